"""What a watched training script showed: its findings, how it ended, and what was in memory when memory ran out."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType

from ..report import Report
from ..units import bytes_text, plural, seconds_text
from .finding import STYLES, finding_view
from .layout import LABEL, Line, line, row

LARGEST_SHOWN = 8  # holders of memory; the report has them all


def guarded_run_view(report: Report, *, verbose: bool = False) -> RenderableType:
    """The diagnosis at the end of a run: nothing but one line where all is well."""
    blocks: list[RenderableType] = []
    for severity in ("error", "warning", "note"):
        for finding in report.findings:
            if finding.severity == severity and (verbose or severity != "note"):
                blocks += [line(), finding_view(finding)]
    blocks += [line(), *_closing(report, verbose)] if blocks else list(_closing(report, verbose))
    return Group(*blocks)


def guard_view(section: Mapping[str, Any]) -> Group:
    """The section `guard` of a report: the processes, how the command ended, and the memory at the failure."""
    return Group(*_section(section))


def _section(section: Mapping[str, Any]) -> Iterator[Line]:
    yield row("guards", ", ".join(section["guards"]))
    yield row("ended", section["ended"]["text"])
    for process in section["processes"]:
        rank = f"rank {process['rank']}: " if process["rank"] is not None else ""
        counts = [plural(process["steps"], "optimizer step"), plural(process["backwards"], "backward"), plural(process["ops"], "op")]
        yield row("process", f"{rank}{process['program']}, {', '.join(counts)}; it ended {_ending(process['ended'])}")
    if section.get("memory"):
        yield from _memory(section["memory"])


def _ending(text: str) -> str:
    return text if text in ("normally", "before its last line was written") else f"with {text}"


def _memory(memory: Mapping[str, Any]) -> Iterator[Line]:
    yield row("asked for", bytes_text(memory["requested_bytes"]))
    yield row("live", bytes_text(memory["live_bytes"]))
    for holder in memory["holders"][:LARGEST_SHOWN]:
        name = f"{holder['category']}  {holder['place']}".rstrip()
        yield line(f"{name}  ({plural(holder['count'], 'tensor')})", head=f"  {bytes_text(holder['bytes']):>10}  ", indent=LABEL)


def _closing(report: Report, verbose: bool) -> Iterator[Line]:
    section = report.sections.get("guard", {})
    notes = dict.fromkeys(finding.probe for finding in report.of("note"))
    if notes and not verbose:
        yield line(f"{', '.join(notes)}  (in full with --verbose)", head=("note", STYLES["note"]), indent=LABEL)
    if section.get("memory"):
        yield from _memory(section["memory"])
    if verbose:
        yield from _section({**section, "memory": None})
    tally = [plural(len(report.of(name)), name) for name in STYLES if report.of(name)]
    text = f"olmodebug: {', '.join(tally) or 'no finding'}; the script: {section.get('ended', {}).get('text', '')}"
    yield line(f"{text}; {seconds_text(report.seconds)}")
    if report.findings and report.id:
        yield line(f"olmodebug report {report.id} --verbose", head="next", indent=LABEL)
