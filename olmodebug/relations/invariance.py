"""Runs that must agree in part, judged on the logits first and traced only when they do not.

A relation that holds costs two plain forwards. One that is broken is traced, placed at its line, and explained.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..compare import difference, roundings_limit
from ..double import KeepDouble
from ..explain import explain_run, source_lines
from ..load import SubjectCodeError
from ..own_code import own_code, quiet
from ..records import Case, Difference
from ..report import Severity
from ..settings import attention_choices
from ..settle import random_state_kept, set_seed, settled
from ..subject import Subject
from ..tracing.tracer import record
from .cases import Sizes, sizes, smallest_breaking
from .diagnose import diagnose
from .pair import Pair, pair_record
from .patterns import Diagnosis
from .relation import Culprit, Part, localise, model_sizes
from .repair import Found


@dataclass(slots=True, kw_only=True)
class Violation:
    """A pair that does not agree: how far apart, in which row and position, and the ops to blame."""

    pair: Pair
    difference: Difference
    limit: float
    culprits: list[Culprit] = field(default_factory=list)
    diagnoses: list[Diagnosis] = field(default_factory=list)
    setting: str = ""
    twin: Subject | None = None

    @property
    def position(self) -> int:
        start = self.pair.part.columns.indices(self.pair.part.seq)[0] if self.pair.part.columns else 0
        return start + self.difference.index[1]

    @property
    def row(self) -> int:
        start = self.pair.part.rows.indices(self.pair.part.batch)[0] if self.pair.part.rows else 0
        return start + self.difference.index[0]


def limit_of(twin: Subject) -> float:
    """The relative difference that rounding alone can make in this twin, from the dtypes that its forward uses."""
    if twin.limit is None:
        twin.limit = _measured_limit(twin)
    return twin.limit


def _measured_limit(twin: Subject) -> float:
    batch, seq = twin.sizes()
    case = Case(name="dtypes", input_ids=twin.token_ids(batch, seq))
    with torch.no_grad(), quiet(), own_code(twin, case):
        recording = record(twin.model, lambda: twin.call(case))
    return roundings_limit(recording.dtypes())


def settings_of(subject: Subject, *, train: bool = True, dtype: torch.dtype = torch.float64) -> Iterator[tuple[str, Subject]]:
    """The twins that a property must hold on: as given, in train mode, and with each other attention implementation."""
    yield "", subject.twin(dtype=dtype)
    if train:
        yield "train mode", subject.twin(dtype=dtype, training=True)
    for name in attention_choices(subject.model):
        yield f"{name} attention", subject.twin(dtype=dtype, attention=name)


def violation(twin: Subject, pair: Pair, *, limit: float, place: bool = True) -> Violation | None:
    """How a pair disagrees on this twin beyond `limit`, with its culprits; None when it agrees."""
    twin = _finite_twin(twin, pair)
    if twin.dtype != torch.float64:
        limit = max(limit, roundings_limit({"float32"}))
    left, right = twin.remembered(pair.left, lambda: run(twin, pair.left)), run(twin, pair.right)
    found = _disagreement(left, right, pair.part, limit)
    if found is None:
        return None
    again = run(twin, pair.left)
    floor = _disagreement(left, again, pair.part, 0.0)
    if floor is not None and found.max_abs <= 32 * floor.max_abs:
        return None  # the model does not repeat itself this closely: the determinism probes say so
    result = Violation(pair=pair, difference=found, limit=limit, twin=twin)
    return _placed(twin, result, run) if place else result


def _placed(twin: Subject, result: Violation, runs: Callable[[Subject, Case], Tensor]) -> Violation:
    """The violation with the ops where its two runs part, and why."""
    pair, limit = result.pair, result.limit
    result.culprits = localise(
        twin.model,
        lambda: runs(twin, pair.left),
        lambda: runs(twin, pair.right),
        part=pair.part,
        limit=limit,
        violated=lambda a, b: _disagreement(a, b, pair.part, limit) is not None,
    )
    result.diagnoses = [diagnose(culprit, pair.part, hidden=pair.hidden) for culprit in result.culprits]
    return result


def below_rounding(twin: Subject, pair: Pair) -> Violation | None:
    """How a pair disagrees by less than float32 shows, where the forward casts to it: a fresh model's own small weights can
    make a leak that small. Every cast is kept in float64 here; None where it agrees, or does not run so."""
    limit = roundings_limit({"float64"})
    if twin.dtype != torch.float64 or limit_of(twin) <= limit:
        return None
    try:
        left, right, again = (run_in_double(twin, case) for case in (pair.left, pair.right, pair.left))
    except SubjectCodeError:  # code that insists on float32
        return None
    found = _disagreement(left, right, pair.part, limit)
    if found is None or _disagreement(left, again, pair.part, 0.0) is not None:
        return None
    return _placed(twin, Violation(pair=pair, difference=found, limit=limit, twin=twin), run_in_double)


def run_in_double(twin: Subject, case: Case) -> Tensor:
    """Logits of one run in which casts to float32 stay in float64."""
    with KeepDouble():
        return run(twin, case)


def _finite_twin(twin: Subject, pair: Pair) -> Subject:
    """The twin, or one in float32 where float64 alone gives no finite logits: code that casts to float32 on the way
    turns float64's finfo.min into -inf, and a comparison of NaN with NaN would prove nothing."""
    rows, columns = pair.part.rows or slice(None), pair.part.columns or slice(None)
    left = twin.remembered(pair.left, lambda: run(twin, pair.left))
    if twin.dtype == torch.float64 and not bool(torch.isfinite(left[rows][:, columns]).all()):
        single = twin.fresh_twin(dtype=torch.float32, training=twin.model.training)
        if bool(torch.isfinite(run(single, pair.left)[rows][:, columns]).all()):
            return single
    return twin


def run(twin: Subject, case: Case) -> Tensor:
    """Logits `[batch, seq_len, vocab]` of one run from the twin's seed; an exception of the model is a SubjectCodeError."""
    with random_state_kept(), quiet():
        set_seed(twin.seed)
        with own_code(twin, case):
            return twin.logits(case).cpu()


def findings_of(
    result: Violation,
    *,
    message: str,
    severity: Severity = "error",
    smallest: Pair | None = None,
    fallback: Diagnosis | None = None,
    altered: bool = False,
) -> list[Found]:
    """One finding for each culprit, or one without a line where none could be placed, with the smallest pair that shows it
    as values. A twin that a probe has altered (`altered`) cannot be made again from values, and the pair says nothing without it."""
    shown = smallest or result.pair
    evidence: dict[str, Any] = {
        "largest change": result.difference.max_abs,
        "logits of magnitude": result.difference.scale,
        "limit": result.limit * result.difference.scale,
        "logits that change": f"{result.difference.mismatched} of {result.difference.total}",
    }
    if result.setting:
        evidence["setting"] = result.setting
    base = Found(
        probe="",
        severity=severity,
        message=message + (f" ({result.setting})" if result.setting else ""),
        expected="no change beyond rounding",
        observed=f"a change of {result.difference.max_abs:.3g} at row {result.row}, position {result.position}",
        evidence=evidence,
        case=shown.right,
        records=(pair_record(result.twin, shown),) if result.twin is not None and not altered else (),
    )
    if not result.culprits:
        nothing = fallback or Diagnosis()
        return [replace(base, cause=nothing.cause, fix=nothing.fix)]
    found = []
    for culprit, diagnosis in zip(result.culprits, result.diagnoses, strict=True):
        told = diagnosis if diagnosis.cause or fallback is None else fallback
        more: dict[str, Any] = dict(told.evidence or {})
        if culprit.confirmed:
            more["confirmed"] = "with the agreeing values put back here the violation is gone"
        if culprit.module_only:
            more["placed at"] = "the smallest module; its ops could not be told apart"
        if culprit.source is not None and culprit.event is not None and culprit.event.where.line != culprit.where.line:
            more["it enters at"] = f"line {culprit.event.where.line} ({culprit.event.op})"
        found.append(
            replace(
                base,
                where=culprit.where,
                source=source_lines(culprit.where),
                cause=told.cause,
                fix=told.fix,
                edits=told.edits,
                ruled_out=told.ruled_out,
                evidence=evidence | more,
            )
        )
    return found


def crash(twin: Subject, case: Case, error: BaseException, *, message: str | None = None) -> Found:
    """The finding for an exception that the model raised on a case."""
    explanation = explain_run(twin, lambda: twin.logits(case), error, case=case)
    text = f"{message}: {explanation.message}" if message else None
    return explanation.finding(case=case, message=text)


def base_part(twin: Subject, case: Case, *, rows: slice | None = None, columns: slice | None = None) -> Part:
    """What must agree between runs on cases of this size."""
    return Part(batch=case.batch_size, seq=case.seq_len, rows=rows, columns=columns, fixed=model_sizes(twin.model))


def drawn(twin: Subject, make: Callable[[Sizes], Pair], *, limit: float, least_batch: int = 1) -> Violation | None:
    """A violation on cases that Hypothesis draws, shrunk to the smallest; None when none of them breaks the rule."""
    longest = min(24, twin.usable_positions or 24)

    def broken(chosen: Sizes) -> bool:
        try:
            return violation(twin, make(chosen), limit=limit, place=False) is not None
        except SubjectCodeError:
            return False  # a size that the model does not take is another probe's question

    if longest < 2:
        return None
    found = smallest_breaking(sizes(least_batch=least_batch, longest=longest), broken)
    return violation(twin, make(found), limit=limit) if found is not None else None


def smallest(candidates: Iterable[Pair], broken: Callable[[Pair], bool]) -> Pair | None:
    """The first pair, in order of size, that is broken; one that cannot run is passed over."""
    for pair in candidates:
        try:
            with settled():
                if broken(pair):
                    return pair
        except SubjectCodeError:
            continue
    return None


def _disagreement(left: Tensor, right: Tensor, part: Part, limit: float) -> Difference | None:
    rows, columns = part.rows or slice(None), part.columns or slice(None)
    return difference(left[rows][:, columns], right[rows][:, columns], relative_limit=limit)
