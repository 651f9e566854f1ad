"""Snapshots of torch's allocator: figures counted by hand from the built file, and files that are none."""

import json
import os
from pathlib import Path

import jsonschema
import pytest

import olmodebug
from olmodebug.cli import main
from olmodebug.errors import ReportError
from olmodebug.footprint.snapshot import read_snapshot, snapshot_section

from .snapshots import MIB, snapshot, write
from .test_memory_section import SAMPLE, drawn


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "snapshot.pickle")


def test_what_is_allocated_reserved_and_free_in_pieces(file: Path) -> None:
    found = snapshot_section(file)["snapshot"]
    assert (found["allocated_bytes"], found["reserved_bytes"]) == (60 * MIB, 92 * MIB)
    assert (found["stranded_bytes"], found["largest_free_bytes"], found["segments"]) == (32 * MIB, 32 * MIB, 2)
    assert found["owners"] == [
        {"place": "train.py:12 forward", "bytes": 40 * MIB, "count": 1},
        {"place": "train.py:31 forward", "bytes": 20 * MIB, "count": 1},
    ]
    assert found["out_of_memory"] == [{"requested_bytes": 100 * MIB, "free_bytes": 7 * MIB}]


def test_the_recorded_peak_counts_what_was_there_before(file: Path) -> None:
    body = snapshot_section(file)
    points = body["timeline"]["points"]
    assert [p["allocated_bytes"] // MIB for p in points] == [40, 70, 90, 90, 60, 60, 60]
    assert points[body["timeline"]["peak"]]["categories"] == [40 * MIB, 50 * MIB]
    assert body["peak"]["owner"] == "33 % of the recorded peak of 90.0 MiB is one block made at train.py:30 forward, 30.0 MiB"


def test_the_recorded_peak_is_told_place_by_place(file: Path) -> None:
    assert snapshot_section(file)["snapshot"]["peak_owners"] == [
        {"place": "train.py:30 forward", "bytes": 30 * MIB, "count": 1},
        {"place": "train.py:31 forward", "bytes": 20 * MIB, "count": 1},
        {"place": "before the recording", "bytes": 40 * MIB, "count": 0},
    ]


def larger() -> dict:
    """The other snapshot's run with 50 MiB where it had 30, in a segment of 52."""
    body = snapshot()
    body["segments"][1]["total_size"] = 52 * MIB
    body["segments"][1]["blocks"][0]["size"] = 52 * MIB
    for entry in body["device_traces"][0]:
        entry["size"] = {30 * MIB: 50 * MIB, 32 * MIB: 52 * MIB}.get(entry["size"], entry["size"])
    return body


def compared(*names: str) -> dict:
    assert main(["memory", *names, "--json", "both.json"]) == 0
    body = json.loads(Path("both.json").read_text())
    jsonschema.validate(body, json.loads((Path(olmodebug.__file__).parent / "report.schema.json").read_text()))
    return body["sections"]["memory"]


def test_two_snapshots_are_compared_place_by_place_at_their_peaks(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "larger.pickle", larger())
    both = compared("snapshot.pickle", "larger.pickle")["comparison"]
    assert {row["name"]: (row["left_bytes"] // MIB, row["right_bytes"] // MIB) for row in both["figures"]} == {
        "tensors": (90, 110),
        "reserved": (92, 112),
        "tensors at the end": (60, 60),
        "free in segments": (32, 52),
        "largest free block": (32, 52),
    }
    assert both["by"] == "place, at the recorded peak"
    assert both["categories"][0] == {"name": "train.py:30 forward", "left_bytes": 30 * MIB, "right_bytes": 50 * MIB}
    assert [row["right_bytes"] - row["left_bytes"] for row in both["categories"][1:]] == [0, 0]


def test_a_snapshot_without_history_is_compared_at_its_end(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "bare.pickle", {**larger(), "device_traces": [[]]})
    both = compared("bare.pickle", "snapshot.pickle")["comparison"]
    assert both["by"] == "place, at the end" and both["categories"][0]["name"] == "train.py:12 forward"
    assert "tensors" not in {row["name"] for row in both["figures"]}


@pytest.mark.parametrize("turned", [False, True])
def test_a_snapshot_stands_beside_a_prediction_by_its_figures(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], turned: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    prediction = json.loads(SAMPLE.read_text(encoding="utf-8"))["sections"]["memory"]["figures"]
    sides = [("snapshot.pickle", 90 * MIB, 92 * MIB), (str(SAMPLE), prediction["tensors"]["expected"], prediction["reserved"]["expected"])]
    left, right = sides[::-1] if turned else sides
    memory = compared(left[0], right[0])
    assert memory["comparison"]["by"] is None and memory["comparison"]["categories"] == []
    assert memory["comparison"]["figures"] == [
        {"name": "tensors", "left_bytes": left[1], "right_bytes": right[1]},
        {"name": "reserved", "left_bytes": left[2], "right_bytes": right[2]},
    ]
    assert "only their figures stand side by side" in " ".join(capsys.readouterr().out.split())
    assert max(map(len, drawn(memory).splitlines())) <= 80


def test_a_snapshot_read_before_is_compared_by_the_report_on_it(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["memory", "snapshot.pickle", "--json", "first.json"]) == 0
    both = compared("first.json", "snapshot.pickle")["comparison"]
    assert both["figures"] and all(row["left_bytes"] == row["right_bytes"] for row in (*both["figures"], *both["categories"]))


def test_a_snapshot_without_history_says_how_to_record_one(tmp_path: Path) -> None:
    body = snapshot_section(write(tmp_path / "s.pickle", {**snapshot(), "device_traces": [[]]}))
    assert body["timeline"] is None and "_record_memory_history" in drawn(body)


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, ("touch owned",)

    with pytest.raises(ReportError, match=r"names (posix|nt)\.system"):
        read_snapshot(write(tmp_path / "evil.pickle", {"segments": [Evil()]}))


@pytest.mark.parametrize("body", [[], {"segments": 3}, {"weights": []}])
def test_another_pickle_is_no_snapshot(tmp_path: Path, body: object) -> None:
    with pytest.raises(ReportError, match="no snapshot"):
        read_snapshot(write(tmp_path / "other.pickle", body))


@pytest.mark.parametrize("body", [{"segments": [{}]}, {"segments": [], "device_traces": [[{}]]}])
def test_a_damaged_snapshot_gets_one_line(tmp_path: Path, body: object) -> None:
    with pytest.raises(ReportError, match="damaged"):
        snapshot_section(write(tmp_path / "damaged.pickle", body))


def test_the_command_draws_a_snapshot_and_its_json_keeps_to_the_schema(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["memory", str(file), "--json", "r.json"]) == 0
    shown = capsys.readouterr().out
    assert "a request of 100 MiB with 7.00 MiB free on the device" in shown
    body = json.loads(Path("r.json").read_text())
    schema = json.loads((Path(olmodebug.__file__).parent / "report.schema.json").read_text())
    jsonschema.validate(body, schema)
    text = drawn(body["sections"]["memory"])
    assert max(map(len, text.splitlines())) <= 80
    assert "forward, b backward" not in text  # a snapshot knows no phases


def test_a_file_that_is_missing_is_exit_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["memory", "none.pickle"]) == 2
    assert "cannot read none.pickle" in capsys.readouterr().err
