"""The parent of a memory run: it starts the child, reads what it tells, and makes the report; a child that the system
kills leaves its prediction, and the kill is a finding. It loads no torch."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import OlmodebugError
from ..process import Child, Death, innermost, last_line, run_child
from ..report import Environment, Finding, Outcome, Report, SubjectInfo, finding_from, with_reproduction
from ..store import Run
from .findings import findings_of, outcomes_of

SIGKILL = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOrder:
    """What a memory run was asked to do; JSON-able, `plan` the fields of a StepPlan, `allocator` the text of
    PYTORCH_ALLOC_CONF."""

    job: Mapping[str, Any]
    plan: Mapping[str, Any]
    gpu: str | None = None
    budget_bytes: int | None = None
    allocator: str = ""
    device: str = "cuda"
    what_ifs: bool = True
    confirm: Mapping[str, Any] | None = None
    timeout_seconds: float = 300.0
    command: str = ""


class MemoryFault(Exception):
    """The child stopped for a fault of olmodebug's own; the text is its traceback."""


@dataclass(slots=True)
class _Told:
    section: dict[str, Any] | None = None
    subject: SubjectInfo | None = None
    environment: Environment | None = None
    findings: list[Finding] = field(default_factory=list)
    step: str = "the prediction"
    unusable: str | None = None
    fault: str | None = None


def run_memory(order: MemoryOrder, run: Run, progress: Callable[[int, int, str, float], None]) -> Report:
    """The report of an order. OlmodebugError where it cannot be run, MemoryFault where olmodebug itself broke."""
    started = time.monotonic()
    told = _Told()
    with tempfile.TemporaryDirectory(prefix="olmodebug-") as scratch:
        folder = run.folder or Path(scratch)
        child = Child(module="olmodebug.footprint.child", folder=folder, timeout_seconds=order.timeout_seconds)
        message = {name: getattr(order, name) for name in MemoryOrder.__dataclass_fields__}

        def tick() -> None:
            progress(int(told.section is not None), 2, told.step, time.monotonic() - started)

        death = run_child(child, {**message, "job": dict(order.job), "plan": dict(order.plan)}, lambda event: _note(told, event), tick)
        if told.unusable is not None:
            raise OlmodebugError(told.unusable)
        if told.fault is not None:
            raise MemoryFault(told.fault)
        if death is not None:
            told.findings.append(_death(told, death, folder))
    return _report(order, told, run, time.monotonic() - started)


def _note(told: _Told, event: dict[str, Any]) -> None:
    kind = event["event"]
    if kind == "start":
        told.step = event["step"]
    elif kind == "environment":
        told.environment = Environment(**event["value"])
    elif kind == "subject":
        told.subject = SubjectInfo(**{**event["value"], "assumptions": tuple(event["value"]["assumptions"])})
    elif kind == "section":
        told.section = event["value"]
    elif kind == "finding":
        told.findings.append(finding_from(event["value"]))
    elif kind == "unusable":
        told.unusable = event["text"]
    elif kind == "fault":
        told.fault = event["traceback"]


def _death(told: _Told, death: Death, folder: Path) -> Finding:
    """How the child ended. A SIGKILL is what the system's killer sends when memory runs out; others send it too."""
    last = last_line(folder / "output.txt")
    killed = death.signal == SIGKILL
    return Finding(
        probe="memory.step-runs",
        severity="error",
        message=f"the process {death.text} while running {told.step}",
        where=innermost(folder / "stacks.txt"),
        fix="the system kills a process that takes too much memory; if that was it, a smaller --confirm-batch-size helps"
        if killed
        else None,
        evidence={"last line of its output": last[:200]} if last else {},
    )


def _report(order: MemoryOrder, told: _Told, run: Run, seconds: float) -> Report:
    from ..environment import environment

    section = told.section
    spec = str(order.job["spec"])
    found = [*told.findings, *(findings_of(section) if section else ())]
    outcomes: tuple[Outcome, ...] = outcomes_of(section, found)
    report = Report(
        subject=told.subject or SubjectInfo(spec=spec),
        environment=told.environment or environment(seed=int(order.job.get("seed", 0)), command=order.command),
        outcomes=outcomes,
        findings=tuple(found),
        sections={"memory": section} if section else {},
        seconds=round(seconds, 3),
        created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        id=run.id,
    )
    return with_reproduction(report, lambda probe: order.command)
