"""What a notebook shows of a value: a fragment of HTML in the notebook's own colours, no script, nothing loaded."""

from markupsafe import Markup, escape

from ..records import ShapeTree
from ..report import Finding, Report
from .concise import by_severity, verdict_line
from .finding import details_view
from .plain import plain_text
from .shapes import tree_view

WIDTH = 110  # columns of the text inside: what a notebook's cell shows beside its margin


def report_fragment(report: Report) -> str:
    """The verdict with its counts; every finding folded under its message, the first error open."""
    findings = by_severity(report.findings)
    parts = [Markup("<p><b>{}</b> {}</p>").format(report.subject.spec, verdict_line(report))]
    parts += [_finding(finding, opened=index == 0 and finding.severity == "error") for index, finding in enumerate(findings)]
    return Markup("<div>{}</div>").format(Markup("").join(parts))


def shapes_fragment(tree: ShapeTree) -> str:
    """The tree of named shapes as text."""
    return _text(plain_text(tree_view(tree), width=WIDTH))


def _finding(finding: Finding, *, opened: bool) -> Markup:
    head = Markup("<summary>{} <b>{}</b> {}</summary>").format(finding.severity, finding.probe, finding.message)
    return Markup("<details{}>{}{}</details>").format(
        Markup(" open") if opened else "", head, _text(plain_text(details_view(finding), width=WIDTH))
    )


def _text(text: str) -> Markup:
    return Markup('<pre style="white-space: pre; overflow-x: auto">{}</pre>').format(escape(text))
