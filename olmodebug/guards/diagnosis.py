"""The report on a watched command, made from its journals alone: findings, outcomes a guard, and the section `guard`."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..environment import olmodebug_version
from ..process import innermost
from ..records import Where
from ..report import Environment, Finding, Outcome, Report, Severity, SubjectInfo, finding_from, plain
from .excerpts import lines_at
from .journal import Event, read_journals, softened
from .run import Ended, stacks_of
from .settings import Settings, redacted, secrets_of
from .unfinished import unfinished

SURVIVES = "process.survives"
DIVIDED = "loop.ranks-see-different-data"
ONE_MODEL = "loop.ranks-share-one-model"

TOPICS = {"index": "index", "numerics": "nan", "shape": "shape", "memory": "oom", "loop": "loop"}
ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}

NOT_SEEN = {
    "loop": "no optimizer step was seen",
}


def diagnose(command: Sequence[str], settings: Settings, ended: Ended, seconds: float) -> Report:
    """The report on a command that has ended."""
    secrets = secrets_of(os.environ)
    journals = [events for events in read_journals(settings.folder) if events]
    processes = [_process(events) for events in journals]
    working = [p for p in processes if p["ops"] or p["findings"]] or processes
    findings = _merged(journals, len(working), ended)
    noted = _noted_batches(journals)
    findings += _same_data(noted) + _apart(noted)
    findings += _death(settings.folder, ended)
    if ended.exit_code and not findings:
        findings += unfinished(settings.record, journals)
    findings.sort(key=lambda finding: ORDER[finding.severity])
    text = redacted(" ".join(command), secrets)
    seen = bool(processes)
    section: dict[str, Any] = {
        "guards": list(settings.guards),
        "ended": {"status": ended.status, "signal": ended.signal, "text": ended.text},
        "processes": working,
        "memory": next((e["memory"] for events in journals for e in events if e["event"] == "memory"), None),
    }
    return Report(
        subject=SubjectInfo(spec=text, kind="training script"),
        environment=_environment(text, journals),
        outcomes=(*(outcome_of(name, findings, working, seen, seconds) for name in settings.guards), *_faults(journals)),
        findings=tuple(findings),
        sections={"guard": plain(section)},
        seconds=round(seconds, 3),
        created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        id=settings.folder.name,
    )


def _environment(text: str, journals: list[list[Event]]) -> Environment:
    start = next((e for events in journals for e in events if e["event"] == "start"), None)
    return Environment(
        olmodebug=olmodebug_version(),
        python=(start or {}).get("python") or platform.python_version(),
        platform=platform.platform(),
        torch=(start or {}).get("torch"),
        transformers=(start or {}).get("transformers"),
        cuda=(start or {}).get("cuda"),
        command=f"olmodebug run -- {text}",
    )


def _process(events: list[Event]) -> dict[str, Any]:
    start = next((e for e in events if e["event"] == "start"), {})
    last = next((e for e in reversed(events) if e["event"] in ("end", "progress")), {})
    ended = next((e for e in events if e["event"] == "end"), None)
    return {
        "pid": start.get("pid", 0),
        "rank": start.get("rank"),
        "program": start.get("program", ""),
        "torch": start.get("torch"),
        "ops": last.get("ops", 0),
        "steps": last.get("steps", 0),
        "backwards": last.get("backwards", 0),
        "seconds": last.get("seconds", 0.0),
        "findings": sum(e["event"] == "finding" for e in events),
        "ended": "before its last line was written" if ended is None else ended["exception"] or "normally",
    }


def _merged(journals: list[list[Event]], processes: int, ended: Ended) -> list[Finding]:
    """The findings of all processes; the same rule at the same line is one finding, with the ranks that met it."""
    merged: dict[tuple[object, ...], Finding] = {}
    ranks: dict[tuple[object, ...], list[str]] = {}
    for events in journals:
        start = next((e for e in events if e["event"] == "start"), {})
        handled = _handled(events) if ended.exit_code == 0 else set()
        for event in events:
            if event["event"] != "finding":
                continue
            finding = finding_from(event["finding"])
            if finding.severity == "error" and (finding.probe, finding.where.file, finding.where.line) in handled:
                finding = softened(finding)
            key: tuple[object, ...] = (finding.probe, finding.where.file, finding.where.line, finding.severity)
            merged.setdefault(key, finding)
            if start.get("rank") is not None:
                ranks.setdefault(key, []).append(str(start["rank"]))
    found = []
    refused = {(f.where.file, f.where.line) for f in merged.values() if f.probe.startswith("index.")}
    for place, finding in merged.items():
        if finding.probe == "shape.fits" and (finding.where.file, finding.where.line) in refused:
            continue  # a worker told of the index, and its parent of the exception that came of it
        if processes > 1 and ranks.get(place):
            where = ", ".join(dict.fromkeys(sorted(ranks[place], key=int)))
            finding = replace(finding, evidence={**finding.evidence, "ranks": where})
        found.append(finding)
    return found


def _handled(events: list[Event]) -> set[tuple[object, ...]]:
    """The findings of a process whose exceptions were caught, in a command that ended well.

    The process says so itself at its end. One without an end (`os._exit`, a forked worker) or whose end came without an exception
    did not die of what an op raised in it: the script caught it, there or in the parent that a worker hands it to.
    """
    fatal = any(e["event"] == "end" and e["exception"] is not None for e in events)
    words = ("handled",) if fatal else ("handled", "raised")
    return {(e["probe"], e["file"], e["line"]) for e in events if e["event"] in words}


def _noted_batches(journals: list[list[Event]]) -> dict[int, Event]:
    """What each rank of a parallel training noted of its first steps."""
    noted = [event for events in journals for event in events if event["event"] == "batches"]
    found: dict[int, Event] = {batches["rank"]: batches for batches in noted}
    return dict(sorted(found.items()))


def _same_data(noted: dict[int, Event]) -> list[Finding]:
    """Ranks of data-parallel training that saw the same batches, different from step to step: the data is not divided."""
    seen: dict[str, list[int]] = {}
    for rank, batches in noted.items():
        if batches["replicated"] and len({str(s) for s in batches["steps"]}) == len(batches["steps"]):
            seen.setdefault(str(batches["steps"]), []).append(rank)
    return [
        Finding(
            probe=DIVIDED,
            severity="error",
            message=f"ranks {_listed(ranks)} saw the same batches in their first steps",
            cause="the batches are equal token for token, and DistributedDataParallel averages equal gradients",
            fix="DistributedSampler(dataset), or split the stream by rank",
            expected="batches of each rank's own",
            observed="equal batches",
            evidence={"ranks": ", ".join(map(str, ranks))},
        )
        for ranks in seen.values()
        if len(ranks) > 1
    ]


def _listed(ranks: Sequence[int]) -> str:
    return " and ".join(map(str, ranks))


def _apart(noted: dict[int, Event]) -> list[Finding]:
    """Replicas of one model that are no longer one after their first steps. Ranks that hold different parts of a model exchange
    what they compute; only those that began alike and never exchanged anything, or that DDP keeps, are looked at."""
    every = list(noted.values())
    if len(every) < 2 or len({str(e["shapes"]) for e in every}) > 1 or not every[0]["shapes"] or len({e["weights"] for e in every}) == 1:
        return []
    wrapped = all(e["replicated"] for e in every)
    began_alike = len({e["first"] for e in every}) == 1
    if not wrapped and (any(e["replicated"] or e["exchanged"] for e in every) or not began_alike):
        return []
    if not wrapped:
        cause: str | None = "the ranks began with equal weights and exchanged neither gradients nor weights in their first steps"
        fix = "wrap the model in DistributedDataParallel, or all_reduce the gradients before each step; right only where each rank is to have a model of its own"
    elif not began_alike:
        cause = "they differed before the first step: DistributedDataParallel makes them equal only when it is built"
        fix = "change or load the weights before the model is wrapped"
    elif not any(e["synced"] for e in every):
        cause = "no backward of these steps averaged the gradients: require_backward_grad_sync was False, or no_sync() was on, in each"
        fix = "let the last backward before optimizer.step() run with synchronisation"
    elif not any(e["exchanged"] for e in every):
        cause = "the ranks exchanged no gradients, though DistributedDataParallel was to average them: its own forward did not run"
        fix = "call the wrapped model, model(...), and not model.module(...)"
    elif not any(e["last_synced"] for e in every):
        cause = "the last backward before optimizer.step() ran under no_sync(): what it added was averaged with no other rank"
        fix = "no_sync() around every micro-batch but the last one of a step"
    else:
        cause, fix = None, "look at what changes weights or gradients on one rank only"
    return [
        Finding(
            probe=ONE_MODEL,
            severity="warning",
            message=f"ranks {_listed(list(noted))} train apart: after {len(every[0]['steps']) - 1} steps their weights differ",
            where=Where(**every[0]["where"], op="step"),
            source=lines_at(Where(**every[0]["where"])),
            cause=cause,
            fix=fix,
            expected="one model on all ranks",
            observed="different weights",
            evidence={"ranks": ", ".join(map(str, noted))},
        )
    ]


def _death(folder: Path, ended: Ended) -> list[Finding]:
    """A finding on a process that was killed by a fault of its own (a segmentation fault, an abort), with its last line."""
    stacks = [(path, path.read_text(encoding="utf-8", errors="replace")) for path in stacks_of(folder)]
    found = []
    for path, text in stacks:
        reason = text.partition("\n")[0].removeprefix("Fatal Python error: ")
        where = innermost(path)
        found.append(
            Finding(
                probe=SURVIVES,
                severity="error",
                message=f"the process died: {reason}",
                where=where,
                source=lines_at(where),
                fix="run the line alone; native code (an extension, a kernel, a full stack) died in it",
                observed=ended.text,
            )
        )
    return found


def _faults(journals: list[list[Event]]) -> list[Outcome]:
    """Faults of the guards themselves, which did not stop the script."""
    texts = [e["text"] for events in journals for e in events if e["event"] == "fault"]
    return [Outcome(probe="guard.itself", status="error", reason=texts[0])] if texts else []


def outcome_of(name: str, findings: Sequence[Finding], processes: list[dict[str, Any]], seen: bool, seconds: float) -> Outcome:
    """How one guard ended: failed with an error finding of its topic; not applicable where it saw nothing."""
    probe = f"guard.{name}"
    if not seen or not any(p["ops"] or p["findings"] for p in processes):
        why = "no Python process of the command imported torch" if not seen else "no op of torch was run"
        return Outcome(probe=probe, status="not-applicable", reason=why)
    if any(f.severity == "error" and TOPICS.get(f.probe.partition(".")[0]) == name for f in findings):
        return Outcome(probe=probe, status="failed", seconds=seconds)
    if name == "loop" and not any(p["steps"] for p in processes):
        return Outcome(probe=probe, status="not-applicable", reason=NOT_SEEN["loop"])
    return Outcome(probe=probe, status="passed", seconds=seconds)


def worst(report: Report) -> Mapping[str, int]:
    """How many findings of each severity."""
    return {severity: len(report.of(severity)) for severity in ORDER}
