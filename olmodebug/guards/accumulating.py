"""Gradient accumulation that averages means over unequal numbers of labels, or adds them up without dividing."""

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sources import Spot
from .gradients import nearest_leaf
from .part import Part

WEIGHTS = "loop.token-weighted-accumulation"
DIVIDED = "loop.accumulation-divided"

UNEQUAL = 1.05  # ratio of token counts from which on a mean of means is another mean

WINDOWS = 2  # in a row whose micro-batches were added up before it is told

aten = torch.ops.aten


@dataclass(slots=True)
class _Accumulated:
    """One mean cross-entropy of a window: which backward it belonged to, its weight in the gradient, how many labels it had."""

    backward: int
    weight: Tensor
    labels: Tensor


class Accumulating(Part):
    """A window is what adds up in the same gradient: backward passes of one line to one parameter, with no reset between."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.window: list[_Accumulated] = []
        self.line: Spot | None = None
        self.leaf: weakref.ref[Tensor] | None = None  # the parameter next to the last loss
        self.state: tuple[Any, int] | None = None  # its gradient after that backward
        self.scale = 1.0  # of the loss
        self.kept = False  # whether what changes gradients now, clipping or unscaling, found them as a backward left them
        self.changing = False
        self.summed = 0

    def listen(self) -> None:
        for op in (aten.nll_loss_backward.default, aten.nll_loss2d_backward.default):
            self.watch.look(op, self._loss_backward)
        self.watch.events.on("backward", self._backward)
        self.watch.events.on("backward_done", self._done)
        self.watch.events.on("step", self._step)
        self.watch.events.on("scaler_scale", lambda scaler, args, spot: setattr(self, "scale", float(scaler.get_scale())))
        for before, after in (("clip", "clipped"), ("scaler_unscale_", "scaler_unscale__done")):
            self.watch.events.on(before, self._before_change)
            self.watch.events.on(after, self._after_change)
        for name in ("_foreach_mul_", "_foreach_div_"):  # they leave the versions of their tensors as they are under a dispatch mode
            packet = getattr(aten, name)
            for overload in packet.overloads():
                self.watch.look(getattr(packet, overload), self._changed)

    def _backward(self, roots: list[Tensor], spot: Spot | None) -> None:
        leaf = nearest_leaf(roots)
        before = self.leaf() if self.leaf is not None else None
        same_line = spot is not None and self.line is not None and (spot.code, spot.line) == (self.line.code, self.line.line)
        if self.window and not (same_line and leaf is before and self._is_kept(leaf)):
            self.window.clear()
        self.line, self.leaf = spot, weakref.ref(leaf) if leaf is not None else None

    def _done(self, roots: list[Tensor], spot: Spot | None) -> None:
        leaf = self.leaf() if self.leaf is not None else None
        grad = leaf.grad if leaf is not None else None
        self.state = (weakref.ref(grad), grad._version) if grad is not None else None

    def _before_change(self, *told: Any) -> None:
        self.changing = True
        self.kept = self._is_kept(self.leaf() if self.leaf is not None else None)

    def _after_change(self, *told: Any) -> None:
        self.changing = False
        if self.kept:
            self._done([], None)

    def _changed(self, args: Any, output: Any) -> None:
        leaf = self.leaf() if self.leaf is not None else None
        if not self.changing and leaf is not None and any(t is leaf.grad for t in args[0]):
            self.state = None

    def _is_kept(self, leaf: Tensor | None) -> bool:
        """Whether the gradient is the one that the last backward left: nobody has reset or scaled it."""
        if leaf is None or leaf.grad is None or self.state is None:
            return False
        return leaf.grad is self.state[0]() and leaf.grad._version == self.state[1]

    def _loss_backward(self, args: Any, output: Any) -> None:
        weight, classes, reduction = args[0], args[3], args[4]
        if reduction == 1 and classes is None and weight.numel() == 1:
            self.window.append(_Accumulated(self.watch.backwards, weight.detach().clone(), args[6].detach().clone()))

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        window, self.window = self.window, []
        scale, self.scale = self.scale, 1.0
        counts = Counter(item.backward for item in window)
        if len(window) < 2 or len(counts) < 2 or max(counts.values()) > 1:
            return
        values = torch.stack([torch.stack([item.weight.double().cpu(), item.labels.double().cpu()]) for item in window])
        weights, labels = values[:, 0], values[:, 1]
        self._undivided(weights / scale)
        if float(labels.min()) <= 0 or float(labels.max() / labels.min()) < UNEQUAL or not torch.allclose(weights, weights[0], rtol=1e-4):
            return
        shown = ", ".join(f"{int(n)}" for n in labels.tolist()[:8])
        factor = float(labels.max() / labels.min())
        self.watch.tell(
            WEIGHTS,
            "warning",
            self.line,
            f"accumulation averages means over unequal lengths: a token of the shortest micro-batch counts {factor:.3g} times one of the longest",
            "backward",
            cause=f"every micro-batch's mean has the same weight {float(weights[0]):.3g}, and they hold {shown} labels",
            fix="sum the losses (reduction='sum') and divide by the labels of the whole window",
            expected="a weight in proportion to the number of labels",
            observed=f"equal weights for {shown} labels",
            evidence={"micro_batches": len(window), "ratio": factor},
        )

    def _undivided(self, weights: Tensor) -> None:
        """Every mean counts in full, and nobody has changed the gradients since, but for clipping."""
        kept = self._is_kept(self.leaf() if self.leaf is not None else None)
        self.summed = self.summed + 1 if kept and torch.allclose(weights, torch.ones_like(weights), rtol=1e-4) else 0
        if self.summed == WINDOWS:
            number = len(weights)
            self.watch.tell(
                DIVIDED,
                "note",
                self.line,
                f"the gradient of a step is the sum of {number} micro-batch means, not their mean",
                "backward",
                cause="the mean loss of every micro-batch has weight 1 in it",
                fix=f"loss / {number} before backward, unless the sum is meant: clipping, eps and the rate of SGD see a gradient {number} times as large",
                evidence={"micro_batches": number},
            )
