"""What a notebook shows of a value: a fragment of HTML in the notebook's own colours, no script, nothing loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from ..records import Event, ShapeTree, TensorInfo
from ..report import Finding, Report
from .concise import by_severity, verdict_line
from .finding import details_view
from .memory import memory_view
from .plain import plain_text
from .shapes import tree_view

WIDTH = 110  # columns of the text inside: what a notebook's cell shows beside its margin
EVENTS_SHOWN = 100  # from the start of a run, and as many from its end


def report_fragment(report: Report) -> str:
    """The verdict with its counts; every finding folded under its message, the first error open."""
    findings = by_severity(report.findings)
    parts = [Markup("<p><b>{}</b> {}</p>").format(report.subject.spec, verdict_line(report))]
    parts += [_finding(finding, opened=index == 0 and finding.severity == "error") for index, finding in enumerate(findings)]
    return Markup("<div>{}</div>").format(Markup("").join(parts))


def shapes_fragment(tree: ShapeTree) -> str:
    """The tree of named shapes as text."""
    return _text(plain_text(tree_view(tree), width=WIDTH))


def memory_fragment(section: Mapping[str, Any]) -> str:
    """A memory prediction as the terminal shows it."""
    return _text(plain_text(memory_view(section), width=WIDTH))


def events_fragment(title: str, events: Sequence[Event]) -> str:
    """A table of the ops of a run: the module, the line, what went in and what came out; a long run is cut at its middle."""
    shown = events if len(events) <= 2 * EVENTS_SHOWN else [*events[:EVENTS_SHOWN], *events[-EVENTS_SHOWN:]]
    rows = []
    for position, event in enumerate(shown):
        if position == EVENTS_SHOWN and len(shown) < len(events):
            rows.append(Markup('<tr><td colspan="5">{} more</td></tr>').format(len(events) - len(shown)))
        line = f"{Path(event.where.file).name}:{event.where.line}" if event.where.file else ""
        cells = (event.phase, event.where.module, line, event.op, f"{_tensors(event.inputs)} -> {_tensors(event.outputs)}")
        rows.append(Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(cell) for cell in cells)))
    head = Markup("<p>{}</p>").format(title)
    return Markup("<div>{}<table>{}</table></div>").format(head, Markup("").join(rows))


def _tensors(infos: Sequence[TensorInfo]) -> str:
    return ", ".join(map(str, infos))


def _finding(finding: Finding, *, opened: bool) -> Markup:
    head = Markup("<summary>{} <b>{}</b> {}</summary>").format(finding.severity, finding.probe, finding.message)
    return Markup("<details{}>{}{}</details>").format(
        Markup(" open") if opened else "", head, _text(plain_text(details_view(finding), width=WIDTH))
    )


def _text(text: str) -> Markup:
    return Markup('<pre style="white-space: pre; overflow-x: auto">{}</pre>').format(escape(text))
