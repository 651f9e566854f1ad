"""`olmodebug run --record FOLDER`, and two such records on any numbers of processes held against each other."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor, nn

import olmodebug
from olmodebug.cli import main
from olmodebug.guards.journal import Journal
from olmodebug.guards.unfinished import unfinished
from olmodebug.guards.watch import Watch
from olmodebug.ranks.calls import Collective
from olmodebug.ranks.record import RankWriter, read_records
from olmodebug.ranks.recorded import compare_recorded
from olmodebug.records import Where
from tests.scripts import recorded

SCRIPT = Path(recorded.__file__)

# name: (how it is spread, text of the script, what stands there instead, probe, words of the finding)
FAULTS = {
    "not-wrapped": ("ddp", "model = DistributedDataParallel(model)", "pass", "ranks.gradients-agree", "keeps the gradient of its own rows"),
    "same-rows": ("ddp", "[rank::world]", "[: BATCH // world]", "ranks.same-data", "every rank takes the same rows"),
    "summed": ("ddp", "loss.backward()", "(loss * world).backward()", "ranks.gradients-agree", "summed over ranks where they should be averaged"),
    "rate-scaled": ("fsdp", "lr=1e-2", "lr=1e-2 * world", "ranks.step-agrees", "learning rate"),
    "one-decays": ("ddp", "lr=1e-2", "lr=1e-2, weight_decay=0.5 * rank", "ranks.step-agrees", "by other amounts"),
    "seeds-apart": (
        "ddp",
        "        model = DistributedDataParallel(model)",
        "        torch.manual_seed(rank)\n        model = Model()",
        "ranks.same-start",
        "ranks start from different weights",
    ),
    "norm-of-shards": (
        "fsdp",
        "torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)",
        "own = sum(p.grad.to_local().pow(2).sum() for p in model.parameters()).sqrt()  # below 0.5, where the whole one is not\n"
        "        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, own)",
        "ranks.step-agrees",
        "exp_avg differs",
    ),
    "dies": ("ddp", "        loss.backward()", "        rank == 1 and os._exit(3)\n        loss.backward()", "ranks.step-completes", "rank 1 does not come to the collective that rank 0 is in"),
}  # fmt: skip


def run_recorded(folder: Path, name: str, script: Path, kind: str = "", ranks: int = 1) -> Path:
    """The folder of a record, made by the command line."""
    command = [sys.executable, "-m", "olmodebug", "run", "--record", name, "--"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else [sys.executable]
    subprocess.run([*command, *launch, str(script), *([kind] if kind else [])], cwd=folder, capture_output=True, timeout=240, check=False)
    return folder / name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recorded(tmp_path_factory.mktemp("alone"), "alone", SCRIPT)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4)])
def test_a_right_script_takes_the_same_step_on_any_number_of_processes(kind: str, ranks: int, alone: Path, tmp_path: Path) -> None:
    report = compare_recorded(alone, run_recorded(tmp_path, "many", SCRIPT, kind, ranks), command="", id="x")
    assert report.findings == ()
    assert report.verdict == "pass"
    assert report.sections["ranks"]["compared"] == {"forward": 11, "gradient": 15, "step": 15, "state": 45}


@pytest.mark.slow
def test_runs_of_two_world_sizes_are_compared_with_each_other(tmp_path: Path) -> None:
    two, four = run_recorded(tmp_path, "two", SCRIPT, "fsdp", 2), run_recorded(tmp_path, "four", SCRIPT, "ddp", 4)
    report = compare_recorded(two, four, command="", id="x")
    assert report.findings == ()
    assert report.sections["ranks"]["compared"]["gradient"] == 15


@pytest.mark.slow
def test_micro_batches_are_put_together(alone: Path, tmp_path: Path) -> None:
    text = SCRIPT.read_text().replace(
        "        loss = F.cross_entropy(model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())\n        loss.backward()\n",
        "        for mine in rows.split(2):\n"
        "            loss = F.cross_entropy(model(mine)[:, :-1].flatten(0, 1), mine[:, 1:].flatten()) / 2\n"
        "            loss.backward()\n",
    )
    assert "rows.split(2)" in text
    (tmp_path / "script.py").write_text(text)
    report = compare_recorded(alone, run_recorded(tmp_path, "many", tmp_path / "script.py", "ddp", 2), command="", id="x")
    assert report.findings == ()


@pytest.mark.slow
def test_an_optimizer_that_drives_another_is_noted_when_it_has_ended(alone: Path, tmp_path: Path) -> None:
    text = SCRIPT.read_text().replace("import sys", "import sys\nfrom torch.distributed.optim import ZeroRedundancyOptimizer")
    zero = "ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW"
    (tmp_path / "script.py").write_text(text.replace("torch.optim.AdamW(model.parameters()", zero))
    report = compare_recorded(alone, run_recorded(tmp_path, "many", tmp_path / "script.py", "ddp", 2), command="", id="x")
    assert report.findings == ()
    assert report.sections["ranks"]["compared"]["step"] == 15


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_parallel_script_is_found(name: str, alone: Path, tmp_path: Path) -> None:
    kind, right, wrong, probe, words = FAULTS[name]
    text = SCRIPT.read_text()
    assert right in text
    (tmp_path / "script.py").write_text(text.replace(right, wrong))
    report = compare_recorded(alone, run_recorded(tmp_path, "many", tmp_path / "script.py", kind, 2), command="", id="x")
    (finding,) = report.of("error")
    assert finding.probe == probe
    assert words in f"{finding.message} {finding.cause} {finding.fix}"
    assert report.exit_code == 1


# --- in this process: a record is what a step was, and nothing of the step changes


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Path]:
    yield from _recorded_here(tmp_path, monkeypatch, capsys, "one")


def _recorded_here(folder: Path, monkeypatch: Any, capsys: Any, name: str) -> Iterator[Path]:
    monkeypatch.setattr(sys, "argv", ["recorded.py"])
    recorded.main()
    plain = capsys.readouterr().out
    (folder / "journal").mkdir()
    with Watch(("index", "nan", "shape", "oom", "loop"), Journal(folder / "journal"), folder / name):
        recorded.main()
    assert capsys.readouterr().out == plain  # the losses of every step, to the last digit that is printed
    yield folder / name


def test_a_step_is_noted_once_and_changes_nothing(one_rank: Path) -> None:
    (record,) = read_records(one_rank)
    assert (record.rank, record.world) == (0, 1)
    assert record.end() is not None
    assert record.end()["optimizers"] == ["AdamW"]  # type: ignore[index]
    names: dict[str, list[str]] = {}
    for event in record.events():
        names.setdefault(event.stage, []).append(event.name)
    assert names["data"] == ["input_ids"]
    assert names["forward"][0] == "embed"
    assert names["forward"][-1] == ""
    assert len(names["start"]) == len(names["gradient"]) == len(names["step"]) == 15
    assert names["loss"] == ["loss"]
    assert names["norm"] == ["grad_norm"]


def test_a_trial_whose_gradients_are_thrown_away_is_no_part_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py"])
    trial = "    F.cross_entropy(model(data[:2])[:, :-1].flatten(0, 1), data[:2, 1:].flatten()).backward()\n    optimizer.zero_grad()\n"
    loop = "    for step in range(3):\n"
    text = SCRIPT.read_text()
    assert loop in text
    script: dict[str, Any] = {"__name__": "script"}
    exec(compile(text.replace(loop, trial + loop), "script.py", "exec"), script)
    (tmp_path / "journal").mkdir()
    with Watch(("loop",), Journal(tmp_path / "journal"), tmp_path / "one"):
        script["main"]()
    (record,) = read_records(tmp_path / "one")
    noted = [(event.stage, event.name, event.shape) for event in record.events()]
    assert [shape for stage, _, shape in noted if stage == "data"] == [(8, 9)]
    assert [name for stage, name, _ in noted if stage in ("loss", "norm")] == ["loss", "grad_norm"]
    assert len([stage for stage, _, _ in noted if stage == "gradient"]) == 15


def test_a_run_agrees_with_itself_and_a_record_is_never_written_over(one_rank: Path, capsys: Any) -> None:
    assert main(["parity", str(one_rank), str(one_rank), "--json", str(one_rank.parent / "r.json")]) == 0
    body = json.loads((one_rank.parent / "r.json").read_text())
    schema = json.loads((Path(olmodebug.__file__).parent / "report.schema.json").read_text())
    jsonschema.validate(body, schema)
    assert "11 module outputs" in capsys.readouterr().out
    assert main(["run", "--record", str(one_rank), "--", sys.executable, "-c", "pass"]) == 2
    assert "holds a record already" in capsys.readouterr().err
    assert main(["parity", str(one_rank)]) == 2
    assert "give two folders" in capsys.readouterr().err


# --- rules on records that are written by hand


def write(
    folder: Path, rank: int, world: int, tensors: list[tuple[str, str, Tensor]], *, dtype: str = "float32", ended: bool = True
) -> None:
    writer = RankWriter(folder, rank=rank, world=world)
    for stage, name, value in tensors:
        writer.tensor(stage, name, value)
    writer.close(dtypes=[dtype], optimizers=["SGD"])
    if not ended:
        path = folder / f"rank-{rank:05d}.jsonl"
        path.write_text("".join(line for line in path.read_text().splitlines(True) if '"end"' not in line))


def step(ids: Tensor, gradient: Tensor) -> list[tuple[str, str, Tensor]]:
    weight = torch.ones(3)
    return [("start", "w", weight), ("data", "input_ids", ids), ("gradient", "w", gradient), ("step", "w", weight - 0.1 * gradient)]


IDS, GRADIENT = torch.arange(8).view(4, 2), torch.tensor([1.0, -2.0, 0.5])


def written(folder: Path, many: list[Tensor], **options: Any) -> Any:
    write(folder / "one", 0, 1, step(IDS, GRADIENT), **options)
    for rank, ids in enumerate(many):
        write(folder / "many", rank, len(many), step(ids, GRADIENT), **options)
    return compare_recorded(folder / "one", folder / "many", command="", id="x")


def test_a_factor_that_ranks_and_micro_batches_both_make_is_told_as_both(tmp_path: Path) -> None:
    def in_micro_batches(rows: Tensor, gradient: Tensor) -> list[tuple[str, str, Tensor]]:
        return [each for each in step(rows, gradient) if each[0] != "data"] + [("data", "input_ids", row[None]) for row in rows]

    write(tmp_path / "one", 0, 1, in_micro_batches(IDS, GRADIENT))
    for rank, rows in enumerate((IDS[:2], IDS[2:])):
        write(tmp_path / "many", rank, 2, in_micro_batches(rows, GRADIENT * 2))
    (finding,) = compare_recorded(tmp_path / "one", tmp_path / "many", command="", id="x").of("error")
    assert "summed over ranks" in str(finding.cause) and "2 micro-batches are summed" in str(finding.cause)


def test_runs_that_saw_other_rows_conclude_nothing(tmp_path: Path) -> None:
    report = written(tmp_path, [IDS[:2] + 100, IDS[2:] + 100])
    assert [(finding.severity, finding.probe) for finding in report.findings] == [("warning", "ranks.same-data")]
    assert "same global batch" in report.findings[0].message
    assert {o.status for o in report.outcomes if o.probe == "ranks.gradients-agree"} == {"skipped"}


def test_sixteen_bits_are_compared_as_far_as_they_can_prove_something(tmp_path: Path) -> None:
    report = written(tmp_path, [IDS[:2], IDS[2:]], dtype="bfloat16")
    reasons = {o.probe: o.reason for o in report.outcomes if o.status == "skipped"}
    assert "run it in float32" in str(reasons["ranks.gradients-agree"])
    assert report.findings == ()


def test_a_rank_that_was_cut_off_and_one_that_is_gone_are_named(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "one", 0, 1, step(IDS, GRADIENT))
    write(tmp_path / "many", 0, 2, step(IDS[:2], GRADIENT))
    assert main(["parity", str(tmp_path / "one"), str(tmp_path / "many")]) == 2
    assert "lacks the records of rank 1 of 2" in capsys.readouterr().err
    write(tmp_path / "many", 1, 2, step(IDS[2:], GRADIENT), ended=False)
    assert main(["parity", str(tmp_path / "one"), str(tmp_path / "many")]) == 1
    assert "rank 1 did not come to its end" in capsys.readouterr().out


# --- a command that failed, and the records of its ranks


def unfinished_run(folder: Path, *, exception: str | None, lost: bool) -> list[Any]:
    here = Where(function="main", file="train.py", line=18, op="allreduce")
    for rank in range(2):
        writer = RankWriter(folder, rank=rank, world=2)
        if rank == 0:
            writer.collective(Collective(op="allreduce", shape=(3,), where=here))
        writer.lines.close()
    ended = {"event": "end", "exception": exception, "lost_a_peer": lost, "ops": 9}
    return unfinished(folder, [[{"event": "start", "rank": 0}, ended], [{"event": "start", "rank": 1}]])


def test_a_rank_that_died_is_told_as_soon_as_the_command_has_ended(tmp_path: Path) -> None:
    (finding,) = unfinished_run(tmp_path, exception="RuntimeError", lost=True)
    assert finding.message == "rank 1 does not come to the collective that rank 0 is in: number 0, allreduce of [3] at train.py:18"
    assert (finding.probe, finding.where.line) == ("ranks.step-completes", 18)


def test_an_exception_of_a_ranks_own_is_told_by_torch_and_not_by_what_comes_of_it(tmp_path: Path) -> None:
    assert unfinished_run(tmp_path, exception="ValueError", lost=False) == []


# --- the guards leave collectives alone


def test_an_op_of_somebody_elses_is_never_run_again_to_explain_an_infinity(tmp_path: Path) -> None:
    calls = []

    @torch.library.custom_op("recorded_test::overflow", mutates_args=())
    def overflow(x: Tensor) -> Tensor:
        calls.append(1)
        return x * float("inf")

    with Watch(("nan",), Journal(tmp_path)):
        (nn.Parameter(torch.ones(2)).exp().sum() + overflow(torch.ones(2)).sum()).item()
    assert calls == [1]


def test_the_result_of_a_collective_is_not_looked_at_while_it_is_written() -> None:
    from olmodebug.guards.nonfinite import _kind

    assert _kind(torch.ops.c10d._allgather_base_.default) == 0
    assert _kind(torch.ops.aten.add.Tensor) == 1
