"""Learning rates that cannot train: no number, or 0 in every step since the first."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from ..sources import Spot
from .gradients import parameters, sample
from .part import Part

RATE = "loop.learning-rate"

STEPS_AT_ZERO = 8  # a warm-up may begin with one


class Rates(Part):
    """Looks at the learning rates of every optimizer when it steps."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.at_zero: weakref.WeakKeyDictionary[Any, tuple[int, list[tuple[Any, Tensor]]]] = weakref.WeakKeyDictionary()
        self.moved: weakref.WeakSet[Any] = weakref.WeakSet()
        self.told: weakref.WeakSet[Any] = weakref.WeakSet()

    def listen(self) -> None:
        self.watch.events.on("step", self._step)

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        rates = [group.get("lr") for group in optimizer.param_groups]
        if not rates or optimizer in self.told or not all(isinstance(rate, (int, float)) for rate in rates):
            return
        wrong = [rate for rate in rates if not math.isfinite(rate)]
        if wrong:
            self.told.add(optimizer)
            self.watch.spoiled = True
            self.watch.tell(
                RATE,
                "error",
                spot,
                f"the learning rate of step {self.watch.steps + 1} is {wrong[0]}: no weight that it updates stays finite",
                "step",
                fix="print the schedule for every step: a division by 0 steps, or a nan that was passed on",
                expected="a finite number",
                observed=str(wrong[0]),
            )
        elif any(rates):
            self.moved.add(optimizer)
        elif optimizer not in self.moved:
            self._still(optimizer, spot)

    def _still(self, optimizer: Any, spot: Spot | None) -> None:
        """All rates are 0, as they have been in every step: told where no weight has moved."""
        if optimizer not in self.at_zero:
            chosen = sorted(parameters(optimizer), key=lambda p: p.numel())[:4]
            self.at_zero[optimizer] = (0, [(weakref.ref(p), sample(p).clone()) for p in chosen])
        steps, before = self.at_zero[optimizer]
        self.at_zero[optimizer] = (steps + 1, before)
        still = all(p is not None and torch.equal(sample(p), old) for p, old in ((reference(), old) for reference, old in before))
        if steps + 1 == STEPS_AT_ZERO and still:
            self.told.add(optimizer)
            self.watch.tell(
                RATE,
                "warning",
                spot,
                f"the learning rate was 0 in each of the first {STEPS_AT_ZERO} steps: no weight has changed",
                "step",
                fix="look at the schedule: a warm-up in whole numbers (step // warmup), or a scheduler that is never stepped",
                expected="a rate above 0",
                observed="0 in every group",
            )
