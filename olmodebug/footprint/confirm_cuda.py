"""The prediction against a run on a CUDA device: context, tensors, reserved, process, the allocator's history, a training.

It needs a card; nothing here runs without one.
"""

import gc
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from ..spec import Job
from .allocator import settings_of
from .confirm import EMPTY, figure, real_subject
from .device_memory import device_memory
from .dry_run import Prepared, token_ids, trace_fake
from .estimate import estimate, folded, on_device
from .gpus import GPUS, Gpu
from .history import Predicted, aligned, allocations_of
from .oom import explain_out_of_memory, is_out_of_memory
from .records import MemoryEstimate
from .short_training import short_training
from .storage_trace import StorageTrace
from .training_step import StepPlan, checkpointed, make_optimizer, make_scaler, step

STEPS = 3
MOST_ENTRIES = 1_000_000  # of the recorded history: one step of a 7B model makes some ten thousand


def confirm_on_cuda(job: Job, plan: StepPlan, _: MemoryEstimate, *, budget_bytes: int | None) -> Iterator[dict[str, Any]]:
    """The confirmation as it grows. The prediction is made anew for the card that is here.

    With a budget the process may take no more of the card than that, so that a real failure is met and explained.
    """
    index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    before = device_memory(index)
    context, gpu = _context(index, before.device_bytes)
    if budget_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / gpu.total_bytes), index)
    trace = trace_fake(Prepared(job, plan.weight_dtype), plan, gpu)
    found = estimate(trace, gpu, settings_of())
    body: dict[str, Any] = {**EMPTY, "device": torch.cuda.get_device_name(index), "plan": str(plan), "context_bytes": context}
    torch.cuda.reset_peak_memory_stats(index)
    try:
        peaks, reserved, history = _measured_steps(job, plan)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        yield {**body, "out_of_memory": _out_of_memory(error, trace, index, budget_bytes)}
        return
    stats = torch.cuda.memory_stats(index)
    after = device_memory(index, uuid=_uuid(index))
    assert found.reserved is not None
    rows = [
        figure("tensors allocated", found.tensors.expected, max(peaks.values())),
        figure("reserved", found.reserved.expected, reserved),
        figure("safe reserved", found.reserved.safe, reserved),
    ]
    rows += [figure(f"{name} at most", _phase(found, name), size) for name, size in peaks.items()]
    if context is not None and after.process_bytes is not None:
        rows.append(figure("process", found.reserved.expected + context, after.process_bytes))
    body |= {
        "figures": rows,
        "retries": int(stats.get("num_alloc_retries", 0)),
        "events": None if plan.inference else aligned(_last_step(trace, gpu), allocations_of(history)),
        "skipped": None if after.process_bytes is not None else f"the process's memory: {after.source}",
    }
    yield body
    if plan.inference:
        return
    gc.collect()
    torch.cuda.empty_cache()
    subject = real_subject(job, plan, "cuda")
    try:
        body["training"] = asdict(short_training(subject, plan, seed=job.seed, device="cuda"))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        body["out_of_memory"] = _out_of_memory(error, trace, index, budget_bytes)
    yield body


def _context(index: int, before: int | None) -> tuple[int | None, Gpu]:
    """The bytes of the CUDA context (what the driver counts beside the allocator, after one product), and the card."""
    with torch.no_grad():
        square = torch.ones(64, 64, device=f"cuda:{index}")
        (square @ square).sum().item()
    del square
    torch.cuda.synchronize(index)
    properties = torch.cuda.get_device_properties(index)
    known = next((gpu for name, gpu in GPUS.items() if name in properties.name.replace(" ", "")), None)
    gpu = replace(
        known or GPUS["A100"],
        name=properties.name,
        capability=(properties.major, properties.minor),
        total_bytes=properties.total_memory,
    )
    here = device_memory(index, uuid=_uuid(index))
    reserved = torch.cuda.memory_reserved(index)
    if here.process_bytes is not None:
        return here.process_bytes - reserved, gpu
    if here.device_bytes is not None and before is not None:
        return max(0, here.device_bytes - before - reserved), gpu
    return None, gpu


def _measured_steps(job: Job, plan: StepPlan) -> tuple[dict[str, int], int, list[Any]]:
    """Peaks of each part of a step, the most that was reserved, and the history of the last step."""
    subject = real_subject(job, plan, "cuda")
    if plan.inference:
        return _measured_inference(subject, plan), torch.cuda.max_memory_reserved(), []
    optimizer = make_optimizer(subject.model, plan.optimizer)
    scaler = make_scaler(plan.precision, "cuda")  # one that leaves no step out: a first step that overflows makes no state
    peaks: dict[str, int] = {}
    part, reserved = "setup", 0

    def begin(name: str) -> None:
        nonlocal part, reserved
        torch.cuda.synchronize()
        reserved = max(reserved, torch.cuda.max_memory_reserved())
        peaks[part] = max(peaks.get(part, 0), torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        part = name

    batches = [token_ids(subject, plan) for _ in range(plan.accumulation)]
    with checkpointed(subject.model, plan.checkpointing, preserve_random_state=True):
        for number in range(1, STEPS + 1):
            if number == STEPS:
                # Private, and the only way to the allocator's events; documented as the memory snapshot of torch.
                torch.cuda.memory._record_memory_history(max_entries=MOST_ENTRIES, stacks="python")
            step(subject, plan, optimizer, scaler, batches, begin, device="cuda")
    begin("end")
    traces = torch.cuda.memory._snapshot()["device_traces"]
    history = list(traces[torch.cuda.current_device()])
    torch.cuda.memory._record_memory_history(enabled=None)
    return {name: size for name, size in peaks.items() if name in ("forward", "backward", "optimizer")}, reserved, history


def _measured_inference(subject: Any, plan: StepPlan) -> dict[str, int]:
    from .dry_run import infer
    from .storage_trace import StorageTracer

    torch.cuda.reset_peak_memory_stats()
    infer(subject, plan, token_ids(subject, plan), StorageTracer(subject.model, lines=False))
    torch.cuda.synchronize()
    return {"prefill": torch.cuda.max_memory_allocated()}


def _last_step(trace: StorageTrace, gpu: Gpu) -> list[Predicted]:
    """What the last predicted step allocates, in order."""
    allocations, events = on_device(trace, gpu)
    last = max(a.step for a in allocations)
    made = (allocations[e] for e in events if e >= 0 and allocations[e].step == last)
    return [Predicted(a.bytes, f"{a.op} of {folded(a.module)}, {a.phase}") for a in made]


def _phase(found: MemoryEstimate, name: str) -> int:
    return max((phase.peak_bytes for phase in found.phases if phase.phase == name), default=0)


def _uuid(index: int) -> str | None:
    """The card's UUID as NVML writes it; None where this torch does not tell it."""
    value = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return None if value is None else f"GPU-{value}"


def _out_of_memory(error: Exception, trace: StorageTrace, index: int, budget_bytes: int | None) -> dict[str, Any]:
    """The failure with the allocator's own figures; a card without a budget is limited by its size."""
    free, total = torch.cuda.mem_get_info(index)
    return explain_out_of_memory(
        error,
        trace,
        None,
        limit_bytes=budget_bytes or total,
        stats=torch.cuda.memory_stats(index),
        free_bytes=free,
    )
