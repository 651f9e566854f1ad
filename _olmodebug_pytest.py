"""The pytest plugin: `pytest --olmodebug SUBJECT -k rope` needs no test file; fixtures and reports for everybody else.

A top-level module of its own, so that pytest can load it without loading olmodebug: it imports neither that nor torch
before a test asks, and costs about two milliseconds. The work is in `olmodebug.testing`.
"""

import secrets
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

EXIT_NOTHING_CHECKED = 5  # pytest's own code for "no tests ran", and olmodebug's for "nothing was checked"
SUITE = "olmodebug"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("olmodebug", "language-model code")
    group.addoption(
        "--olmodebug", metavar="SUBJECT", help="run olmodebug's probes on this subject; without paths, nothing else is collected"
    )
    group.addoption(
        "--olmodebug-config", action="append", default=[], metavar="KEY=VALUE|FILE", help="what a class that needs a config gets"
    )
    group.addoption("--olmodebug-seed", type=int, default=0, metavar="N", help="seed of the weights and of every case (default 0)")
    group.addoption(
        "--olmodebug-probes", action="append", default=[], metavar="FILE.py", help="probes of your own, beside the shipped ones"
    )
    group.addoption(
        "--olmodebug-expect-failure", action="append", default=[], metavar="PROBE=REASON", help="a failure that is known; strict"
    )
    parser.addini("olmodebug_subject", "the subject of the fixture `subject`, where --olmodebug gives none")
    parser.addini("olmodebug_expected_failures", "PROBE = REASON, one a line; strict", type="linelist", default=[])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "olmodebug: a probe of olmodebug's")
    config.addinivalue_line("markers", "olmodebug_slow: a probe that takes more than a few seconds")
    worker = getattr(config, "workerinput", None)
    fresh = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    config.stash[RUN] = worker["olmodebug_run"] if worker and "olmodebug_run" in worker else fresh
    config.stash[RECORDS] = []
    config.pluginmanager.register(_Collected(config), "olmodebug-collected")
    if config.getoption("--olmodebug") and not _has_paths(config):
        config.args[:] = []  # nothing but the probes, whatever tests lie in this folder


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist: every worker writes the same run's id."""
    node.workerinput["olmodebug_run"] = node.config.stash[RUN]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """The probes join what was collected, before -k and -m choose."""
    if config.getoption("--olmodebug"):
        suite = ProbeSuite.from_parent(session, name=SUITE, nodeid=SUITE)  # type: ignore[call-arg]
        probes: list[pytest.Item | pytest.Collector] = list(suite.collect())
        items.extend(item for item in probes if isinstance(item, pytest.Item))
        report = pytest.CollectReport(nodeid=SUITE, outcome="passed", longrepr=None, result=probes)
        config.hook.pytest_collectreport(report=report)  # so that the line "collected 63 items" counts them


class ProbeSuite(pytest.Collector):
    """Every probe on the subject of `--olmodebug`, as tests without a file."""

    def collect(self) -> Iterable["ProbeItem"]:
        from olmodebug.testing import bench_of_options

        bench, slow = bench_of_options(self.config)
        for name in bench.names:
            item: ProbeItem = ProbeItem.from_parent(self, name=name)
            item.bench = bench
            item.add_marker("olmodebug")
            if name in slow:
                item.add_marker("olmodebug_slow")
            yield item


class ProbeItem(pytest.Item):
    """One probe as a test."""

    bench: Any

    def runtest(self) -> None:
        from olmodebug.testing import SubjectUnusable

        try:
            self.bench.judge(self.name)
        except SubjectUnusable as error:  # there is nothing to test: the exit code of every other command
            pytest.exit(str(error), returncode=2)

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        """A probe that fails needs no traceback: the finding is the message."""
        return super().repr_failure(excinfo, style="value" if hasattr(excinfo.value, "headline") else style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.config.rootpath / SUITE, None, self.name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Give JUnit the probe, the place and the way to run it again, and the summary its first line."""
    bench, name = _probe_of(item)
    if bench is not None and call.when == "call" and name in bench.results:
        # on the item and not on the report: JUnit reads the report of the teardown, which copies them from here
        item.user_properties.extend(bench.properties(name, item.config.stash[RUN]))
    report = yield
    headline = getattr(call.excinfo.value, "headline", None) if call.excinfo else None
    crash = getattr(report.longrepr, "reprcrash", None)
    if headline and crash is not None:
        crash.message = headline  # the summary is cut at the width of the terminal: the probe and the line come first
    if bench is None or call.when != "call":
        return report
    if report.skipped and isinstance(item, ProbeItem) and isinstance(report.longrepr, tuple):
        report.longrepr = (str(item.reportinfo()[0]), None, report.longrepr[2])  # type: ignore[assignment]  # no line of ours
    if name in bench.results:
        report.olmodebug = bench.record(name)  # type: ignore[attr-defined]
    return report


class _Collected:
    """What the probes told, here or in a worker: the hook for reports gets no config, so it must know its own."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        record = getattr(report, "olmodebug", None)
        if record is not None:
            self.config.stash[RECORDS].append(record)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Record the run, and do not let a run pass in which no probe could be asked."""
    records = session.config.stash[RECORDS]
    if hasattr(session.config, "workerinput") or not records:
        return
    from olmodebug.testing import save_records

    session.config.stash[LINES] = save_records(records, session.config.stash[RUN], Path.cwd())
    nothing = all(record["outcome"]["status"] in ("skipped", "not-applicable") for record in records)
    if session.config.getoption("--olmodebug") and nothing and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = EXIT_NOTHING_CHECKED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """How many probes ran, passed, failed, did not apply: a green run that asked nothing is none."""
    lines = config.stash.get(LINES, [])
    if lines:
        terminalreporter.section("olmodebug", sep="=")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def subject(pytestconfig: pytest.Config) -> Any:
    """The subject that --olmodebug or the ini value olmodebug_subject names, as olmodebug sees it; `.model` is the module."""
    from olmodebug.testing import subject_of_options

    return subject_of_options(pytestconfig)


@pytest.fixture(scope="session")
def assert_causal() -> Any:
    """`assert_causal(model)`: no logit depends on a later token; the failure names the line."""
    from olmodebug.testing import assert_causal as assertion

    return assertion


@pytest.fixture(scope="session")
def assert_parity() -> Any:
    """`assert_parity("my_model.py:build", dtype="bfloat16")`: two executions agree op by op; the failure names the first op."""
    from olmodebug.testing import assert_parity as assertion

    return assertion


@pytest.fixture
def guard() -> Any:
    """`with guard(): step()`: the guards of `olmodebug run` (index, nan) on a block; the failure names line, tensor and value."""
    from olmodebug.testing import Guarded

    return Guarded


RUN = pytest.StashKey[str]()
RECORDS = pytest.StashKey[list[dict[str, Any]]]()
LINES = pytest.StashKey[list[str]]()


def _has_paths(config: pytest.Config) -> bool:
    return config.args_source == pytest.Config.ArgsSource.ARGS


def _probe_of(item: pytest.Item) -> tuple[Any, str]:
    """The bench and the probe of a test, ours or one made by parametrize_with_probes."""
    if isinstance(item, ProbeItem):
        return item.bench, item.name
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    bench, probe = parameters.get("subject"), parameters.get("probe")
    if type(bench).__module__ == "olmodebug.testing" and type(probe).__module__ == "olmodebug.testing":
        return bench, str(probe)
    return None, ""
