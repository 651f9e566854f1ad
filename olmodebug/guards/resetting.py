"""Gradients that nobody reset: those of the step before are still there, and a backward adds to them."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..report import Finding
from ..sources import Spot
from .excerpts import lines_at
from .gradients import Followed, follow, has_plain_gradient, local, nearest_leaf, sample
from .part import Part
from .place import text_of, where_of

RESET = "loop.gradients-reset"

BY_HAND = 3  # updates in a row without an optimizer that show the same before it is told
ALONG = -0.99  # cosine of the change of a weight and its gradient: a step of gradient descent


@dataclass(slots=True)
class _Left:
    """The parameter next to a loss as a backward left it: the gradient, its version, and samples of both."""

    parameter: Any
    gradient: Any
    version: int
    slope: Tensor
    weight: Tensor
    applied: bool = False  # an update by hand has moved the weight along this gradient, which is still there


class Resetting(Part):
    """Follows the gradients that were applied until they are gone, replaced or added to."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.steps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.applied: dict[int, list[Followed]] = {}
        self.step_lines: dict[int, Spot | None] = {}
        self.begun: dict[int, Spot | None] = {}  # backward passes that found the applied gradients in place
        self.carried: dict[int, Spot | None] = {}  # and then added to them
        self.left: _Left | None = None
        self.by_hand = 0

    def listen(self) -> None:
        events = self.watch.events
        events.on("backward", self._backward)
        events.on("backward_done", self._done)
        events.on("zeroed", lambda args, kwargs, spot: self._reset(id(args[0])))
        events.on("module_zeroed", self._module_zeroed)
        events.on("step", self._step)
        events.on("stepped", self._stepped)

    def _backward(self, roots: list[Tensor], spot: Spot | None) -> None:
        """Before a backward: are the gradients that were applied still there, unchanged?"""
        if self.left is not None:
            self.left.applied = _applied_by_hand(self.left)
        for key, followed in list(self.applied.items()):
            states = [_state(item) for item in followed]
            if "gone" in states:
                self._reset(key)
            elif key in self.carried:
                continue
            elif states and all(state == "same" for state in states):
                self.begun[key] = spot
            else:
                del self.applied[key]

    def _done(self, roots: list[Tensor], spot: Spot | None) -> None:
        """After it: only gradients that this backward wrote to were carried over; another model's are replaced later."""
        for key, line in list(self.begun.items()):
            if any(_state(item) == "changed" for item in self.applied.get(key, ())):
                self.carried[key] = line
        self.begun.clear()
        if not self.watch.steps:
            self._follow_updates_by_hand(roots, spot)

    def _follow_updates_by_hand(self, roots: list[Tensor], spot: Spot | None) -> None:
        """A loop without an optimizer: the weight next to the loss moves along its gradient, and that gradient stays."""
        before, p = self.left, nearest_leaf(roots)
        self.left = None
        if p is None or p.grad is None or not has_plain_gradient(p):
            self.by_hand = 0
            return
        grad = p.grad
        carried = before is not None and before.applied and before.parameter() is p and before.gradient() is grad
        added = carried and before is not None and not torch.equal(sample(grad), before.slope)
        self.by_hand = self.by_hand + 1 if added else 0
        if self.by_hand == BY_HAND:
            self._tell(spot, "the weights were updated", "p.grad = None after the update of each parameter", BY_HAND + 1)
        self.left = _Left(weakref.ref(p), weakref.ref(grad), grad._version, sample(grad).clone(), sample(p).clone())

    def _reset(self, key: int) -> None:
        self.applied.pop(key, None)
        self.begun.pop(key, None)
        self.carried.pop(key, None)

    def _module_zeroed(self, args: Any, kwargs: Any, spot: Spot | None) -> None:
        owned = {id(parameter) for parameter in args[0].parameters()}
        for key, followed in list(self.applied.items()):
            if any((parameter := item.parameter()) is None or id(parameter) in owned for item in followed):
                self._reset(key)

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        number = self.steps[optimizer] = self.steps.get(optimizer, 0) + 1
        key = id(optimizer)
        if key in self.carried:
            self._tell_carried(key, self.carried[key], self.step_lines.get(key), number)
        self._reset(key)

    def _stepped(self, optimizer: Any, spot: Spot | None) -> None:
        key = id(optimizer)
        self.applied[key] = follow(optimizer)
        self.step_lines[key] = spot

    def _tell_carried(self, key: int, spot: Spot | None, before: Spot | None, number: int) -> None:
        line = f" at {text_of(before)}" if before else ""
        self._tell(
            spot, f"optimizer.step(){line}", "optimizer.zero_grad() after optimizer.step(), or before the first backward of a step", number
        )

    def _tell(self, spot: Spot | None, after: str, fix: str, number: int) -> None:
        where = where_of(spot, op="backward")
        self.watch.find(
            Finding(
                probe=RESET,
                severity="error",
                message=f"backward adds to the gradients of the step before: nothing reset them after {after}",
                cause="the same gradient tensors, unchanged since they were applied and not zero, were there when this backward began",
                fix=fix,
                where=where,
                source=lines_at(where),
                expected=f"gradients of step {number} alone",
                observed=f"gradients of steps 1 .. {number} added up"
                if number == 2
                else f"gradients of step {number - 1} in those of step {number}",
                evidence={"optimizer_step": number},
            )
        )


def _state(followed: Followed) -> str:
    """`same` where the very tensor that was applied is still the gradient, unchanged and not zero; `gone`, `changed`."""
    p = followed.parameter()
    if p is None or p.grad is None or not bool(local(p.grad).any()):
        return "gone"
    return "same" if followed.is_unchanged() else "changed"


def _applied_by_hand(left: _Left) -> bool:
    """Whether a weight has moved against its gradient since the last backward, and the gradient is the same."""
    p, grad = left.parameter(), left.gradient()
    if p is None or grad is None or p.grad is not grad or grad._version != left.version or not torch.equal(sample(grad), left.slope):
        return False
    change, slope = (sample(p) - left.weight).double(), left.slope.double()
    lengths = float(change.norm() * slope.norm())
    return lengths > 0 and float(change @ slope) < ALONG * lengths
