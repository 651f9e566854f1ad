"""A run of the subject in which one step is done by another rule, in every layer: whether the difference is gone then."""

import re
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from .aligned import traced
from .anchors import Graph
from .captured import Parting

# What a step makes of the tensor that it starts from, with the vectors that it read on its way, by their parameters' names.
Rule = Callable[[Tensor, dict[str, Tensor]], Tensor]


def vanishes(parting: Parting, source: int, node: int, rule: Rule) -> bool:
    """Whether the logits agree when at this line, wherever it runs, the tensor is what `rule` makes of the one before.

    `source` and `node` are the tensors before and behind the step where the runs part. Other layers run the same code, so
    that there the two stand as many ops apart.
    """
    return undone(parting, [(source, node, rule)])


def undone(parting: Parting, changes: Sequence[tuple[int, int, Rule]], *, in_layers: bool = False) -> bool:
    """The same for several steps at once; with `in_layers` only where other layers do this very step, and not wherever a
    function that they share runs."""
    graph = parting.left
    keys = repeated(graph) if in_layers else {}
    model = parting.aligned.left.subject.model
    vectors = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 1}
    ends: dict[int, list[tuple[int, int, Rule]]] = {}
    for source, node, rule in changes:
        keeps_size = graph.nodes[source].tensor.numel() == graph.nodes[node].tensor.numel()
        for start, end in _steps(graph, source, node):
            if in_layers and keys[graph.nodes[end].event] != keys[graph.nodes[node].event]:
                continue
            if keeps_size and graph.nodes[start].tensor.numel() != graph.nodes[end].tensor.numel():
                continue  # another step that happens to stand on this line
            ends.setdefault(graph.nodes[end].event, []).append((start, end, rule))
    sources = {graph.nodes[start].event for steps in ends.values() for start, _, _ in steps}
    held: dict[int, list[Tensor]] = {}

    def change(index: int, outputs: list[Tensor]) -> None:
        for first, last, rule in ends.get(index, ()):
            start, end = graph.nodes[first], graph.nodes[last]
            x = held[start.event][start.output]
            read = (name for event in graph.recording.events[start.event : index + 1] for name in event.parameters)
            made = rule(x, {name: vectors[name] for name in read if name in vectors})
            outputs[end.output].copy_(made.reshape(outputs[end.output].shape))
        if index in sources:
            held[index] = [t.detach().clone() for t in outputs]

    changed = traced(parting.aligned.left.subject, parting.aligned.case, change=change)
    return parting.aligned.gap(changed.recording.result) is None


def _steps(graph: Graph, source: int, node: int) -> Iterator[tuple[int, int]]:
    """(source, node) of the same step wherever its line runs."""
    reader = next((i for i in range(source + 1, node + 1) if source in graph.nodes[i].inputs), None)
    if reader is None:
        return
    apart, place = graph.nodes[node].event - graph.nodes[reader].event, graph.nodes[reader].inputs.index(source)
    first, last = graph.event(reader), graph.event(node)
    for event in graph.recording.events:
        if event.op != last.op or (event.where.function, event.where.line) != (last.where.function, last.where.line):
            continue
        starts, ends = graph.made_by(event.index - apart), graph.made_by(event.index)
        if starts and graph.event(starts[0]).op == first.op and len(graph.nodes[starts[0]].inputs) > place:
            yield graph.nodes[starts[0]].inputs[place], ends[min(graph.nodes[node].output, len(ends) - 1)]


def repeated(graph: Graph) -> dict[int, tuple[object, ...]]:
    """What makes an op the same op in every layer: its place, its module without the layer's number, and its turn there."""
    turns: dict[tuple[object, ...], int] = {}
    found: dict[int, tuple[object, ...]] = {}
    for event in graph.recording.events:
        place = (event.op, event.where.function, event.where.line)
        turn = turns[(*place, event.where.module)] = turns.get((*place, event.where.module), -1) + 1
        found[event.index] = (*place, re.sub(r"\d+", "#", event.where.module), turn)
    return found
