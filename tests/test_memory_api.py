"""`olmodebug.memory` from Python, its what-ifs and largest sizes, and torch's own MemTracker beside it."""

import copy

import pytest
import torch
from torch import nn

import olmodebug
from olmodebug.errors import UsageError
from olmodebug.first_run import from_model
from olmodebug.footprint.allocator import AllocatorSettings
from olmodebug.footprint.dry_run import Prepared, token_ids, trace_fake
from olmodebug.footprint.estimate import estimate
from olmodebug.footprint.fit import largest, what_ifs
from olmodebug.footprint.gpus import GPUS
from olmodebug.footprint.training_step import StepPlan, make_optimizer, step
from olmodebug.model import Olmo
from olmodebug.presets import preset
from olmodebug.spec import Job

MIB = 1 << 20
PLAN = StepPlan(batch_size=64, seq_len=64)
NATIVE = AllocatorSettings()


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return Prepared(Job(spec="olmo1-tiny"), torch.float32)


def test_a_live_model_is_predicted_and_left_as_it_was() -> None:
    model = Olmo(preset("olmo2-tiny"))
    before, mode = copy.deepcopy(model.state_dict()), model.training
    found = olmodebug.memory(model, batch_size=4, gpu="T4")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training == mode and all(p.grad is None for p in model.parameters())
    assert found == olmodebug.memory("olmo2-tiny", batch_size=4, gpu="T4")


def test_the_three_figures_are_in_order() -> None:
    found = olmodebug.memory("olmo1-tiny", batch_size=256)
    assert found.reserved is not None and found.process is not None
    for figure in (found.tensors, found.reserved, found.process):
        assert figure.low <= figure.expected <= figure.safe
    assert found.tensors.expected <= found.reserved.expected < found.process.expected
    assert sum(share.bytes for share in found.categories) == found.tensors.expected


def test_the_largest_batch_fits_and_the_next_one_does_not(prepared: Prepared) -> None:
    budget = 900 * MIB
    found = largest(prepared, PLAN, GPUS["A100"], NATIVE, axis="batch_size", budget_bytes=budget)
    assert found.value > 64 and found.safe_bytes <= budget

    def safe(batch: int) -> int:
        plan = StepPlan(batch_size=batch, seq_len=64)
        return estimate(trace_fake(prepared, plan, GPUS["A100"], steps=2, lines=False), GPUS["A100"], NATIVE).needed.safe

    assert safe(found.value) == found.safe_bytes
    assert safe(round(found.value * 1.1)) > budget


def test_where_not_even_one_sequence_fits_the_largest_is_nought(prepared: Prepared) -> None:
    found = largest(prepared, PLAN, GPUS["A100"], NATIVE, axis="batch_size", budget_bytes=10 * MIB)
    assert (found.value, found.traces) == (0, 1)


def test_the_largest_sequence_is_bounded_by_the_positions_of_the_model(prepared: Prepared) -> None:
    found = largest(prepared, PLAN, GPUS["A100"], NATIVE, axis="seq_len", budget_bytes=80 << 30)
    assert (found.value, found.bounded_by) == (64, "the positions that the model declares")


def test_what_ifs_are_what_a_trace_of_the_changed_plan_gives(prepared: Prepared) -> None:
    base = estimate(trace_fake(prepared, PLAN, GPUS["A100"]), GPUS["A100"], NATIVE)
    rows = {row.change: row for row in what_ifs(prepared, PLAN, GPUS["A100"], NATIVE, base=base, budget_bytes=None)}
    assert {"gradient checkpointing", "chunked cross-entropy", "fused optimizer", "expandable segments"} <= set(rows)
    changed = StepPlan(batch_size=64, seq_len=64, checkpointing=True)
    again = estimate(trace_fake(prepared, changed, GPUS["A100"]), GPUS["A100"], NATIVE)
    assert rows["gradient checkpointing"].tensors == again.tensors
    assert rows["gradient checkpointing"].saved_bytes == base.needed.expected - again.needed.expected


def test_a_change_that_does_not_apply_says_why() -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(97, 24)
            self.head = nn.Linear(24, 97)

        def forward(self, idx: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(idx))

    ready = Prepared(from_model(Bigram()), torch.float32)
    base = estimate(trace_fake(ready, PLAN, GPUS["A100"]), GPUS["A100"], NATIVE)
    rows = {row.change: row for row in what_ifs(ready, PLAN, GPUS["A100"], NATIVE, base=base, budget_bytes=None)}
    assert "no list of blocks" in (rows["gradient checkpointing"].reason or "")
    assert rows["chunked cross-entropy"].tensors is not None


class LastWithoutTargets(nn.Module):
    """Logits of the last position only, unless there are targets, and a position to start from that has no default."""

    def __init__(self, *, looks: bool = True) -> None:
        super().__init__()
        self.embed, self.head, self.looks = nn.Embedding(97, 24), nn.Linear(24, 97), looks

    def forward(self, idx: torch.Tensor, start_pos: int, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        states = self.embed(idx) + start_pos
        if not self.looks:
            return states @ self.head.weight.T, None
        if targets is None:
            return self.head(states[:, [-1]]), None
        logits = self.head(states)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("gpu", [None, "T4"])
def test_the_loss_in_chunks_of_a_model_that_gives_all_logits_only_with_targets(gpu: str | None) -> None:
    found = olmodebug.memory(LastWithoutTargets(), batch_size=4, seq_len=600, loss="chunked", precision="fp32", gpu=gpu)
    assert found.tensors.expected > 4 * 600 * 24 * 4


def test_a_head_that_the_forward_goes_past_cannot_be_chunked() -> None:
    with pytest.raises(UsageError, match="the forward does not call head"):
        olmodebug.memory(LastWithoutTargets(looks=False), batch_size=4, seq_len=60, loss="chunked")


@pytest.mark.slow
def test_torch_s_own_memtracker_agrees_to_a_hundredth_of_a_percent() -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    plan = StepPlan(batch_size=8, seq_len=64, precision="fp32")
    ready = Prepared(Job(spec="datadecide-4M"), torch.float32)
    trace = trace_fake(ready, plan, None, steps=2)
    ours = level = 0
    for event in trace.events:  # in bytes as they are: MemTracker rounds to blocks on CUDA alone
        size = trace.allocations[event if event >= 0 else ~event].bytes
        level += size if event >= 0 else -size
        ours = max(ours, level)
    ready = Prepared(Job(spec="datadecide-4M"), torch.float32)
    with ready.mode:
        optimizer = make_optimizer(ready.subject.model, plan.optimizer)
        tracker = MemTracker()
        tracker.track_external(ready.subject.model, optimizer)
        peaks = []
        for _ in range(2):
            with tracker:
                step(ready.subject, plan, optimizer, None, [token_ids(ready.subject, plan)], lambda name: None)
            peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
            tracker.reset_mod_stats()
    assert max(peaks) == pytest.approx(ours, rel=1e-4)
