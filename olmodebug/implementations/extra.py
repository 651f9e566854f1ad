"""A step that one of two implementations does and the other leaves out: a norm without a place of its own, a clamp."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..tracing.norms import norm_calls
from .aligned import Aligned, logits_of
from .anchors import Columns, Graph, same
from .captured import Parting, parting_of
from .hypotheses import Cause
from .norm_rules import COMMON_EPS, DIVISIONS, USES, NormRule
from .repaired import undone
from .wiring import function_that_made

CLAMPS = ("clamp", "clamp_", "clip", "clip_", "hardtanh", "hardtanh_")
BEHIND = 12  # ops between a tensor and what a norm made of it
Step = tuple[int, int, str]  # the nodes before and behind it, and what it does
BEYOND = 4.0  # times the bound: how large q, k and v are made so that a clamp acts


def extra_step(parting: Parting) -> Cause | None:
    """A norm or a clamp that one side has and the other has not: without it the two agree."""
    for mine, view in ((True, parting), (False, parting.flipped())):
        if view is None:
            continue
        clamps, norms = list(_clamps(view)), list(_norms(view))
        groups = (
            [[step] for step in clamps]
            + [clamps]
            + [[step] for pair in norms for step in pair]
            + [[p[0] for p in norms], [p[-1] for p in norms]]
        )
        for steps in groups:
            if steps and undone(view, [(source, node, _left) for source, node, _ in steps], in_layers=True):
                return _cause(parting, view, "clamp" if steps[0] in clamps else "norm", steps[0], mine=mine)
    return None


def _left(x: Tensor, vectors: dict[str, Tensor]) -> Tensor:
    """The step left out."""
    return x


def _cause(parting: Parting, view: Parting, what: str, step: Step, *, mine: bool) -> Cause:
    source, node, words = step
    if mine:
        text = f"the subject {words}, and the reference does not; without this step the logits agree"
        spot, module = parting.spot(node), parting.left.event(node).where.module
        fix = f"leave this {what} out"
    else:
        text = f"the reference {words}, and the subject does not; without that step the reference gives the subject's logits"
        twin = view.left.nodes[source].anchor
        spot = function_that_made(parting.left, twin) if twin is not None else None
        spot, module = spot or parting.spot(parting.node), parting.left.event(parting.node if twin is None else twin).where.module
        fix = f"do as the reference, which {words}"
    return Cause(name=f"{what} {'too many' if mine else 'missing'}", text=text, fix=fix, spot=spot, module=module)


def _clamps(view: Parting) -> Iterator[Step]:
    """Clamps on tensors that both sides have, whose result the other side has not."""
    graph = view.left
    for index in view.near(graph, view.node):
        sources = graph.nodes[index].inputs
        bounds = clamp_bounds(graph, index)
        if bounds is not None and sources and graph.nodes[sources[0]].anchor is not None:
            yield sources[0], index, f"clamps to [{bounds[0]:.6g}, {bounds[1]:.6g}]"


def clamp_bounds(graph: Graph, index: int) -> tuple[float, float] | None:
    """The two bounds of a clamp; None for any other op."""
    if graph.event(index).op not in CLAMPS:
        return None
    arguments = graph.recording.kept[graph.nodes[index].event].arguments
    bounds = [next((arguments[n] for n in names if n in arguments), None) for names in (("min", "min_val"), ("max", "max_val"))]
    low, high = bounds
    return (float(low), float(high)) if isinstance(low, int | float) and isinstance(high, int | float) else None


def _norms(view: Parting) -> Iterator[list[Step]]:
    """Norms of tensors that both sides have, whose result the other side has not; each up to the first and up to the last tensor
    that it gives: the weight comes last, and what is normalised twice is the same again."""
    graph = view.left
    eps = {c.eps for c in norm_calls(graph.recording)} | COMMON_EPS
    strays = list(view.near(graph, view.node))
    told: set[int] = set()
    for source in dict.fromkeys(s for index in strays for s in _anchored_before(graph, index)):
        x = graph.nodes[source].tensor
        anchor = graph.nodes[source].anchor
        if x.ndim < 2 or x.shape[-1] < 2 or not x.is_floating_point() or anchor in told:
            continue
        near = [i for i in strays if graph.nodes[i].tensor.numel() == x.numel()]
        found = _normed(view, source, near, eps)
        if found and anchor is not None:
            told.add(anchor)
            yield [(source, node, f"has a norm here (it divides by {rule.division})") for rule, node in found]


def _normed(view: Parting, source: int, near: list[int], eps: set[float]) -> list[tuple[NormRule, int]]:
    """The first and the last tensor that is a norm of this one, with its rule."""
    graph = view.left
    model = view.aligned.left.subject.model
    x = graph.nodes[source].tensor
    vectors = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 1 and p.shape[0] == x.shape[-1]}
    rules: dict[tuple[str, ...], list[tuple[NormRule, Columns | None]]] = {}
    found: list[tuple[NormRule, int]] = []
    for index in near:
        events = graph.recording.events[graph.nodes[source].event + 1 : graph.nodes[index].event + 1]
        read = {name: vectors[name] for event in events for name in event.parameters if name in vectors}
        held = graph.nodes[index].columns
        if tuple(read) not in rules:
            uses = list(USES) if read else list(USES)[:1]
            all_rules = [NormRule(division=d, use=u, eps=e) for d in DIVISIONS for u in uses for e in sorted(eps)]
            rules[tuple(read)] = [(rule, graph.columns_of(rule(x, read))) for rule in all_rules]
        fits = (rule for rule, made in rules[tuple(read)] if made is not None and held is not None and same(made, held, view.limit))
        if (rule := next(fits, None)) is not None:
            found.append((rule, index))
    return [found[0], found[-1]] if len(found) > 1 else found


def _anchored_before(graph: Graph, index: int) -> Iterator[int]:
    """The tensors that both sides have, a few ops before a node."""
    queue, seen = [index], set[int]()
    while queue and len(seen) < BEHIND:
        current = queue.pop(0)
        for source in graph.nodes[current].inputs:
            if source in seen or not graph.nodes[source].data:
                continue
            seen.add(source)
            queue.append(source)
            if graph.nodes[source].anchor is not None:
                yield source


# A clamp that ordinary values never reach


def unseen_clamp(aligned: Aligned) -> tuple[Cause, Aligned] | None:
    """A clamp of one side alone, which these values never reach: with q, k and v made larger the outputs part, and without it they agree."""
    bounds = [
        {b for i in range(len(g.nodes)) if g.nodes[i].leads and g.nodes[i].data and (b := clamp_bounds(g, i))} for g in aligned.graphs()
    ]
    differing = {high for low, high in bounds[0] ^ bounds[1] if low == -high and torch.isfinite(torch.tensor(high))}
    if not differing:
        return None
    weights = {s: t * BEYOND * max(differing) if s.split(".")[-2] in ("q", "k", "v") else t for s, t in aligned.weights.items()}
    larger = replace(aligned, weights=weights, others=[], _graphs=None)
    larger.load()
    try:
        larger.left_logits, larger.right_logits = (logits_of(side.subject, aligned.case) for side in (larger.left, larger.right))
        if larger.gap() is None:
            return None
        cause = extra_step(parting_of(larger))
        return None if cause is None or not cause.name.startswith("clamp") else (cause, larger)
    finally:
        aligned.load()


ON_EXTRA: dict[str, Callable[[Parting], Cause | None]] = {"a norm or a clamp that one side leaves out": extra_step}
