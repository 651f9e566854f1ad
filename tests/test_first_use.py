"""Every wrong turn of a new user: one clear line, the right exit code, no traceback; and every poor terminal."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from olmodebug.cli import main
from tests.test_cli import COLOUR, STYLE, on_narrow_terminal
from tests.test_render_formats import REPORT

ROOT = Path(__file__).parents[1]

MODELS = """
    import torch
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self, width, layers):
            super().__init__()
            self.embed = nn.Embedding(31, width)

        def forward(self, input_ids):
            return self.embed(input_ids) @ self.embed.weight.T

    def build():
        return Tiny(8, 1)

    def build_on_meta():
        return Tiny(8, 1).to("meta")

    number = 3
"""


class Turn(NamedTuple):
    """What a user types, how it must end, and words that the one line must hold."""

    arguments: list[str]
    code: int
    words: tuple[str, ...]


# What a look at the arguments and the disk settles.
AT_ONCE = {
    "no such report": Turn(["report", "nowhere.json"], 2, ("cannot read nowhere.json", "No such file")),
    "a report of a newer schema": Turn(["report", "newer.json"], 2, ("olmodebug/report@1", "olmodebug/report@2", "newer olmodebug")),
    "a damaged report": Turn(["report", "damaged.json"], 2, ("damaged report",)),
    "no report at all": Turn(["report", "models.py"], 2, ("not a report",)),
    "no run yet": Turn(["report"], 2, ("no run is recorded", "olmodebug check makes one")),
    "nothing to replay": Turn(["replay", "3f9a"], 2, ("no run is recorded",)),
    "an unknown probe to list": Turn(["probes", "rope.relativ-shift"], 2, ("did you mean rope.relative-shift",)),
    "an unknown probe to expect": Turn(["check", "--expect-failure", "rope.relativ=x"], 2, ("did you mean rope.relative-shift",)),
    "a failure without a reason": Turn(["check", "--expect-failure", "rope.relative-shift"], 2, ("give a reason",)),
    "a selection that cannot be read": Turn(["check", "-k", "rope and ("], 2, ("cannot be read",)),
    "a file of probes that is not there": Turn(["check", "-k", "x", "--probes", "mine.py"], 2, ("mine.py", "no such file")),
    "a config that is not there": Turn(["check", "--config", "sizes.json"], 2, ("sizes.json", "No such file")),
    "a config that is no JSON": Turn(["check", "--config", "models.py"], 2, ("models.py", "not valid JSON")),
    "a folder that is not there": Turn(["check", "--html", "no/such/page.html"], 2, ("--html no/such/page.html", "cannot write")),
    "a folder as a file": Turn(["report", "good.json", "--md", "."], 2, ("--md .", "cannot write")),
    "no report but a model": Turn(["memory", "models.py", "good.json"], 2, ("models.py: not a report",)),
    "an unknown command": Turn(["chekc"], 2, ("invalid choice: 'chekc'; did you mean check?",)),
    "an unknown option": Turn(["check", "--devcie", "cpu"], 2, ("olmodebug check: ", "--devcie; did you mean --device?")),
    "an unknown option of none": Turn(["--verison"], 2, ("--verison; did you mean --version?",)),
    "an unknown choice": Turn(["memory", "--dtype", "float61"], 2, ("--dtype: invalid choice: 'float61'; did you mean float16,",)),
    "a choice that is like none": Turn(["memory", "--dtype", "x"], 2, ("choose from", "float16", "memory --help")),
    "a number that is none": Turn(["train", "--steps", "x"], 2, ("--steps: expected a whole number of at least 1, observed x",)),
    "a batch of nothing": Turn(["memory", "--confirm-batch-size", "0"], 2, ("at least 1, observed 0",)),
    "no time at all": Turn(["check", "--timeout", "0"], 2, ("--timeout: expected a number of seconds above 0",)),
    "an unknown card": Turn(["memory", "--gpu", "H10"], 2, ("did you mean H100, ", "give --budget")),
}

# What only building the subject shows; each costs a child process.
IN_THE_CHILD = {
    "no such file": Turn(["check", "model.py:build"], 2, ("no such file: model.py", "near it: models.py")),
    "no such attribute": Turn(["check", "models.py:biuld"], 2, ("no attribute biuld", "did you mean build")),
    "a class that needs arguments": Turn(["check", "models.py:Tiny"], 2, ("needs arguments (width, layers)", "--config name=value")),
    "weights without numbers": Turn(["check", "models.py:build_on_meta"], 2, ("weights are on the meta device", "build it on the CPU")),
    "a number is no model": Turn(["check", "models.py:number"], 2, ("is a int", "expected a model")),
    "no attribute given": Turn(["check", "models.py"], 2, ("models.py:NAME", "Tiny, build")),
    "no such preset": Turn(["check", "olmo9-1B"], 2, ("'olmo9-1B' is no subject", "did you mean olmo")),
    "a file without its ending": Turn(["check", "models"], 2, ("'models' is no subject", "perhaps models.py:NAME")),
}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a model and some reports."""
    monkeypatch.chdir(tmp_path)
    body = json.loads(REPORT.to_json())
    Path("models.py").write_text(textwrap.dedent(MODELS), encoding="utf-8")
    Path("good.json").write_text(json.dumps(body), encoding="utf-8")
    Path("newer.json").write_text(json.dumps(body | {"schema": "olmodebug/report@2"}), encoding="utf-8")
    Path("damaged.json").write_text(json.dumps({"schema": "olmodebug/report@1", "subject": {}}), encoding="utf-8")
    return tmp_path


def one_line(turn: Turn, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(turn.arguments)
    except SystemExit as left:  # as argparse leaves
        code = int(str(left.code))
    out, err = capsys.readouterr()
    err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("loading torch"))
    assert (code, out) == (turn.code, ""), err
    assert re.match(r"olmodebug( \w+)?: ", err)
    assert err.count("\n") == 1, err
    assert all(word in err for word in turn.words), err


@pytest.mark.parametrize("turn", AT_ONCE.values(), ids=AT_ONCE.keys())
def test_a_wrong_turn_is_one_clear_line(turn: Turn, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_line(turn, capsys)
    assert sorted(path.name for path in desk.iterdir()) == ["damaged.json", "good.json", "models.py", "newer.json"]


@pytest.mark.parametrize("turn", IN_THE_CHILD.values(), ids=IN_THE_CHILD.keys())
def test_a_wrong_subject_is_one_clear_line(turn: Turn, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_line(turn, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_card_that_is_not_there_is_one_clear_line(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_line(Turn(["check", "--device", "cuda"], 2, ("CUDA is not available here", "use --device cpu")), capsys)


def test_a_probe_that_is_not_there_runs_nothing_and_names_the_near_one(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "models.py:build", "-k", "rope.relativ-shift"]) == 5
    out, err = capsys.readouterr()
    assert "did you mean rope.relative-shift" in err
    assert "nothing was checked" in out


def test_a_question_that_does_not_apply_is_no_success(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "models.py:build", "-k", "padding.finite"]) == 5
    assert "nothing that was asked applies" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(("path", "words"), [("/dev/full", "cannot be written (No space left on device)"), ("/proc/report", "cannot")])
def test_a_file_that_cannot_be_written_in_the_end_is_one_clear_line_and_the_work_is_shown(
    path: str, words: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "good.json", "--html", path]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"olmodebug: --html {path}: {words}") and err.count("\n") == 1
    assert "causality.no-future" in out


def test_a_script_runs_under_guards_where_nothing_can_be_recorded(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path(".olmodebug").write_text("in the way", encoding="utf-8")
    assert main(["run", "--", sys.executable, "-c", "print('trained')"]) == 5  # no torch in it: nothing was checked
    out, err = capfd.readouterr()
    assert out == "trained\n"
    assert "olmodebug: this run is not recorded" in err
    assert "Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["report", "good.json"], ["report", "good.json", "--format", "json"], ["probes"]])
def test_a_full_disk_behind_standard_output_is_one_clear_line(arguments: list[str], desk: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "olmodebug", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, "olmodebug: cannot write the output: No space left on device\n")


@pytest.mark.parametrize("name", ["full", "md", "sarif"])
def test_a_reader_that_has_seen_enough_gets_no_traceback(name: str, desk: Path) -> None:
    read, write = os.pipe()
    os.close(read)  # what `| head -1` does, without the race
    done = subprocess.run(
        [sys.executable, "-m", "olmodebug", "report", "good.json", "--format", name],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_forty_columns_of_ascii_without_colour_hold_a_whole_report(desk: Path) -> None:
    code, text = on_narrow_terminal("-m", "olmodebug", "report", "good.json", "-v", cwd=desk)
    assert code == 0, text
    assert not COLOUR.search(text)
    lines = [STYLE.sub("", line) for line in text.splitlines()]
    assert max(map(len, lines)) <= 40
    flat = "".join(text.split())
    assert "thescoresweight[bold]getnocausalmask" in flat
    assert "xfail" in flat


@pytest.mark.parametrize(
    "settings", [{"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_locale_that_is_not_utf8_gets_plain_letters(settings: dict[str, str], desk: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "olmodebug", "report", "good.json"],
        capture_output=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **settings},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert b"x fail" in done.stdout
