"""The parent of a check: it starts the child, reads its journal, and turns a death or a hang into a finding.

It loads no torch. A child that dies in one probe is started again for the others, so that nothing already found is lost.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import UsageError
from .process import Child, Death, innermost, last_line, run_child
from .report import Environment, Finding, Outcome, Report, SubjectInfo, finding_from, merge_by_root, root_groups, with_reproduction
from .store import Run

MOST_RESTARTS = 5
CASES = "cases.json"  # in a run's folder: the values of the cases behind each finding, by its number in the report
BUILD, FIRST_RUN = "build.constructs", "build.runs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a check was asked to do: the job that makes the subject, and which probes run on it; `stored` are the values of
    an earlier run's findings, by their number, that are tried again."""

    job: Mapping[str, Any]
    select: str | None = None
    own_probes: tuple[str, ...] = ()
    quick: bool = False
    expected: Mapping[str, str] = field(default_factory=dict)
    timeout_seconds: float = 300.0
    stored: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""


class InternalFault(Exception):
    """The child stopped for a fault of olmodebug's own; the text is its traceback."""


@dataclass(slots=True)
class _Journal:
    """Everything that the children have told so far."""

    probes: list[str] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    sections: dict[str, Any] = field(default_factory=dict)
    records: list[list[Any]] = field(default_factory=list)  # of each finding
    causes: list[tuple[int, int]] = field(default_factory=list)  # places in findings: the cause, what follows from it
    replayed: list[Mapping[str, Any]] = field(default_factory=list)
    subject: SubjectInfo | None = None
    environment: Environment | None = None
    step: str = BUILD
    unusable: str | None = None
    fault: str | None = None


def check(order: Order, run: Run, progress: Callable[[int, int, str, float], None], *, module: str = "olmodebug.child") -> Report:
    """Run an order in child processes, `python -m module`, and give back the report.

    `progress(done, total, step, seconds)` is called about five times a second. UsageError when the subject does not
    resolve, InternalFault when olmodebug itself broke before any probe could run.
    """
    started = time.monotonic()
    journal = _Journal()
    with tempfile.TemporaryDirectory(prefix="olmodebug-") as scratch:
        folder = run.folder or Path(scratch)
        for _ in range(MOST_RESTARTS):
            death = _one_child(order, journal, folder, Path(scratch), progress, started, module)
            if journal.unusable is not None:
                raise UsageError(journal.unusable)
            if journal.fault is not None:
                raise InternalFault(journal.fault)
            if death is None:
                break
            _record_death(journal, death, folder)
            if BUILD in journal.outcomes and journal.outcomes[BUILD].status == "failed":
                break
        if journal.findings and run.folder is not None:
            with contextlib.suppress(OSError):  # the run is told, recorded or not
                (run.folder / CASES).write_text(json.dumps(_cases(journal)), encoding="utf-8")
    return _report(order, journal, run, time.monotonic() - started)


def _one_child(
    order: Order,
    journal: _Journal,
    folder: Path,
    scratch: Path,
    progress: Callable[[int, int, str, float], None],
    started: float,
    module: str,
) -> Death | None:
    """Run one child to its end; None when it ended well or said why it could not go on, else how it died."""
    # hypothesis would leave a folder in the user's working directory
    storage = os.environ.get("HYPOTHESIS_STORAGE_DIRECTORY", str(scratch / "hypothesis"))
    child = Child(
        module=module,
        folder=folder,
        timeout_seconds=order.timeout_seconds,
        environment={"HYPOTHESIS_STORAGE_DIRECTORY": storage},
    )
    message = {
        "job": dict(order.job),
        "select": order.select,
        "own_probes": list(order.own_probes),
        "quick": order.quick,
        "expected": dict(order.expected),
        "command": order.command,
        "stored": dict(order.stored),
        "done": [name for name in journal.outcomes if name not in (BUILD, FIRST_RUN)],
        "failed": [o.probe for o in journal.outcomes.values() if o.status in ("failed", "expected-failure")],
    }
    journal.step = BUILD

    def tick() -> None:
        progress(len(journal.outcomes), len(journal.probes) + 2, journal.step, time.monotonic() - started)

    death = run_child(child, message, lambda event: _note(journal, event), tick)
    return None if journal.unusable or journal.fault else death


def _note(journal: _Journal, event: dict[str, Any]) -> None:
    kind = event["event"]
    if kind == "start":
        journal.step = event["step"]
    elif kind == "probes":
        journal.probes = event["names"]
    elif kind == "environment":
        journal.environment = Environment(**event["value"])
    elif kind == "subject":
        value = event["value"]
        journal.subject = SubjectInfo(**{**value, "assumptions": tuple(value["assumptions"])})
    elif kind == "result":
        outcome = Outcome(**event["outcome"])
        if outcome.probe not in journal.outcomes:
            journal.outcomes[outcome.probe] = outcome
            journal.findings += [finding_from(finding) for finding in event["findings"]]
            records = event.get("records", [])
            journal.records += [records[i] if i < len(records) else [] for i in range(len(event["findings"]))]
            journal.replayed += event.get("replayed", [])
    elif kind == "section":
        journal.sections[event["topic"]] = event["value"]
    elif kind == "causes":
        journal.causes = [(_place(journal, *cause), _place(journal, *follower)) for cause, follower in event["value"]]
    elif kind == "unusable":
        journal.unusable = event["text"]
    elif kind == "fault":
        journal.fault = event["traceback"]


def _place(journal: _Journal, probe: str, number: int) -> int:
    """Where a probe's finding stands in the list of all, by its number among that probe's own."""
    return [i for i, finding in enumerate(journal.findings) if finding.probe == probe][number]


def _record_death(journal: _Journal, death: Death, folder: Path) -> None:
    step = journal.step
    if step in journal.outcomes:
        return  # it was told before the process ended, as where a device was lost
    while_doing = "building the model" if step == BUILD else f"running {step}"
    where = innermost(folder / "stacks.txt")
    last = last_line(folder / "output.txt")
    journal.outcomes[step] = Outcome(probe=step, status="failed")
    journal.records.append([])
    journal.findings.append(
        Finding(
            probe=step,
            severity="error",
            message=f"the process {death.text} while {while_doing}",
            where=where,
            fix="look for an endless loop, a lock or a wait for input; --timeout allows more time" if death.hung else None,
            evidence={"last line of its output": last[:200]} if last else {},
        )
    )
    if step == BUILD:
        journal.outcomes[FIRST_RUN] = Outcome(probe=FIRST_RUN, status="skipped", reason=f"{BUILD} failed")


def _report(order: Order, journal: _Journal, run: Run, seconds: float) -> Report:
    from .environment import environment

    built = all(journal.outcomes.get(name, Outcome(probe=name, status="failed")).status == "passed" for name in (BUILD, FIRST_RUN))
    outcomes = [journal.outcomes[name] for name in (BUILD, FIRST_RUN) if name in journal.outcomes]
    for name in journal.probes:
        missing = Outcome(probe=name, status="skipped", reason="the process died too often" if built else "the model does not build or run")
        outcomes.append(journal.outcomes.get(name, missing))
    if built and not journal.probes and order.select != "build":
        outcomes = []  # -k selected nothing: that the model builds is no answer to what was asked
    if order.stored:
        journal.sections["replay"] = {"findings": [*journal.replayed, *_unjudged(order, journal)]}
    spec = str(order.job["spec"])
    report = Report(
        subject=journal.subject or SubjectInfo(spec=spec),
        environment=journal.environment or environment(seed=int(order.job.get("seed", 0)), command=order.command),
        outcomes=tuple(outcomes),
        findings=merge_by_root(journal.findings, journal.causes),
        sections=journal.sections,
        seconds=round(seconds, 3),
        created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        id=run.id,
    )
    return with_reproduction(report, lambda probe: reproduce(order, probe))


def _unjudged(order: Order, journal: _Journal) -> Iterator[dict[str, Any]]:
    """Recorded findings that no child spoke of: those of the build, and of a probe that took the process with it again."""
    judged = {(part["finding"], part["probe"]) for part in journal.replayed}
    words = {"passed": "fixed", "failed": "still fails", "skipped": "not reached"}
    for number, records in order.stored.items():
        for probe in dict.fromkeys(record["probe"] for record in records):
            if (int(number), probe) in judged:
                continue
            outcome = journal.outcomes.get(probe)
            message = next((finding.message for finding in journal.findings if finding.probe == probe), None)
            text = message or (outcome and outcome.reason) or ("it passes" if outcome and outcome.status == "passed" else "it was not run")
            yield {"finding": int(number), "probe": probe, "status": words.get(outcome.status if outcome else "", "error"), "text": text}


def _cases(journal: _Journal) -> dict[str, list[Any]]:
    """The values behind each finding of the report: its own, and those of the findings that joined it."""
    found: dict[str, list[Any]] = {}
    for number, group in enumerate(root_groups(journal.findings, journal.causes), start=1):
        for i in group:
            finding, records = journal.findings[i], journal.records[i]
            about = {"probe": finding.probe, "severity": finding.severity}
            found.setdefault(str(number), []).extend({**record, **about} for record in records or [{}])
    return found


def reproduce(order: Order, probe: str) -> str:
    """The command line that runs one probe of this order again."""
    import shlex

    job = order.job
    parts = ["olmodebug", "check", str(job["spec"])]
    parts += [f"--config={key}={json.dumps(value)}" for key, value in dict(job.get("config") or {}).items()]
    parts += [f"--{name}={job[name]}" for name in ("tokenizer", "adapter", "dtype") if job.get(name)]
    parts += [f"--vocab-size={job['vocab_size']}"] if job.get("vocab_size") else []
    parts += [f"--seed={job['seed']}"] if job.get("seed") else []
    parts += [f"--device={job['device']}"] if job.get("device", "cpu") != "cpu" else []
    parts += ["--download"] if job.get("download") else []
    parts += [f"--probes={path}" for path in order.own_probes]
    if not probe.startswith("build."):
        parts += ["-k", probe]
    return shlex.join(parts)


def order_from(record: Mapping[str, Any]) -> Order:
    """The order that a run's `job.json` holds."""
    return Order(**{**record, "own_probes": tuple(record["own_probes"])})


def order_record(order: Order) -> dict[str, Any]:
    """An order as JSON-able values."""
    return asdict(order)
