"""A report as Markdown: to paste into an issue, or for the summary of a workflow step."""

import re
import textwrap
from collections.abc import Iterator

from ..report import Finding, Report
from ..units import count_text, facts_text, listed, seconds_text
from .concise import by_severity, place, verdict_line

MARKUP = re.compile(r"[\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w)|^#")  # an underscore inside a word is none

MOST_NAMES = 8  # of probes that share a reason: a page is read, the report holds them all

WORDS = {"error": "Error", "warning": "Warning", "note": "Note"}


def markdown(report: Report) -> str:
    """Verdict and counts, every finding with its lines of source, what did not run, and the machine."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    subject, environment = report.subject, report.environment
    yield f"## olmodebug: {report.verdict}"
    yield ""
    size = f", {count_text(subject.parameters)} parameters" if subject.parameters else ""
    kind = f" ({subject.kind}{size})" if subject.kind else ""
    yield f"{_code(subject.spec)}{kind}: {verdict_line(report).partition(': ')[2]}, in {seconds_text(report.seconds)}"
    for finding in by_severity(report.findings):
        yield ""
        yield from _finding(finding)
    yield from _not_run(report)
    yield ""
    versions = {"olmodebug": environment.olmodebug, "Python": environment.python, "torch": environment.torch}
    versions |= {"transformers": environment.transformers, "CUDA": environment.cuda, "GPU": environment.gpu}
    named = [f"{name} {version}" for name, version in versions.items() if version]
    yield ", ".join([*named, f"device {environment.device}", f"seed {environment.seed}", environment.platform])
    if environment.command:
        yield ""
        yield _code(environment.command)


def _not_run(report: Report) -> Iterator[str]:
    """A row for each reason why probes broke, failed as expected or were skipped."""
    names: dict[tuple[str, str], list[str]] = {}
    for outcome in report.outcomes:
        if outcome.status in ("error", "expected-failure", "skipped"):
            reason = (outcome.reason or "").strip().rpartition("\n")[2]  # of a traceback the last line
            names.setdefault((outcome.status, reason), []).append(outcome.probe)
    if names:
        yield from ("", "| how it ended | why | probes |", "|---|---|---|")
    for (status, reason), probes in names.items():
        yield f"| {status} | {_text(reason)} | {listed(map(_code, probes), MOST_NAMES)} |"


def _finding(finding: Finding) -> Iterator[str]:
    yield f"### {WORDS[finding.severity]}: {_code(finding.probe)}"
    yield ""
    yield _text(finding.message)
    at = place(finding.where)
    inside = [finding.where.function, finding.where.op, finding.where.module if at != finding.where.module else None]
    if at:
        yield ""
        yield "at " + ", ".join(_code(text) for text in [at, *inside] if text)
    if finding.source:
        yield ""
        fence = "```" if not any("```" in line.text for line in finding.source) else "~~~~"
        code = textwrap.dedent("\n".join(line.text.expandtabs(4) for line in finding.source)).split("\n")
        yield f"{fence}python"
        for line, text in zip(finding.source, code, strict=True):
            yield f"{'>' if line.marked else ' '} {line.number:>4} | {text}".rstrip()
        yield fence
    verified = " (verified: the probe passes with it)" if finding.fix_verified else ""
    rows = [
        ("cause", finding.cause),
        ("fix", f"{finding.fix}{verified}" if finding.fix else None),
        ("expected", finding.expected),
        ("observed", finding.observed),
        ("evidence", facts_text(finding.evidence)),
        ("ruled out", "; ".join(finding.ruled_out)),
        ("also failing because of this", ", ".join(finding.also)),
        ("raised", finding.raised),
    ]
    if any(text for _, text in rows):
        yield ""
    for label, words in rows:
        if words:
            yield f"- **{label}**: {_text(words)}"
    if finding.reproduce:
        yield f"- **reproduce**: {_code(finding.reproduce)}"


def _text(text: str) -> str:
    """One line in which nothing is markup: shapes in brackets, stars, names with underscores and tags stay as they are."""
    return " ".join(MARKUP.sub(r"\\\g<0>", text).split())


def _code(text: str) -> str:
    """Inline code, whatever stands in it."""
    flat = " ".join(text.split())
    return f"`` {flat} ``" if "`" in flat else f"`{flat}`"
