"""A report as GitHub workflow commands: annotations at the lines of the subject's files."""

from collections.abc import Iterator

from ..report import Finding, Report, Severity
from .concise import verdict_line

MOST_OF_A_KIND = 10  # GitHub keeps ten errors, ten warnings and ten notices of a step, and drops the rest without a word

COMMANDS: dict[Severity, str] = {"error": "error", "warning": "warning", "note": "notice"}


def github(report: Report) -> str:
    """An annotation a finding, never more of a kind than GitHub shows: the last one says how many are left out."""
    return "".join(f"{line}\n" for line in _lines(report))


def _lines(report: Report) -> Iterator[str]:
    for severity, command in COMMANDS.items():
        found = report.of(severity)
        shown = found if len(found) <= MOST_OF_A_KIND else found[: MOST_OF_A_KIND - 1]
        for finding in shown:
            yield _annotation(command, finding)
        if len(shown) < len(found):
            yield f"::{command} title=olmodebug::and {len(found) - len(shown)} more; the report has them all"
    yield _data(f"{report.subject.spec}: {verdict_line(report)}")


def _annotation(command: str, finding: Finding) -> str:
    where = finding.where
    properties = {"file": where.file, "line": where.line if where.file else None, "title": finding.probe}
    named = ",".join(f"{name}={_property(str(value))}" for name, value in properties.items() if value)
    more = [("cause", finding.cause), ("fix", finding.fix), ("reproduce", finding.reproduce)]
    text = "\n".join([finding.message, *(f"{label}: {value}" for label, value in more if value)])
    return f"::{command} {named}::{_data(text)}"


def _data(text: str) -> str:
    """What a message may not hold as it is: it would end the command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
