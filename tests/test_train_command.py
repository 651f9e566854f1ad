"""`olmodebug train` from the command line: what it leaves, how it ends, and every way a subject can fail in it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import olmodebug.report
from tests.command import run_here

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads(Path(olmodebug.report.__file__).with_name("report.schema.json").read_text(encoding="utf-8"))
SMALL = ("--batch-size", "2", "--seq-len", "16", "--dtype", "float32")
MODEL = """
    import os
    import torch
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(300, 8)
            self.head = nn.Linear(8, 300, bias=False)
            self.calls = 0

        def forward(self, input_ids):
            hidden = self.embed(input_ids)
            if self.training:
                self.calls += 1
                {what}
            return self.head(hidden)
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"the cat number {i} sees the dog number {7 * i}. " * 3}) + "\n" for i in range(40)))
    return path


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "olmodebug", "train", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def run(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=240, check=False)


def report_of(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(path.read_text())
    jsonschema.validate(body, SCHEMA)
    return body


def test_a_run_leaves_its_results_and_a_checkpoint_that_check_reads(tmp_path: Path, texts: Path) -> None:
    texts_with_a_bad_line = tmp_path / "b.jsonl"
    texts_with_a_bad_line.write_text(texts.read_text() + "{nonsense\n")
    size = ("--config", "vocab_size=300")
    done = run(tmp_path, "olmo1-tiny", *size, "--data", texts_with_a_bad_line, "--steps", "6", *SMALL, "--output", "out")
    assert done.returncode == 0, done.stdout + done.stderr
    body = report_of(tmp_path / "out" / "results.json")
    (only,) = body["sections"]["training"]["runs"]
    assert [step["step"] for step in only["steps"]] == [1, 2, 3, 4, 5, 6]
    assert only["steps"][-1]["loss"] < only["steps"][0]["loss"]
    assert only["checkpoint"] is True
    assert only["evaluated"]["validation_after"]["perplexity"] < only["evaluated"]["validation_before"]["perplexity"]
    assert (tmp_path / "out" / "checkpoint" / "config.json").is_file()
    assert (tmp_path / "out" / "checkpoint" / "tokenizer.json").is_file()
    assert "b.jsonl:41: no valid JSON" in done.stdout
    assert "dtype float32, as asked" in done.stderr
    assert {outcome["probe"]: outcome["status"] for outcome in body["outcomes"]}["train.checkpoint"] == "passed"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("if self.calls == 3: raise ValueError('no third step')", "step 3 raises"),
        ("if self.calls == 3: os.abort()", "the process died of SIGABRT at step 3"),
        ("if self.calls >= 3: hidden = hidden / (hidden - hidden)", "step 3: the loss or the gradient is not finite"),
    ],
)
def test_a_subject_that_fails_in_a_step_is_a_finding(tmp_path: Path, texts: Path, what: str, message: str) -> None:
    (tmp_path / "model.py").write_text(textwrap.dedent(MODEL).format(what=what))
    done = run_here(tmp_path, "train", "model.py:Tiny", "--data", texts, "--steps", "5", *SMALL, "--json", "out.json")
    assert done.returncode == 1, done.stdout + done.stderr
    body = report_of(tmp_path / "out.json")
    (finding,) = [item for item in body["findings"] if item["severity"] == "error"]
    assert message in finding["message"]
    assert "Traceback" not in done.stdout + done.stderr
    assert len(body["sections"]["training"]["runs"][0]["steps"]) >= 2


def test_a_subject_that_fails_while_it_is_evaluated_is_a_finding(tmp_path: Path, texts: Path) -> None:
    longest = "hidden = self.embed(input_ids if input_ids.shape[1] < 16 else input_ids[:, 0, 0])"
    (tmp_path / "m.py").write_text(textwrap.dedent(MODEL.format(what="pass")).replace("hidden = self.embed(input_ids)", longest))
    done = run_here(tmp_path, "train", "m.py:Tiny", "--data", texts, "--steps", "2", "--json", tmp_path / "r.json", *SMALL)
    assert done.returncode == 1, done.stdout + done.stderr
    found = next(f for f in report_of(tmp_path / "r.json")["findings"] if f["severity"] == "error")
    assert found["probe"] == "train.runs" and found["message"].count("validation perplexity before training raises") == 1
    assert found["where"]["file"].endswith("m.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "none-*.jsonl"), "no such file, and no file fits it as a pattern"),
        (("--recipe", "datadecide-5M"), "expected a known name such as datadecide-"),
        (("--seq-len", "1"), "a window of 1 token predicts nothing"),
        (("--resume", "nowhere"), "there is no resume.pt in it"),
        (("--learning-rate", "0"), "expected a number above 0"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_2(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run_here(tmp_path, "train", "olmo1-tiny", *arguments, "--steps", "2")
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_a_state_that_goes_on_to_the_same_losses(tmp_path: Path, texts: Path) -> None:
    base = ("olmo1-tiny", "--config", "vocab_size=300", "--data", texts, "--steps", "400", *SMALL)
    whole = run(tmp_path, *base, "--output", "whole")
    assert whole.returncode == 0, whole.stderr
    cut = command(*base, "--output", "cut")
    with subprocess.Popen(cut, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for text in process.stderr:
            if text.startswith("step"):
                process.send_signal(signal.SIGINT)
                break
        process.stderr.read()
        assert process.wait(60) == 130
    again = run(tmp_path, *base, "--resume", "cut", "--json", "again.json")
    assert again.returncode == 0, again.stderr

    def losses(path: Path) -> list[float]:
        return [step["loss"] for step in report_of(path)["sections"]["training"]["runs"][0]["steps"]]

    assert losses(tmp_path / "again.json") == losses(tmp_path / "whole" / "results.json")
