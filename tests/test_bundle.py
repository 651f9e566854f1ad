"""Bundles: what is written is read, and what is missing, cut short, foreign or too large says so."""

import json
import resource
from pathlib import Path

import pytest
import torch

from olmodebug.executions.bundle import EVENTS, HEAD, BundleError, Writer, read_bundle


def written(folder: Path, *, budget: int = 1 << 20) -> Path:
    writer = Writer(folder=folder, budget_bytes=budget)
    writer.open({"words": "cpu float32"})
    writer.event("op", i=0)
    writer.tensor("a", torch.arange(6.0).reshape(2, 3))
    writer.tensor("b", torch.ones(1000))
    writer.close()
    return folder


def test_what_was_written_is_read(tmp_path: Path) -> None:
    bundle = read_bundle(written(tmp_path / "x.bundle"))
    assert bundle.head["words"] == "cpu float32"
    assert [event["event"] for event in bundle.events] == ["op"]
    kept = bundle.tensor("a")
    assert kept is not None
    assert torch.equal(kept, torch.arange(6.0).reshape(2, 3))
    assert bundle.tensor("c") is None


def test_a_tensor_over_the_budget_is_counted_and_left_out(tmp_path: Path) -> None:
    bundle = read_bundle(written(tmp_path / "x.bundle", budget=100))
    assert bundle.tensor("a") is not None
    assert bundle.tensor("b") is None
    assert bundle.left_out == 1


def test_a_bundle_without_its_last_line_is_truncated_and_still_read_in_part(tmp_path: Path) -> None:
    folder = written(tmp_path / "x.bundle")
    lines = (folder / EVENTS).read_text().splitlines()
    (folder / EVENTS).write_text("\n".join(lines[:1]) + "\n")
    with pytest.raises(BundleError, match="its last line is missing, so the run that wrote it did not finish"):
        read_bundle(folder)
    assert len(read_bundle(folder, partial=True).events) == 1


def test_a_line_or_a_tensor_file_cut_short_is_found(tmp_path: Path) -> None:
    folder = written(tmp_path / "x.bundle")
    text = (folder / EVENTS).read_text()
    (folder / EVENTS).write_text(text[:-20])
    with pytest.raises(BundleError, match="truncated: line 3 of events.jsonl is no JSON"):
        read_bundle(folder)
    (folder / EVENTS).write_text(text)
    shard = folder / "tensors-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(BundleError, match="truncated: tensors-00000.safetensors has"):
        read_bundle(folder)


def test_a_bundle_of_another_version_and_a_folder_that_is_none_say_so(tmp_path: Path) -> None:
    folder = written(tmp_path / "x.bundle")
    (folder / HEAD).write_text(json.dumps({"schema": "olmodebug/bundle@9"}))
    with pytest.raises(BundleError, match="expected schema olmodebug/bundle@1, observed olmodebug/bundle@9"):
        read_bundle(folder)
    with pytest.raises(BundleError, match="is no bundle"):
        read_bundle(tmp_path)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(BundleError, match=r"cannot be written \(.*\); free some space or lower --budget"):
            written(tmp_path / "x.bundle")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
