"""Exceptions by which torch refuses what a training loop does: a graph that is gone, a scaler out of order."""

import re
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..report import Finding
from ..sources import Spot
from . import place
from .excerpts import lines_at
from .gradients import NEAREST
from .place import Place, text_of

BACKWARD = "loop.backward-runs"
SCALER = "loop.scaler-in-order"


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What torch's words establish by themselves."""

    pattern: str
    message: str
    fix: str


REFUSALS = (
    _Refusal(
        r"unscale_\(\) is being called after step\(\)|step\(\) has already been called since the last update\(\)",
        "this optimizer has stepped, and scaler.update() has not run since",
        "scaler.update() once in every iteration, after scaler.step(optimizer)",
    ),
    _Refusal(
        r"unscale_\(\) has already been called on this optimizer since the last update\(\)",
        "the gradients of this optimizer are unscaled a second time before scaler.update()",
        "unscale once an optimizer step, after the last micro-batch, and call scaler.update() after scaler.step(optimizer)",
    ),
    _Refusal(
        r"No inf checks were recorded prior to update",
        "scaler.update() runs, and no optimizer has stepped through the scaler since the last one",
        "scaler.step(optimizer) in the place of optimizer.step()",
    ),
    _Refusal(
        r"No inf checks were recorded for this optimizer",
        "scaler.step(optimizer) finds no gradient in any parameter of this optimizer",
        "look at the order: zero_grad, forward, backward, step; and that the optimizer holds the parameters of this model",
    ),
)
FREED = "Trying to backward through the graph a second time"
OVERWRITTEN = "modified by an inplace operation"


class Misuse:
    """Remembers which graphs a backward has freed: autograd numbers its nodes in the order in which they are made."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.roots: list[Any] = []
        self.begun = self.freed = -1  # the number of the next node when the last backward began, and when the last one ended
        self.at: Spot | None = None
        self.stepped = -1  # the number of the next node when the last optimizer stepped
        self.step_at: Spot | None = None

    def listen(self) -> None:
        self.watch.events.on("backward", self._backward)
        self.watch.events.on("backward_done", self._done)
        self.watch.events.on("step", self._step)

    def finish(self) -> None:
        """Nothing waits for the end."""

    def _backward(self, roots: list[Tensor], spot: Spot | None) -> None:
        self.roots = [weakref.ref(root) for root in roots]
        # private: no public accessor; without it the line that reads the old tensor is not known
        self.begun = torch.autograd._get_sequence_nr()

    def _done(self, roots: list[Tensor], spot: Spot | None) -> None:
        self.freed, self.at = self.begun, spot

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        self.stepped, self.step_at = torch.autograd._get_sequence_nr(), spot

    def explain(self, error: BaseException) -> Finding | None:
        """The finding on a refusal; None for any other exception."""
        text, at = str(error), place.of(error.__traceback__)
        if FREED in text:
            return self._freed(at, text)
        if OVERWRITTEN in text:
            return self._overwritten(at, text)
        refusal = next((r for r in REFUSALS if re.search(r.pattern, text)), None)
        if refusal is None:
            return None
        return _finding(SCALER, at.spot, refusal.message, text, fix=refusal.fix)

    def _freed(self, at: Place, text: str) -> Finding:
        message = f"backward at {text_of(at.spot)} needs a graph that an earlier backward has freed"
        nodes = self._nodes()
        if nodes and all(node._sequence_nr() < self.freed for node in nodes):
            cause = f"this loss was computed before the backward at {text_of(self.at)}, and shares its graph"
            return _finding(
                BACKWARD,
                at.spot,
                message,
                text,
                cause=cause,
                fix="add the losses and call backward once, or retain_graph=True on the first",
            )
        reader = _reader(nodes, self.freed)
        if reader is None:
            return _finding(BACKWARD, at.spot, message, text)
        spot = self.watch.made_at(reader)
        cause = f"the op at {text_of(spot)} ({reader.name()}) reads a tensor of an earlier step that still carries its graph"
        fix = "detach() what is carried from step to step: a hidden state, a cache, a running sum"
        return _finding(BACKWARD, spot or at.spot, message, text, cause=cause, fix=fix)

    def _nodes(self) -> list[Any]:
        return [root.grad_fn for reference in self.roots if (root := reference()) is not None and root.grad_fn is not None]

    def _overwritten(self, at: Place, text: str) -> Finding:
        nodes = self._nodes()
        message = f"backward at {text_of(at.spot)} needs a value that was overwritten after forward had used it"
        if nodes and all(node._sequence_nr() < self.stepped for node in nodes):
            cause = f"optimizer.step() at {text_of(self.step_at)} changed the weights between this forward and its backward"
            return _finding(
                BACKWARD, self.step_at or at.spot, message, text, cause=cause, fix="zero_grad, forward, backward, step: in this order"
            )
        fix = "write +=, an assignment to a slice, or an op that ends in _ as one that makes a new tensor"
        return _finding(BACKWARD, at.spot, message, text, fix=fix)


def _finding(probe: str, spot: Spot | None, message: str, raised: str, *, cause: str | None = None, fix: str | None = None) -> Finding:
    where = place.where_of(spot)
    source, first = lines_at(where), raised.partition("\n")[0]
    return Finding(probe=probe, severity="error", message=message, where=where, source=source, raised=first, cause=cause, fix=fix)


def _reader(nodes: list[Any], freed: int) -> Any:
    """The node of the newest graph, nearest to the loss, one of whose inputs was made before the last backward."""
    queue, seen = deque(nodes), set(nodes)
    while queue and len(seen) < NEAREST:
        node = queue.popleft()
        for before, _ in node.next_functions:
            if before is None or before in seen:
                continue
            if before._sequence_nr() < freed:
                return node
            seen.add(before)
            queue.append(before)
    return None
