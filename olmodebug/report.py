"""The record of a run: findings, outcomes, environment, and the JSON that every picture is drawn from.

Schema `olmodebug/report@1`; `report.schema.json` beside this file describes it.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from .errors import EXIT_FINDINGS, EXIT_INTERNAL, EXIT_NOTHING_CHECKED, EXIT_PASS, ReportError
from .files import write_whole
from .records import Case, Rows, Where
from .units import plural

SCHEMA = "olmodebug/report@1"

Severity = Literal["error", "warning", "note"]
Status = Literal["passed", "failed", "expected-failure", "not-applicable", "skipped", "error"]

Scalar = str | int | float | bool | None

# JSON has no such numbers; these words stand for them.
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLine:
    """A line of the subject's source as it stood when the finding was made."""

    number: int
    text: str
    marked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What is wrong: one sentence, the place, the cause if it is established, the repair, and the evidence.

    `cause` is None where it is not known. `fix_verified`: the repair was applied to a copy and the probe passed.
    """

    probe: str
    severity: Severity
    message: str
    cause: str | None = None
    fix: str | None = None
    fix_verified: bool = False
    where: Where = field(default_factory=Where)
    source: tuple[SourceLine, ...] = ()
    expected: str | None = None
    observed: str | None = None
    evidence: Mapping[str, Scalar] = field(default_factory=dict)
    ruled_out: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    raised: str | None = None
    case: Case | None = None
    reproduce: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one probe ended; `reason` says why it was skipped, does not apply, was expected to fail or broke."""

    probe: str
    status: Status
    reason: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectInfo:
    """What was checked: its spec, class, size, how it is called, and what had to be assumed."""

    spec: str
    kind: str = ""
    file: str | None = None
    parameters: int = 0
    parameter_bytes: int = 0
    dtype: str = ""
    convention: str = ""
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The machine and the versions that a result depends on."""

    olmodebug: str
    python: str
    platform: str
    torch: str | None = None
    transformers: str | None = None
    cuda: str | None = None
    device: str = "cpu"
    driver: str | None = None
    gpu: str | None = None
    seed: int = 0
    command: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many probes ended how; `ran` is passed + failed + expected failures + errors."""

    passed: int
    failed: int
    expected: int
    errors: int
    not_applicable: int
    skipped: int

    @property
    def ran(self) -> int:
        return self.passed + self.failed + self.expected + self.errors

    @property
    def total(self) -> int:
        return self.ran + self.not_applicable + self.skipped

    def __str__(self) -> str:
        parts = [f"{self.passed} pass"]
        parts += [f"{self.failed} fail"] if self.failed else []
        parts += [f"{self.expected} expected-fail"] if self.expected else []
        parts += [f"{self.errors} broke"] if self.errors else []
        text = f"{self.ran} ran ({', '.join(parts)})"
        if self.not_applicable:
            text += f", {self.not_applicable} not applicable"
        if self.skipped:
            text += f", {self.skipped} skipped"
        return f"{text}, of {plural(self.total, 'probe')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything one run found; the verdict and the exit code follow from it.

    `sections` holds what a command measured beyond its findings, by topic (`shapes`, `leaks`, `parity`, `memory`,
    `training`, `guard`): JSON values only, in the form that `report.schema.json` gives each.
    """

    subject: SubjectInfo
    environment: Environment
    outcomes: tuple[Outcome, ...] = ()
    findings: tuple[Finding, ...] = ()
    sections: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    created: str = ""
    id: str = ""

    @property
    def verdict(self) -> Literal["pass", "fail", "error"]:
        """`fail` with an unexpected failure, `error` when a probe of ours broke or nothing was checked, else `pass`."""
        verdicts: dict[int, Literal["pass", "fail", "error"]] = {EXIT_PASS: "pass", EXIT_FINDINGS: "fail"}
        return verdicts.get(self.exit_code, "error")

    @property
    def exit_code(self) -> int:
        """1 with an unexpected failure: a failed probe, or an error finding that no probe was expected to make."""
        counts = self.counts
        expected = {outcome.probe for outcome in self.outcomes if outcome.status == "expected-failure"}
        if counts.failed or any(finding.probe not in expected for finding in self.of("error")):
            return EXIT_FINDINGS
        if counts.errors:
            return EXIT_INTERNAL
        return EXIT_PASS if self.checked else EXIT_NOTHING_CHECKED

    @property
    def checked(self) -> bool:
        """Whether a question that was asked could be put to the subject. That it builds and runs answers none but that one:
        where others were asked and none applies, nothing was checked."""
        ran = [outcome.probe for outcome in self.outcomes if outcome.status not in ("not-applicable", "skipped")]
        return any(not name.startswith("build.") for name in ran) or bool(ran) and len(ran) == len(self.outcomes)

    @property
    def unchecked(self) -> str:
        """`nothing was checked` in the words that fit; empty where something was, or where something failed."""
        if self.checked or self.verdict != "error":
            return ""
        return "nothing that was asked applies" if self.counts.ran else "nothing was checked"

    @property
    def counts(self) -> Counts:
        number = {status: sum(outcome.status == status for outcome in self.outcomes) for status in get_args(Status)}
        return Counts(
            passed=number["passed"],
            failed=number["failed"],
            expected=number["expected-failure"],
            errors=number["error"],
            not_applicable=number["not-applicable"],
            skipped=number["skipped"],
        )

    def of(self, *severities: Severity) -> tuple[Finding, ...]:
        """The findings of these severities, in the order of the report."""
        return tuple(finding for finding in self.findings if finding.severity in severities)

    def __repr__(self) -> str:
        errors, warnings = plural(len(self.of("error")), "error"), plural(len(self.of("warning")), "warning")
        return f"<Report {self.subject.spec}: {self.verdict}, {errors}, {warnings}; {self.counts}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from .render.notebook import report_fragment  # a notebook's hook; reading and writing reports stays without rich

        return report_fragment(self)

    def to_json(self) -> str:
        """Strict JSON, schema `olmodebug/report@1`: non-finite numbers are the strings `nan`, `inf` and `-inf`."""
        body = {"schema": SCHEMA, "verdict": self.verdict, "exit_code": self.exit_code, "counts": _plain(self.counts)}
        return json.dumps(body | _plain(self), indent=1, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Write the JSON whole or not at all."""
        write_whole(path, self.to_json())


def from_json(text: str) -> Report:
    """The report that `to_json` wrote; ReportError when it is no report or one of a newer schema."""
    try:
        body = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"not a report: no valid JSON ({error})") from None
    schema = body.get("schema") if isinstance(body, dict) else None
    if schema != SCHEMA:
        newer = "; a newer olmodebug wrote it" if str(schema).startswith("olmodebug/report@") else ""
        raise ReportError(f"not a report this version can read: expected schema {SCHEMA}, observed {schema}{newer}")
    try:
        return Report(
            subject=SubjectInfo(**_tuples(body["subject"])),
            environment=Environment(**body["environment"]),
            outcomes=tuple(Outcome(**outcome) for outcome in body["outcomes"]),
            findings=tuple(finding_from(finding) for finding in body["findings"]),
            sections=body.get("sections", {}),
            seconds=body["seconds"],
            created=body["created"],
            id=body["id"],
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ReportError(f"a damaged report: {type(error).__name__}: {error}") from None


def read(path: Path) -> Report:
    """The report in a file."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from None
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ReportError(f"{path}: not a report: no text in UTF-8") from None


def finding_from(body: Mapping[str, Any]) -> Finding:
    """A finding from its JSON object."""
    case = body.get("case")
    return Finding(
        **{
            **_tuples(body),
            "where": Where(**body["where"]),
            "evidence": {name: NON_FINITE.get(value, value) for name, value in body["evidence"].items()},
            "source": tuple(SourceLine(**line) for line in body["source"]),
            "case": case_from(case) if case else None,
        }
    )


def case_from(body: Mapping[str, Any]) -> Case:
    """A case from its JSON object."""

    def rows(value: Any) -> Rows | None:
        return None if value is None else tuple(tuple(row) for row in value)

    names = ("input_ids", "attention_mask", "position_ids", "labels")
    return Case(**{**body, **{name: rows(body.get(name)) for name in names}})


def plain(value: Any) -> Any:
    """A record as JSON-able dicts, lists and scalars."""
    return _plain(value)


def merge_by_root(findings: Iterable[Finding], causes: Iterable[tuple[int, int]] = ()) -> tuple[Finding, ...]:
    """One finding a root cause: a later one of the same cause, and its `also`, join the `also` of the first."""
    known = tuple(findings)
    merged = []
    for first, *others in root_groups(known, causes):
        names = dict.fromkeys(name for i in (first, *others) for name in ((known[i].probe,) if i != first else ()) + known[i].also)
        merged.append(replace(known[first], also=tuple(name for name in names if name != known[first].probe)))
    return tuple(merged)


def root_groups(findings: Sequence[Finding], causes: Iterable[tuple[int, int]] = ()) -> list[list[int]]:
    """The places in a list of the findings that have one root cause, the one that is told in front: those of other probes
    at the same file and line, and those that `causes` says follow from another, `(cause, what follows)`.

    A finding without a file and a line stands alone, and a weaker severity never swallows a stronger one. Where the line
    is that of a `def`, a whole function is meant, and only findings of one topic are taken for one.
    """
    order: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
    groups: list[list[int]] = []
    for i, finding in enumerate(findings):
        for group in groups:
            first = findings[group[0]]
            placed = finding.where.file and finding.where.line
            same = placed and (first.where.file, first.where.line) == (finding.where.file, finding.where.line)
            same = same and (not _whole_function(finding) or first.probe.partition(".")[0] == finding.probe.partition(".")[0])
            if same and first.probe != finding.probe and order[first.severity] <= order[finding.severity]:
                group.append(i)
                break
        else:
            groups.append([i])
    for cause, follower in causes:
        root, other = (next(group for group in groups if i in group) for i in (cause, follower))
        if root is not other and order[findings[root[0]].severity] <= order[findings[other[0]].severity]:
            root += other
            groups.remove(other)
    return groups


def _whole_function(finding: Finding) -> bool:
    return any(line.marked and re.match(r"\s*(async\s+def|def|class)\b|\s*@", line.text) for line in finding.source)


def with_reproduction(report: Report, command: Callable[[str], str]) -> Report:
    """The report with the command line that shows each finding again; `command` maps a probe to it."""
    findings = tuple(replace(finding, reproduce=finding.reproduce or command(finding.probe)) for finding in report.findings)
    return replace(report, findings=findings)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _tuples(body: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in body.items()}
