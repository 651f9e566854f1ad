"""What the terminal shows of a report, its outcomes, the list of probes and the machine."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Group, RenderableType

from ..report import Environment, Finding, Outcome, Report, Scalar, Status, SubjectInfo
from ..units import bytes_text, count_text, dtype_text, facts_text, plural, seconds_text
from .finding import STYLES, finding_view
from .layout import LABEL, Line, console, line, row
from .sections import section_views

__all__ = ["console", "environment_view", "finding_view", "outcomes_view", "probes_view", "report_view"]

SYMBOLS: dict[Status, tuple[str, str]] = {
    "passed": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "expected-failure": ("✗", "yellow"),
    "not-applicable": ("–", "dim"),
    "skipped": ("–", "yellow"),
    "error": ("!", "bold red"),
}
VERDICTS = {"pass": ("✓ pass", "bold green"), "fail": ("✗ fail", "bold red"), "error": ("! error", "bold red")}

MOST_NAMED = 12  # probes that one reason may name: a model that does not build skips them all, and the finding is what counts

Details = Mapping[str, Scalar | Mapping[str, Scalar]]


def report_view(report: Report, *, verbose: bool = False) -> RenderableType:
    """The whole report: subject, findings from errors to notes, what did not run, the counts, the next command.

    Notes and expected failures are folded into a line each; `verbose` shows them in full, and every outcome.
    """
    expected = {outcome.probe for outcome in report.outcomes if outcome.status == "expected-failure"}
    full = [item for item in report.of("error", "warning", "note") if verbose or _needs_reading(item, expected)]
    full.sort(key=lambda item: list(STYLES).index(item.severity))
    blocks: list[RenderableType] = [Group(*_subject(report.subject), *(_versions(report.environment) if verbose else ()))]
    blocks += [finding_view(item) for item in full]
    blocks += section_views(report.sections)
    if verbose and report.outcomes:
        blocks.append(outcomes_view(report))
    return Group(*_spaced([*blocks, Group(*_closing(report, expected, verbose))]))


def outcomes_view(report: Report) -> Group:
    """A line for each probe: how it ended, how long it took, and the reason where there is one."""
    return Group(*map(_outcome, report.outcomes))


def probes_view(probes: Sequence[tuple[str, str, str]], *, full: bool = False) -> Group:
    """Each probe's name and first line; with `full`, or for a single probe, the whole docstring."""
    if full or len(probes) == 1:
        return Group(*_spaced(Group(*_docstring(name, text)) for name, _, text in probes))
    width = max((len(name) for name, _, _ in probes), default=0) + 2
    return Group(*(line(first, head=(name, "bold"), indent=width) for name, first, _ in probes))


def environment_view(environment: Environment, details: Details) -> Group:
    """The versions and the machine, a line for each topic of `details`: its facts, or why there are none."""
    topics = {"olmodebug": environment.olmodebug, "platform": environment.platform, **details}
    texts = {name: facts_text(facts) if isinstance(facts, Mapping) else str(facts) for name, facts in topics.items()}
    return Group(*(row(name, text) for name, text in texts.items()))


def _needs_reading(finding: Finding, expected: set[str]) -> bool:
    return finding.severity != "note" and finding.probe not in expected


def _spaced(blocks: Iterable[RenderableType]) -> Iterator[RenderableType]:
    for i, block in enumerate(blocks):
        if i:
            yield line()
        yield block


# The head and the foot of a report


def _subject(subject: SubjectInfo) -> Iterator[Line]:
    memory = ", ".join(filter(None, [bytes_text(subject.parameter_bytes), dtype_text(subject.dtype)]))
    about = [subject.kind, f"{count_text(subject.parameters)} parameters ({memory})" if subject.parameters else ""]
    yield line(", ".join(filter(None, about)), head=(f"{subject.spec}  ", "bold"), indent=len(subject.spec) + 2)
    if subject.convention:
        yield row("called", subject.convention)
    if subject.assumptions:
        yield row("assumed", "\n".join(subject.assumptions))


def _versions(environment: Environment) -> Iterator[Line]:
    names = {"olmodebug": environment.olmodebug, "python": environment.python, "torch": environment.torch}
    names |= {"transformers": environment.transformers, "cuda": environment.cuda, "driver": environment.driver}
    names |= {"gpu": environment.gpu}
    parts = [f"{name} {version}" for name, version in names.items() if version]
    parts += [environment.platform, f"device {environment.device}", f"seed {environment.seed}"]
    yield row("with", ", ".join(parts))


def _closing(report: Report, expected: set[str], verbose: bool) -> Iterator[Line]:
    notes = dict.fromkeys(item.probe for item in report.of("note") if item.probe not in expected)
    if notes and not verbose:
        yield line(f"{', '.join(notes)}  (in full with --verbose)", head=("note", STYLES["note"]), indent=LABEL)
    if not verbose:
        unusual: tuple[Status, ...] = ("error", "expected-failure", "skipped")
        for status in unusual if report.checked else (*unusual, "not-applicable"):
            yield from _reasons(report.outcomes, status)
    symbol, style = VERDICTS[report.verdict]
    nothing = f"{report.unchecked}: " if report.unchecked else ""
    tally = [plural(len(report.of(name)), name) for name in STYLES if report.of(name)]
    tail = [", ".join(tally), seconds_text(report.seconds)]
    yield line(f"{nothing}{report.counts}; {'; '.join(filter(None, tail))}", head=(f"{symbol}  ", style), indent=LABEL)
    yield line(_next_command(report, verbose), head="next", indent=LABEL)


def _reasons(outcomes: Sequence[Outcome], status: Status) -> Iterator[Line]:
    probes: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.status == status:
            probes.setdefault((outcome.reason or "no reason given").rstrip(), []).append(outcome.probe)
    word = {"error": "broke", "expected-failure": "expected", "not-applicable": "n/a"}.get(status, status)
    for reason, names in probes.items():
        told = ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} probes"
        yield line(f"{told}: {reason}", head=(word, SYMBOLS[status][1]), indent=LABEL)


def _next_command(report: Report, verbose: bool) -> str:
    """What shows most about the worst thing in the report; where nothing is to mend, more detail."""
    if report.unchecked:
        return "olmodebug probes"
    repeat = f"olmodebug report {report.id}" if report.id else report.environment.command
    repeat = repeat or f"olmodebug check {report.subject.spec}"
    worst = {"fail": report.of("error"), "pass": report.of("warning"), "error": ()}[report.verdict]
    again = f"olmodebug replay {report.id}" if report.id and report.verdict == "fail" else ""  # a warning is no failure to replay
    commands = [finding.reproduce or again for finding in worst]
    return next(filter(None, commands), "olmodebug probes --verbose" if verbose else f"{repeat} --verbose")


def _outcome(outcome: Outcome) -> Line:
    symbol, style = SYMBOLS[outcome.status]
    reason = f": {outcome.reason.rstrip()}" if outcome.reason else ""
    head = f"{symbol} {outcome.status:<16} {seconds_text(outcome.seconds):>12}  "
    return line((outcome.probe, "bold"), reason, head=(head, style), indent=len(head))


def _docstring(name: str, text: str) -> Iterator[Line]:
    yield line((name, "bold"))
    for text_line in inspect.cleandoc(text).splitlines():
        margin = len(text_line) - len(text_line.lstrip())
        yield line(text_line.strip(), head=" " * (margin + 2), indent=margin + 2)
