"""A subject against a reference, in a child process: whatever either does to the process, the answer is a report."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..process import Child, Event, innermost, last_line, run_child
from ..report import Environment, Finding, Outcome, Report, SubjectInfo, finding_from, with_reproduction
from ..store import Run
from ..supervise import InternalFault

OUTPUTS = "parity.outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is compared with what; `stated` is the file of --map, `shown` the reference as the user wrote it."""

    job: Mapping[str, Any]
    reference: str
    shown: str = ""
    reference_config: Mapping[str, Any] = field(default_factory=dict)
    stated: str | None = None
    timeout_seconds: float = 300.0
    command: str = ""


def against(order: Order, run: Run, progress: Callable[[int, int, str, float], None]) -> Report:
    """The report on a subject against a reference. UsageError when the two cannot be compared."""
    started = time.monotonic()
    told: dict[str, Any] = {"step": "starting"}

    def note(event: Event) -> None:
        told[event["event"]] = event
        told["step"] = event.get("step", told["step"])

    with tempfile.TemporaryDirectory(prefix="olmodebug-") as scratch:
        folder = run.folder or Path(scratch)
        child = Child(module="olmodebug.implementations.child", folder=folder, timeout_seconds=order.timeout_seconds)
        message = {
            "job": dict(order.job),
            "reference": order.reference,
            "shown": order.shown or order.reference,
            "scripts": str(run.folder / "scripts") if run.folder is not None else None,
            "reference_config": dict(order.reference_config),
            "map": order.stated,
            "command": order.command,
        }
        death = run_child(child, message, note, lambda: progress(0, 1, told["step"], time.monotonic() - started))
        if "unusable" in told:
            raise UsageError(told["unusable"]["text"])
        if "fault" in told:
            raise InternalFault(told["fault"]["traceback"])
        if "report" in told:
            report = _report_from(told["report"]["value"], run.id)
        else:
            assert death is not None
            report = _dead(order, run, death.text, told["step"], folder, time.monotonic() - started)
    return with_reproduction(report, lambda probe: order.command)


def _report_from(body: Mapping[str, Any], identifier: str) -> Report:
    subject = body["subject"]
    return Report(
        subject=SubjectInfo(**{**subject, "assumptions": tuple(subject["assumptions"])}),
        environment=Environment(**body["environment"]),
        outcomes=tuple(Outcome(**outcome) for outcome in body["outcomes"]),
        findings=tuple(finding_from(finding) for finding in body["findings"]),
        sections=body["sections"],
        seconds=round(body["seconds"], 3),
        created=body["created"] or f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}",
        id=identifier,
    )


def _dead(order: Order, run: Run, text: str, step: str, folder: Path, seconds: float) -> Report:
    """The report on a child that died or hung; one that died of the reference is no finding of the subject."""
    from ..environment import environment

    if step == "building the reference":
        raise UsageError(f"the process {text} while building the reference {order.reference}")
    last = last_line(folder / "output.txt")
    finding = Finding(
        probe=OUTPUTS,
        severity="error",
        message=f"the process {text} while {step}",
        where=innermost(folder / "stacks.txt"),
        evidence={"last line of its output": last[:200]} if last else {},
    )
    return Report(
        subject=SubjectInfo(spec=str(order.job["spec"])),
        environment=environment(seed=int(order.job.get("seed", 0)), command=order.command),
        outcomes=(Outcome(probe=OUTPUTS, status="failed"),),
        findings=(finding,),
        seconds=round(seconds, 3),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        id=run.id,
    )
