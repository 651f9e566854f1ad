"""Gradient accumulation that averages means over unequal numbers of labels."""

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sources import Spot
from .gradients import nearest_leaf

WEIGHTS = "loop.token-weighted-accumulation"

UNEQUAL = 1.05  # ratio of token counts from which on a mean of means is another mean

aten = torch.ops.aten


@dataclass(slots=True)
class _Accumulated:
    """One mean cross-entropy of a window: which backward it belonged to, its weight in the gradient, how many labels it had."""

    backward: int
    weight: Tensor
    labels: Tensor


class Accumulating:
    """A window is what adds up in the same gradient: backward passes of one line to one parameter, with no reset between."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.window: list[_Accumulated] = []
        self.line: Spot | None = None
        self.leaf: weakref.ref[Tensor] | None = None  # the parameter next to the last loss
        self.state: tuple[Any, int] | None = None  # its gradient after that backward

    def listen(self) -> None:
        for op in (aten.nll_loss_backward.default, aten.nll_loss2d_backward.default):
            self.watch.look(op, self._loss_backward)
        self.watch.events.on("backward", self._backward)
        self.watch.events.on("backward_done", self._done)
        self.watch.events.on("step", self._step)

    def finish(self) -> None:
        """Nothing waits for the end."""

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
        counts = Counter(item.backward for item in window)
        if len(window) < 2 or len(counts) < 2 or max(counts.values()) > 1:
            return
        values = torch.stack([torch.stack([item.weight.double().cpu(), item.labels.double().cpu()]) for item in window])
        weights, labels = values[:, 0], values[:, 1]
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
