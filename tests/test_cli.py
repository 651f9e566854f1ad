"""The command line and the child process: exit codes, one clear line for a wrong turn, and every way a subject can die."""

import importlib
import json
import os
import pty
import re
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest

import olmodebug.report

cli = importlib.import_module("olmodebug.cli")
ROOT = Path(__file__).parents[1]
SCHEMA = json.loads(Path(olmodebug.report.__file__).with_name("report.schema.json").read_text(encoding="utf-8"))
BUGS = ROOT / "tests" / "mutants" / "bugs"
STYLE = re.compile(r"\x1b\[[0-9;]*m")
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3|4|9|10)[0-8]")  # bold and underlined are no colours

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
"""


class Ran(NamedTuple):
    """What a run of the command line left behind."""

    code: int
    out: str
    err: str
    report: dict[str, Any] | None

    def outcome(self, probe: str) -> dict[str, Any]:
        assert self.report is not None
        return next(item for item in self.report["outcomes"] if item["probe"] == probe)

    def errors(self) -> list[dict[str, Any]]:
        assert self.report is not None
        return [item for item in self.report["findings"] if item["severity"] == "error"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in an empty folder; its child is a real process, its report is checked against the schema."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str) -> Ran:
        code = cli.main(list(arguments))
        out, err = capsys.readouterr()
        err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("loading torch and building"))  # progress
        found = None
        if "--json" in arguments and Path(arguments[arguments.index("--json") + 1]).is_file():
            found = json.loads(Path(arguments[arguments.index("--json") + 1]).read_text(encoding="utf-8"), parse_constant=_no_constant)
            jsonschema.Draft202012Validator(SCHEMA).validate(found)
        return Ran(code, out, err, found)

    return call


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def write(name: str, text: str, *, model: str = MODEL) -> Path:
    path = Path(name)
    path.write_text(textwrap.dedent(model) + textwrap.dedent(text), encoding="utf-8")
    return path


def on_narrow_terminal(*arguments: str, cwd: Path = ROOT) -> tuple[int, str]:
    """Exit code and output on a terminal of 40 columns that knows ASCII only and wants no colour."""
    master, slave = pty.openpty()
    settings = {"NO_COLOR": "1", "COLUMNS": "40", "TERM": "xterm", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    process = subprocess.Popen([sys.executable, *arguments], stdout=slave, stderr=slave, env=environment, cwd=cwd)
    os.close(slave)
    text = b""
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:  # how Linux says that the other end is closed
            chunk = b""
        if not chunk:
            break
        text += chunk
    os.close(master)
    return process.wait(), text.decode("ascii").replace("\r", "")


def alone(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """A fresh interpreter in which olmodebug is found."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False, **options)


# Starting up


def test_help_is_quick_and_loads_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'hypothesis', 'pytest', 'numpy', 'rich'} & set(sys.modules)"
    program = f"""
import sys, olmodebug, olmodebug.cli
assert not {heavy}, {heavy}
try:
    olmodebug.cli.main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
assert not {heavy}, {heavy}
olmodebug.cli.main(["probes"])
assert 'torch' not in sys.modules, "listing the probes loads torch"
"""
    ran = alone("-c", program)
    assert ran.returncode == 0, ran.stderr
    for command in ("check", "probes", "env", "report", "replay"):
        assert f"  {command}" in ran.stdout
    assert "0 no error finding, 1 at least one, 2 could not run" in " ".join(ran.stdout.split())
    assert "causality.no-future" in ran.stdout


def test_help_is_quick_beside_what_any_command_line_imports() -> None:
    def cpu(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert alone(*arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    usual = ("-c", "import argparse, dataclasses, json, pathlib, typing")
    pairs = [(cpu("-m", "olmodebug", "--help"), cpu(*usual)) for _ in range(5)]  # both under the same load
    ours, theirs = (min(each) for each in zip(*pairs, strict=True))
    assert ours < 3 * theirs, f"{ours * 1000:.0f} ms of CPU, beside {theirs * 1000:.0f}"


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    read, write_end = os.pipe()
    os.close(read)  # what `| head -1` does, without the race
    for arguments in (["probes", "-v"], ["probes", "causality"]):
        ran = subprocess.run(
            [sys.executable, "-m", "olmodebug", *arguments],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert (ran.returncode, ran.stderr) == (141, "")
    os.close(write_end)


def test_probes_can_be_listed_on_a_narrow_terminal_in_plain_ascii_without_colour() -> None:
    code, text = on_narrow_terminal("-m", "olmodebug", "probes", "causality", "-v")
    assert code == 0, text
    assert not COLOUR.search(text)
    assert max(len(STYLE.sub("", line)) for line in text.splitlines()) <= 40
    assert "causality.no-future" in text
    assert "causality.holds-for-large-scores" in text


# What cannot run: exit 2 and one line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--timeout", "soon"], "--timeout"),
        (["nonsense"], "nonsense"),
        (["check", "--no-such-option"], "--no-such-option"),
    ],
)
def test_an_option_that_cannot_be_meant_is_exit_2(arguments: list[str], words: str, run: Callable[..., Ran], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "-k", "(causality"], ["cannot be read"]),
        (["check", "--probes", "nowhere.py", "-k", "x"], ["nowhere.py", "no such file"]),
        (["check", "--json", "no/such/folder/report.json"], ["cannot write"]),
        (["check", "--config", "nowhere.json"], ["nowhere.json", "No such file"]),
        (["check", "--expect-failure", "causality.no-future"], ["reason"]),
        (["check", "--expect-failure", "causality.no-futur=known"], ["did you mean causality.no-future"]),
        (["probes", "no-futur-at-all"], ["no probe matches"]),
        (["report"], ["no run is recorded"]),
        (["report", "nowhere.json"], ["nowhere.json"]),
        (["replay"], ["no run is recorded"]),
    ],
)
def test_what_can_be_seen_to_be_wrong_without_torch_is_exit_2_and_one_line(
    arguments: list[str], words: list[str], run: Callable[..., Ran]
) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1, ran.err
    assert ran.err.startswith("olmodebug: ")
    assert all(word in ran.err for word in words), ran.err


def test_a_file_of_probes_that_does_not_load_is_exit_2(run: Callable[..., Ran]) -> None:
    Path("own.py").write_text("raise RuntimeError('half done')\n", encoding="utf-8")
    ran = run("check", "olmo1-tiny", "--probes", "own.py")
    assert ran.code == 2, ran.err
    assert "half done" in ran.err
    assert "Traceback" not in ran.err


# Verdicts


@pytest.mark.fresh
def test_a_right_model_passes_in_a_folder_that_cannot_be_written(run: Callable[..., Ran]) -> None:
    Path(".olmodebug").write_text("a file stands where the folder would be", encoding="utf-8")
    ran = run("check", "olmo2-tiny", "-k", "causality or structure", "--json", "report.json")
    assert ran.code == 0, ran.out + ran.err
    assert "this run is not recorded" in ran.err
    assert ran.report is not None
    assert (ran.report["verdict"], ran.errors()) == ("pass", [])
    assert ran.report["subject"]["convention"].startswith("forward(input_ids")
    assert ran.report["environment"]["command"] == "olmodebug check olmo2-tiny -k 'causality or structure' --json report.json"


def test_a_selection_of_nothing_is_exit_5(run: Callable[..., Ran]) -> None:
    ran = run("check", "olmo1-tiny", "-k", "causalty", "--json", "report.json")
    assert ran.code == 5
    assert "did you mean" in ran.err
    assert ran.report is not None
    assert (ran.report["outcomes"], ran.report["exit_code"]) == ([], 5)


def test_a_broken_model_fails_is_recorded_and_replayed_until_it_is_fixed(run: Callable[..., Ran]) -> None:
    text = (BUGS / "mask_added.py").read_text(encoding="utf-8")
    Path("mine.py").write_text(text, encoding="utf-8")
    ran = run("check", "mine.py:build_loud", "-k", "mask-is-accepted or structure", "--json", "report.json")
    assert ran.code == 1
    assert ran.report is not None
    (finding,) = ran.errors()
    assert (finding["probe"], finding["fix_verified"]) == ("padding.mask-is-accepted", True)
    assert (finding["where"]["file"], finding["where"]["function"]) == ("mine.py", "OLMoAttention.forward")
    assert finding["reproduce"] == "olmodebug check mine.py:build_loud -k padding.mask-is-accepted"

    assert Path(".olmodebug/.gitignore").read_text(encoding="utf-8") == "*\n"
    (recorded,) = Path(".olmodebug/runs").iterdir()
    assert json.loads((recorded / "report.json").read_text(encoding="utf-8")) == ran.report
    assert sorted(path.name for path in Path.cwd().iterdir() if path.name != "__pycache__") == [".olmodebug", "mine.py", "report.json"]

    drawn = run("report", ran.report["id"])
    assert drawn.code == 0
    assert "OLMoAttention.forward" in drawn.out

    still = run("replay")
    first = ran.report["id"].rpartition("-")[2]
    assert still.code == 1
    assert still.out.startswith(f"still fails    {first}:1 padding.mask-is-accepted: the probe was run on the recorded values: ")
    assert run("replay", f"{first}:padding.mask-is-accepted").code == 1
    unknown = run("replay", f"{first}:7")
    assert (unknown.code, "has no finding 7; it has 1 (padding.mask-is-accepted)" in unknown.err) == (2, True)

    added = "            scores = scores + attention_mask\n"
    assert text.count(added) == 1
    masked = "            scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)\n"
    Path("mine.py").write_text(text.replace(added, masked), encoding="utf-8")
    mended = run("replay")
    assert mended.code == 0
    assert mended.out.endswith("padding.mask-is-accepted: the probe was run on the recorded values, and passes\n")
    again = run("replay")
    assert again.code == 5, "the newest run has no failed probe, so there is nothing to replay"


def test_a_model_that_did_not_build_is_replayed_as_fixed_once_it_does(run: Callable[..., Ran]) -> None:
    text = (BUGS / "inv_freq_twice.py").read_text(encoding="utf-8")
    Path("mine.py").write_text(text, encoding="utf-8")
    ran = run("check", "mine.py:build", "-k", "structure", "--json", "report.json")
    assert ran.code == 1
    assert [(f["probe"], f["fix_verified"]) for f in ran.errors()] == [("build.constructs", True)]
    assert "reported" not in ran.err
    Path("mine.py").write_text(
        text.replace("self.inv_freq = 1.0", "inv_freq = 1.0").replace('", self.inv_freq)', '", inv_freq)'), encoding="utf-8"
    )
    mended = run("replay")
    told = f"fixed          {ran.report['id'].rpartition('-')[2]}:1 build.constructs: it passes\n"
    assert (mended.code, mended.out) == (0, told), mended.out + mended.err


def test_an_expected_failure_is_no_failure_and_must_fail(run: Callable[..., Ran]) -> None:
    spec = f"{BUGS / 'mask_added.py'}:build_loud"
    ran = run(
        "check", spec, "-k", "mask-is-accepted or eval-repeats", "--json", "report.json",
        "--expect-failure", "padding.mask-is-accepted=no padding here", "--expect-failure", "determinism.eval-repeats=dropout",
    )  # fmt: skip
    assert ran.outcome("padding.mask-is-accepted") | {"seconds": 0} == {
        "probe": "padding.mask-is-accepted", "status": "expected-failure", "reason": "no padding here", "seconds": 0,
    }  # fmt: skip
    assert ran.code == 1, "an expected failure that passes must fail the run"
    (finding,) = ran.errors()
    assert finding["probe"] == "determinism.eval-repeats"
    assert "expected to fail (dropout)" in finding["message"]


# A subject that dies


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import os; os.abort()", "died of SIGABRT while building the model"),
        ("import ctypes; ctypes.string_at(0)", "died of SIGSEGV while building the model"),
        ("import os; os._exit(3)", "ended with exit status 3 while building the model"),
        ("import os; os._exit(0)", "ended with exit status 0 while building the model"),
        ("raise KeyboardInterrupt", "while building the model"),
    ],
)
def test_a_factory_that_ends_the_process_is_a_finding(body: str, words: str, run: Callable[..., Ran]) -> None:
    path = write("mine.py", f"print('x' * 200_000)\n\ndef build():\n    {body}\n")
    ran = run("check", "mine.py:build", "-k", "structure", "--json", "report.json")
    assert ran.code == 1, ran.err
    (finding,) = ran.errors()
    assert (finding["probe"], words in finding["message"]) == ("build.constructs", True), finding["message"]
    assert ran.outcome("build.runs")["status"] == "skipped"
    if "_exit" not in body:  # nothing can be asked of a process that leaves without a word
        last = len(path.read_text(encoding="utf-8").splitlines())
        assert (finding["where"]["file"], finding["where"]["line"]) == ("mine.py", last)
    assert finding["raised"] is None, "what it printed is not what it raised"
    assert all(len(str(value)) <= 200 for value in finding["evidence"].values())
    assert "x" * 201 not in ran.out


def test_a_factory_that_hangs_is_a_finding_at_its_line(run: Callable[..., Ran]) -> None:
    path = write("mine.py", "def build():\n    while True:\n        pass\n")
    ran = run("check", "mine.py:build", "--timeout", "1", "-k", "structure", "--json", "report.json")
    assert ran.code == 1
    (finding,) = ran.errors()
    assert "gave no answer for 1 s while building the model" in finding["message"]
    assert "--timeout" in finding["fix"]
    assert finding["where"]["function"] == "build"
    last = len(path.read_text(encoding="utf-8").splitlines())
    assert finding["where"]["line"] in (last - 1, last)


@pytest.mark.fresh
def test_loading_torch_does_not_count_as_a_hang_of_the_subject(run: Callable[..., Ran]) -> None:
    write("mine.py", "build = Tiny\n")
    ran = run("check", "mine.py:build", "--timeout", "1", "-k", "structure.registered", "--json", "report.json")
    assert ran.code == 0, ran.out


def test_a_death_inside_a_probe_costs_that_probe_alone(run: Callable[..., Ran]) -> None:
    write(
        "mine.py",
        """
        class Dies(Tiny):
            def forward(self, input_ids):
                if input_ids.shape[1] > 20:
                    import os; os.abort()
                if len(input_ids) == 1 and input_ids.shape[1] == 2:
                    import os; os._exit(0)
                hidden = self.embed(input_ids)
                return self.head(hidden + hidden.mean(1, keepdim=True))

        class Config:
            vocab_size = 31
            max_position_embeddings = 40

        def build():
            return Dies(), Config()
        """,
    )
    own = textwrap.dedent(
        """
        from olmodebug.probe import probe
        from olmodebug.records import Case
        from olmodebug.relations.invariance import run

        def call(subject, rows, columns):
            run(subject.twin(), Case(name="", input_ids=subject.token_ids(rows, columns)))
            return iter(())

        @probe()
        def a_aborts(subject):
            "It dies of a signal."
            return call(subject, 2, 30)

        @probe()
        def b_leaves(subject):
            "It leaves with exit status 0."
            return call(subject, 1, 2)

        @probe()
        def c_lives(subject):
            "It runs."
            return call(subject, 2, 5)
        """
    )
    Path("own.py").write_text(own, encoding="utf-8")
    ran = run("check", "mine.py:build", "--probes", "own.py", "-k", "own or eval-repeats or structure", "--json", "report.json")
    assert ran.code == 1, ran.out + ran.err
    status = {item["probe"]: item["status"] for item in ran.report["outcomes"]} if ran.report else {}
    assert status["own.a-aborts"] == "failed"
    assert status["own.b-leaves"] == "failed"
    assert (status["own.c-lives"], status["determinism.eval-repeats"], status["structure.registered"]) == ("passed",) * 3
    messages = {finding["probe"]: finding["message"] for finding in ran.errors()}
    assert messages == {
        "own.a-aborts": "the process died of SIGABRT while running own.a-aborts",
        "own.b-leaves": "the process ended with exit status 0 while running own.b-leaves",
    }
    where = next(finding["where"] for finding in ran.errors() if finding["probe"] == "own.a-aborts")
    assert (where["file"], where["function"]) == ("mine.py", "forward")


# Drawing


def test_a_report_is_drawn_on_a_narrow_terminal_in_plain_ascii_without_torch(tmp_path: Path) -> None:
    from olmodebug.records import Where
    from olmodebug.report import Environment, Finding, Outcome, Report, SubjectInfo

    finding = Finding(
        probe="causality.no-future",
        severity="error",
        message="logits at position 6 change by 0.43 when only tokens 7..10 change",
        cause="no causal mask reaches this softmax",
        fix="mask the scores",
        where=Where(module="layers.0.attn", function="Attention.forward", file="model.py", line=88, op="_softmax"),
    )
    report = Report(
        subject=SubjectInfo(spec="model.py:build"),
        environment=Environment(olmodebug="0", python="3", platform="Linux"),
        outcomes=(Outcome(probe="causality.no-future", status="failed"),),
        findings=(finding,),
    )
    report.write(tmp_path / "report.json")
    program = (
        "import sys, olmodebug.cli; code = olmodebug.cli.main(['report', 'report.json']); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    code, drawn = on_narrow_terminal("-c", program, cwd=tmp_path)
    assert code == 0, drawn
    assert not COLOUR.search(drawn)
    assert max(len(STYLE.sub("", line)) for line in drawn.splitlines()) <= 40
    words = " ".join(STYLE.sub("", drawn).split())
    for text in ("causality.no-future", "model.py:88", "no causal mask", "mask the scores"):
        assert text in words, drawn
