"""`olmodebug memory` as people call it: exit codes, what it says, what it writes."""

import json
from pathlib import Path

import jsonschema
import pytest

import olmodebug
from olmodebug.cli import main

MODEL = """
import os
import torch
from torch import nn


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(97, 32), nn.Linear(32, 97)

    def forward(self, input_ids):
        return self.head(self.own(self.embed(input_ids)))


class Wrong(Base):
    def own(self, x):
        return x + torch.zeros(3, 5) if self.training else x


class Reads(Base):
    def own(self, x):
        return x * 2 if self.training and x.sum().item() > 0 else x


class Aborts(Base):
    def own(self, x):
        return os.abort() if self.training else x
"""
SMALL = ["--batch-size", "2", "--seq-len", "16", "--no-what-ifs"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")
    return tmp_path


def report() -> dict:
    body = json.loads(Path("r.json").read_text(encoding="utf-8"))
    jsonschema.validate(body, json.loads((Path(olmodebug.__file__).parent / "report.schema.json").read_text(encoding="utf-8")))
    return body


@pytest.mark.fresh
def test_a_whole_run_on_the_cpu_predicts_measures_and_trains(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["memory", "olmo1-tiny", *SMALL, "--device", "cpu", "--dtype", "bfloat16", "--json", "r.json", "--chrome-trace", "t.json"])
        == 0
    )
    confirmation = report()["sections"]["memory"]["confirmation"]
    assert confirmation["events"]["identical"] and confirmation["events"]["predicted"] > 500
    assert confirmation["figures"][0]["error"] == 0
    assert confirmation["training"]["fell"] and len(confirmation["training"]["losses"]) == 40
    assert "identical, one by one" in capsys.readouterr().out
    assert json.loads(Path("t.json").read_text())["traceEvents"]


def test_what_does_not_fit_is_exit_1_with_its_owner_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["memory", "olmo1-tiny", "--batch-size", "4096", "--seq-len", "64", "--predict-only", "--budget", "2GiB", "--json", "r.json"]
    assert main(line) == 1
    body = report()
    finding = body["findings"][0]
    assert finding["probe"] == "memory.fits-the-budget" and "of the peak is" in finding["cause"]
    sizes = {row["axis"]: row["value"] for row in body["sections"]["memory"]["largest"]}
    assert 1 < sizes["batch_size"] < 4096 and f"--batch-size {sizes['batch_size']}" in finding["fix"]
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["olmo1-tiny", "--gpu", "H1000"], "not in the table"),
        (["olmo1-tiny", "--budget", "much"], "no size of memory"),
        (["olmo1-tiny", "--device", "cpu", "--gpu", "T4"], "are for --device cuda"),
        (["a", "b", "c"], "observed 3 arguments"),
        (["none.json", "other.json"], "cannot read none.json"),
        (["one.json"], "give two to compare"),
    ],
)
def test_what_cannot_be_meant_is_exit_2_and_one_line(line: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", *line]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code", "words"), [("Wrong", 1, "Wrong.own"), ("Aborts", 1, "SIGABRT")])
def test_a_model_that_fails_in_its_step_is_a_finding(name: str, code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", f"model.py:{name}", *SMALL]) == code
    assert words in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_that_reads_values_cannot_be_predicted_and_is_not_blamed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "model.py:Reads", *SMALL]) == 2
    assert "depends on values, which a dry run has not" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sequence_longer_than_the_model_declares_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "olmo1-tiny", "--seq-len", "65"]) == 2
    assert "declares 64 positions" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_failure_to_allocate_is_caught_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["memory", "olmo1-4M", "--device", "cpu", "--budget", "100MiB", "--no-what-ifs", "--json", "r.json"]
    assert main([*line, "--confirm-batch-size", "4", "--confirm-seq-len", "256"]) == 1
    lost = report()["sections"]["memory"]["confirmation"]["out_of_memory"]
    assert lost["reason"] == "need" and lost["requested_bytes"] > 90 << 20 and lost["limit_bytes"] == 100 << 20
    assert {row["name"] for row in lost["live"]} >= {"parameters", "logits and loss"}
    assert "out of memory in step 1, forward" in capsys.readouterr().out
