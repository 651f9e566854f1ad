"""Updates that are lost in the rounding of low-precision weights without a master copy."""

import weakref
from typing import Any

import torch
from torch import Tensor

from ..report import Finding
from ..sources import Spot
from .excerpts import lines_at
from .gradients import has_plain_gradient, parameters, sample
from .part import Part
from .place import where_of

SURVIVES = "loop.updates-survive-rounding"

SAMPLED_PARAMETERS = 24
SAMPLED_STEPS = (1, 2, 4, 8)
LOST = 0.5  # of the sampled elements with a gradient: below, most of the update is rounded away


class Rounding(Part):
    """Samples weights before and after a few steps of torch's own optimizers.

    Others may round stochastically or keep what was lost (Kahan): few weights move in a step, and nothing is lost.
    """

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.made: weakref.WeakKeyDictionary[Any, Spot | None] = weakref.WeakKeyDictionary()
        self.steps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.before: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.moved: dict[int, list[tuple[float, float, str, str]]] = {}
        self.lines: dict[int, Spot | None] = {}  # where an optimizer was made; the optimizer itself may be gone at the end

    def listen(self) -> None:
        self.watch.events.on("optimizer_made", lambda args, kwargs, spot: self.made.__setitem__(args[0], spot))
        self.watch.events.on("step", self._step)
        self.watch.events.on("stepped", lambda optimizer, spot: self._compare(optimizer, self.before.pop(id(optimizer), [])))

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        number = self.steps[optimizer] = self.steps.get(optimizer, 0) + 1
        if number in SAMPLED_STEPS and (type(optimizer).step.__module__ or "").startswith("torch.optim"):
            self.before[id(optimizer)] = _samples(optimizer)

    def _compare(self, optimizer: Any, before: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        rate = max((float(group.get("lr", 0.0)) for group in optimizer.param_groups), default=0.0)
        moved = counted = 0
        dtype = ""
        for parameter, old, gradient in before:
            asked = gradient != 0
            counted += int(asked.sum())
            moved += int(((sample(parameter) != old) & asked).sum())
            dtype = str(parameter.dtype)[6:]
        if counted and rate > 0:
            name = type(optimizer).__name__
            self.lines[id(optimizer)] = self.made.get(optimizer)
            self.moved.setdefault(id(optimizer), []).append((moved / counted, rate, dtype, name))

    def finish(self) -> None:
        """The verdict on lost updates: only where most were lost in every step that was looked at."""
        for key, shares in self.moved.items():
            low = [item for item in shares if item[2] in ("bfloat16", "float16")]
            if len(low) < 2 or max(share for share, *_ in low) >= LOST:
                continue
            share, rate, dtype, name = max(low)
            where = where_of(self.lines[key])
            self.watch.find(
                Finding(
                    probe=SURVIVES,
                    severity="warning",
                    message=f"at most {share:.0%} of the {dtype} weights that had a gradient moved in a step: the rest of the update is rounded away",
                    cause=f"{name} updates {dtype} weights in place: a change below half a unit in the last place is lost",
                    fix="keep float32 master weights (autocast over a float32 model), or an optimizer with stochastic rounding",
                    where=where,
                    source=lines_at(where),
                    expected="nearly all weights move",
                    observed=", ".join(f"{s:.1%}" for s, *_ in low),
                    evidence={"learning_rate": rate, "steps_looked_at": len(low)},
                )
            )


def _samples(optimizer: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    chosen = sorted((p for p in parameters(optimizer) if has_plain_gradient(p)), key=lambda p: -p.numel())[:SAMPLED_PARAMETERS]
    chosen = [p for p in chosen if p.dtype in (torch.bfloat16, torch.float16) and type(p.data) is Tensor]
    return [(p, sample(p).clone(), sample(p.grad).clone()) for p in chosen if p.grad is not None]
