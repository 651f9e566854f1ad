"""One training step on many ranks against the same step in one process: where they part first, and why.

Tensors are compared in their logical form: a DTensor by its placements, a plain tensor under the layouts it can have
(every rank the whole, its rows, a shard, a share of a sum). Everything is in float64, where a broken rule is far above
rounding. A cause is told only when it reproduces the observed numbers to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..report import Finding, Outcome
from . import rules, step_rules
from .errors import errors_by_layer, replica_counts
from .logical import gather
from .pair import Pair
from .record import RankRecord

EXACT = ("ranks.same-data", "ranks.same-start")  # what no arithmetic comes before
OF_WEIGHTS = {"ranks.same-start": "start", "ranks.gradients-agree": "gradient", "ranks.step-agrees": "step"}
SHORT = {"bfloat16", "float16"}  # in these, roundings are as large as what the rules on values look for


@dataclass(slots=True, kw_only=True)
class Comparison:
    """What was compared and what was found; `also` are rules that fail because of an earlier one."""

    findings: list[Finding]
    outcomes: list[Outcome]
    compared: dict[str, int]
    layers: list[dict[str, Any]]
    replicas: list[dict[str, Any]]


def compare_ranks(single: RankRecord, ranks: list[RankRecord], *, limit: float) -> Comparison:
    """Every rule over a single process's record and those of all ranks; `limit` is relative, as `roundings_limit` gives it."""
    pair = Pair(gather([single]), gather(ranks), ranks, limit)
    checks: list[tuple[str, Callable[[Pair], Finding | None]]] = [
        ("ranks.same-data", rules.data),
        ("ranks.same-start", rules.start),
        ("ranks.forward-agrees", rules.forward),
        ("ranks.loss-agrees", rules.loss),
        ("ranks.norm-agrees", rules.norm),
        ("ranks.gradients-agree", rules.gradients),
        ("ranks.step-agrees", step_rules.step),
    ]
    findings: list[Finding] = []
    outcomes: list[Outcome] = []
    short = in_short(ranks) - in_short([single])
    for probe, check in checks:
        if short and probe not in EXACT:
            outcomes.append(Outcome(probe=probe, status="skipped", reason=too_short(short)))
            continue
        finding = check(pair)
        outcomes.append(Outcome(probe=probe, status="passed" if finding is None or finding.severity != "error" else "failed"))
        if finding is None:
            if unnamed := without_names(pair, probe):
                outcomes[-1] = Outcome(probe=probe, status="skipped", reason=unnamed)
            continue
        if findings and findings[0].severity == "error":  # one root: what parts later parts because of it
            findings[0] = replace(findings[0], also=(*findings[0].also, probe))
            outcomes[-1] = Outcome(probe=probe, status="skipped", reason=f"it depends on {findings[0].probe}, which failed")
        elif finding.severity == "error":  # a warning before it, of another loss, is explained by it
            findings = [replace(finding, probe=probe, also=tuple(each.probe for each in findings))]
        else:
            findings.append(replace(finding, probe=probe))
    compared = {
        stage: 0 if short else len(set(pair.held.of(stage)) & set(pair.truth.of(stage)))
        for stage in ("forward", "gradient", "step", "state")
    }
    layers = errors_by_layer(pair, findings, stages=("start",) if short else ("start", "forward", "gradient", "step"))
    return Comparison(findings=findings, outcomes=outcomes, compared=compared, layers=layers, replicas=replica_counts(pair))


def without_names(pair: Pair, probe: str) -> str | None:
    """Why a rule on weights has compared nothing; None where it has."""
    stage = OF_WEIGHTS.get(probe)
    if stage is None or set(pair.held.of(stage)) & set(pair.truth.of(stage)):
        return None
    if stage != "start" and set(pair.held.of("start")) & set(pair.truth.of("start")):
        return "no weight was noted on both sides"
    return "no weight has its name of the other side: with the first FSDP, use_orig_params=True keeps the names"


def in_short(records: list[RankRecord]) -> set[str]:
    """The 16-bit dtypes that ops of a step wrote."""
    return {dtype for record in records for dtype in (record.end() or {}).get("dtypes", [])} & SHORT


def too_short(dtypes: set[str]) -> str:
    """Why values are not compared."""
    return f"the step computed in {', '.join(sorted(dtypes))}, whose roundings are as large as what is looked for: run it in float32"
