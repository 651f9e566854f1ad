"""What became of findings of an earlier run: judged again on their values where they have some, by their probe elsewhere."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from .examine import Result, plain_finding
from .load import SubjectCodeError
from .probe import Probe
from .relations.repair import Found
from .relations.stored import CHUNKS, DRAWS, RELATION, broken_by, drawn_before
from .report import Severity
from .settle import settled
from .subject import Subject

FIXED, FAILS, ERROR, NOT_REACHED, NOT_APPLICABLE = "fixed", "still fails", "error", "not reached", "does not apply"
SEVERITIES = get_args(Severity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One probe's part of a finding: `finding` is its number in the earlier report, `text` says what was done and seen."""

    finding: int
    probe: str
    status: str
    text: str


def replay_probe(probe: Probe, subject: Subject, stored: Mapping[str, Any], run: Callable[[], Result]) -> tuple[Result, list[Replayed]]:
    """The result of running a probe again, and what became of each recorded finding that it had a part in.

    A recorded error that still breaks its rule is an error of the probe, though it passes on the cases that it draws now.
    """
    mine = [(int(number), record) for number, records in stored.items() for record in records if record["probe"] == probe.name]
    subject.draws.given = drawn_before(record for _, record in mine)
    result = run()
    subject.draws.given = {}
    again, broken = [], []
    for number, record in mine:
        status, text = _judged(subject, record, result)
        again.append(Replayed(finding=number, probe=probe.name, status=status, text=text))
        if status == FAILS and record.get("kind") in (RELATION, CHUNKS) and record["severity"] == "error":
            broken.append(Found(probe=probe.name, severity="error", message=text, records=(record,)))
    if not broken or result.outcome.status != "passed":
        return result, again
    outcome = replace(result.outcome, status="failed")
    return Result(outcome=outcome, findings=(plain_finding(broken[0]), *result.findings), found=(broken[0], *result.found)), again


def _judged(subject: Subject, record: Mapping[str, Any], result: Result) -> tuple[str, str]:
    kind = record.get("kind")
    if kind is None or kind == DRAWS:
        return _by_probe(record, result, "on the recorded values" if kind else "again, since its case has no values")
    try:
        with settled(subject.model, seed=subject.seed):
            finding = broken_by(subject, record)
    except SubjectCodeError as error:
        cause = error.__cause__
        return ERROR, f"the model no longer runs on the recorded case: {type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
    return (FAILS, finding.message) if finding else (FIXED, "the recorded case holds now")


def _by_probe(record: Mapping[str, Any], result: Result, how: str) -> tuple[str, str]:
    status, reason = result.outcome.status, (result.outcome.reason or "").strip().rpartition("\n")[2]
    ran = f"the probe was run {how}"
    if status == "error":
        return ERROR, f"{ran}, and broke: {reason}"
    if status in ("skipped", "not-applicable"):
        return (NOT_REACHED if status == "skipped" else NOT_APPLICABLE), reason
    weakest = SEVERITIES.index(record["severity"])
    left = next((finding for finding in result.findings if SEVERITIES.index(finding.severity) <= weakest), None)
    return (FAILS, f"{ran}: {left.message}") if left else (FIXED, f"{ran}, and passes")
