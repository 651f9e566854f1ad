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
from .gradients import parameters
from .part import Part
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
        r"Attempted \w+ but _scale is None",
        "no loss has gone through scaler.scale() before this call: backward ran on the loss itself",
        "scaler.scale(loss).backward()",
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
CHANGED = re.compile(r"\[\S*Tensor \[([\d, ]*)\]\].* is at version (\d+)")  # torch's words on what was overwritten
PASSED = 16  # backward passes that are remembered: those of a few steps with many losses
MOST_NODES = 5_000  # of a graph that is searched; of a larger one nothing is told


@dataclass(frozen=True, slots=True)
class _Passed:
    """A backward that has ended, and the numbers of the nodes behind its losses, which may be gone by now. Autograd numbers
    nodes as they are made; `begun` was the next number when it began."""

    begun: int
    nodes: frozenset[int] | None
    at: Spot | None

    def may_have_freed(self, node: Any) -> bool | None:
        """Whether its losses led to a node; None of a graph that was too large, where nobody can tell."""
        number = node._sequence_nr()
        return None if self.nodes is None and number < self.begun else number in (self.nodes or ())


class Misuse(Part):
    """Remembers the backward passes, of which one has freed the graph, and the last step of an optimizer."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.roots: list[Any] = []  # of the backward that runs
        self.begun = -1
        self.nodes: frozenset[int] | None = None
        self.passed: deque[_Passed] = deque(maxlen=PASSED)
        self.stepped = -1  # the number of the next node when the last optimizer stepped
        self.optimizer: Any = None
        self.step_at: Spot | None = None

    def listen(self) -> None:
        self.watch.events.on("backward", self._backward)
        self.watch.events.on("backward_done", self._done)
        self.watch.events.on("step", self._step)

    def _backward(self, roots: list[Tensor], spot: Spot | None) -> None:
        self.roots = [weakref.ref(root) for root in roots]
        # private, as the number of a node: no public accessor; without them nothing is known of what came before
        self.begun = torch.autograd._get_sequence_nr()
        graph = _graph(self._nodes())
        self.nodes = None if graph is None else frozenset(node._sequence_nr() for node in graph)

    def _done(self, roots: list[Tensor], spot: Spot | None) -> None:
        if not self.watch.events.retains:
            self.passed.append(_Passed(self.begun, self.nodes, spot))

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        self.stepped, self.optimizer, self.step_at = torch.autograd._get_sequence_nr(), weakref.ref(optimizer), spot

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
        way = _way_to_freed(self._nodes())
        by = self._freeing(way)
        if by is None:
            return _finding(BACKWARD, at.spot, message, text)
        reader = _reader(way, by)
        if reader is None:
            cause = f"this loss was computed before the backward at {text_of(by.at)}, and shares its graph"
            fix = "add the losses and call backward once, or retain_graph=True on the first"
            return _finding(BACKWARD, at.spot, message, text, cause=cause, fix=fix)
        spot = self.watch.made_at(reader)
        cause = f"the op at {text_of(spot)} ({reader.name()}) reads a tensor of an earlier step that still carries its graph"
        fix = "detach() what is carried from step to step: a hidden state, a cache, a running sum"
        return _finding(BACKWARD, spot or at.spot, message, text, cause=cause, fix=fix)

    def _freeing(self, way: list[Any]) -> _Passed | None:
        """The backward that has freed the end of a way; None where several may have, and tell different stories."""
        asked = [(passed, passed.may_have_freed(way[-1])) for passed in self.passed] if way else []
        if known := [passed for passed, does in asked if does]:
            return known[-1]  # whatever went there before it had to keep the graph
        perhaps = [passed for passed, does in asked if does is None]
        stories = {reader if (reader := _reader(way, passed)) is not None else passed.at for passed in perhaps}
        return perhaps[-1] if len(stories) == 1 else None

    def _nodes(self) -> list[Any]:
        return [root.grad_fn for reference in self.roots if (root := reference()) is not None and root.grad_fn is not None]

    def _overwritten(self, at: Place, text: str) -> Finding:
        message = f"backward at {text_of(at.spot)} needs a value that was overwritten after forward had used it"
        nodes = self._nodes()
        if nodes and all(node._sequence_nr() < self.stepped for node in nodes) and self._is_weight(text):
            cause = f"optimizer.step() at {text_of(self.step_at)} changed the weights between this forward and its backward"
            fix = "zero_grad, forward, backward, step: in this order"
            return _finding(BACKWARD, self.step_at or at.spot, message, text, cause=cause, fix=fix)
        fix = "write +=, an assignment to a slice, or an op that ends in _ as one that makes a new tensor"
        return _finding(BACKWARD, at.spot, message, text, fix=fix)

    def _is_weight(self, text: str) -> bool:
        """Whether a parameter of the optimizer that stepped last has the sizes and the version of what was overwritten."""
        changed, optimizer = CHANGED.search(text), self.optimizer()
        if changed is None or optimizer is None:
            return False
        sizes = sorted(int(size) for size in changed[1].split(",") if size.strip())  # sorted: a product reads it transposed
        return any(sorted(p.shape) == sizes and p._version == int(changed[2]) for p in parameters(optimizer))


def _finding(probe: str, spot: Spot | None, message: str, raised: str, *, cause: str | None = None, fix: str | None = None) -> Finding:
    where = place.where_of(spot)
    source, first = lines_at(where), raised.partition("\n")[0]
    return Finding(probe=probe, severity="error", message=message, where=where, source=source, raised=first, cause=cause, fix=fix)


def _reader(way: list[Any], passed: _Passed) -> Any:
    """The node of a way that was made after a backward had begun and reads what was made before; None where all of it was."""
    pairs = zip(way, way[1:], strict=False)
    return next((node for node, before in pairs if node._sequence_nr() >= passed.begun > before._sequence_nr()), None)


def _graph(nodes: list[Any]) -> dict[Any, Any] | None:
    """Every node behind these, with the one that reads it on a shortest way; None of a graph that is too large."""
    read_by: dict[Any, Any] = dict.fromkeys(nodes)
    queue = deque(nodes)
    while queue:
        node = queue.popleft()
        for before, _ in node.next_functions:
            if before is not None and before not in read_by:
                read_by[before] = node
                queue.append(before)
        if len(read_by) > MOST_NODES:
            return None
    return read_by


def _way_to_freed(nodes: list[Any]) -> list[Any]:
    """The nodes from a loss to the oldest that is freed. The backward that fails has freed others on its way, from the newest on,
    but none that is older than the one at which it failed."""
    read_by = _graph(nodes) or {}
    node = min(filter(_is_freed, read_by), key=lambda each: each._sequence_nr(), default=None)
    way: list[Any] = []
    while node is not None:
        way.insert(0, node)
        node = read_by[node]
    return way


def _is_freed(node: Any) -> bool:
    """Whether what a node saved for its backward is gone: torch says so when it is asked for it."""
    for name in (*(name for name in dir(node) if name.startswith("_saved_")), "saved_tensors"):
        try:
            getattr(node, name, None)
        except Exception as error:  # also of hooks that unpack what was saved, which are the script's
            if FREED in str(error):
                return True
    return False
