"""Probes run on a subject, one after the other, and what they found as a report.

Nothing a probe meets ends the run: an exception of the subject is a finding, an exception of ours an outcome `error`
with its traceback, and every other probe still runs.
"""

import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeVar

import torch

from .convention import NoLogits
from .device_errors import is_lost
from .errors import SubjectError
from .explain import explain
from .load import SubjectCodeError
from .on_device import index_checked
from .own_code import refused
from .probe import NotApplicable, Probe, Skipped
from .records import Where
from .relations.earlier import fails_after_another
from .relations.invariance import run
from .relations.repair import Found, RepairedSource
from .relations.stored import draws_record
from .report import Finding, Outcome
from .settings import attention_choices
from .settle import settled
from .sources import Sources, Spot, is_ours, traceback_frames
from .spec import Job, device_named, resolve
from .subject import Subject

BUILD = "build.constructs"
FIRST_RUN = "build.runs"

F = TypeVar("F", bound=Finding)


@dataclass(slots=True, kw_only=True)
class Result:
    """One probe's outcome and findings; `found` are the same with the edits and the values that the report does not carry.

    `root` is the failed probe because of which what depends on this one is left out: itself, or the one that it was left
    out for; None where it stands in nobody's way.
    """

    outcome: Outcome
    findings: tuple[Finding, ...] = ()
    found: tuple[Found, ...] = ()
    blocked_by: str | None = None

    @property
    def root(self) -> str | None:
        return self.outcome.probe if self.outcome.status in ("failed", "expected-failure") else self.blocked_by


@dataclass(slots=True, kw_only=True)
class Building:
    """The subject, or the finding that says why there is none. The two build outcomes are always there."""

    subject: Subject | None = None
    results: list[Result] = field(default_factory=list)


def build(job: Job) -> Building:
    """Build the subject. SubjectError (exit 2) when the spec leads nowhere; what the subject's code raises is a finding."""
    started = time.perf_counter()
    try:
        with index_checked(device_named(job.device)):
            subject = resolve(job)
    except SubjectCodeError as error:
        return Building(results=unbuilt(error, job, time.perf_counter() - started))
    seconds = time.perf_counter() - started
    results = [Result(outcome=Outcome(probe=name, status="passed", seconds=seconds)) for name in (BUILD, FIRST_RUN)]
    return Building(subject=subject, results=results)


def unbuilt(error: SubjectCodeError, job: Job, seconds: float) -> list[Result]:
    """The two build outcomes, and the finding, for a subject whose own code raised while it was built or first run."""
    at_build = error.stage != "first run"
    name = BUILD if at_build else FIRST_RUN
    finding: Finding = replace(explain(error).finding(), probe=name)
    finding = verified(finding, job, lambda: _builds(job, finding))
    results = [] if at_build else [Result(outcome=Outcome(probe=BUILD, status="passed", seconds=seconds))]
    results.append(Result(outcome=Outcome(probe=name, status="failed", seconds=seconds), findings=(plain_finding(finding),)))
    if at_build:
        results.append(Result(outcome=Outcome(probe=FIRST_RUN, status="skipped", reason=f"{BUILD} failed")))
    return results


def blocker(probe: Probe, failed: Mapping[str, str]) -> str | None:
    """The failed probe because of which this one cannot say anything; None where nothing stands in its way."""
    return next((failed[name] for name in probe.after if name in failed), None)


def run_probe(
    probe: Probe,
    subject: Subject,
    *,
    job: Job | None = None,
    failed: Mapping[str, str] = MappingProxyType({}),
    expected: Mapping[str, str] | None = None,
) -> Result:
    """Run one probe. `failed` are the probes that failed before or were left out, each with its `root`; `expected` maps
    names to why they may fail."""
    if subject.lost is not None:
        return Result(outcome=Outcome(probe=probe.name, status="skipped", reason=f"the device was lost under {subject.lost}"))
    root = blocker(probe, failed)
    if root is not None:
        return Result(outcome=Outcome(probe=probe.name, status="skipped", reason=f"it depends on {root}, which failed"), blocked_by=root)
    started = time.perf_counter()

    def outcome(status: str, reason: str | None = None) -> Outcome:
        return Outcome(probe=probe.name, status=status, reason=reason, seconds=time.perf_counter() - started)  # type: ignore[arg-type]

    findings: list[Found] = []
    subject.draws.made.clear()
    try:
        with settled(subject.model, seed=subject.seed), index_checked(subject.device):
            for finding in probe.function(subject):
                found = _found(finding, probe, subject)
                if not any((found.message, found.where) == (other.message, other.where) for other in findings):
                    findings.append(found)  # what two cases show at one line is told once
    except NotApplicable as error:
        if not findings:
            return Result(outcome=outcome("not-applicable", str(error)))
    except Skipped as error:
        if not findings:
            return Result(outcome=outcome("skipped", str(error)))
    except (SubjectCodeError, SubjectError) as error:
        if is_lost(error):
            return _device_lost(probe, subject, error, outcome("failed"))
        if subject.dtype != torch.float64 and not subject.keep_dtype and not findings and (asked := _in_own_dtype(probe, subject)):
            return Result(outcome=outcome(*asked))
        if (refusal := refused(error)) is not None and not findings:
            return Result(outcome=outcome("not-applicable", f"the model refuses this case: {refusal}"))
        findings.append(_found(_raised(subject, error), probe, subject))
    except Exception as error:
        if is_lost(error):
            return _device_lost(probe, subject, error, outcome("failed"))
        spot = Sources(subject.model).spot_of(error)
        if not isinstance(error, NoLogits) and (is_ours(error) or spot is None or _of_the_probe(error, spot, probe)):
            return Result(outcome=outcome("error", traceback.format_exc()), findings=tuple(plain_finding(f) for f in findings))
        raised = _without_instruments(subject, error) or SubjectCodeError("a forward under the instruments of this probe")
        raised.__cause__ = error
        findings.append(_found(_raised(subject, raised), probe, subject))
    if job is not None:
        findings = [verified(f, job, lambda: _holds(probe, job, f, findings)) for f in findings]  # noqa: B023 - called at once
    wrong = any(finding.severity == "error" for finding in findings)
    reason = (expected or {}).get(probe.name)
    plain = tuple(plain_finding(finding) for finding in findings)
    if reason is not None and wrong:
        notes = tuple(replace(finding, severity="note") for finding in plain)
        return Result(outcome=outcome("expected-failure", reason), findings=notes, found=tuple(findings))
    if reason is not None:
        message = f"{probe.name} passes, though it was expected to fail ({reason}); take it off the list"
        unexpected = Finding(probe=probe.name, severity="error", message=message)
        return Result(outcome=outcome("failed", "it was expected to fail and passes"), findings=(unexpected, *plain))
    return Result(outcome=outcome("failed" if wrong else "passed"), findings=plain, found=tuple(findings))


def _without_instruments(subject: Subject, error: Exception) -> SubjectCodeError | None:
    """The error of a plain forward with one of the attentions that the model offers; None where none raises one of this kind."""
    for name in attention_choices(subject.model):
        twin = subject.twin(attention=name)
        case = twin.first_case()
        try:
            run(twin, case)
        except SubjectCodeError as plain:
            if type(plain.__cause__) is type(error):
                return plain
    return None


def _of_the_probe(error: Exception, spot: Spot, probe: Probe) -> bool:
    """Whether the probe's own file raised it, outside of any call of a module: a probe may stand beside the model."""
    if spot.code.co_filename != probe.function.__code__.co_filename:
        return False
    return all(frame.f_code.co_name != "_call_impl" for frame, _, _ in traceback_frames(error.__traceback__))


def _in_own_dtype(probe: Probe, subject: Subject) -> tuple[str, str] | None:
    """The status, with its reason, of a probe that raised on a copy in float64, where the copies stay in the model's own
    dtype; None where it finds an error or raises there too: then what was raised stands."""
    try:
        with settled(subject.model, seed=subject.seed), index_checked(subject.device):
            if any(found.severity == "error" for found in probe.function(subject.in_own_dtype())):
                return None
    except NotApplicable as error:
        return "not-applicable", str(error)
    except Skipped as error:
        return "skipped", str(error)
    except Exception:  # it raises there too
        return None
    return "passed", "it raises on a copy in float64 and not in its own dtype, in which it was asked instead"


def _device_lost(probe: Probe, subject: Subject, error: BaseException, outcome: Outcome) -> Result:
    """The finding for a device that stopped under a probe; whatever comes after it is left out."""
    subject.lost = probe.name
    raised = first_cause(error)
    where = explain(error).finding().where if isinstance(error, SubjectCodeError) else Where()
    finding = Finding(
        probe=probe.name,
        severity="error",
        message=f"the device stopped: {str(raised).strip().partition(chr(10))[0][:200]}",
        where=where,
        fix=f"CUDA_LAUNCH_BLOCKING=1 olmodebug check {subject.spec} --device {subject.device.type} -k {probe.name} raises it at its own line",
        raised=f"{type(raised).__name__}: {str(raised).strip().partition(chr(10))[0][:200]}",
    )
    return Result(outcome=outcome, findings=(finding,))


def first_cause(error: BaseException) -> BaseException:
    """The error that others were raised from; the first that says so of a group."""
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    cause = next((part for part in parts if is_lost(part)), error.__cause__)
    return error if cause is None else first_cause(cause)


def verified(finding: F, job: Job, holds: Callable[[], bool]) -> F:
    """The finding with `fix_verified` set when its edits, made on a copy of the source, mend the probe."""
    edits = finding.edits if isinstance(finding, Found) else ()
    if not edits or not job.spec.partition(":")[0].endswith(".py"):
        return finding
    try:
        return replace(finding, fix_verified=holds())
    except Exception:  # a repair that does not even load is no repair; the finding stands without the mark
        return finding


def _holds(probe: Probe, job: Job, finding: Finding, findings: Iterable[Finding]) -> bool:
    """Whether the probe on the repaired copy finds no error but those of the other functions that it found before."""
    others = {other.where.function for other in findings} - {finding.where.function}
    edits = finding.edits if isinstance(finding, Found) else ()
    with RepairedSource(job, edits) as subject:
        if subject is None:
            return False
        with settled(subject.model, seed=subject.seed), index_checked(subject.device):
            return all(left.severity != "error" or left.where.function in others for left in probe.function(subject))


def _builds(job: Job, finding: Finding) -> bool:
    edits = finding.edits if isinstance(finding, Found) else ()
    with RepairedSource(job, edits) as subject:
        return subject is not None


def _raised(subject: Subject, error: BaseException) -> Finding:
    if isinstance(error, SubjectCodeError):
        with settled(subject.model, seed=subject.seed), index_checked(subject.device):  # the failing run is traced again
            return (fails_after_another(subject, error) or explain(error)).finding(case=error.case)
    return Finding(probe="", severity="error", message=str(error))


def _found(finding: Finding, probe: Probe, subject: Subject) -> Found:
    """A probe's finding under its name, with what the probe has drawn where it brings no values of its own."""
    values = {name: getattr(finding, name) for name in Found.__dataclass_fields__ if hasattr(finding, name)}
    found = Found(**{**values, "probe": probe.name})
    drawn = draws_record(subject) if not found.records and found.severity != "note" else None
    return replace(found, records=(drawn,)) if drawn else found


def plain_finding(finding: Finding) -> Finding:
    """The finding as the report carries it."""
    return finding.told() if isinstance(finding, Found) else finding
