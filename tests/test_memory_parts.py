"""The smaller parts of a memory run: cards and sizes, scratch, who owns the peak, histories, failures, driver figures."""

from types import SimpleNamespace

import pytest
import torch

from olmodebug.errors import UsageError
from olmodebug.footprint.device_memory import device_memory
from olmodebug.footprint.estimate import estimate, on_device
from olmodebug.footprint.gpus import GPUS, bytes_from, gpu_named
from olmodebug.footprint.history import Predicted, aligned
from olmodebug.footprint.oom import explain_out_of_memory, is_out_of_memory, reason_of, requested_bytes
from olmodebug.footprint.peak_owner import owner
from olmodebug.footprint.scratch import scratch_blocks
from olmodebug.footprint.short_training import overflow_text, rate_of
from olmodebug.footprint.storage_trace import ACTIVATIONS, LOGITS, LOSS, OPTIMIZER_STATE, PARAMETERS, TEMPORARIES, Allocation, StorageTrace
from olmodebug.footprint.training_step import StepPlan

MIB = 1 << 20


@pytest.mark.parametrize("name", ["h100", "H100", "NVIDIA H100", "A100-40GB", "a100 40gb", "Tesla T4", "rtx4090", "GeForce RTX 4090"])
def test_a_card_is_known_however_it_is_written(name: str) -> None:
    assert gpu_named(name).name in GPUS


def test_a_card_that_is_unknown_gets_near_names() -> None:
    with pytest.raises(UsageError, match="H100"):
        gpu_named("H1000")


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 << 30), ("512 MiB", 512 * MIB), ("24GB", 24 * 10**9), ("1.5gib", 3 << 29), ("77", 77)]
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert bytes_from(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8 GiB free", "-1GiB", "0", "8Gx"])
def test_what_is_no_size_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="no size of memory"):
        bytes_from(text)


def test_the_workspace_of_cublas_is_8_mib_and_a_bit_before_hopper_and_32_from_it_on() -> None:
    assert GPUS["A100"].cublas_workspace_bytes == 8_519_680
    assert GPUS["H100"].cublas_workspace_bytes == 32 * MIB


def test_each_thread_of_a_step_takes_a_workspace_and_inference_has_one_thread() -> None:
    def ops(*given: tuple[str, str]) -> list[str]:
        made = [Allocation(MIB, op, "model", phase, 1, ACTIVATIONS) for phase, op in given]
        allocations, events = on_device(StorageTrace(allocations=made, events=list(range(len(made)))), GPUS["H100"])
        return [allocations[e].op for e in events]

    forward, backward = ("forward", "mm"), ("backward", "mm")
    step = ops(
        ("setup", "mm"), ("forward", "embedding"), forward, forward, ("backward", "nll_loss_backward"), backward, ("optimizer", "mm")
    )
    workspace = "cublas workspace"
    assert step == ["mm", "embedding", "mm", workspace, "mm", "nll_loss_backward", "mm", workspace, "mm"]  # each behind a first output
    assert ops(("setup", "mm"), ("prefill", "addmm"), ("decode", "mm")) == ["mm", "addmm", workspace, "mm"]


def test_wide_models_are_trained_at_a_lower_rate() -> None:
    small, middle, large = (rate_of(n) for n in (1_000, 150_000_000, 1_280_000_000))
    assert small == 1e-2 and middle == pytest.approx(0.5 * 0.0047 * (150 / 108) ** (-1 / 3)) and large < 1.1e-3


HALF, FULL = torch.float16, torch.float32
SDPA = "_scaled_dot_product_"
MEASURED = [  # an H100 with torch 2.11: what these took beside their outputs, in the order of the blocks
    ("efficient_attention_backward", FULL, (8, 8, 1024, 8), 8, ((2097152, 262144), (262144, 262144), (262144, 16793600))),
    ("efficient_attention_backward", FULL, (2, 12, 1024, 64), 12, ((6291456, 98304), (98304, 98304), (98304, 6297600))),
    ("efficient_attention_backward", FULL, (2, 16, 2048, 128), 16, ((33554432, 262144), (262144, 262144), (262144, 33570816))),
    ("efficient_attention_backward", FULL, (1, 4, 300, 32), 4, ((153600, 4800), (4800, 4800), (4800, 328000))),
    ("efficient_attention_backward", FULL, (2, 2, 512, 256), 2, ((2097152, 8192), (8192, 8192), (8192, 2098176))),
    ("efficient_attention_backward", HALF, (2, 12, 1024, 64), 12, ((98304, 6297600),)),
    ("efficient_attention_backward", HALF, (2, 16, 2048, 128), 16, ((262144, 33562624),)),
    ("efficient_attention_backward", HALF, (3, 4, 200, 64), 4, ((9600, 787200),)),
    ("efficient_attention_backward", HALF, (2, 2, 512, 256), 2, ((8192, 6292480),)),
    ("flash_attention_backward", HALF, (8, 8, 1024, 8), 8, ((262144, 8388608),)),
    ("flash_attention_backward", HALF, (2, 12, 1024, 64), 12, ((98304, 6291456),)),
    ("flash_attention_backward", HALF, (3, 4, 200, 64), 4, ((12288, 786432),)),
    ("flash_attention_backward", HALF, (1, 4, 300, 32), 4, ((6144, 196608),)),
    ("flash_attention_backward", HALF, (2, 8, 512, 64), 2, ((32768, 2097152, 1048576, 1048576),)),
    ("cudnn_attention_backward", HALF, (8, 8, 1024, 8), 8, ((2359552,),)),
    ("cudnn_attention_backward", HALF, (3, 4, 200, 64), 4, ((624256,),)),
    ("cudnn_attention_backward", HALF, (2, 2, 512, 256), 2, ((2105600,),)),
    ("cudnn_attention_backward", HALF, (2, 8, 512, 64), 2, ((4227328,),)),
]


@pytest.mark.parametrize(("op", "dtype", "shape", "kv_heads", "blocks"), MEASURED)
def test_attention_s_scratch_is_what_a_card_took(
    op: str, dtype: torch.dtype, shape: tuple[int, ...], kv_heads: int, blocks: tuple[tuple[int, ...], ...]
) -> None:
    query = torch.empty(shape, dtype=dtype, device="meta")
    key = torch.empty(shape[0], kv_heads, *shape[2:], dtype=dtype, device="meta")
    assert scratch_blocks(SDPA + op, (query, query, key, key)) == blocks


@pytest.mark.parametrize(("rows", "width", "staged"), [(4096, 384, 12 * MIB), (4096, 768, 24 * MIB)])
def test_a_sum_over_rows_is_staged_as_on_a_card(rows: int, width: int, staged: int) -> None:
    terms = torch.empty(4, rows // 4, width, device="meta")
    for kind in (terms, terms.half(), terms.bfloat16()):  # of 16 bits in float32, as the pure bfloat16 runs of 150M show
        assert scratch_blocks("sum", (kind, [0, 1])) == ((staged,),)
    assert scratch_blocks("sum", (terms, [-1])) == scratch_blocks("sum", (terms.double(), [0, 1])) == scratch_blocks("sum", (terms,)) == ()


def test_wide_heads_in_16_bits_have_their_output_in_float32_too() -> None:
    wide, narrow = (torch.empty(2, 2, 512, width, dtype=HALF, device="meta") for width in (256, 128))
    assert scratch_blocks(SDPA + "efficient_attention", (wide, wide, wide)) == ((2097152,),)
    assert scratch_blocks(SDPA + "efficient_attention", (narrow, narrow, narrow)) == ()
    assert scratch_blocks(SDPA + "cudnn_attention", (narrow, narrow, narrow)) == ((256,),)
    assert scratch_blocks("mm", (narrow, narrow)) == ()


def test_embedding_backward_needs_no_scratch_for_few_tokens() -> None:
    gradient, few = torch.empty(3000, 64, device="meta"), torch.empty(3000, dtype=torch.long, device="meta")
    assert scratch_blocks("embedding_dense_backward", (gradient, few, 500, -1, False)) == ()
    ids = 8 * 3000
    assert scratch_blocks("embedding_dense_backward", (gradient, few, 500, 1, False)) == ((ids, ids, ids, ids, (300 + 500) * 64 * 4),)


def test_a_cached_block_that_is_a_little_too_large_counts_whole() -> None:
    """As torch.cuda.memory_allocated counts it; the H100's runs showed up to 64 MiB of such remainders."""
    allocations = [*made(TEMPORARIES, 30 * MIB), *made(ACTIVATIONS, 30 * MIB - 600_000), *made(ACTIVATIONS, 10 * MIB)]
    trace = StorageTrace(allocations=allocations, events=[0, ~0, 1, 2, ~2, ~1])
    workspace = GPUS["A100"].cublas_workspace_bytes
    on_card, on_cpu = estimate(trace, GPUS["A100"]), estimate(trace, None)
    assert on_card.tensors.expected == 40 * MIB + workspace == sum(share.bytes for share in on_card.categories)
    assert on_cpu.tensors.expected == 40 * MIB - 600_000 // 512 * 512


def made(category: str, size: int, *, shape: tuple[int, ...] = (), module: str = "", op: str = "mul", count: int = 1) -> list[Allocation]:
    return [Allocation(size, op, module, "forward", 1, category, shape, "float32") for _ in range(count)]


def test_the_owner_of_the_peak_is_copies_of_the_logits() -> None:
    live = (
        made(LOGITS, 300 * MIB, shape=(16384, 4800), count=2)
        + made(LOGITS, 300 * MIB, shape=(8, 2048, 4800), module=LOSS)
        + made(PARAMETERS, 100 * MIB)
    )
    assert (
        owner(live, 2, "backward")
        == "90 % of the peak is three float32 copies of the logits of 300 MiB each, in the loss (backward of step 2)"
    )


def test_one_copy_of_the_logits_is_in_the_module_that_made_it() -> None:
    live = made(LOGITS, 90 * MIB, shape=(8, 100, 97), module="lm_head") + made(PARAMETERS, 10 * MIB)
    assert owner(live, 1, "prefill") == "90 % of the peak is one float32 copy of the logits of 90.0 MiB, in lm_head (prefill of step 1)"


def test_the_owner_of_the_peak_is_activations_of_so_many_layers() -> None:
    live = [a for i in range(3) for a in made(ACTIVATIONS, 30 * MIB, shape=(4, 4), module=f"model.layers.{i}.mlp")]
    assert (
        owner(live + made(PARAMETERS, 10 * MIB), 1, "forward")
        == "90 % of the peak is saved activations of 3 layers, 90.0 MiB (forward of step 1)"
    )


def test_where_nothing_holds_half_the_first_three_are_named() -> None:
    live = made(OPTIMIZER_STATE, 40 * MIB) + made(PARAMETERS, 30 * MIB) + made(ACTIVATIONS, 30 * MIB)
    text = owner(live, 1, "optimizer")
    assert text == "no single category holds the peak: optimizer 40 %, parameters 30 %, saved activations 30 % (optimizer of step 1)"


def entry(size: int, line: int) -> dict:
    frames = [{"filename": "/x/torch/nn/functional.py", "line": 1, "name": "f"}, {"filename": "model.py", "line": line, "name": "forward"}]
    return {"action": "alloc", "size": size, "frames": frames}


def predicted(*sizes: int) -> list[Predicted]:
    return [Predicted(size, f"op{i} of model, forward") for i, size in enumerate(sizes)]


def test_a_real_allocation_that_nobody_predicted_is_named_with_its_line() -> None:
    made = predicted(1000, 2000, 2000)
    found = aligned(made, [entry(1024, 1), entry(2048, 2), entry(2048, 2), entry(70000, 7), entry(70000, 7)])
    assert not found["identical"] and (found["predicted"], found["measured"]) == (3, 5)
    assert found["unpredicted"] == [{"bytes": 70144, "count": 2, "place": "model.py:7 forward"}]
    assert aligned(predicted(1000, 2000), [entry(1024, 1), entry(2048, 2)])["identical"]
    found = aligned(predicted(1000, 2000), [entry(1024, 1)])
    assert found["first_difference"] == "0 real allocations that were not predicted, 1 predicted ones that were not made"
    assert found["missing"] == [{"bytes": 2048, "count": 1, "place": "op1 of model, forward"}]


def test_an_allocation_without_frames_is_named_by_what_was_predicted_before_it() -> None:
    bare = {"action": "alloc", "frames": []}
    sizes = [512, 1024, 2048, 7168, 7168, 4096, 512]  # of 7168 one was predicted, later
    found = aligned(predicted(512, 1024, 2048, 4096, 512, 7168, 9216), [{**bare, "size": size} for size in sizes])
    assert found["unpredicted"] == [{"bytes": 7168, "count": 1, "place": "after op2 of model, forward"}]
    assert found["missing"] == [{"bytes": 9216, "count": 1, "place": "op6 of model, forward"}]


def test_a_request_is_read_from_torch_s_own_words() -> None:
    cpu = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 400000000 bytes."
    cuda = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 14.56 GiB"
    assert (requested_bytes(cpu), requested_bytes(cuda), requested_bytes("no")) == (400_000_000, 5 << 29, None)
    assert (
        is_out_of_memory(RuntimeError(cpu)) and is_out_of_memory(torch.OutOfMemoryError(cuda)) and not is_out_of_memory(RuntimeError("x"))
    )


@pytest.mark.parametrize(
    ("requested", "allocated", "reserved", "limit", "reason"),
    [(50, 60, 70, 100, "need"), (20, 60, 95, 100, "fragmentation"), (20, 60, 65, 100, "limit"), (None, 60, None, None, "limit")],
)
def test_need_and_fragmentation_are_told_apart(
    requested: int | None, allocated: int, reserved: int | None, limit: int | None, reason: str
) -> None:
    assert reason_of(requested, allocated, reserved, limit) == reason


class Nvml:
    """Stands in for pynvml: one card, and these processes on it."""

    class NVMLError(Exception):
        pass

    def __init__(self, *processes: tuple[int, int | None], broken: bool = False) -> None:
        self.processes, self.broken = [SimpleNamespace(pid=p, usedGpuMemory=m) for p, m in processes], broken
        self.shut = 0

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        self.shut += 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> SimpleNamespace:
        return SimpleNamespace(used=9000)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[SimpleNamespace]:
        return self.processes


@pytest.mark.parametrize(
    ("nvml", "process", "device", "words"),
    [
        (Nvml((7, 500), (8, 900)), 500, 9000, "this process"),
        (Nvml((4711, 500)), 500, 9000, "another number in this container"),
        (Nvml((4711, 500), (4712, 1)), None, 9000, "no number that it knows"),
        (Nvml((7, None)), None, 9000, "WDDM"),
        (Nvml(broken=True), None, None, "Driver Not Loaded"),
    ],
    ids=["plain", "container", "crowded container", "WDDM or MIG", "no driver"],
)
def test_the_driver_s_figures_or_why_there_are_none(nvml: Nvml, process: int | None, device: int | None, words: str) -> None:
    found = device_memory(0, nvml=nvml, processes=frozenset({7}))
    assert (found.process_bytes, found.device_bytes) == (process, device) and words in found.source
    assert nvml.shut == (0 if nvml.broken else 1)


def test_overflow_steps_are_explained() -> None:
    assert overflow_text(20, [], [65536.0], scaled=True).startswith("none of 20 steps")
    assert "how the scaler finds the first one that fits" in overflow_text(20, [1, 2], [16384.0], scaled=True)
    assert "infinite or NaN" in overflow_text(3, [1, 2, 3], [8192.0], scaled=True)
    assert "no GradScaler" in overflow_text(20, [], [], scaled=False)


def test_a_plan_that_cannot_be_meant_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        StepPlan(batch_size=0)
    with pytest.raises(UsageError, match="pure float16"):
        StepPlan(precision="fp16")


def test_a_failure_on_a_card_without_a_live_table_claims_no_part_and_no_categories() -> None:
    stats = {"allocated_bytes.all.current": 60 * MIB, "reserved_bytes.all.current": 95 * MIB}
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    found = explain_out_of_memory(error, StorageTrace(), None, limit_bytes=100 * MIB, stats=stats)
    assert (found["step"], found["live"], found["reason"]) == ("the run on the card", [], "fragmentation")
