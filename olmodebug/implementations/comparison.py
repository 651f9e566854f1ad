"""Does this implementation compute what that one computes? The first place where it does not, and why.

Both get the same weights and the same tokens; logits, loss and every gradient are compared in float64. Where they differ,
tensors of both runs are matched by value and the first op is named whose inputs the reference has and whose result it
has not; then named causes are tried, and the one with which the difference vanishes is reported.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compare import difference
from ..environment import environment
from ..records import Difference, Where
from ..report import Finding, Outcome, Report, merge_by_root
from ..sources import Spot, short_path
from ..subject import Subject
from ..units import listed
from .aligned import Aligned, Side, align
from .alone import script_of, script_of_ops
from .anchors import Graph, positions_first
from .backward import GradientGap, NoGradients, gradient_gap, script_of_gradients
from .blocks import ON_BLOCKS
from .captured import ON_TENSORS, differing_eps, eps_cause, parting_of
from .casts import cast_order
from .decoding import DECODING, Decoding, decoding
from .extra import ON_EXTRA, unseen_clamp
from .factors import ON_FACTORS
from .hypotheses import ON_WEIGHTS, Cause
from .left_out import ON_USES
from .norm_rules import ON_NORMS
from .routing import ON_ROUTING
from .turned import ON_ROTATION
from .wiring import ON_SUMS, ON_WIRING, caller, weights_read

OUTPUTS, GRADIENTS, WEIGHTS, ARGUMENTS = "parity.outputs", "parity.gradients", "parity.weights", "parity.arguments"
# A cause that only moves values shows later than it acts: where they meet. These ops are where it acts.
DIVIDES = ("split", "split_with_sizes", "chunk", "unbind", "slice", "select", "narrow")
GROWS = ("expand", "repeat", "repeat_interleave", "index_select", "index", "cat")
UPSTREAM = {"qkv order": DIVIDES, "fused projection order": DIVIDES, "fused gate and up order": DIVIDES, "GQA order": GROWS}


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What the comparison of the outputs found: the difference, where it starts, why, and what was tried in vain."""

    aligned: Aligned  # of the ways to map the weights the one with which the cause was established
    gap: Difference
    where: Where
    parting: tuple[int, int | None]  # the first wrong node of either run
    cause: Cause | None
    tried: list[tuple[str, bool]] = field(default_factory=list)


def compare(
    left: Subject, right: Subject, *, stated: Mapping[str, str] | None = None, seed: int = 0, command: str = "", scripts: Path | None = None
) -> Report:
    """The report on a subject against a reference: findings, and `sections["implementations"]`.

    `scripts` is the folder that takes a script which shows the first difference without olmodebug.
    SubjectError where the two do not fit (another vocabulary, other sizes, weights without a counterpart).
    """
    began = time.perf_counter()
    aligned = align(left, right, stated=stated, seed=seed)
    findings = [*_tied_apart(aligned)]
    gap = aligned.gap()
    tried: list[tuple[str, bool]] = []
    gradients: GradientGap | None = None
    unasked = differ = "the outputs differ already"
    decoded = Decoding(unasked=differ)
    if gap is not None:
        verdict = locate(aligned, gap)
        aligned, tried = verdict.aligned, verdict.tried
        findings.append(_output_finding(aligned, verdict, scripts))
    else:
        findings += _argument_findings(aligned, scripts)
        try:
            gradients = gradient_gap(aligned)
            findings += _gradient_findings(aligned, gradients, findings, scripts)
        except NoGradients as error:
            unasked = str(error)
        decoded = decoding(aligned)
        findings += decoded.findings
    probes = (WEIGHTS, OUTPUTS) + ((ARGUMENTS,) if gap is None else ()) + ((GRADIENTS,) if gradients is not None else ())
    probes += (DECODING,) if decoded.unasked is None else ()
    failed = {f.probe for f in findings if f.severity == "error"}
    return Report(
        subject=left.info(),
        environment=environment(seed=seed, command=command),
        outcomes=tuple(Outcome(probe=name, status="failed" if name in failed else "passed") for name in probes)
        + (() if gradients is not None else (Outcome(probe=GRADIENTS, status="skipped", reason=unasked),))
        + (() if decoded.unasked is None else (_undecoded(decoded.unasked, differ),)),
        findings=merge_by_root(findings),
        sections={"implementations": _section(aligned, gap, gradients, tried)},
        seconds=time.perf_counter() - began,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _undecoded(reason: str, differ: str) -> Outcome:
    return Outcome(probe=DECODING, status="skipped" if reason == differ else "not-applicable", reason=reason)


def locate(aligned: Aligned, gap: Difference) -> Verdict:
    """Where the subject leaves the reference, and the cause with which the difference vanishes."""
    tried: list[tuple[str, bool]] = []
    for hypotheses in (_on_weights, _on_captured):
        for way in (aligned, *aligned.others):  # a way to map the weights that looked no better may be the right one with the fault undone
            way.load()
            cause = _tried(hypotheses(way), tried if way is aligned else [])
            if cause is not None:
                return _verdict(way, way.gap() or gap, cause, tried)
    aligned.load()
    return _verdict(aligned, gap, None, tried)


def _verdict(aligned: Aligned, gap: Difference, cause: Cause | None, tried: list[tuple[str, bool]]) -> Verdict:
    parting = parting_of(aligned)
    place = _place(aligned, parting.left, parting.node, cause)
    return Verdict(aligned=aligned, gap=gap, where=place, parting=(parting.node, parting.other), cause=cause, tried=tried)


def _on_weights(aligned: Aligned) -> Iterator[tuple[str, Callable[[], Cause | None]]]:
    return ((name, partial(h, aligned)) for name, h in {**ON_WEIGHTS, **ON_USES}.items())


def _on_captured(aligned: Aligned) -> Iterator[tuple[str, Callable[[], Cause | None]]]:
    parting = parting_of(aligned)
    return (
        (name, partial(h, parting))
        for name, h in {
            **ON_ROTATION,
            **ON_NORMS,
            **ON_TENSORS,
            **ON_ROUTING,
            **ON_FACTORS,
            **ON_WIRING,
            **ON_BLOCKS,
            **ON_EXTRA,
            **ON_SUMS,
        }.items()
    )


def _tried(hypotheses: Iterable[tuple[str, Callable[[], Cause | None]]], tried: list[tuple[str, bool]]) -> Cause | None:
    """The first cause that is established; `tried` takes the names of all that were looked at."""
    for name, look in hypotheses:
        cause = look()
        tried.append((name, cause is not None))
        if cause is not None:
            return cause
    return None


def _place(aligned: Aligned, left: Graph, node: int, cause: Cause | None) -> Where:
    """The function and line of the subject's own file."""
    if cause is not None and cause.spot is not None:
        return _where(cause.module or "", cause.spot, cause.op)
    ops = UPSTREAM.get(cause.name) if cause is not None else None
    if ops is not None:
        apart = all(p.order is None for s, p in aligned.left.layout.slots.items() if s.split(".")[-2] == "q")
        found = None if apart and cause is not None and cause.name == "qkv order" else _upstream(left, node, ops)
        if found is None and cause is not None and cause.name == "qkv order":  # projections of their own: where the function calls them
            used = [i for i, slot in weights_read(left, aligned.left.layout) if slot.split(".")[-2] in ("q", "k", "v") and i < node]
            spot, module = caller(left, left.nodes[used[-1]].event) if used else (None, "")
            if spot is not None:
                return _where(module, spot, left.event(used[-1]).op)
        node = node if found is None else found
    elif not aligned.left.pairs and not aligned.right.pairs:
        node = _where_order_changed(aligned, node)
    event = left.event(node)
    where = event.where
    if where.file is None:
        spot, module = caller(left, left.nodes[node].event)
        if spot is not None:
            return _where(module, spot, event.op)
    return where


def _upstream(graph: Graph, node: int, ops: tuple[str, ...]) -> int | None:
    """The op before a node in the same module that divides or repeats what it reads: the first that divides, the last that repeats."""
    queue, seen, found = [node], set[int](), list[int]()
    module = graph.event(node).where.module
    while queue:
        index = queue.pop()
        if index in seen or not graph.nodes[index].data:
            continue
        seen.add(index)
        event = graph.event(index)
        grown = event.op not in GROWS or any(o.shape and _numel(o.shape) > _numel(i.shape) for o in event.outputs for i in event.inputs[:1])
        if index != node and event.op in ops and grown and event.where.file is not None and event.where.module == module:
            found.append(index)
        if index == node or not event.parameters:
            queue += graph.nodes[index].inputs
    if not found:
        return None
    return min(found) if ops is DIVIDES else max(found)


def _where_order_changed(aligned: Aligned, node: int) -> int:
    """A node that has the right numbers in another order than the reference, and feeds the first wrong one: there the fault is."""
    left, right = aligned.graphs()
    found, queue, seen = node, list(left.nodes[node].inputs), set[int]()
    module = left.event(node).where.module
    while queue:
        index = queue.pop()
        held = left.nodes[index]
        if index in seen or held.anchor is None or not held.data or left.event(index).where.module != module:
            continue
        seen.add(index)
        mine = positions_first(held.tensor, batch=left.batch, seq=left.seq)
        theirs = positions_first(right.nodes[held.anchor].tensor, batch=right.batch, seq=right.seq)
        if mine is None or theirs is None or mine.shape != theirs.shape:  # a head that stands there more than once, say
            queue += held.inputs
            continue
        if difference(mine, theirs, relative_limit=aligned.limit) is not None:
            found = min(found, index)
            queue += held.inputs
    return found


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _where(module: str, spot: Spot, op: str | None) -> Where:
    return Where(module=module, function=spot.function, file=short_path(spot.file), line=spot.line, op=op)


def _output_finding(aligned: Aligned, verdict: Verdict, scripts: Path | None) -> Finding:
    gap, cause = verdict.gap, verdict.cause
    left, right = aligned.left.subject.spec, aligned.right.subject.spec
    place = verdict.where
    script = script_of(aligned, *verdict.parting, scripts) if scripts is not None else None
    start = f"; up to `{place.function}` every tensor of the reference is there" if place.function else ""
    return Finding(
        probe=OUTPUTS,
        severity="error",
        message=f"with the same weights and tokens the logits of {left} and {right} differ by {gap.max_abs:.3g} (of {gap.scale:.3g}){start}",
        cause=cause.text if cause else None,
        fix=cause.fix if cause else None,
        where=place,
        expected=f"logits within {aligned.limit:.2g} of their largest magnitude",
        observed=f"{gap.mismatched} of {gap.total} differ, the largest by {gap.relative:.3g} of it",
        evidence={
            "max_abs": gap.max_abs,
            "relative": gap.relative,
            "limit": aligned.limit,
            **({"cause": cause.name, **cause.evidence} if cause else {}),
            **({"script": script} if script else {}),
        },
        ruled_out=tuple(name for name, vanished in verdict.tried if not vanished),
        case=aligned.case,
    )


def _argument_findings(aligned: Aligned, scripts: Path | None) -> list[Finding]:
    """Arguments that differ although these values hardly show it."""
    found = [*_clamp_findings(aligned), *_cast_findings(aligned)]
    pair = differing_eps(aligned)
    if pair is None:
        return found
    one, other = pair
    nodes = [graph.made_by(call.event) for graph, call in zip(aligned.graphs(), pair, strict=True)]
    script = script_of_ops(aligned, nodes[0][0], nodes[1][0], scripts) if scripts is not None and all(nodes) else None
    cause = eps_cause(one, other, "on the weights of this comparison the outputs still agree, on small activations they do not")
    return [
        Finding(
            probe=ARGUMENTS,
            severity="error",
            message=f"the norm at `{one.where.module}` has eps {one.eps:.3g}, the reference's has {other.eps:.3g}",
            cause=cause.text,
            fix=cause.fix,
            where=one.where,
            evidence={"cause": "eps", "eps": one.eps, "reference_eps": other.eps, **({"script": script} if script else {})},
            case=aligned.case,
        ),
        *found,
    ]


def _clamp_findings(aligned: Aligned) -> list[Finding]:
    """A clamp of one side that these values never reach."""
    found = unseen_clamp(aligned)
    if found is None:
        return []
    cause, larger = found
    gap = larger.gap()
    assert gap is not None
    return [
        Finding(
            probe=ARGUMENTS,
            severity="error",
            message=f"the logits agree as long as no query, key or value is large; where they are, they differ by {gap.relative:.3g} of the largest",
            cause=cause.text,
            fix=cause.fix,
            where=_where(cause.module or "", cause.spot, None) if cause.spot else Where(module=cause.module or ""),
            evidence={"cause": cause.name, "condition": "queries, keys and values beyond the bound", "relative": gap.relative},
            case=aligned.case,
        )
    ]


def _cast_findings(aligned: Aligned) -> list[Finding]:
    """Casts at another place, which only a run in 16 bits shows."""
    found = cast_order(aligned)
    if found is None:
        return []
    mine, theirs = (str(dtype).removeprefix("torch.") for dtype in (found.mine, found.theirs))
    what = f"{found.op} with {found.parameter}" if found.parameter else found.op
    later = found.mine.itemsize > found.theirs.itemsize
    return [
        Finding(
            probe=ARGUMENTS,
            severity="note",  # both orders are in use; which is right, the checkpoint's own code says
            message=f"in a bfloat16 model {what} is done in {mine} where the reference does it in {theirs}; in float64 the two agree",
            cause=f"the cast back to bfloat16 comes {'after' if later else 'before'} it, the reference casts {'before' if later else 'after'} it; with the inputs of the wider one cast first, it gives the other's result bit for bit",
            fix=f"cast to the dtype of the input {'before' if later else 'after'} this op, as the reference does",
            where=found.where,
            expected=theirs,
            observed=mine,
            evidence={"cause": "cast order", "condition": "bfloat16", "op": found.op},
            case=aligned.case,
        )
    ]


def _tied_apart(aligned: Aligned) -> list[Finding]:
    """One side shares a parameter between embedding and head, the other keeps two."""
    tied = ["head.weight" in side.layout.tied for side in (aligned.left, aligned.right)]
    if tied[0] == tied[1] or "head.weight" not in aligned.weights:
        return []
    words = ("shares one parameter", "keeps two")
    mine, theirs = (words[0], words[1]) if tied[0] else (words[1], words[0])
    return [
        Finding(
            probe=WEIGHTS,
            severity="error",
            message=f"for embedding and head {aligned.left.subject.spec} {mine}, {aligned.right.subject.spec} {theirs}",
            cause=f"the subject {'ties' if tied[0] else 'does not tie'} its head to the embedding, the reference {'does not' if tied[0] else 'does'}",
            fix="tie both or none: `lm_head.weight = embed_tokens.weight` makes it one parameter, copying its data does not",
            where=Where(module=_head_module(aligned.left)),
            evidence={"cause": "tied head"},
        )
    ]


def _head_module(side: Side) -> str:
    piece = side.layout.slots.get("head.weight")
    return piece.parameter.rpartition(".")[0] if piece else ""


def _gradient_findings(aligned: Aligned, gradients: GradientGap, so_far: list[Finding], scripts: Path | None) -> list[Finding]:
    found = []
    if gradients.own is not None:
        found.append(
            Finding(
                probe=GRADIENTS,
                severity="error",
                message=f"logits agree, the loss that the subject returns is {gradients.own[0]:.6g}, no mean cross-entropy of them ({gradients.own[1]:.6g})",
                expected="the mean cross-entropy, as the reference returns it, of labels that are shifted inside or come shifted",
                evidence={"loss": gradients.own[0], "cross_entropy": gradients.own[1]},
                case=aligned.case,
            )
        )
    tied = {"embed.weight", "head.weight"} if any(f.probe == WEIGHTS for f in so_far) else set()
    slots = [slot for slot in gradients.differing if slot not in tied]
    if slots:
        names = [aligned.left.layout.slots[s].parameter for s in slots]
        shown = listed(dict.fromkeys(names), 3)
        worst = gradients.differing[slots[0]]
        script = script_of_gradients(aligned, gradients, scripts)
        found.append(
            Finding(
                probe=GRADIENTS,
                severity="error",
                message=f"logits agree, gradients do not: {len(slots)} of {gradients.compared}, the last of them on the way forward {shown}",
                cause=gradients.cause,
                fix="let the gradient through: without detach(), .data, no_grad or a backward of its own" if gradients.cause else None,
                where=_where(gradients.module, gradients.spot, None) if gradients.spot else Where(module=names[0].rpartition(".")[0]),
                expected="the gradients of the reference, mapped by the weights",
                observed=f"{names[0]} differs by {worst.max_abs:.3g} of {worst.scale:.3g}",
                evidence={
                    "differing": len(slots),
                    "compared": gradients.compared,
                    **({"cause": "gradient stopped"} if gradients.cause else {}),
                    **({"script": script} if script else {}),
                },
                case=aligned.case,
            )
        )
    return found


def _section(aligned: Aligned, gap: Difference | None, gradients: GradientGap | None, tried: list[tuple[str, bool]]) -> dict[str, Any]:
    measured = _largest(aligned.left_logits, aligned.right_logits)
    graphs = aligned.graphs()
    return {
        "reference": aligned.right.subject.spec,
        "case": aligned.case.name,
        "limit": aligned.limit,
        "logits": {"largest_difference": measured[0], "largest_magnitude": measured[1], "agree": gap is None},
        "gradients": None
        if gradients is None
        else {
            "compared": gradients.compared,
            "differing": len(gradients.differing),
            "largest_relative_difference": gradients.largest,
            "loss": gradients.losses[0],
            "reference_loss": gradients.losses[1],
        },
        "mapping": [
            {"slot": slot, "subject": str(piece), "reference": str(aligned.right.layout.slots[slot])}
            for slot, piece in aligned.left.layout.slots.items()
        ],
        "settled_by_value": list(aligned.by_value),
        "tensors": {
            "subject": sum(n.data and n.leads for n in graphs[0].nodes),
            "subject_found": sum(n.data and n.leads and n.anchor is not None for n in graphs[0].nodes),
            "reference": sum(n.data and n.leads for n in graphs[1].nodes),
            "reference_found": sum(n.data and n.leads and n.anchor is not None for n in graphs[1].nodes),
        },
        "layers": _by_weight(aligned, graphs),
        "tried": [{"cause": name, "vanishes": vanished} for name, vanished in tried],
    }


def _by_weight(aligned: Aligned, graphs: tuple[Graph, Graph]) -> list[dict[str, Any]]:
    """How far the two runs are apart behind each matrix that both read once, in the order of the model: drift, no verdict."""
    sides = []
    for graph, side in zip(graphs, (aligned.left, aligned.right), strict=True):
        uses = [(i, slot) for i, slot in weights_read(graph, side.layout) if aligned.weights.get(slot, torch.zeros(0)).ndim == 2]
        sides.append({slot: i for i, slot in uses if sum(s == slot for _, s in uses) == 1})
    found = []
    for slot, index in sides[0].items():
        other = sides[1].get(slot)
        if other is None:
            continue
        a, b = (positions_first(g.value(i), batch=g.batch, seq=g.seq) for g, i in zip(graphs, (index, other), strict=True))
        if a is None or b is None or a.shape != b.shape:
            continue
        gap = float((a.double() - b.double()).abs().max()) / max(float(a.abs().max()), float(b.abs().max()), 1e-300)
        module = aligned.left.layout.slots[slot].parameter.rpartition(".")[0]
        found.append({"module": module, "difference": gap})
    return found


def _largest(left: Tensor, right: Tensor) -> tuple[float, float]:
    return float((left.double() - right.double()).abs().max()), float(torch.maximum(left.abs(), right.abs()).max())
