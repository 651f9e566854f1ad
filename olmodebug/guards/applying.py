"""Gradients on their way into an optimizer's step: thrown away before it, clipped after it, or applied with the loss scale in them."""

import weakref
from typing import Any

import torch
from torch import Tensor

from ..sources import Spot
from ..units import plural
from .gradients import Followed, clip_limit, follow, local, parameters, written_since
from .part import Part
from .place import text_of
from .scheduling import UNSCALE

REACH = "loop.gradients-reach-the-step"
CLIP = "loop.clip-before-step"
SCALED = "loop.step-unscaled"

EMPTY_STEPS = 3  # in a row, each after a reset of fresh gradients, before it is told
LATE_CLIPS = 2


class Applying(Part):
    """Follows a few gradients of every optimizer from the backward that wrote them to the step that applies them."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.made: weakref.WeakSet[Any] = weakref.WeakSet()
        self.applied: weakref.WeakKeyDictionary[Any, list[Followed]] = weakref.WeakKeyDictionary()
        self.wiped: weakref.WeakKeyDictionary[Any, Spot | None] = weakref.WeakKeyDictionary()
        self.empty: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.backward_at: Spot | None = None
        self.clipped = False  # since the last backward, and before a step
        self.late = 0
        self.losses: list[tuple[Any, Any]] = []  # scaled losses, with their scaler
        self.written: list[tuple[Any, Any, list[Followed]]] = []
        self.scaled: weakref.WeakKeyDictionary[Any, tuple[Any, list[Followed]]] = weakref.WeakKeyDictionary()
        self.scaler_steps: Any = None

    def listen(self) -> None:
        events = self.watch.events
        events.on("optimizer_made", lambda args, kwargs, spot: self.made.add(args[0]))
        events.on("zeroed", lambda args, kwargs, spot: self._reset(args[0], spot))
        events.on("module_zeroed", self._module_reset)
        events.on("clip", self._clip)
        events.on("scaler_scale_done", self._scaled)
        events.on("scaler_unscale__done", lambda scaler, args, spot, result: self.scaled.pop(args[0], None))
        events.on("scaler_update_done", lambda scaler, args, spot, result: self.scaled.clear())
        events.on("scaler_step", lambda scaler, args, spot: setattr(self, "scaler_steps", args[0] if args else None))
        events.on("scaler_step_done", lambda scaler, args, spot, result: setattr(self, "scaler_steps", None))
        events.on("backward", self._backward)
        events.on("backward_done", self._done)
        events.on("step", self._step)
        events.on("stepped", self._stepped)

    # Thrown away

    def _reset(self, optimizer: Any, spot: Spot | None) -> None:
        """Gradients that no step has applied are about to go."""
        fresh = written_since(optimizer, self.applied.get(optimizer, []))
        if any(bool(local(grad).any()) for f in fresh if (grad := f.gradient()) is not None):
            self.wiped[optimizer] = spot

    def _module_reset(self, args: Any, kwargs: Any, spot: Spot | None) -> None:
        owned = {id(p) for p in args[0].parameters()}
        for optimizer in list(self.made):
            if any(id(p) in owned for p in parameters(optimizer)):
                self._reset(optimizer, spot)

    def _stepped(self, optimizer: Any, spot: Spot | None) -> None:
        """After the step, so that the gradients of a closure count."""
        self.applied[optimizer] = follow(optimizer)
        reset = self.wiped.pop(optimizer, None)
        own = (type(optimizer).step.__module__ or "").startswith("torch.optim")  # others may keep gradients elsewhere
        if reset is None or not own or _has_gradients(optimizer):
            self.empty[optimizer] = 0
            return
        self.empty[optimizer] = self.empty.get(optimizer, 0) + 1
        if self.empty[optimizer] == EMPTY_STEPS:
            self.watch.tell(
                REACH,
                "error",
                reset,
                f"the gradients are reset before optimizer.step() at {text_of(spot)} applies them: no weight changes",
                "zero_grad",
                cause=f"backward at {text_of(self.backward_at)} wrote them, and in {EMPTY_STEPS} steps in a row every gradient was None or zero",
                fix="zero_grad, forward, backward, step: in this order",
                expected="gradients when the optimizer steps",
                observed="none",
            )

    # Clipped too late

    def _clip(self, args: Any, kwargs: Any, spot: Spot | None) -> None:
        """Clipping of nothing but gradients that have been applied, when none came between them and their step."""
        given = [args[0]] if isinstance(args[0], Tensor) else args[0]
        if not isinstance(clip_limit(args, kwargs), (int, float)):
            return
        clipped = {id(p) for p in given if p.grad is not None}
        self._clip_scaled(clipped, spot)
        applied = [o for o, followed in self.applied.items() if followed and all(f.is_unchanged() for f in followed)]
        if not clipped or not clipped <= {id(p) for o in applied for p in parameters(o)}:
            self.clipped, self.late = True, 0
            return
        self.late += not self.clipped
        if self.late == LATE_CLIPS and not self.clipped:
            self.watch.tell(
                CLIP,
                "warning",
                spot,
                "gradients are clipped after optimizer.step() has applied them: the limit has no effect",
                "clip_grad",
                cause="every gradient that is clipped here is one of the step before, and no clipping came between backward and that step",
                fix="clip between backward and optimizer.step()",
            )

    # Applied with the loss scale

    def _clip_scaled(self, clipped: set[int], spot: Spot | None) -> None:
        """Gradients of one optimizer, not unscaled yet, in one norm with others: clipping scales all by what they weigh."""
        for optimizer, (scaler, followed) in list(self.scaled.items()):
            own = {id(p) for p in parameters(optimizer)}
            if own & clipped and clipped - own and all(f.is_unchanged() for f in followed):
                del self.scaled[optimizer]
                kind, scale = type(optimizer).__name__, float(scaler.get_scale())
                self.watch.tell(
                    UNSCALE,
                    "error",
                    spot,
                    f"gradients are clipped while those of {kind} still carry the loss scale of {scale:g}",
                    "clip_grad",
                    cause=f"scaler.unscale_ was not called for the optimizer {kind} of {plural(len(own), 'parameter')}, whose gradients are in this norm",
                    fix="scaler.unscale_(optimizer) for every optimizer before clipping",
                    evidence={"scale": scale},
                )

    def _scaled(self, scaler: Any, args: Any, spot: Spot | None, result: Any) -> None:
        if scaler.is_enabled() and isinstance(result, Tensor):
            self.losses = [(r, s) for r, s in self.losses if r() is not None] + [(weakref.ref(result), scaler)]

    def _backward(self, roots: list[Tensor], spot: Spot | None) -> None:
        self.backward_at, self.clipped = spot, False
        scaler = next((s for reference, s in self.losses if any(reference() is root for root in roots)), None)
        self.written = []
        if scaler is not None and float(scaler.get_scale()) != 1.0:
            self.written = [(o, scaler, follow(o)) for o in list(self.made)]

    def _done(self, roots: list[Tensor], spot: Spot | None) -> None:
        for optimizer, scaler, before in self.written:
            new = written_since(optimizer, before, values=True)
            if new:
                self.scaled[optimizer] = (scaler, new)
        self.written = []

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        scaler, followed = self.scaled.pop(optimizer, (None, []))
        if scaler is None or self.scaler_steps is optimizer or not all(f.is_unchanged() for f in followed):
            return
        scale = float(scaler.get_scale())
        self.watch.spoiled = True
        self.watch.tell(
            SCALED,
            "error",
            spot,
            f"optimizer.step() applies gradients that still carry the loss scale of {scale:g}",
            "step",
            cause="they are as scaler.scale(loss).backward() left them, and this step does not go through the scaler",
            fix="scaler.step(optimizer), once for every optimizer, then scaler.update()",
            expected="gradients divided by the scale",
            observed=f"{scale:g} times the gradient of the loss",
            evidence={"scale": scale},
        )


def _has_gradients(optimizer: Any) -> bool:
    grads = (p.grad for p in parameters(optimizer))
    return any(grad is not None and (grad.layout != torch.strided or bool((local(grad) != 0).any())) for grad in grads)
