"""Weights that nobody has filled since `to_empty` gave them memory: they hold whatever lay there."""

import weakref
from typing import Any

import torch
from torch import Tensor

from ..sources import Spot
from ..units import listed, plural
from .gradients import local, sample
from .part import Part

FILLED = "loop.weights-filled"

NAMES_SHOWN = 4


class Filling(Part):
    """Compares what `to_empty` left with what the first backward finds."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.left: list[tuple[Any, Spot | None, list[tuple[str, Any, int, Tensor]]]] = []

    def listen(self) -> None:
        self.watch.events.on("emptied", self._emptied)
        self.watch.events.on("backward", self._backward)

    def _emptied(self, module: Any, shared: Any, spot: Spot | None) -> None:
        memory = [(name, p, local(p)) for name, p in module.named_parameters()]
        found = [(name, weakref.ref(p), p._version, sample(t).clone()) for name, p, t in memory if t.device.type != "meta" and t.numel()]
        self.left.append((weakref.ref(module), spot, found))

    def _backward(self, roots: list[Tensor], spot: Spot | None) -> None:
        waiting, self.left = self.left, []
        for reference, at, left in waiting:
            module = reference()
            held = {id(p) for p in module.parameters()} if module is not None else set()
            same = [name for name, weight, version, before in left if _as_left(weight(), held, version, before)]
            if same:
                self.watch.spoiled = True
                shown = listed(same, NAMES_SHOWN)
                self.watch.tell(
                    FILLED,
                    "error",
                    at,
                    f"{plural(len(same), 'weight')} of {type(module).__name__} hold what to_empty left in them, uninitialised memory: {shown}",
                    "to_empty",
                    cause="their values at the first backward are, bit for bit, what lay in the memory that to_empty took",
                    fix="initialise every module after to_empty (its reset must reach all layers), or load a checkpoint",
                    evidence={"weights": len(same), "of": len(left)},
                )


def _as_left(weight: Any, held: set[int], version: int, before: Tensor) -> bool:
    """Whether a parameter is still the module's, was never written, and holds the same numbers: not all of one value, as an
    initialisation may give."""
    if weight is None or id(weight) not in held or weight._version != version:
        return False
    now = sample(local(weight)).clone()
    several = bool((before != before[0]).any())
    return several and now.shape == before.shape and torch.equal(now.view(torch.uint8), before.view(torch.uint8))  # bits: nan is not nan
