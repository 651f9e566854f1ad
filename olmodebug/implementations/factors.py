"""A constant factor that one of two implementations has and the other has not: found on captured tensors, shown by taking it out."""

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from .aligned import traced
from .anchors import Graph, anchor, first_bad, same
from .captured import NEAR, Parting
from .hypotheses import Cause
from .repaired import repeated
from .wiring import between

GROUPS = 8  # of tensors that are a constant times the reference's, tried by running
FACTORS = 5  # that one subject may have wrong at once: embedding, scores, both branches, logits


def factor(parting: Parting) -> Cause | None:
    """Constant factors: the scale of the scores, of the embeddings, of the branches, of the logits. With them taken out, the logits agree."""
    undone: dict[int, float] = {}
    found: list[tuple[int, float]] = []
    current: Parting | None = parting
    try:
        while current is not None and len(found) < FACTORS:
            current, undone, step = _next(current, undone)
            found += [step] if step else []
            if step and current is None:
                return _cause(parting, found)
        return None
    finally:
        anchor(parting.left, parting.right, parting.limit)


def _next(parting: Parting, undone: dict[int, float]) -> tuple[Parting | None, dict[int, float], tuple[int, float] | None]:
    """One factor more taken out: that with which the logits agree (then no parting is left), or the first that moves it on."""
    moved: tuple[Parting | None, dict[int, float], tuple[int, float] | None] = (None, undone, None)
    aligned = parting.aligned
    for group, ratio in list(_scaled_groups(parting)):
        factors = dict(undone)
        for event in _everywhere(parting.left, group):
            factors[event] = factors.get(event, 1.0) * ratio
        graph = _without(parting, factors)
        if aligned.gap(graph.recording.result) is None:
            return None, factors, (group[0], ratio)
        if moved[0] is None:
            anchor(graph, parting.right, parting.limit)
            mine = first_bad(graph)
            if mine is not None and mine > parting.node:
                later = Parting(aligned=aligned, left=graph, right=parting.right, node=mine, other=first_bad(parting.right))
                moved = (later, factors, (group[0], ratio))
    if moved[0] is not None:
        anchor(moved[0].left, parting.right, parting.limit)
    return moved


def _everywhere(graph: Graph, group: list[int]) -> Iterator[int]:
    """The events that are these in another layer, and these."""
    keys = repeated(graph)
    wanted = {keys[graph.nodes[i].event] for i in group}
    return (index for index, key in keys.items() if key in wanted)


def _without(parting: Parting, factors: dict[int, float]) -> Graph:
    """A run in which what these events give is divided by their factor."""

    def change(index: int, outputs: list[Tensor]) -> None:
        for output in outputs if index in factors else ():
            output.div_(factors[index])

    return traced(parting.aligned.left.subject, parting.aligned.case, change=change)


def _scaled_groups(parting: Parting) -> Iterator[tuple[list[int], float]]:
    """Tensors of one function that are one constant times a tensor of the reference, the first in the run first."""
    left, right = parting.left, parting.right
    stray = list(_strays(right, parting.other))
    groups: dict[tuple[str | None, float], list[int]] = {}
    ratios: dict[int, float] = {}
    for index in _strays(left, parting.node):
        read = [a for source in left.nodes[index].inputs if (a := left.nodes[source].anchor) is not None]
        ratio = next((r for other in [*stray, *read] if (r := _ratio(left, index, right, other, parting.limit))), None)
        if ratio is not None:
            ratios[index] = ratio
    for other in stray:  # what the reference multiplies and the subject leaves as it is
        for source in right.nodes[other].inputs:
            twin = right.nodes[source].anchor
            if twin is not None and twin not in ratios and (ratio := _ratio(left, twin, right, other, parting.limit)):
                ratios[twin] = ratio
    bare = {i for i in ratios if left.nodes[i].anchor is not None}  # of these the last is the nearest to where the factor is missing
    for index, ratio in sorted(ratios.items()):
        if not any(abs(ratios.get(source, 0.0) / ratio - 1) < parting.limit for source in _made_of(left, index)):
            groups.setdefault((left.event(index).where.function, float(f"{ratio:.4g}")), []).append(index)
    for group in sorted(groups.values(), key=lambda g: (g[0] in bare, -g[0] if g[0] in bare else g[0]))[:GROUPS]:
        yield group, ratios[group[0]]


def _made_of(graph: Graph, index: int, depth: int = 4) -> Iterator[int]:
    """The tensors that a tensor is made of, a few ops back."""
    if depth:
        for source in graph.nodes[index].inputs:
            yield source
            yield from _made_of(graph, source, depth - 1)


def _strays(graph: Graph, start: int | None) -> Iterator[int]:
    last = len(graph.nodes) if start is None else min(start + NEAR, len(graph.nodes))
    for index, node in enumerate(graph.nodes[:last]):
        if node.anchor is None and node.leads and node.columns is not None and node.columns.positioned:
            yield index


def _ratio(left: Graph, index: int, right: Graph, other: int, limit: float) -> float | None:
    mine, theirs = left.nodes[index].columns, right.nodes[other].columns
    if mine is None or theirs is None or mine.matrix.shape != theirs.matrix.shape or left.nodes[index].data != right.nodes[other].data:
        return None
    ratio = mine.scale / theirs.scale
    if abs(ratio - 1) < 10 * limit:
        return None
    return ratio if same(mine.times(1 / ratio), theirs, limit) else None


def _cause(parting: Parting, found: list[tuple[int, float]]) -> Cause:
    index, ratio = found[0]
    spot, module = parting.spot(index), parting.left.event(index).where.module
    bare = parting.left.nodes[index].anchor is not None  # the tensor is right, and a step on it is missing
    if bare and module != parting.left.event(parting.node).where.module:
        spot, module = between(parting.left, index, parting.node)
    shape = parting.left.nodes[index].tensor.shape
    seq = parting.left.seq
    scores = len(shape) >= 2 and shape[-2:] == (seq, seq)
    what = "the attention scores are" if scores else "the tensor here is"
    details = ""
    layout = parting.aligned.left.layout
    query = next((t for s, t in parting.aligned.weights.items() if s.endswith(".q.weight")), None)
    if scores and layout.heads and query is not None:
        width = query.shape[0] // layout.heads
        mine = _as_power(ratio / math.sqrt(width), width, query.shape[1])
        details = f" (its scale is {mine} if the reference's is 1/sqrt(head_dim {width}))"
    return Cause(
        name="scale" if scores else "constant factor",
        text=f"{what} {ratio:.6g} times the reference's, in every element{details}{_others(parting, found[1:])}; divided by {'them' if found[1:] else 'it'}, the logits agree",
        fix="scale the scores by 1/sqrt(head_dim), once"
        if scores
        else f"multiply by {1 / ratio:.6g}, or leave the factor out on both sides",
        spot=spot,
        module=module,
        op=parting.left.event(index).op,
        evidence={"factor": ratio},
    )


def _as_power(value: float, width: int, hidden: int) -> str:
    known = {
        "1": 1.0, f"1/head_dim {width}": 1 / width, f"1/sqrt(hidden_size {hidden})": hidden**-0.5, f"1/hidden_size {hidden}": 1 / hidden,
        f"sqrt(head_dim {width})": width**0.5,
    }  # fmt: skip
    return next((name for name, number in known.items() if abs(value / number - 1) < 1e-4), f"{value:.6g}")


def _others(parting: Parting, found: list[tuple[int, float]]) -> str:
    places = [f"{ratio:.6g} times at line {spot.line}" for index, ratio in found if (spot := parting.spot(index)) is not None]
    return f", and another {' and another '.join(places)}" if places else ""


ON_FACTORS: dict[str, Callable[[Parting], Cause | None]] = {"a constant factor (scale)": factor}
