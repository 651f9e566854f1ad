"""A report as one HTML page: it needs no network, no script and no other file, and its policy forbids them all."""

import base64
import hashlib
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..records import Where
from ..report import Outcome, Report, SourceLine, Status
from ..units import bytes_text, count_text, dtype_text, seconds_text, value_text
from .concise import by_severity, place, tally
from .figures import FIGURES
from .finding import case_text
from .layout import printable
from .svg import tag

TEMPLATES = Path(__file__).with_name("templates")

# The order in which outcomes are worth reading, and the words that the page uses.
STATUSES: dict[Status, str] = {
    "failed": "failed",
    "error": "broke",
    "expected-failure": "failed as expected",
    "skipped": "skipped",
    "passed": "passed",
    "not-applicable": "not applicable",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One topic of `Report.sections`, drawn."""

    id: str
    title: str
    body: Markup


def html(report: Report) -> str:
    """The whole page; everything in it comes from the report."""
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"seconds": seconds_text, "bytes": bytes_text, "count": count_text, "dtype": dtype_text, "value": _value}
    groups = list(_groups(report))
    page = environment.get_template("report.html.j2").render(
        report=report,
        findings=by_severity(report.findings),
        tally=tally(report),
        groups=groups,
        bar=_bar(groups) if len(report.outcomes) > 1 else None,
        sections=list(_sections(report)),
        versions=_versions(report),
        style=Markup(style),  # noqa: S704 - our own file
        style_hash=_hash(style),
        place=place,
        inside=_inside,
        code=_code,
        case_text=case_text,
        by_reason=_by_reason,
        anchors={finding.probe: f"finding-{index}" for index, finding in reversed(list(enumerate(by_severity(report.findings), 1)))},
    )
    return printable(page, "utf-8")


def _sections(report: Report) -> Iterator[Section]:
    for topic, figure in FIGURES.items():
        if topic in report.sections:
            yield Section(id=topic, title=figure.title, body=figure.draw(report.sections[topic]))


def _groups(report: Report) -> Iterator[tuple[str, str, list[Outcome]]]:
    for status, words in STATUSES.items():
        outcomes = [outcome for outcome in report.outcomes if outcome.status == status]
        if outcomes:
            yield status, words, outcomes


def _by_reason(outcomes: list[Outcome]) -> list[tuple[str, list[Outcome]]]:
    """Outcomes that share a reason share a line; without a reason each has its own."""
    shared: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        shared.setdefault(outcome.reason or f"\0{outcome.probe}", []).append(outcome)
    return [("" if reason.startswith("\0") else reason.rstrip(), together) for reason, together in shared.items()]


def _bar(groups: list[tuple[str, str, list[Outcome]]]) -> Markup:
    """The outcomes as one bar, each status by its share."""
    total = sum(len(outcomes) for _, _, outcomes in groups)
    parts, start = [], 0.0
    for status, _, outcomes in groups:
        width = 1000 * len(outcomes) / total
        parts.append(tag("rect", x=start, y=0, width=max(width - 3, 3.0), height=10, class_=status))
        start += width
    return tag("svg", *parts, viewBox="0 0 1000 10", preserveAspectRatio="none", class_="bar", aria_hidden="true")


def _versions(report: Report) -> dict[str, Any]:
    environment, subject = report.environment, report.subject
    rows = {
        "command": environment.command,
        "olmodebug": environment.olmodebug,
        "torch": environment.torch,
        "transformers": environment.transformers,
        "Python": environment.python,
        "platform": environment.platform,
        "device": environment.device,
        "GPU": environment.gpu,
        "driver": environment.driver,
        "CUDA": environment.cuda,
        "seed": environment.seed,
        "made": report.created,
        "run": report.id,
        "file": subject.file,
    }
    return {name: value for name, value in rows.items() if value not in (None, "")}


def _inside(where: Where) -> str:
    """`Attention.forward, module model.layers.0.self_attn, softmax` beside the file."""
    module = f"module {where.module}" if where.module and where.file else ""
    return ", ".join(filter(None, [where.function, module, where.op]))


def _code(lines: tuple[SourceLine, ...]) -> list[tuple[SourceLine, str, bool]]:
    """Each line, its text without the common margin, and whether lines are missing before it."""
    texts = textwrap.dedent("\n".join(line.text.expandtabs(4) for line in lines)).split("\n")
    gaps = [False, *(after.number != before.number + 1 for before, after in zip(lines, lines[1:], strict=False))]
    return list(zip(lines, texts, gaps, strict=True))


def _value(value: Any, name: str) -> str:
    return value_text(name, value)


def _hash(text: str) -> str:
    """What the content-security policy knows the one style sheet by."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
