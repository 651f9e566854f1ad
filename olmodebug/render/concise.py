"""A line a finding, as compilers write it, and a last line with the verdict."""

from collections.abc import Iterator

from ..records import Where
from ..report import Finding, Report
from ..units import plural

ORDER = ("error", "warning", "note")


def concise(report: Report) -> str:
    """`model.py:88: error causality.no-future: ...` for every finding, worst first, then the verdict with its counts."""
    return "\n".join(_lines(report)) + "\n"


def by_severity(findings: tuple[Finding, ...]) -> list[Finding]:
    """Errors, then warnings, then notes, each in the order of the report."""
    return sorted(findings, key=lambda finding: ORDER.index(finding.severity))


def tally(report: Report) -> str:
    """`2 errors, 1 note`; empty without a finding."""
    return ", ".join(plural(len(report.of(name)), name) for name in ORDER if report.of(name))  # type: ignore[arg-type]


def verdict_line(report: Report) -> str:
    """`fail: 42 ran (40 pass, 2 fail), 3 not applicable, of 45 probes; 2 errors`."""
    nothing = f"{report.unchecked}; " if report.unchecked else ""
    return "; ".join(filter(None, [f"{report.verdict}: {nothing}{report.counts}", tally(report)]))


def place(where: Where) -> str:
    """`model.py:88`, or the module where there is no file; empty where nothing is known."""
    if where.file:
        return f"{where.file}:{where.line}" if where.line else where.file
    return where.module


def _lines(report: Report) -> Iterator[str]:
    for finding in by_severity(report.findings):
        message = " ".join(finding.message.split())
        at = place(finding.where) or report.subject.spec
        yield f"{at}: {finding.severity} {finding.probe}: {message}"
    yield f"{report.subject.spec}: {verdict_line(report)}"
