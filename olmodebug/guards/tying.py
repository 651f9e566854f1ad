"""Weights that were one parameter and train apart."""

import weakref
from typing import Any

from torch import nn

from ..report import Finding
from ..sources import Spot
from .excerpts import lines_at
from .part import Part
from .place import where_of

TIES = "loop.ties-kept"


class Tying(Part):
    """Looks at shared parameters once, at the first step of an optimizer."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.steps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.emptied: list[tuple[Any, list[tuple[str, str]], Spot | None]] = []

    def listen(self) -> None:
        self.watch.events.on("emptied", lambda module, shared, spot: self.emptied.append((weakref.ref(module), shared, spot)))
        self.watch.events.on("step", self._step)

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        number = self.steps[optimizer] = self.steps.get(optimizer, 0) + 1
        if number == 1:
            self._ties()

    def _ties(self) -> None:
        for reference, shared, spot in self.emptied:
            module = reference()
            if module is None:
                continue
            tensors = dict(module.named_parameters(remove_duplicate=False))
            lost = [(a, b) for a, b in shared if a in tensors and b in tensors and tensors[a] is not tensors[b]]
            if lost:
                self._tell_ties(type(module).__name__, lost[0], "to_empty gives every place of a shared parameter memory of its own", spot)
        for root in self.watch.models.roots():
            output = getattr(root, "get_output_embeddings", None)
            tied = getattr(getattr(root, "config", None), "tie_word_embeddings", False)
            if output is None or tied is not True:
                continue
            head, embedding = output(), root.get_input_embeddings()
            left, right = getattr(head, "weight", None), getattr(embedding, "weight", None)
            if left is None or right is None or left.shape != right.shape or type(left) is not nn.Parameter:
                continue
            if left is not right and left.data_ptr() != right.data_ptr() and not self.emptied:
                names = (self.watch.name_of_tensor(right) or "input embedding", self.watch.name_of_tensor(left) or "output embedding")
                self._tell_ties(
                    type(root).__name__, names, "config.tie_word_embeddings is true, and the two have memory of their own", None
                )

    def _tell_ties(self, model: str, names: tuple[str, str], cause: str, spot: Spot | None) -> None:
        where = where_of(spot) if spot else where_of(None, module=model)
        self.watch.find(
            Finding(
                probe=TIES,
                severity="error",
                message=f"{names[0]} and {names[1]} of {model} were one parameter and train apart",
                cause=cause,
                fix="tie them again after the change: model.tie_weights(), or head.weight = embedding.weight, before the optimizer is built",
                where=where,
                source=lines_at(where),
            )
        )
