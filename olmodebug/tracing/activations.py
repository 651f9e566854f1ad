"""The activation of a feed-forward block without a gate, as a run tabulates it: what stands between one matrix and the next.

It is known by its values, so that one written out in a function is seen like one that torch has as one op.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .rotation import MOVES
from .tracer import Recording

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")
EXACT, TANH = "exact gelu", "gelu (tanh approximation)"
KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    EXACT: F.gelu,
    TANH: lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "squared relu": lambda x: F.relu(x).square(),
}
# Activations change no faster than four times their input, near zero and as far as a small model reaches.
STEEPEST = 4.0
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Bend:
    """One activation: the op that gives its values, what goes in and what comes out, in float64, sorted by what goes in."""

    index: int
    x: Tensor
    y: Tensor

    def is_(self, name: str) -> bool:
        """Whether it is the known activation of this name."""
        return self.apart(name) <= ROUNDING * float(self.x.abs().max())

    def apart(self, name: str) -> float:
        """The largest difference from the known activation of this name."""
        return float((self.y - KNOWN[name](self.x)).abs().max())


def bends(recording: Recording) -> Iterator[Bend]:
    """Every activation between two products with weights, of a run in float64 that was recorded with `keep=True`."""
    products = [i for i, event in enumerate(recording.events) if event.op in PRODUCTS and event.parameters]
    for first, second in zip(products, products[1:], strict=False):
        made = recording.kept[first].outputs[0]
        read = next((t for t in recording.kept[second].inputs if t.numel() == made.numel() and t.shape[-1] == made.shape[-1]), None)
        if read is None or made.dtype != torch.float64 or made.numel() < 100:
            continue
        x, order = made.flatten().sort()
        y = read.flatten()[order].to(x)
        smooth = bool(((y[1:] - y[:-1]).abs() <= STEEPEST * (x[1:] - x[:-1]) + ROUNDING * x.abs().max()).all())
        if not smooth or bool((y == y[0]).all()) or bool(((y - x).abs() <= ROUNDING * x.abs().max()).all()):
            continue
        storages = {info.storage for info in recording.events[second].inputs}
        before = [i for i in range(second - 1, first, -1) if recording.events[i].op not in MOVES]
        index = next((i for i in before if storages & {info.storage for info in recording.events[i].outputs}), first)
        yield Bend(index=index, x=x, y=y)
