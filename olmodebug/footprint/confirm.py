"""The prediction against a run on real tensors of the CPU: events one by one, bytes, resident memory, a short training."""

import contextlib
import resource
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..casts import cast
from ..own_code import quiet
from ..spec import SHRINK_ABOVE, Job, resolve
from ..subject import Subject
from .dry_run import Prepared, trace_fake, trace_real
from .estimate import peak_of
from .oom import explain_out_of_memory, is_out_of_memory
from .short_training import STEPS, STEPS_IN_FLOAT16_ON_THE_CPU, short_training
from .storage_trace import StorageTrace
from .training_step import StepPlan

BATCH_SIZE, SEQ_LEN = 2, 64  # of the run on the CPU, where not told otherwise: seconds for the default subject
EMPTY: dict[str, Any] = {
    "device": "cpu",
    "plan": "",
    "figures": [],
    "events": None,
    "training": None,
    "context_bytes": None,
    "retries": None,
    "out_of_memory": None,
    "skipped": None,
}


def confirm_on_cpu(
    job: Job, plan: StepPlan, *, batch_size: int | None, seq_len: int | None, parameters: int, limit_bytes: int | None = None
) -> Iterator[dict[str, Any]]:
    """The confirmation as it grows: after the comparison, then after the training. A large model is left out and says so.

    The plan runs at its own precision and optimizer, at a small size. With a limit, the process may grow by so much.
    """
    if parameters > SHRINK_ABOVE:
        yield {**EMPTY, "skipped": f"no run on the CPU: {parameters:,} parameters are more than {SHRINK_ABOVE:,}; with a GPU it runs there"}
        return
    small = replace(plan, batch_size=batch_size or min(BATCH_SIZE, plan.batch_size), seq_len=seq_len or min(SEQ_LEN, plan.seq_len))
    predicted = trace_fake(Prepared(job, small.weight_dtype), small, None)
    expected = peak_of(predicted.allocations, predicted.events)
    body = {**EMPTY, "plan": str(small)}
    live: list[StorageTrace] = []
    try:
        with limited(limit_bytes):
            before = _lowered_resident()
            subject = real_subject(job, small)
            measured = trace_real(subject, small, started=live.append)
            grown = max(0, _highest_resident() - before)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        yield {**body, "out_of_memory": explain_out_of_memory(error, predicted, live[-1] if live else None, limit_bytes=limit_bytes)}
        return
    peak = peak_of(measured.allocations, measured.events)
    body |= {
        "figures": [
            figure("tensors at the peak", expected, peak),
            # told beside the tensors and not held against them: buffers of kernels and what the C allocator keeps are in it
            {**figure("resident memory, growth", expected, grown), "error": None},
        ],
        "events": compared(predicted, measured),
    }
    yield body
    if small.inference:
        return
    steps = STEPS_IN_FLOAT16_ON_THE_CPU if small.precision == "fp16-amp" else STEPS
    fresh = real_subject(job, small)  # the comparison has trained the other on zeros
    body["training"] = asdict(short_training(fresh, small, steps=steps, seed=job.seed))
    yield body


def real_subject(job: Job, plan: StepPlan, device: str = "cpu") -> Subject:
    """The subject with its memory, whole, in the dtype of the plan's weights, in training mode.

    Cast before it is moved: float32 weights that are cast on a card leave it cached blocks of float32 (an H100 then reserved
    6.5 % more).
    """
    with quiet():
        subject = resolve(replace(job, meta=False, whole=True, device="cpu"))
    cast(subject.model, plan.weight_dtype)
    cast(subject.model, None, device=torch.device(device))
    subject.model.train()
    return subject


def figure(name: str, predicted: int, measured: int) -> dict[str, Any]:
    """One row of the table predicted / measured / error."""
    return {
        "name": name,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "error": round((predicted - measured) / measured, 6) if measured else None,
    }


def compared(predicted: StorageTrace, measured: StorageTrace) -> dict[str, Any]:
    """Both sequences of events; the first that differs, in words."""
    left, right = predicted.sequence(), measured.sequence()
    first = None
    if left != right:
        at = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
        sides = [" ".join(map(str, side[at])) if at < len(side) else "the end" for side in (left, right)]
        first = f"event {at}: predicted {sides[0]}; measured {sides[1]}"
    return {
        "device": "cpu",
        "predicted": len(left),
        "measured": len(right),
        "identical": first is None,
        "first_difference": first,
        "unpredicted": [],
    }


@contextlib.contextmanager
def limited(limit_bytes: int | None) -> Iterator[None]:
    """The process may map so many bytes more than now; beyond that an allocation fails instead of the machine."""
    if limit_bytes is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _lowered_resident() -> int:
    """The resident bytes now; the highest mark is brought down to them where Linux allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def _highest_resident() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    """A figure of /proc/self/status in bytes; the process's highest resident memory where there is none."""
    with contextlib.suppress(OSError):
        for text in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if text.startswith(f"{name}:"):
                return int(text.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_cuda_here() -> bool:
    """Whether a run on a card is possible."""
    return torch.cuda.is_available()
