"""Loops that train nothing: steps without a backward, steps of the parameters of another model, and gradients that no step applies."""

import heapq
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sources import Spot
from .gradients import FOLLOWED, local, parameters, sample
from .holding import ALL_HELD
from .part import Part
from .place import text_of

REACH = "loop.gradients-reach-the-step"

# Steps in a row without a gradient before it is told; by then it is known whether an optimizer holds the parameters of no model.
IDLE_STEPS = 4
FEWEST_RESETS = 5  # of gradients in a script that never steps; a few may be a look at a gradient

aten = torch.ops.aten


@dataclass(slots=True)
class _Resets:
    """Resets of gradients by an optimizer that has not stepped, and whether the first weight with a gradient moved all the same."""

    at: Spot | None
    values: Tensor
    times: int = 0
    moved: bool = False


class Idle(Part):
    """Counts steps without any gradient while losses are computed, and resets of gradients while no optimizer steps."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.steps = 0  # in a row, of any optimizer, that had no gradient
        self.weights: list[tuple[Any, Tensor]] = []  # some, as they were at the first of these steps: a hook may train them by hand
        self.losses = self.backwards = 0  # since the last step
        self.backward_at: Spot | None = None
        self.asked = False  # a scaler was asked for a step, which it may have skipped
        self.reset = False  # gradients were reset since the last step, which is told elsewhere
        self.resets: dict[int, _Resets] = {}  # by the id of an optimizer, which may be gone when the script ends

    def listen(self) -> None:
        for op in (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default):
            self.watch.look(op, self._loss)
        self.watch.events.on("backward", self._backward)
        self.watch.events.on("zeroed", self._zeroed)
        self.watch.events.on("module_zeroed", lambda args, kwargs, spot: setattr(self, "reset", True))
        self.watch.events.on("stepped", self._stepped)
        self.watch.events.on("scaler_step", lambda scaler, args, spot: setattr(self, "asked", True))

    def _loss(self, args: Any, output: Any) -> None:
        self.losses += torch.is_grad_enabled() and args[0].requires_grad

    def _backward(self, roots: list[Tensor], spot: Spot | None) -> None:
        self.backwards, self.backward_at = self.backwards + 1, spot

    def _zeroed(self, args: Any, kwargs: Any, spot: Spot | None) -> None:
        if not self.backwards:
            return  # what a step has applied
        optimizer = args[0]
        first = next((p for p in parameters(optimizer) if p.grad is not None and bool(p.grad.any())), None)
        if first is None:
            return
        self.reset = True
        if not self.watch.steps:
            known = self.resets.setdefault(id(optimizer), _Resets(spot, sample(first).clone()))
            known.times += 1
            known.moved = known.moved or not torch.equal(known.values, sample(first))

    def _stepped(self, optimizer: Any, spot: Spot | None) -> None:
        losses, backwards, reset = self.losses, self.backwards, self.reset
        self.losses, self.backwards, self.reset = 0, 0, False
        own = (type(optimizer).step.__module__ or "").startswith("torch.optim")  # others may take gradients away as they step
        if reset or not own or any(p.grad is not None for p in parameters(optimizer)):
            self.steps = 0
            return
        if not self.steps and (losses or backwards):
            smallest = heapq.nsmallest(FOLLOWED, parameters(optimizer), key=Tensor.numel)
            self.weights = [(weakref.ref(p), sample(local(p)).clone()) for p in smallest]
        self.steps += bool(losses or backwards)
        moved = any((now := p()) is not None and not torch.equal(sample(local(now)), then) for p, then in self.weights)
        if self.steps == IDLE_STEPS and not moved and not any(f.probe == ALL_HELD for f in self.watch.journal.findings):
            if backwards:
                self._tell_elsewhere(optimizer, spot)
            else:
                self._tell_no_backward(spot)

    def _tell_elsewhere(self, optimizer: Any, spot: Spot | None) -> None:
        held = {id(p) for p in parameters(optimizer)}
        roots = [root for root in self.watch.models.roots() if any(p.grad is not None for p in root.parameters())]
        apart = [type(root).__name__ for root in roots if not any(id(p) in held for p in root.parameters())]
        self.watch.tell(
            REACH,
            "error",
            spot,
            f"optimizer.step() finds no gradient in any of its parameters, though backward ran at {text_of(self.backward_at)}: no weight changes",
            "step",
            cause=f"backward wrote gradients of {apart[0]}, and the optimizer holds none of its parameters" if apart else None,
            fix="build the optimizer from the parameters of the model that is trained",
            expected="gradients when the optimizer steps",
            observed=f"none in {IDLE_STEPS} steps in a row",
        )

    def _tell_no_backward(self, spot: Spot | None) -> None:
        self.watch.tell(
            REACH,
            "error",
            spot,
            "optimizer.step() runs, and no backward ran before it: no weight changes",
            "step",
            cause=f"in {IDLE_STEPS} steps in a row a loss was computed, backward was not called, and no parameter had a gradient",
            fix="loss.backward() before optimizer.step()",
            expected="gradients when the optimizer steps",
            observed="none",
        )

    def finish(self) -> None:
        """A script that reset gradients again and again, whose weights never moved."""
        for known in self.resets.values() if not self.watch.steps and not self.asked else ():
            if known.times >= FEWEST_RESETS and not known.moved:
                self.watch.tell(
                    REACH,
                    "note",  # gradients may be measured alone, as a Fisher information is
                    known.at,
                    f"gradients were computed and reset {known.times} times, and no optimizer has ever stepped: no weight changes",
                    "zero_grad",
                    cause=f"zero_grad was called on an optimizer that holds gradients of the backward at {text_of(self.backward_at)}, and its step() never",
                    fix="optimizer.step() between backward and zero_grad",
                )
