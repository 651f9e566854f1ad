"""Gradients on their way into an optimizer's step: thrown away before it, clipped after it, or applied with the loss scale in them."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..sources import Spot
from ..units import plural
from .gradients import Followed, clip_limit, follow, local, parameters, sample, written_since
from .part import Part
from .place import text_of
from .scheduling import UNSCALE

REACH = "loop.gradients-reach-the-step"
CLIP = "loop.clip-before-step"
SCALED = "loop.step-unscaled"

EMPTY_STEPS = 3  # in a row, each after a reset of fresh gradients, before it is told
LATE_CLIPS = 2
STEPS_LOOKED_AT = 16  # a loop that drops micro-batches does so from its first step on
DROPPING_STEPS = 3  # in a row that apply the last of several micro-batches: a batch that is skipped for its nan comes now and then


@dataclass(slots=True)
class _Wiped:
    """Gradients that were reset before a step: how often since the last one, where, and the weights they belonged to."""

    at: Spot | None
    times: int
    weights: list[tuple[Any, Tensor]]
    left: list[Followed] = field(default_factory=list)  # the gradients as the last backward left them, at most clipped or unscaled since
    kept: bool = False  # whether a step applies those, and none that were gathered by hand

    def is_kept(self) -> bool:
        return bool(self.left) and all(f.is_unchanged() for f in self.left)


class Applying(Part):
    """Follows a few gradients of every optimizer from the backward that wrote them to the step that applies them."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.made: weakref.WeakSet[Any] = weakref.WeakSet()
        self.applied: weakref.WeakKeyDictionary[Any, list[Followed]] = weakref.WeakKeyDictionary()
        self.wiped: weakref.WeakKeyDictionary[Any, _Wiped] = weakref.WeakKeyDictionary()
        # by optimizer, of the first steps: some weights as they were at the last backward
        self.weights: weakref.WeakKeyDictionary[Any, list[tuple[Any, Tensor]]] = weakref.WeakKeyDictionary()
        self.dropping: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.changing: list[
            Any
        ] = []  # optimizers whose gradients are as the last backward left them, while clipping or unscaling changes them
        self.lines: list[Any] = []  # of the backward passes since a step
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
        for before, after in (("clip", "clipped"), ("scaler_unscale_", "scaler_unscale__done")):
            events.on(before, self._before_change)
            events.on(after, self._after_change)
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
        if fresh and _has_gradients(optimizer):
            wiped = self.wiped.get(optimizer)
            weights = self.weights.get(optimizer, [])
            self.wiped[optimizer] = _Wiped(spot, wiped.times + 1, wiped.weights) if wiped else _Wiped(spot, 1, weights)

    def _module_reset(self, args: Any, kwargs: Any, spot: Spot | None) -> None:
        owned = {id(p) for p in args[0].parameters()}
        for optimizer in list(self.made):
            if any(id(p) in owned for p in parameters(optimizer)):
                self._reset(optimizer, spot)

    def _stepped(self, optimizer: Any, spot: Spot | None) -> None:
        """After the step, so that the gradients of a closure count."""
        self.applied[optimizer] = follow(optimizer)
        wiped = self.wiped.pop(optimizer, None)
        own = (type(optimizer).step.__module__ or "").startswith("torch.optim")  # others may keep gradients elsewhere
        if wiped is None or not own or _has_gradients(optimizer):
            self.empty[optimizer] = 0
            if self.watch.steps < STEPS_LOOKED_AT:
                self._dropped(optimizer, wiped, spot)
            self.lines.clear()
            return
        self.lines.clear()
        self.empty[optimizer] = self.empty.get(optimizer, 0) + 1
        if self.empty[optimizer] == EMPTY_STEPS:
            self.watch.tell(
                REACH,
                "error",
                wiped.at,
                f"the gradients are reset before optimizer.step() at {text_of(spot)} applies them: no weight changes",
                "zero_grad",
                cause=f"backward at {text_of(self.backward_at)} wrote them, and in {EMPTY_STEPS} steps in a row every gradient was None or zero",
                fix="zero_grad, forward, backward, step: in this order",
                expected="gradients when the optimizer steps",
                observed="none",
            )

    def _before_change(self, *told: Any) -> None:
        self.changing = [optimizer for optimizer, wiped in self.wiped.items() if wiped.is_kept()]

    def _after_change(self, *told: Any) -> None:
        for optimizer in self.changing:
            self.wiped[optimizer].left = follow(optimizer, values=True)

    def _dropped(self, optimizer: Any, wiped: _Wiped | None, spot: Spot | None) -> None:
        """A step that applies the last of several passes of one line, which were all taken of the same weights."""
        lines, passes = self.lines, len(self.lines)
        # passes of which another optimizer still holds gradients that were never reset are those of other losses
        others = (o for o in self.made if o is not optimizer and o not in self.wiped)
        apart = any(written_since(o, self.applied.get(o, [])) for o in others)
        if wiped is None or not wiped.kept or len(set(lines)) > 1 or passes != wiped.times + 1 or not wiped.weights or apart:
            self.dropping[optimizer] = 0
            return
        self.dropping[optimizer] = self.dropping.get(optimizer, 0) + 1
        if self.dropping[optimizer] == DROPPING_STEPS:
            self.watch.tell(
                REACH,
                "warning",
                wiped.at,
                f"of {passes} micro-batches only the last one reaches optimizer.step() at {text_of(spot)}: the gradients of the others are reset",
                "zero_grad",
                cause=f"backward at {text_of(self.backward_at)} wrote them, and in {DROPPING_STEPS} steps in a row the weights had not moved before this line",
                fix="zero_grad once for each optimizer.step(), after it",
                expected=f"the sum of {passes} gradients",
                observed="the last of them",
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
        self.lines.append((spot.code, spot.line) if spot is not None else None)
        for wiped in self.wiped.values():  # nothing is lost where the weights have moved in between
            if not all((now := p()) is not None and torch.equal(sample(local(now)), then) for p, then in wiped.weights):
                wiped.weights = []
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
        for optimizer, wiped in self.wiped.items():
            wiped.left = follow(optimizer, values=True)
        for optimizer in list(self.made) if self.watch.steps < STEPS_LOOKED_AT else ():
            weights = ((f.parameter, f.parameter()) for f in follow(optimizer))
            self.weights[optimizer] = [(reference, sample(local(p)).clone()) for reference, p in weights if p is not None]

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        if (wiped := self.wiped.get(optimizer)) is not None:
            wiped.kept = wiped.is_kept()
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
