"""The pytest plugin, run by pytest itself on tiny subjects: every way a probe can end, ids, counts, JUnit, xdist, no side effects."""

import json
import os
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from hypothesis import settings

import olmodebug
from olmodebug.errors import UsageError

ROOT = Path(__file__).parents[1]
PLUGIN = () if entry_points(group="pytest11", name="olmodebug") else ("-p", "_olmodebug_pytest")

MODEL = """
    import torch
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(31, 8)
            self.head = nn.Linear(8, 31)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids))

    def crash():
        raise RuntimeError("no weights today")
"""
PROBES = """
    from olmodebug.probe import not_applicable, probe, skip
    from olmodebug.records import Where
    from olmodebug.report import Finding

    @probe()
    def holds(subject):
        \"\"\"It holds.\"\"\"
        return
        yield

    @probe()
    def broken(subject):
        \"\"\"It does not hold.\"\"\"
        yield Finding(probe="", severity="error", message="logits [batch, seq] move", where=Where(file="model.py", line=8), cause="why not")

    @probe(after=("mine.broken",))
    def dependent(subject):
        \"\"\"It needs the other.\"\"\"
        return
        yield

    @probe()
    def elsewhere(subject):
        \"\"\"It does not apply.\"\"\"
        not_applicable("no such thing")
        yield

    @probe()
    def later(subject):
        \"\"\"It cannot run here.\"\"\"
        skip("no card")
        yield

    @probe(cost="slow")
    def bug_of_ours(subject):
        \"\"\"It breaks.\"\"\"
        raise KeyError("ours")
        yield
"""


class OwnModules:
    """What pytester calls a snapshot of sys.modules: forgets the modules of one folder, and no other.

    Pytester's own forgets everything that a run has imported; half of torch is imported late, and cannot be imported twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def restore(self) -> None:
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(str(self.folder)):
                del sys.modules[name]


@pytest.fixture
def folder(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setattr(pytester, "_Pytester__take_sys_modules_snapshot", lambda: OwnModules(pytester.path))
    monkeypatch.setattr(pytester, "_sys_modules_snapshot", OwnModules(pytester.path))
    monkeypatch.setenv("COLUMNS", "200")
    pytester.makepyfile(model=textwrap.dedent(MODEL), mine=textwrap.dedent(PROBES))
    pytester.makeini("[pytest]\naddopts = --strict-markers\n")
    pytester.syspathinsert(str(ROOT))
    return pytester


def run(folder: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return folder.runpytest_inprocess(*PLUGIN, *arguments)


OWN = ("--olmodebug", "model.py:Tiny", "--olmodebug-probes", "mine.py")


def test_without_a_test_file_every_probe_ends_as_it_should_and_is_counted(folder: pytest.Pytester) -> None:
    folder.makepyfile(test_users_own="def test_rope_of_the_user(): assert False")  # not collected: no path was given
    before = settings.default
    result = run(folder, *OWN, "-k", "mine.", "-rA", "--junitxml=junit.xml")
    assert settings.default is before
    result.assert_outcomes(passed=1, failed=2, skipped=3, deselected=len(olmodebug_names()))
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "mine.broken: model.py:8: logits [[]batch, seq[]] move",
            "  --> model.py:8",
            "  cause      why not",
            "*KeyError: 'ours'*",
            "model.py:Tiny: 3 ran (1 pass, 1 fail, 1 broke), 1 not applicable, 2 skipped, of 6 probes; olmodebug report *",
            "PASSED olmodebug::mine.holds",
            "SKIPPED * it depends on mine.broken, which failed",
            "SKIPPED * not applicable: no such thing",
            "SKIPPED * no card",
            "FAILED olmodebug::mine.broken - mine.broken: model.py:8: logits [[]batch, seq[]] move",
        ],
    )
    result.stdout.no_fnmatch_line("*test_rope_of_the_user*")
    cases = {case.get("name"): case for case in ET.parse(folder.path / "junit.xml").iter("testcase")}
    properties = {p.get("name"): p.get("value") for p in cases["mine.broken"].iter("property")}
    assert properties["olmodebug_probe"] == "mine.broken"
    assert properties["olmodebug_where"] == "model.py:8"
    run_folder = folder.path / ".olmodebug" / "runs" / (properties["olmodebug_replay"] or "")
    report = json.loads((run_folder / "report.json").read_text(encoding="utf-8"))
    assert report["counts"] == {"passed": 1, "failed": 1, "expected": 0, "errors": 1, "not_applicable": 1, "skipped": 2}
    assert report["findings"][0]["reproduce"] == "olmodebug check model.py:Tiny --probes=mine.py -k mine.broken"
    assert {p.get("name") for p in cases["mine.holds"].iter("property")} == {"olmodebug_probe"}


def olmodebug_names() -> list[str]:
    from olmodebug.probe import declared_probes

    return [item.name for item in declared_probes()]


def test_the_users_own_tests_run_too_when_their_path_is_given_and_markers_choose(folder: pytest.Pytester) -> None:
    path = folder.makepyfile(test_users="def test_own(): pass")
    result = run(folder, *OWN, "-k", "mine. or users", "-m", "not olmodebug_slow", str(path))
    result.assert_outcomes(passed=2, failed=1, skipped=3, deselected=len(olmodebug_names()) + 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "the fixture `subject` needs pytest --olmodebug SUBJECT, or olmodebug_subject in the ini file"),
        (("-o", "olmodebug_subject=nowhere.py:build"), "no such file: nowhere.py"),
    ],
)
def test_a_subject_that_the_fixture_cannot_give_is_told_in_a_line(options: tuple[str, ...], words: str, folder: pytest.Pytester) -> None:
    path = folder.makepyfile(test_users="def test_own(subject): pass")
    result = run(folder, *options, str(path))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([words])
    result.stdout.no_fnmatch_line("*testing.py*")


def test_an_expected_failure_is_strict_and_needs_a_name_and_a_reason(folder: pytest.Pytester) -> None:
    result = run(folder, *OWN, "-k", "mine.broken", "--olmodebug-expect-failure", "mine.broken=not yet", "-rx")
    result.assert_outcomes(xfailed=1, deselected=len(olmodebug_names()) + 5)
    result.stdout.fnmatch_lines(["*1 expected-fail*", "XFAIL *mine.broken - not yet"])
    result = run(folder, *OWN, "-k", "mine.holds", "--olmodebug-expect-failure", "mine.holds=not yet")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["mine.holds: mine.holds passes, though it was expected to fail (not yet); take it off the list"])
    for pair, words in (("mine.hold=x", "*no probe is called 'mine.hold'; did you mean mine.holds*"), ("mine.holds=", "*needs a reason*")):
        result = run(folder, *OWN, "--olmodebug-expect-failure", pair)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([words])


def test_a_run_in_which_nothing_could_be_asked_is_no_success(folder: pytest.Pytester) -> None:
    assert run(folder, *OWN, "-k", "mine.elsewhere or mine.later").ret == 5
    assert run(folder, *OWN, "-k", "no_such_probe").ret == 5


def test_a_subject_that_does_not_build_fails_once_and_skips_the_rest(folder: pytest.Pytester) -> None:
    result = run(folder, "--olmodebug", "model.py:crash", "-k", "vocab", "-rs")
    outcomes = result.parseoutcomes()
    assert outcomes["failed"] == 1
    assert outcomes["skipped"] >= 2
    result.stdout.fnmatch_lines(["build.constructs: model.py:14: *no weights today*", "SKIPPED *build.constructs failed"])


def test_a_subject_that_does_not_exist_is_one_clear_line(folder: pytest.Pytester) -> None:
    result = run(folder, "--olmodebug", "modell.py:Tiny", "-k", "vocab.rows-are-alive")
    assert result.ret == 2
    result.stdout.fnmatch_lines(["*olmodebug: no such file: modell.py; near it: model.py*"])


def test_one_line_in_a_suite_runs_every_probe_with_plain_ids(folder: pytest.Pytester) -> None:
    path = folder.makepyfile(
        test_model="""
        import olmodebug
        from model import Tiny

        @olmodebug.parametrize_with_probes([Tiny], expected_failures={"mine.broken": "known"}, probes=["mine.py"])
        def test_tiny(subject, probe):
            probe(subject)
        """
    )
    result = run(folder, str(path), "-k", "mine.holds or mine.broken or keeps-norm", "-rA")
    result.assert_outcomes(passed=1, xfailed=1, skipped=1, deselected=len(olmodebug_names()) - 1 + 4)
    result.stdout.fnmatch_lines(["PASSED *::test_tiny[[]mine.holds[]]"])


def test_a_failure_in_a_suite_starts_with_the_probe_and_the_line(folder: pytest.Pytester) -> None:
    path = folder.makepyfile(
        test_model="""
        import olmodebug, torch
        from model import Tiny, crash

        @olmodebug.parametrize_with_probes([Tiny, crash], probes=["mine.py"], select="mine.broken")
        def test_tiny(subject, probe):
            probe(subject)

        class Leaky(Tiny):
            def forward(self, input_ids):
                return self.head(self.embed(input_ids).flip(1))

        def test_leaky(assert_causal):
            assert_causal(Tiny())
            assert_causal(Leaky())

        def test_subject(subject):
            assert subject.model.head.out_features == 31
        """
    )
    result = run(folder, str(path), "-o", "olmodebug_subject=model.py:Tiny")
    result.assert_outcomes(failed=3, passed=1)
    result.stdout.fnmatch_lines(
        [
            "FAILED test_model.py::test_tiny[[]Tiny-mine.broken[]] - mine.broken: model.py:8: logits*",
            "FAILED test_model.py::test_tiny[[]crash-mine.broken[]] - build.constructs: model.py:14: *",
            "FAILED test_model.py::test_leaky - causality.no-future: *test_model.py:*: logits at position*",
        ]
    )
    result.stdout.no_fnmatch_line("*testing.py*")  # nobody has to read our own frames


def test_a_block_under_the_guards_fails_at_the_line_with_the_value(folder: pytest.Pytester) -> None:
    path = folder.makepyfile(
        test_model="""
        import torch
        from model import Tiny

        def test_right(guard):
            with guard():
                Tiny()(torch.tensor([[30]])).sum().backward()

        def test_wrong(guard):
            with guard():
                Tiny()(torch.tensor([[31]]))

        def test_other(guard):
            with guard(guards=["index"]):
                raise ValueError("of the test itself")
        """
    )
    result = run(folder, str(path))
    result.assert_outcomes(failed=2, passed=1)
    result.stdout.fnmatch_lines(
        [
            "FAILED test_model.py::test_wrong - index.in-bounds: model.py:11: index 31 is out of range: `embed.weight` has 31 rows",
            "FAILED test_model.py::test_other - ValueError: of the test itself",
        ]
    )


@pytest.mark.slow
def test_parity_of_a_spec_is_asserted(folder: pytest.Pytester) -> None:
    path = folder.makepyfile(
        test_model="""
        def test_bfloat16(assert_parity):
            report = assert_parity("model.py:Tiny", dtype="bfloat16")
            assert report.sections["parity"]["runs"]
        """
    )
    run(folder, str(path)).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expected_failures": {"rope.relative": "x"}}, "no probe is called 'rope.relative'; did you mean rope.relative-shift"),
        ({"expected_failures": {"rope.relative-shift": " "}}, "needs a reason"),
        ({"select": "no-such"}, "no probe matches 'no-such'"),
        ({"probes": ["missing.py"]}, "no such file of probes: missing.py"),
    ],
)
def test_what_a_suite_cannot_mean_is_an_error_when_it_is_collected(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        olmodebug.parametrize_with_probes([object()], **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_workers_of_xdist_share_one_count_and_one_record(folder: pytest.Pytester) -> None:
    result = folder.runpytest_subprocess(*PLUGIN, *OWN, "-k", "mine.", "-n", "2", "--junitxml=junit.xml")
    outcomes = result.parseoutcomes()
    assert (outcomes["passed"], outcomes["failed"]) in ((1, 2), (2, 2))  # the dependent may be in the other worker
    result.stdout.fnmatch_lines(["model.py:Tiny: * of 6 probes; olmodebug report *", "FAILED *mine.broken: model.py:8: logits*"])
    assert len(list((folder.path / ".olmodebug" / "runs").iterdir())) == 1


def test_loading_the_plugin_costs_little_and_loads_nothing_heavy() -> None:
    program = """
import sys, time
import pytest
start = time.process_time()
import _olmodebug_pytest
print(time.process_time() - start)
print([name for name in ("torch", "olmodebug", "numpy", "transformers", "rich") if name in sys.modules])
sys.exit(pytest.main(["--help", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, *PLUGIN], capture_output=True, text=True, env=environment, cwd="/", check=False)
    seconds, loaded = done.stdout.splitlines()[:2]
    assert loaded == "[]"
    assert float(seconds) < 0.02, seconds  # about 0.002 on a quiet machine
    assert "--olmodebug=SUBJECT" in done.stdout
