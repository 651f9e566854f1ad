"""Two recorded runs of a training script, on any numbers of processes: their first training step, held against each other.

`olmodebug run --record FOLDER -- CMD` makes the records. Nothing here chooses data, weights or optimizer: where the runs did
not see the same, that is said, and nothing is concluded from the rest.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..compare import roundings_limit
from ..environment import environment
from ..errors import UsageError
from ..records import Where
from ..report import Finding, Outcome, Report, SubjectInfo, with_reproduction
from . import rules, step_rules
from .calls import of_ranks, parted
from .compare import in_short, too_short, without_names
from .errors import errors_by_layer, replica_counts
from .logical import as_one, gather
from .pair import Pair
from .record import RankRecord, read_records
from .replicas import first_unlike_collectives, unlike_replicas
from .run import COMPLETES, MATCH

REPLICAS = "ranks.replicas-agree"
DATA = "ranks.same-data"
# Rules on values, in the order in which a step computes them.
VALUES: tuple[tuple[str, Callable[[Pair], Finding | None]], ...] = (
    ("ranks.same-start", rules.start),
    ("ranks.forward-agrees", rules.forward),
    ("ranks.loss-agrees", rules.loss),
    ("ranks.norm-agrees", rules.norm),
    ("ranks.gradients-agree", rules.gradients),
)
STEP = "ranks.step-agrees"


def compare_recorded(left: Path, right: Path, *, command: str, id: str) -> Report:
    """The report on the record at `right`, held against the one at `left`. UsageError or ReportError where one cannot be read."""
    started = time.monotonic()
    one, many = read_records(left), read_records(right)
    judged = _Judged()
    for folder, ranks in ((left, one), (right, many)):
        judged.whole(folder, ranks)
    compared = None
    if not judged.findings:
        for folder, ranks in ((left, one), (right, many)):
            judged.alike(folder, ranks)
        compared = judged.values(one, many)
    section = {
        "world": len(many),
        "strategy": str(right),
        "beside": {"world": len(one), "strategy": str(left)},
        "compared": compared,
        "collectives": [sum(1 for _ in record.collectives()) for record in many],
    }
    if judged.pair is not None and compared is not None:
        stages = ("start", "forward", "gradient", "state") if judged.ruled else ("start",)
        section |= {"layers": errors_by_layer(judged.pair, judged.findings, stages=stages), "replicas": replica_counts(judged.pair)}
    report = Report(
        subject=SubjectInfo(spec=f"{left} and {right}"),
        environment=environment(seed=0, command=command),
        outcomes=tuple(judged.outcomes),
        findings=tuple(judged.findings),
        sections={"ranks": section},
        seconds=round(time.monotonic() - started, 3),
        created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        id=id,
    )
    return with_reproduction(report, lambda _: command)


class _Judged:
    """Findings and outcomes as they come."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.outcomes: list[Outcome] = []
        self.pair: Pair | None = None
        self.ruled = False  # whether the rules on values were asked

    def whole(self, folder: Path, ranks: list[RankRecord]) -> None:
        """Every rank's record is there and came to its end."""
        there, world = {record.rank for record in ranks}, max(record.world for record in ranks)
        gone = [rank for rank in range(world) if rank not in there]
        cut = [record.rank for record in ranks if record.end() is None]
        if gone:
            raise UsageError(f"{folder} lacks the records of {of_ranks(gone)} of {world}")
        if cut:
            message, where = f"the first training step of {of_ranks(cut)} did not come to its end in {folder}", Where()
            unlike = first_unlike_collectives(ranks)
            if unlike is not None:
                words, where = parted(unlike)
                message = f"the first training step did not come to its end in {folder}: {words}"
            self._found(Finding(probe=COMPLETES, severity="error", message=message, where=where))
        elif not any(outcome.probe == COMPLETES for outcome in self.outcomes):
            self.outcomes.append(Outcome(probe=COMPLETES, status="passed"))

    def alike(self, folder: Path, ranks: list[RankRecord]) -> None:
        """The ranks of one run call the same collectives, and what each holds whole is the same bits."""
        if len(ranks) < 2:
            return
        unlike = first_unlike_collectives(ranks)
        if unlike is not None:
            message, place = parted(unlike)
            self._found(Finding(probe=MATCH, severity="error", message=f"{folder}: {message}", where=place))
        else:
            self.outcomes.append(Outcome(probe=MATCH, status="passed"))

    def values(self, one: list[RankRecord], many: list[RankRecord]) -> dict[str, int] | None:
        """The rules on values; how many tensors of each stage were compared, or None where the runs cannot be compared."""
        dtypes = {dtype for record in (*one, *many) for dtype in (record.end() or {}).get("dtypes", [])}
        pair = Pair(as_one(gather(one), one), gather(many), many, roundings_limit(dtypes), clipped=False)
        self.pair = pair
        data = rules.data(pair)
        if data is not None and data.message.startswith("a rank saw"):  # another order or another seed is no fault of a rank's
            reason = "the two runs did not see the same rows in their first step: give both the same global batch"
            self.findings.append(replace(data, probe=DATA, severity="warning", message=reason))
            self.outcomes.append(Outcome(probe=DATA, status="failed"))
            self._skip([name for name, _ in VALUES] + [STEP], "the runs did not see the same rows")
            return None
        self._rule(DATA, data)
        if short := in_short([*one, *many]):
            self._rule("ranks.same-start", rules.start(pair))
            self._skip([name for name, _ in VALUES[1:]] + [STEP], too_short(short))
        else:
            self.ruled = True
            for probe, rule in VALUES:
                self._rule(probe, rule(pair))
            optimizers = {name for record in (*one, *many) for name in (record.end() or {}).get("optimizers", [])}
            self._rule(STEP, step_rules.recorded_step(pair, optimizers))
        drifted = None if self._failed() or len(many) < 2 else _drifted(pair, many)
        if drifted is not None:
            self._rule(REPLICAS, drifted)
        both = {stage: set(pair.held.of(stage)) & set(pair.truth.of(stage)) for stage in ("forward", "gradient", "step", "state")}
        return {stage: len(names) if self.ruled else 0 for stage, names in both.items()}

    def _failed(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)

    def _rule(self, probe: str, finding: Finding | None) -> None:
        """One root: what parts later parts because of it."""
        if finding is None:
            unnamed = without_names(self.pair, probe) if self.pair is not None else None
            self.outcomes.append(Outcome(probe=probe, status="skipped" if unnamed else "passed", reason=unnamed))
        elif self._failed():
            first = self.findings[0]
            self.findings[0] = replace(first, also=(*first.also, probe))
            self._skip([probe], f"it depends on {first.probe}, which failed")
        else:
            self._found(replace(finding, probe=probe))

    def _found(self, finding: Finding) -> None:
        self.findings.insert(0, finding)
        self.outcomes.append(Outcome(probe=finding.probe, status="failed" if finding.severity == "error" else "passed"))

    def _skip(self, probes: list[str], reason: str) -> None:
        self.outcomes += [Outcome(probe=probe, status="skipped", reason=reason) for probe in probes]


def _drifted(pair: Pair, ranks: list[RankRecord]) -> Finding | None:
    """A weight that every rank holds whole, and that is not the same bits on all of them after the step."""
    shapes: dict[str, Any] = {name: held.parts[0].shape for name, held in pair.truth.of("start").items()}
    for stage, name, other in unlike_replicas(ranks, stages=("step",)):
        held = pair.held.of(stage).get(name)
        if held is None or held.parts[0].shape != shapes.get(name):
            continue  # shards of the same size, or a layout that is not known
        message = (
            f"after the step {name} of {of_ranks(other)} is not that of rank 0, though both are right to rounding: replicas drift apart"
        )
        return Finding(probe=REPLICAS, severity="warning", message=message, where=Where(module=name.rpartition(".")[0]))
    return None
