"""Ten training scripts: nothing is said of the clean ones, and every fault that is put into them is named with its line.

What runs in this process costs no import of torch; scripts that need processes of their own are slow.
"""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from olmodebug.guards.diagnosis import diagnose
from olmodebug.guards.journal import Journal
from olmodebug.guards.run import Ended
from olmodebug.guards.settings import GUARDS, Settings
from olmodebug.guards.watch import Watch
from olmodebug.report import Finding, from_json

from .scripts.catalog import ELSEWHERE, FAULTS, FOLDER, SCRIPTS, Fault, line_number, source

pytestmark = pytest.mark.usefixtures("_only_young_objects")

ROOT = str(Path(__file__).parents[1])


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield out


def run_here(path: Path) -> tuple[list[Finding], str]:
    """A script in this process under all guards: its findings and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder))
        with quiet() as out, contextlib.suppress(Exception), Watch(GUARDS, journal) as watch:
            runpy.run_path(str(path), run_name="__main__")
        told = [line for file in Path(folder).iterdir() for line in file.read_text(encoding="utf-8").splitlines()]
    assert not watch.faults, [line for line in told if '"event": "fault"' in line]
    return journal.findings, out.getvalue()


def run_elsewhere(folder: Path, script: str) -> tuple[int, list[Finding], str]:
    """A script in processes of its own, as a user runs it."""
    command = [sys.executable, f"{script}.py"]
    if script == "ddp":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"{script}.py"]
    line = [sys.executable, "-m", "olmodebug", "run", "--json", "report.json", "--", *command]
    environ = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300, check=False, env=environ)
    report = from_json((folder / "report.json").read_text())
    return done.returncode, list(report.findings), done.stdout


def judge(fault: Fault, findings: list[Finding]) -> None:
    """The fault is named with its line, and nothing else of its weight is said."""
    named = [f for f in findings if f.probe == fault.probe]
    assert named, f"{fault.name}: expected {fault.probe}, observed {[(f.probe, f.message) for f in findings]}"
    number = line_number(fault)
    finding = next((f for f in named if f.where.line == number), named[0])
    assert finding.severity == fault.severity
    assert fault.words in f"{finding.message} {finding.cause}", (finding.message, finding.cause)
    assert finding.where.line == number or not fault.line, (finding.where, finding.message)
    assert {f.probe for f in findings} == {fault.probe}, [(f.probe, f.message) for f in findings]


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in ELSEWHERE])
def test_a_clean_script_is_silent_and_prints_the_same_bits(script: str) -> None:
    path = FOLDER / f"{script}.py"
    with quiet() as plain:
        runpy.run_path(str(path), run_name="__main__")
    findings, printed = run_here(path)
    assert not findings, [(f.probe, f.message) for f in findings]
    assert printed == plain.getvalue() and printed.count("loss") >= 4


def _in_this_process() -> list[object]:
    """All faults of the plain loop and the first of every other script; the rest are slow."""
    first: set[str] = set()
    marked: list[object] = []
    for fault in FAULTS:
        if fault.script in ELSEWHERE:
            continue
        quick = fault.script == "plain_loop" or fault.script not in first
        first.add(fault.script)
        marked.append(pytest.param(fault, id=fault.name, marks=() if quick else pytest.mark.slow))
    return marked


@pytest.mark.parametrize("fault", _in_this_process())
def test_a_fault_is_named_with_its_line(fault: Fault, tmp_path: Path) -> None:
    path = tmp_path / f"{fault.script}.py"
    path.write_text(source(fault))
    findings, _ = run_here(path)
    judge(fault, findings)


@pytest.mark.slow
@pytest.mark.parametrize("script", ELSEWHERE)
def test_a_clean_script_with_processes_of_its_own_is_silent(script: str, tmp_path: Path) -> None:
    (tmp_path / f"{script}.py").write_text((FOLDER / f"{script}.py").read_text())
    code, findings, _ = run_elsewhere(tmp_path, script)
    assert not findings, [(f.probe, f.message) for f in findings]
    assert code == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f for f in FAULTS if f.script in ELSEWHERE], ids=lambda fault: fault.name)
def test_a_fault_in_processes_of_its_own_is_named_with_its_line(fault: Fault, tmp_path: Path) -> None:
    (tmp_path / f"{fault.script}.py").write_text(source(fault))
    code, findings, _ = run_elsewhere(tmp_path, fault.script)
    judge(fault, findings)
    assert code == 1 or fault.severity != "error"


def test_a_shape_in_a_compiled_model_is_explained_at_the_models_own_line(tmp_path: Path) -> None:
    text = (FOLDER / "compiled.py").read_text()
    path = tmp_path / "compiled.py"
    path.write_text(text.replace("self.up(self.embed(input_ids))", "self.up(self.embed(input_ids)).transpose(0, 1).view(4, 12, WIDTH)"))
    (finding,), _ = run_here(path)
    assert (finding.probe, finding.where.function) == ("shape.fits", "Model.forward")
    assert "view never copies" in (finding.cause or "") and "tried: the same call runs" in (finding.fix or "")


def test_findings_of_two_ranks_are_one_with_both_ranks(tmp_path: Path) -> None:
    finding = {"probe": "index.in-bounds", "severity": "error", "message": "m", "where": {"file": "a.py", "line": 3}, "evidence": {}}
    for rank in (0, 1):
        events = [
            {"event": "start", "time": rank, "rank": rank, "pid": rank, "torch": "2"},
            {"event": "finding", "finding": {**finding, "source": [], "case": None}},
            {"event": "batches", "rank": rank, "replicated": True, "steps": [[1], [2], [3], [4]], "shapes": [], "weights": ""},
            {"event": "end", "ops": 3, "steps": 4, "backwards": 4, "seconds": 1.0, "exception": None},
        ]
        (tmp_path / f"journal-{rank}.jsonl").write_text("\n".join(json.dumps(event) for event in events))
    report = diagnose(["train.py"], Settings(guards=GUARDS, folder=tmp_path), Ended(status=0), 1.0)
    assert [(f.probe, f.evidence["ranks"]) for f in report.findings] == [
        ("index.in-bounds", "0, 1"),
        ("loop.ranks-see-different-data", "0, 1"),
    ]
    assert {o.probe: o.status for o in report.outcomes}["guard.loop"] == "failed"


def _noted(rank: int, **values: Any) -> dict[str, Any]:
    """What a rank writes at its fourth step; by default of one that is in order."""
    common = {"replicated": True, "exchanged": True, "synced": True, "last_synced": True, "first": "a", "weights": "b", "shapes": [[3]]}
    where = {"file": "train.py", "line": 7, "function": "main"}
    return {"event": "batches", "rank": rank, "steps": [[rank, n] for n in range(4)], "where": where, **common, **values}


@pytest.mark.parametrize(
    ("first", "second", "cause"),
    [
        ({}, {}, ""),
        ({"synced": False}, {"synced": False, "weights": "c"}, "no backward of these steps"),
        ({"last_synced": False}, {"last_synced": False, "weights": "c"}, "the last backward before optimizer.step() ran under no_sync()"),
        ({"exchanged": False}, {"exchanged": False, "weights": "c"}, "its own forward did not run"),
        ({}, {"first": "x", "weights": "c"}, "differed before the first step"),
        ({"replicated": False, "exchanged": False}, {"replicated": False, "exchanged": False, "weights": "c"}, "exchanged neither"),
        ({"replicated": False}, {"replicated": False, "weights": "c"}, ""),  # sharded, or averaged every so often
        ({"replicated": False, "exchanged": False}, {"replicated": False, "exchanged": False, "first": "x", "weights": "c"}, ""),
        ({"replicated": False, "exchanged": False}, {"replicated": False, "exchanged": False, "shapes": [[4]], "weights": "c"}, ""),
    ],
)
def test_ranks_that_train_apart_are_told_and_those_that_hold_parts_are_not(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], cause: str
) -> None:
    for rank, values in enumerate((first, second)):
        events = [{"event": "start", "time": rank, "rank": rank, "pid": rank, "torch": "2"}, _noted(rank, **values)]
        (tmp_path / f"journal-{rank}.jsonl").write_text("\n".join(json.dumps(event) for event in events))
    found = diagnose(["train.py"], Settings(guards=GUARDS, folder=tmp_path), Ended(status=0), 1.0).findings
    assert [(f.probe, f.where.line) for f in found] == ([("loop.ranks-share-one-model", 7)] if cause else [])
    assert all(cause in (f.cause or "") for f in found)
