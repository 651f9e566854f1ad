"""The run records: where they lie, how many are kept, and how one is found again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from olmodebug.errors import ReportError
from olmodebug.report import Environment, Outcome, Report, SubjectInfo
from olmodebug.store import KEPT_RUNS, find_run, load_report, new_run


def report(id: str) -> Report:
    return Report(
        subject=SubjectInfo(spec="olmo1-4M"),
        environment=Environment(olmodebug="0", python="3", platform="Linux"),
        outcomes=(Outcome(probe="a.b", status="passed"),),
        id=id,
    )


def test_a_run_is_kept_with_its_job_and_ignores_itself_in_git(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert run.problem is None
    assert run.folder == tmp_path / ".olmodebug" / "runs" / run.id
    run.save(report(run.id), {"select": None})
    assert (tmp_path / ".olmodebug" / ".gitignore").read_text() == "*\n"
    assert json.loads((run.folder / "job.json").read_text()) == {"select": None}
    assert load_report(tmp_path, None) == load_report(tmp_path, run.id) == report(run.id)
    assert [path.name for path in tmp_path.iterdir()] == [".olmodebug"]


def test_a_report_that_cannot_be_recorded_has_no_id_by_which_somebody_would_look_for_it(tmp_path: Path) -> None:
    (tmp_path / ".olmodebug").write_text("in the way")
    nowhere = new_run(tmp_path)
    assert nowhere.problem is not None
    assert nowhere.save(report(nowhere.id), {}).id == ""
    (tmp_path / ".olmodebug").unlink()
    lost = new_run(tmp_path)
    assert lost.folder is not None
    (lost.folder / "report.json").mkdir()  # as unwritable as on a full disk
    assert lost.save(report(lost.id), {}).id == ""
    kept = new_run(tmp_path)
    assert kept.save(report(kept.id), {}).id == kept.id


def test_a_run_is_found_by_the_end_of_its_id_and_the_newest_without_one(tmp_path: Path) -> None:
    for name in ("20260101-000000-aaaa", "20260102-000000-bbbb", "20260103-000000-aabb"):
        folder = tmp_path / ".olmodebug" / "runs" / name
        folder.mkdir(parents=True)
        report(name).write(folder / "report.json")
    (tmp_path / ".olmodebug" / "runs" / "20260104-000000-cccc").mkdir()  # died before it was finished
    assert find_run(tmp_path, None).name == "20260103-000000-aabb"
    assert find_run(tmp_path, "aaaa").name == "20260101-000000-aaaa"
    assert find_run(tmp_path, "20260102-000000-bbbb").name == "20260102-000000-bbbb"
    with pytest.raises(ReportError, match="more than one"):
        find_run(tmp_path, "bb")
    with pytest.raises(ReportError, match="no recorded run matches cccc"):
        find_run(tmp_path, "cccc")


def test_of_two_runs_in_one_second_the_later_one_is_the_newest_whatever_was_drawn_for_its_name(tmp_path: Path) -> None:
    for number, name in enumerate(("20260101-000000-ffff", "20260101-000000-0000", "20251231-235959-aaaa")):
        folder = tmp_path / ".olmodebug" / "runs" / name
        folder.mkdir(parents=True)
        report(name).write(folder / "report.json")
        os.utime(folder, (number, number))
    assert find_run(tmp_path, None).name == "20260101-000000-0000"
    for number in range(KEPT_RUNS - 2):
        (tmp_path / ".olmodebug" / "runs" / f"20260102-0000{number:02d}-0000").mkdir()
    new_run(tmp_path)
    left = {path.name for path in (tmp_path / ".olmodebug" / "runs").glob("202[56]*-????") if path.name < "20260102"}
    assert left == {"20260101-000000-0000"}


def test_only_the_newest_runs_are_kept(tmp_path: Path) -> None:
    for number in range(KEPT_RUNS + 3):
        (tmp_path / ".olmodebug" / "runs" / f"20250101-0000{number:02d}-0000").mkdir(parents=True)
    newest = new_run(tmp_path)
    names = sorted(path.name for path in (tmp_path / ".olmodebug" / "runs").iterdir())
    assert len(names) == KEPT_RUNS
    assert newest.id in names
    assert "20250101-000000-0000" not in names


def test_a_run_of_another_process_that_still_goes_on_is_kept(tmp_path: Path) -> None:
    code = f"import sys; from pathlib import Path; from olmodebug.store import new_run; new_run(Path({str(tmp_path)!r}), name='20240101-000000-0000'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for number in range(KEPT_RUNS + 3):
            (tmp_path / ".olmodebug" / "runs" / f"20250101-0000{number:02d}-0000").mkdir(parents=True)
        new_run(tmp_path)
        assert (tmp_path / ".olmodebug" / "runs" / "20240101-000000-0000").is_dir()
        assert not (tmp_path / ".olmodebug" / "runs" / "20250101-000000-0000").is_dir()
        other.kill()
    new_run(tmp_path)
    assert not (tmp_path / ".olmodebug" / "runs" / "20240101-000000-0000").is_dir()


def test_a_folder_that_cannot_be_written_is_a_problem_not_an_exception(tmp_path: Path) -> None:
    (tmp_path / ".olmodebug").write_text("a file in the way")
    run = new_run(tmp_path)
    assert run.folder is None
    assert "not recorded" in str(run.problem)
    run.save(report(run.id), {})  # and saving is no error either


def test_without_any_run_the_way_to_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="olmodebug check"):
        find_run(tmp_path, None)


def test_a_report_is_read_from_a_file_of_any_name(tmp_path: Path) -> None:
    report("x").write(tmp_path / "kept.txt")
    assert load_report(tmp_path, str(tmp_path / "kept.txt")).id == "x"
    with pytest.raises(ReportError, match="cannot read"):
        load_report(tmp_path, str(tmp_path / "nowhere.json"))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ReportError, match="not a report"):
        load_report(tmp_path, str(tmp_path / "other.json"))
