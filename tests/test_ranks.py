"""A training step on several processes against the same step in one: clean strategies stay clean, broken ones are named."""

from __future__ import annotations

import io
import json
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from rich.console import Console
from torch import Tensor

import olmodebug
from olmodebug.cli import main
from olmodebug.commands.ranks import STRATEGIES
from olmodebug.compare import roundings_limit
from olmodebug.errors import ReportError, UsageError
from olmodebug.group import peer_words
from olmodebug.ranks.calls import Collective, parted
from olmodebug.ranks.compare import compare_ranks
from olmodebug.ranks.last_op import LastOp, read_last_op
from olmodebug.ranks.logical import gather, wholes
from olmodebug.ranks.parallel import STRATEGIES as parallel_strategies
from olmodebug.ranks.record import RankWriter, digest, plain_name, read_records
from olmodebug.ranks.replicas import first_unlike_collectives, unlike_replicas
from olmodebug.ranks.run import RankOrder, compare_step
from olmodebug.records import Where
from olmodebug.render.ranks import ranks_view
from olmodebug.report import Report
from olmodebug.store import Run
from tests.mutants import mixed, parallel, pipeline

MODEL = "tests/mutants/clean/nanogpt_style.py:build"
LIMIT = roundings_limit({"float64"})
QUICK = ("per_rank_mean", "bias_on_each_rank")


def step_on(
    spec: str,
    *,
    strategy: str = "ddp",
    wrap: str | None = None,
    file: str = parallel.__file__,
    ranks: int = 2,
    mesh: tuple[int, ...] = (),
    patience: float = 8.0,
) -> Report:
    launch = f"{file}:{wrap}" if wrap else None
    order = RankOrder(
        job={"spec": spec}, ranks=ranks, strategy=strategy, launch=launch, mesh=mesh, patience_seconds=patience, timeout_seconds=120
    )
    return compare_step(order, Run(id="test", folder=None), lambda *_: None)


def piped(wrap: str) -> Report:
    spec = pipeline.LLAMA if wrap in pipeline.OF_LLAMA else MODEL
    return step_on(spec, wrap=wrap, file=pipeline.__file__)


def mingled(wrap: str) -> Report:
    spec = mixed.LLAMA if wrap in mixed.OF_LLAMA else MODEL
    return step_on(spec, wrap=wrap, file=mixed.__file__, ranks=4 if wrap in mixed.ON_FOUR else 2, patience=60)


def expect_found(mutant: parallel.Mutant) -> None:
    kinds = {pipeline.MUTANTS: piped, mixed.MUTANTS: mingled}
    run = next((run for mutants, run in kinds.items() if mutant in mutants), lambda wrap: step_on(MODEL, wrap=wrap))
    report = run(mutant.wrap)
    (finding,) = report.of("error")
    assert finding.probe == mutant.probe
    assert mutant.place in f"{finding.where.module} {finding.where.function} {finding.where.op}"
    assert any(word in f"{finding.message} {finding.cause}" for word in mutant.words), finding
    assert report.exit_code == 1


def expect_clean(report: Report) -> None:
    assert report.findings == ()
    assert report.verdict == "pass"
    assert report.sections["ranks"]["compared"]["gradient"] > 10


@pytest.mark.fresh
def test_fully_sharded_training_takes_the_step_of_one_process() -> None:
    expect_clean(step_on("olmo1-tiny", strategy="fsdp"))


@pytest.mark.parametrize("mutant", [m for m in parallel.MUTANTS if m.wrap in QUICK], ids=lambda m: m.wrap)
def test_a_broken_parallel_step_is_found_with_its_cause(mutant: parallel.Mutant) -> None:
    expect_found(mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [m for m in parallel.MUTANTS if m.wrap not in QUICK], ids=lambda m: m.wrap)
def test_every_broken_parallel_step_is_found(mutant: parallel.Mutant) -> None:
    expect_found(mutant)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", parallel.CLEAN)
def test_hand_written_parallelism_that_is_right_stays_clean(wrap: str) -> None:
    expect_clean(step_on(MODEL, wrap=wrap))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", pipeline.MUTANTS, ids=lambda m: m.wrap)
def test_every_broken_pipeline_is_found(mutant: parallel.Mutant) -> None:
    expect_found(mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", mixed.MUTANTS, ids=lambda m: m.wrap)
def test_every_broken_mixture_is_found(mutant: parallel.Mutant) -> None:
    expect_found(mutant)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [wrap for wrap in mixed.CLEAN if wrap != "clean_in_bfloat16"])
def test_mixtures_that_are_right_stay_clean(wrap: str) -> None:
    expect_clean(mingled(wrap))


@pytest.mark.slow
def test_values_of_a_step_in_16_bits_are_not_judged_and_that_is_said() -> None:
    report = mingled("clean_in_bfloat16")
    assert report.findings == () and report.verdict == "pass"
    skipped = {outcome.probe: outcome.reason for outcome in report.outcomes if outcome.status == "skipped"}
    assert "bfloat16" in str(skipped["ranks.gradients-agree"])


@pytest.mark.slow
@pytest.mark.parametrize("wrap", pipeline.CLEAN)
def test_hand_written_pipelines_that_are_right_stay_clean(wrap: str) -> None:
    expect_clean(piped(wrap))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp", "pp"])
@pytest.mark.parametrize(
    "spec", ["olmo1-tiny", "olmo2-tiny", "transformers:OlmoForCausalLM", "transformers:Olmo2ForCausalLM", "transformers:LlamaForCausalLM"]
)
def test_every_strategy_takes_the_step_of_one_process(spec: str, strategy: str) -> None:
    expect_clean(step_on(spec, strategy=strategy))


@pytest.mark.slow
def test_shards_over_data_and_tensor_parallel_ranks_at_once_are_put_together() -> None:
    expect_clean(step_on("olmo1-tiny", strategy="fsdp", ranks=4, mesh=(2, 2), patience=60))


@pytest.mark.slow
def test_plain_tensors_over_two_mesh_dimensions_stay_clean() -> None:
    expect_clean(step_on(MODEL, wrap="clean_rows_by_heads", ranks=4, mesh=(2, 2), patience=60))


@pytest.mark.slow
def test_flat_shards_are_joined_and_weights_without_their_names_left_out() -> None:
    report = step_on(MODEL, wrap="flat_shards", patience=60)
    assert report.findings == () and report.verdict == "pass"
    compared = report.sections["ranks"]["compared"]
    assert compared["forward"] > 10 and compared["gradient"] > 10
    report = step_on(MODEL, wrap="flat_weights", patience=60)
    assert report.findings == () and report.sections["ranks"]["compared"]["gradient"] == 0
    assert {o.status for o in report.outcomes if o.probe in ("ranks.same-start", "ranks.gradients-agree", "ranks.step-agrees")} == {
        "skipped"
    }


@pytest.mark.slow
def test_a_mesh_of_two_dimensions_that_nobody_declared_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="give --mesh DPxTP"):
        step_on(MODEL, wrap="own_mesh", ranks=4, patience=60)


def test_one_rank_is_no_comparison() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        step_on("olmo1-tiny", ranks=1)


@pytest.mark.slow
def test_heads_that_cannot_be_split_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="5 heads of model.layers.0.self_attn.q_proj cannot be split over 2 ranks"):
        step_on("datadecide-tiny", strategy="tp")


def test_the_command_line_names_the_strategies_that_there_are() -> None:
    assert parallel_strategies == STRATEGIES


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--ranks 1", "needs at least 2"),
        ("a.bundle b.bundle --ranks 2", "takes one subject"),
        ("--ranks 4 --mesh 2", "expected two sizes"),
        ("--ranks 2 --mesh 2x2", "has 4 places, and --ranks is 2"),
        ("--ranks 4 --mesh 2x2", "goes with --strategy fsdp or --launch"),
    ],
)
def test_a_wrong_turn_is_one_line(line: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["parity", *line.split()]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_compares_ranks_and_exits_by_the_finding(monkeypatch: Any, tmp_path: Path) -> None:
    here = Path.cwd()
    monkeypatch.chdir(tmp_path)
    line = ["parity", f"{here / MODEL.partition(':')[0]}:build", "--ranks", "2", "--launch", f"{Path(parallel.__file__)}:rank_raises"]
    assert main([*line, "--json", "out.json"]) == 1
    body = json.loads((tmp_path / "out.json").read_text())
    assert body["sections"]["ranks"]["world"] == 2
    assert body["findings"][0]["where"]["function"].endswith("rank_raises.train_step")


def test_the_section_keeps_to_the_schema_and_is_drawn() -> None:
    schema = json.loads((Path(olmodebug.__file__).parent / "report.schema.json").read_text())["properties"]["sections"]["properties"][
        "ranks"
    ]
    full = {"world": 2, "strategy": "ddp", "compared": {"forward": 34, "gradient": 15, "step": 15, "state": 15}, "collectives": [3, 3]}
    died = {"world": 2, "strategy": "my.py:wrap", "compared": None, "collectives": [1, 0]}
    texts = []
    for section in (full, died):
        jsonschema.validate(section, schema)
        out = io.StringIO()
        Console(file=out, width=100, no_color=True).print(ranks_view(section))
        texts.append(out.getvalue())
    assert "34 module outputs, 15 gradients, 15 weights, 15 optimizer tensors" in texts[0]
    assert "3 collectives on every rank" in texts[0]
    assert "cannot be held against each other" in texts[1]
    assert "1, 0" in texts[1]


# --- records and rules, without processes


def write(
    folder: Path,
    rank: int,
    world: int,
    tensors: list[tuple[str, str, Tensor]],
    calls: list[Collective] | None = None,
    dtypes: Sequence[str] = (),
) -> None:
    writer = RankWriter(folder, rank=rank, world=world, coordinate=(rank,), mesh=(world,))
    for call in calls or []:
        writer.collective(call)
    for stage, name, value in tensors:
        writer.tensor(stage, name, value)
    writer.close(dtypes=dtypes)


def one_step(gradient: Tensor, ids: Tensor, *, loss: float = 2.0) -> list[tuple[str, str, Tensor]]:
    weight = torch.ones(4, 3, dtype=torch.float64)
    return [
        ("start", "w", weight),
        ("input", "", ids),
        ("data", "input_ids", ids),
        ("forward", "", ids.double() * 2),
        ("gradient", "w", gradient),
        ("loss", "loss", torch.tensor(loss, dtype=torch.float64)),
        ("step", "w", weight - 0.1 * gradient),
    ]


def findings(folder: Path) -> list[Any]:
    [single] = read_records(folder / "single")
    return compare_ranks(single, read_records(folder / "ranks"), limit=LIMIT).findings


@pytest.fixture
def gradient() -> Tensor:
    return torch.arange(12, dtype=torch.float64).view(4, 3) - 5.5


IDS = torch.arange(12).view(4, 3)


def test_equal_steps_have_no_finding(tmp_path: Path, gradient: Tensor) -> None:
    write(tmp_path / "single", 0, 1, one_step(gradient, IDS))
    for rank in range(2):
        write(tmp_path / "ranks", rank, 2, one_step(gradient, IDS[rank::2]))
    assert findings(tmp_path) == []


def test_values_of_records_in_16_bits_are_not_judged(tmp_path: Path, gradient: Tensor) -> None:
    write(tmp_path / "single", 0, 1, one_step(gradient, IDS))
    for rank in range(2):
        write(tmp_path / "ranks", rank, 2, one_step(gradient * 1.01, IDS[rank::2]), dtypes=["bfloat16"])
    [single] = read_records(tmp_path / "single")
    comparison = compare_ranks(single, read_records(tmp_path / "ranks"), limit=LIMIT)
    assert comparison.findings == []
    assert {o.status for o in comparison.outcomes if o.probe == "ranks.gradients-agree"} == {"skipped"}
    assert comparison.compared["gradient"] == 0


def test_a_gradient_summed_over_ranks_is_told_from_one_divided_twice(tmp_path: Path, gradient: Tensor) -> None:
    write(tmp_path / "single", 0, 1, one_step(gradient, IDS))
    for factor, words in ((2.0, "summed over ranks"), (0.5, "once too often")):
        for rank in range(2):
            write(tmp_path / "ranks", rank, 2, one_step(gradient * factor, IDS[rank::2]))
        [finding] = findings(tmp_path)
        assert words in finding.cause


def test_a_cause_is_left_out_where_no_hypothesis_gives_the_numbers(tmp_path: Path, gradient: Tensor) -> None:
    write(tmp_path / "single", 0, 1, one_step(gradient, IDS))
    for rank in range(2):
        write(tmp_path / "ranks", rank, 2, one_step(gradient + torch.eye(4, 3, dtype=torch.float64), IDS[rank::2]))
    [finding] = findings(tmp_path)
    assert (finding.probe, finding.cause) == ("ranks.gradients-agree", None)


def test_losses_that_each_rank_has_of_its_own_rows_are_no_finding(tmp_path: Path, gradient: Tensor) -> None:
    write(tmp_path / "single", 0, 1, one_step(gradient, IDS))
    for rank in range(2):
        write(tmp_path / "ranks", rank, 2, one_step(gradient, IDS[rank::2], loss=1.5 + rank))
    assert findings(tmp_path) == []


def test_shards_are_put_together_by_their_placements(tmp_path: Path) -> None:
    whole = torch.arange(10.0).view(5, 2)
    for rank, part in enumerate(whole.chunk(2)):
        write(tmp_path, rank, 2, [("gradient", "w", part)])
    records = read_records(tmp_path)
    held = gather(records).of("gradient")["w"]
    assert wholes(held, records) is None, "a plain tensor does not say how it lies"
    for placements, expected in (("shard:0", whole), ("replicate", held.parts[0])):
        held.events = [replace(event, placements=(placements,)) for event in held.events]
        joined = wholes(held, records)
        assert joined is not None
        assert torch.equal(joined[0], expected)


def test_a_dimension_that_two_mesh_dimensions_split_is_put_together_and_every_copy_is_compared(tmp_path: Path) -> None:
    whole = torch.arange(16.0).view(8, 2)
    first, second = whole.chunk(2)  # tensor parallel ranks; data parallel ranks split what each of them has
    parts = [first.chunk(2)[0], second.chunk(2)[0], first.chunk(2)[1], second.chunk(2)[1]]
    for rank, part in enumerate(parts):
        write(tmp_path, rank, 4, [("start", "w", part)])
    records = read_records(tmp_path)
    for record, coordinate in zip(records, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        record.coordinate = coordinate
    held = gather(records).of("start")["w"]
    held.events = [replace(event, placements=("strided:0", "shard:0")) for event in held.events]
    assert [torch.equal(found, whole) for found in wholes(held, records) or []] == [True]
    held.events = [replace(event, placements=("shard:0", "replicate")) for event in held.events]
    copies = wholes(held, records) or []
    assert [copy.tolist() for copy in copies] == [torch.cat([parts[0], parts[2]]).tolist(), torch.cat([parts[1], parts[3]]).tolist()]


def test_the_first_unlike_collective_is_found_and_uneven_shards_are_none(tmp_path: Path) -> None:
    same = Collective(op="allgather_base", shape=(3,))
    write(tmp_path, 0, 2, [], [same, Collective(op="allreduce", shape=(4,))])
    write(tmp_path, 1, 2, [], [Collective(op="allgather_base", shape=(2,)), Collective(op="allreduce", shape=(5,))])
    unlike = first_unlike_collectives(read_records(tmp_path))
    assert unlike is not None
    assert unlike[0] == 1


def test_a_collective_that_a_rank_never_calls_is_told_with_its_line(tmp_path: Path) -> None:
    here = Where(function="train_step", file="train.py", line=12, op="allreduce")
    shared, last = Collective(op="broadcast", shape=(2,)), Collective(op="allreduce", shape=(4,), where=here)
    for rank in range(9):
        write(tmp_path, rank, 9, [], [shared, last] if rank == 7 else [shared])
    unlike = first_unlike_collectives(read_records(tmp_path))
    assert unlike is not None
    words, where = parted(unlike)
    assert words == (
        "ranks 0, 1, 2, 3, 4, 5 and 2 more do not come to the collective that rank 7 is in: number 1, allreduce of [4] at train.py:12"
    )
    assert where == here
    assert parted((0, {0: last, 1: shared})) == (
        "the ranks do not call the same collectives: at number 0 rank 0 allreduce of [4] at train.py:12, rank 1 broadcast of [2]",
        here,
    )


def test_more_ranks_than_files_that_may_be_open(tmp_path: Path) -> None:
    for rank in range(40):
        call = Collective(op="allreduce", shape=(5 if rank == 39 else 4,))
        write(tmp_path, rank, 40, [("start", "w", torch.full((2,), float(rank == 38)))], [call])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, before[1]))
    try:
        records = read_records(tmp_path)
        unlike, replicas = first_unlike_collectives(records), list(unlike_replicas(records))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert unlike is not None and (unlike[0], len(unlike[1])) == (0, 40)
    assert replicas == [("start", "w", [38])]


def test_what_is_left_of_a_killed_process_is_its_last_op(tmp_path: Path) -> None:
    assert read_last_op(tmp_path / "op.txt") is None
    with LastOp(tmp_path / "op.txt") as last:
        for line in (100, 7):
            last.note(Where(function="train_step", file="train.py", line=line, op="mm"))
        last.note(Where(file="x" * 5000))  # too long for a note
    assert read_last_op(tmp_path / "op.txt") == Where(function="train_step", file="train.py", line=7, op="mm")


def test_what_gloo_says_is_told_without_its_own_files() -> None:
    text = "RuntimeError: [/__w/pytorch/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:43: Connection reset. This is typically caused by"
    assert peer_words(text) == "RuntimeError: Read error [127.0.0.1]:43: Connection reset"


def test_replicas_that_differ_are_named_by_digest_alone(tmp_path: Path) -> None:
    for rank in range(8):
        write(tmp_path, rank, 8, [("start", "a", torch.ones(3)), ("start", "b", torch.full((2,), float(rank == 5)))])
    assert list(unlike_replicas(read_records(tmp_path))) == [("start", "b", [5])]


def test_a_digest_sees_order_shape_and_dtype() -> None:
    base = torch.arange(6, dtype=torch.float32).view(2, 3)
    others = [base.t().contiguous(), base.flip(0).contiguous(), base.view(3, 2), base.double(), -base]
    assert len({digest(tensor) for tensor in [base, *others]}) == 6
    assert digest(base) == digest(base.clone())


def test_half_a_line_at_the_end_is_what_a_killed_rank_leaves(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, [("start", "a", torch.ones(3)), ("start", "b", torch.ones(3))])
    file = tmp_path / "rank-00000.jsonl"
    text = "".join(file.read_text().splitlines(keepends=True)[:-1])  # without the line that says it ended
    file.write_text(text[:-20])
    assert read_records(tmp_path)[0].end() is None
    assert [event.name for event in read_records(tmp_path)[0].events()] == ["a"]
    head, first, second = text.splitlines()
    file.write_text("\n".join([head, first[:-20], second]) + "\n")
    with pytest.raises(ReportError, match="damaged at line 2"):
        list(read_records(tmp_path)[0].events())


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, [])
    file = tmp_path / "rank-00000.jsonl"
    file.write_text(json.dumps({**json.loads(file.read_text().splitlines()[0]), "version": 99}) + "\n")
    with pytest.raises(ReportError, match="expected version 2 of the record, observed 99"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("module.model.norm", "model.norm"),
        ("_orig_mod.h.0", "h.0"),
        ("module", ""),
        ("h.0._checkpoint_wrapped_module.mlp", "h.0.mlp"),
        ("", ""),
    ],
)
def test_a_path_is_the_same_under_every_wrapper(wrapped: str, plain: str) -> None:
    assert plain_name(wrapped) == plain
