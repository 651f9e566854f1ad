"""Probes as tests: `parametrize_with_probes` for a suite of your own, and what the pytest plugin runs.

Unlike the command line this runs in pytest's own process: a model that aborts takes it along (with xdist, one worker).
"""

import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pytest

from .errors import OlmodebugError, UsageError
from .probe import Declared, declared_in, declared_probes
from .report import Environment, Finding, Outcome, Report, SubjectInfo, finding_from, merge_by_root, plain
from .spec_text import parse_config
from .supervise import Order, order_record, reproduce

if TYPE_CHECKING:
    from torch import nn

    from .examine import Result
    from .probe import Probe
    from .spec import Job
    from .subject import Subject

BUILD, FIRST_RUN = "build.constructs", "build.runs"


class SubjectUnusable(pytest.fail.Exception):  # type: ignore[name-defined, misc]
    """The subject cannot be had at all: a mistake in what was asked, and nothing about a model."""


class ProbeFailure(AssertionError):
    """A probe failed. `headline` is its name, the culprit's place and what is wrong, in one line."""

    __module__ = "olmodebug"  # what people see of it in a summary

    def __init__(self, finding: Finding) -> None:
        from .render.concise import place
        from .render.finding import details_view
        from .render.plain import plain_text

        self.finding = finding
        self.headline = ": ".join(filter(None, [finding.probe, place(finding.where), " ".join(finding.message.split())]))
        super().__init__(f"{self.headline}\n{plain_text(details_view(finding))}".rstrip())


def parametrize_with_probes(
    subjects: Sequence[object],
    *,
    expected_failures: Mapping[str, str] | None = None,
    select: str | None = None,
    probes: Sequence[str | Path] = (),
    seed: int = 0,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run a test once for every probe on every subject: `def test_model(subject, probe): probe(subject)`.

    A subject is a factory, a class, a model or a spec; factories are called when the first probe needs them.
    `expected_failures` maps a probe to the reason why it may fail; it is strict, and an unknown name is an error.
    `select` is an expression like `-k`'s, `probes` are files of your own.
    """
    from .probe import select as selected

    known = _declared(probes)
    expected = checked_expectations(expected_failures or {}, known)
    names = [item.name for item in selected(known, select)]
    if not names:
        raise UsageError(f"parametrize_with_probes: no probe matches {select!r}; olmodebug probes lists them")
    benches = [Bench(what=what, names=names, expected=expected, own=tuple(map(str, probes)), seed=seed) for what in subjects]
    rows = []
    for bench in benches:
        for item in known:
            if item.name in names:
                marks = [pytest.mark.olmodebug, *([pytest.mark.olmodebug_slow] if item.cost == "slow" else [])]
                test_id = item.name if len(benches) == 1 else f"{bench.label}-{item.name}"
                rows.append(pytest.param(bench, ProbeCall(item.name), id=test_id, marks=marks))
    return pytest.mark.parametrize(("subject", "probe"), rows)


def assert_causal(model: object, **options: Any) -> None:
    """No logit of the model depends on a later token; ProbeFailure names the line otherwise. Options as of `olmodebug.check`."""
    __tracebackhide__ = True
    assert_probes(model, "causality", **options)


def assert_probes(model: object, select: str, **options: Any) -> Report:
    """The probes that fit an expression hold on a live model or a spec; ProbeFailure otherwise, or when none applies."""
    __tracebackhide__ = True
    from .api import check

    report = check(model, select_probes=select, **options)  # type: ignore[arg-type]
    errors = report.of("error")
    if errors:
        raise ProbeFailure(errors[0])
    broken = [outcome for outcome in report.outcomes if outcome.status == "error"]
    if broken:
        raise RuntimeError(f"{broken[0].probe} itself broke:\n{broken[0].reason}")
    if not [outcome for outcome in report.outcomes if outcome.status == "passed" and outcome.probe not in (BUILD, FIRST_RUN)]:
        reasons = dict.fromkeys(outcome.reason for outcome in report.outcomes if outcome.reason)
        message = f"no probe of {select!r} applies: {'; '.join(filter(None, reasons)) or 'none has such a name'}"
        raise ProbeFailure(Finding(probe=select, severity="error", message=message))
    return report


def assert_parity(subject: str, reference: str | None = None, **options: Any) -> Report:
    """Two executions of a spec, or a spec and a reference, agree op by op; ProbeFailure at the first op that does not.

    Options as of `olmodebug.parity`.
    """
    __tracebackhide__ = True
    from .api import parity

    report = parity(subject, reference, **options)
    if errors := report.of("error"):
        raise ProbeFailure(errors[0])
    if not report.counts.ran:
        raise ProbeFailure(Finding(probe="parity.runs", severity="error", message="nothing could be compared"))
    return report


class Guarded:
    """`with Guarded(): step()`: a block under `olmodebug.guard`, by default index and nan; ProbeFailure for what is found there."""

    def __init__(self, model: "nn.Module | None" = None, *, guards: Sequence[str] = ("index", "nan")) -> None:
        from .guarding import guard

        self.guard = guard(model, guards=guards)

    def __enter__(self) -> None:
        self.guard.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        __tracebackhide__ = True
        self.guard.__exit__(kind, error, trace)
        errors = [finding for finding in self.guard.findings if finding.severity == "error"]
        if errors and (error is None or isinstance(error, Exception)):
            raise ProbeFailure(errors[0]) from None


@dataclass(frozen=True, slots=True)
class ProbeCall:
    """One probe, to be called with the `subject` of the same test."""

    name: str

    def __call__(self, subject: "Bench") -> None:
        __tracebackhide__ = True
        subject.judge(self.name)

    def __str__(self) -> str:
        return self.name


class Bench:
    """One subject under test in this process: built when the first probe asks for it, with what was found so far."""

    def __init__(
        self,
        *,
        what: object,
        names: Sequence[str],
        expected: Mapping[str, str],
        own: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        command: str = "",
    ) -> None:
        self.what, self.names, self.expected, self.own, self.seed = what, names, expected, own, seed
        self.config, self.command = dict(config or {}), command
        self._job: Job | None = None
        self._probes: dict[str, Probe] = {}
        self._subject: Subject | None = None
        self._stopped: str | None = None
        self.results: dict[str, Result] = {}

    @property
    def label(self) -> str:
        """What tells this subject from the others in a test's id."""
        return self.what if isinstance(self.what, str) else getattr(self.what, "__name__", type(self.what).__name__)

    @property
    def spec(self) -> str:
        """How the command line would name this subject, where it can: `tests/test_model.py:build`."""
        if isinstance(self.what, str):
            return self.what
        if not self.label.isidentifier() or self.label != getattr(self.what, "__qualname__", ""):
            return self.label  # a model, a lambda, something inside a function
        return f"{os.path.relpath(inspect.getfile(self.what))}:{self.label}"  # type: ignore[arg-type]

    @property
    def repeatable(self) -> bool:
        """Whether the command line can build it again."""
        return isinstance(self.what, str) or self.spec != self.label

    def ready(self) -> "Subject":
        """The subject, built on first use; ProbeFailure when its code raises, OlmodebugError when there is no such thing."""
        __tracebackhide__ = True
        if self._subject is None:
            self._build()
        if self._subject is None:
            raise UsageError(self._stopped or "the subject does not build")
        return self._subject

    def judge(self, name: str) -> None:
        """Run one probe and end the test as pytest knows it: pass, fail, skip with its reason, or expected failure."""
        __tracebackhide__ = True
        from .examine import Result

        if self._subject is None and self._stopped is None:
            try:
                self._build()
            except ProbeFailure as failure:  # told by the first probe that asks; the others are skipped
                self.results[name] = Result(outcome=Outcome(probe=failure.finding.probe, status="failed"), findings=(failure.finding,))
                raise
            except OlmodebugError as error:
                raise SubjectUnusable(f"olmodebug: {error}", pytrace=False) from None
        if self._subject is None:
            self.results[name] = Result(outcome=Outcome(probe=name, status="skipped", reason=self._stopped))
            pytest.skip(self._stopped or "")
        result = self.run(name)
        status, reason = result.outcome.status, result.outcome.reason or ""
        if status == "failed":
            raise ProbeFailure(next(finding for finding in result.findings if finding.severity == "error"))
        if status == "error":
            pytest.fail(f"{name} itself broke; this is a fault of olmodebug's:\n{reason}", pytrace=False)
        if status == "expected-failure":
            pytest.xfail(reason)
        if status == "not-applicable":
            pytest.skip(f"not applicable: {reason}")
        if status == "skipped":
            pytest.skip(reason)

    def run(self, name: str) -> "Result":
        """The result of one probe, recorded."""
        from .examine import run_probe

        assert self._subject is not None
        failed = {other: result.root for other, result in self.results.items() if result.root is not None}
        with warnings.catch_warnings():  # a suite that turns warnings into errors would break the model under test
            warnings.simplefilter("default")
            result = run_probe(self._all()[name], self._subject, job=self._job, failed=failed, expected=self.expected)
        if self.repeatable:
            result.findings = tuple(replace(finding, reproduce=reproduce(self.order, name)) for finding in result.findings)
        self.results[name] = result
        return result

    @property
    def order(self) -> "Order":
        """What `olmodebug check` would be asked to do the same."""
        job = plain(self._job) if self._job is not None else {"spec": self.spec}
        select = " or ".join(result.outcome.probe for result in self.results.values())
        return Order(job=job, select=select, own_probes=tuple(self.own), expected=self.expected, command=self.command)

    def record(self, name: str) -> dict[str, Any]:
        """A result as JSON values, with what a report needs beside it."""
        from .environment import environment

        result = self.results[name]
        info = self._subject.info() if self._subject is not None else SubjectInfo(spec=self.spec)
        return {
            "outcome": plain(result.outcome),
            "findings": [plain(finding) for finding in result.findings],
            "subject": plain(info),
            "sections": plain(self._subject.measured) if self._subject is not None else {},
            "environment": plain(environment(seed=self.seed, command=self.command)),
            "order": order_record(self.order) if self.repeatable else None,
        }

    def properties(self, name: str, run: str) -> list[tuple[str, str]]:
        """What JUnit shows beside a test: the probe, and for a failure the place and how to run it again."""
        from .render.concise import place

        found = [("olmodebug_probe", name)]
        errors = [finding for finding in self.results[name].findings if finding.severity == "error"]
        if errors:
            found.append(("olmodebug_where", place(errors[0].where)))
        if errors and self.repeatable:
            found.append(("olmodebug_replay", run))
        return found

    def _build(self) -> None:
        __tracebackhide__ = True
        from .explain import explain
        from .load import SubjectCodeError
        from .spec import Job, resolve, resolve_object

        self._job = Job(spec=self.spec, config=self.config, seed=self.seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                self._subject = resolve(self._job) if isinstance(self.what, str) else resolve_object(self.what, self._job)
        except OlmodebugError as error:
            self._stopped = f"no subject: {error}"
            raise
        except SubjectCodeError as error:
            name = FIRST_RUN if error.stage == "first run" else BUILD
            self._stopped = f"{name} failed"
            raise ProbeFailure(explain(error).finding().told(probe=name)) from None

    def _all(self) -> dict[str, "Probe"]:
        from .load import load_file
        from .probe import probes_in, shipped_probes, with_own

        if not self._probes:
            probes = shipped_probes()
            for path in self.own:
                probes = with_own(probes, probes_in(load_file(Path(path))))
            self._probes = {probe.name: probe for probe in probes}
        return self._probes


def bench_of_options(config: pytest.Config) -> tuple[Bench, set[str]]:
    """The bench that the command line of pytest asks for, made once, and the names of its slow probes; pytest.UsageError
    when it cannot be meant."""
    if BENCH not in config.stash:
        spec = config.getoption("--olmodebug") or config.getini("olmodebug_subject")
        if not spec:
            raise pytest.UsageError("the fixture `subject` needs pytest --olmodebug SUBJECT, or olmodebug_subject in the ini file")
        try:
            known = _declared(config.getoption("--olmodebug-probes"))
            pairs = [*config.getini("olmodebug_expected_failures"), *config.getoption("--olmodebug-expect-failure")]
            bench = Bench(
                what=spec,
                names=[item.name for item in known],
                expected=checked_expectations(dict(map(_pair, pairs)), known),
                own=config.getoption("--olmodebug-probes"),
                config=parse_config(config.getoption("--olmodebug-config")),
                seed=config.getoption("--olmodebug-seed"),
                command=" ".join(["pytest", *map(str, config.invocation_params.args)]),
            )
        except OlmodebugError as error:
            raise pytest.UsageError(f"olmodebug: {error}") from None
        config.stash[BENCH] = (bench, {item.name for item in known if item.cost == "slow"})
    return config.stash[BENCH]


def subject_of_options(config: pytest.Config) -> "Subject":
    """The subject for the fixture: what stands in its way is told in a line, without a traceback through this plugin."""
    try:
        return bench_of_options(config)[0].ready()
    except (pytest.UsageError, OlmodebugError) as error:
        pytest.fail(str(error), pytrace=False)


def checked_expectations(expected: Mapping[str, str], known: Sequence[Declared]) -> dict[str, str]:
    """Expected failures of which every name is a probe and every reason a text; UsageError with near names otherwise."""
    import difflib

    names = [item.name for item in known]
    for name, reason in expected.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; olmodebug probes lists them"
            raise UsageError(f"expected failures: no probe is called {name!r}{hint}")
        if not isinstance(reason, str) or not reason.strip():
            raise UsageError(f"expected failures: {name} needs a reason, as in {{{name!r}: 'no KV cache yet'}}")
    return {name: reason.strip() for name, reason in expected.items()}


def save_records(records: Sequence[Mapping[str, Any]], run_id: str, base: Path) -> list[str]:
    """Write each subject's results as a run that `olmodebug report` and `replay` read; a line for each about what ran."""
    from .store import new_run

    lines, specs = [], list(dict.fromkeys(record["subject"]["spec"] for record in records))
    for index, spec in enumerate(specs):
        own = [record for record in records if record["subject"]["spec"] == spec]
        last = own[-1]
        name = run_id if not index else f"{run_id}-{index}"
        report = Report(
            subject=SubjectInfo(**{**last["subject"], "assumptions": tuple(last["subject"]["assumptions"])}),
            environment=Environment(**last["environment"]),
            outcomes=tuple(Outcome(**record["outcome"]) for record in own),
            findings=merge_by_root(finding_from(finding) for record in own for finding in record["findings"]),
            sections=last["sections"],
            seconds=round(sum(record["outcome"]["seconds"] for record in own), 3),
            created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            id=name,
        )
        line = f"{spec}: {report.counts}"
        if last["order"] is not None:
            run = new_run(base, name=name)
            select = " or ".join(outcome.probe for outcome in report.outcomes)
            if run.save(report, {**last["order"], "select": select}).id:
                line += f"; olmodebug report {name}"
        lines.append(line)
    return lines


BENCH = pytest.StashKey[tuple[Bench, set[str]]]()


def _declared(files: Sequence[str | Path]) -> list[Declared]:
    known = declared_probes()
    for path in files:
        if not Path(path).is_file():
            raise UsageError(f"no such file of probes: {path}")
        for item in declared_in(Path(path)):
            if item.name in {other.name for other in known}:
                raise UsageError(f"two probes are called {item.name}; rename one")
            known.append(item)
    return known


def _pair(text: str) -> tuple[str, str]:
    name, _, reason = text.partition("=")
    return name.strip(), reason.strip()
