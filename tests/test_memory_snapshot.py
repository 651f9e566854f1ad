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
from .test_memory_section import drawn


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


def test_a_snapshot_without_history_says_how_to_record_one(tmp_path: Path) -> None:
    body = snapshot_section(write(tmp_path / "s.pickle", {**snapshot(), "device_traces": [[]]}))
    assert body["timeline"] is None and "_record_memory_history" in body["notes"][0]


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
