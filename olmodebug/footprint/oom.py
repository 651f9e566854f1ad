"""An allocation that failed, explained: how much was asked for, what was alive, whether memory was needed or only in pieces."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from ..units import bytes_text
from .allocator import rounded
from .estimate import on_device
from .gpus import bytes_from
from .storage_trace import CATEGORIES, TEMPORARIES, StorageTrace

CPU_REQUEST = re.compile(r"you tried to allocate (\d+) bytes")
CUDA_REQUEST = re.compile(r"Tried to allocate ([0-9.]+ [KMGT]?i?B)")
NEED, FRAGMENTATION, LIMIT = "need", "fragmentation", "limit"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of a GPU or of the process."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "CUDA out of memory" in text)


def explain_out_of_memory(
    error: BaseException,
    predicted: StorageTrace,
    live: StorageTrace | None,
    *,
    limit_bytes: int | None,
    stats: Mapping[str, int] | None = None,
    free_bytes: int | None = None,
    largest_free_bytes: int | None = None,
) -> dict[str, Any]:
    """What failed, and the categories alive then beside those of the predicted peak.

    `stats` are torch.cuda.memory_stats() where the run was on a card.
    """
    requested = requested_bytes(str(error))
    alive = live_categories(live) if live is not None else Counter[str]()
    allocated = stats.get("allocated_bytes.all.current") if stats else sum(alive.values())
    reserved = stats.get("reserved_bytes.all.current") if stats else None
    part = "the run on the card" if stats else "building the model"
    if live is not None and live.marks:
        part = f"step {live.marks[-1][1]}, {live.marks[-1][2]}"
    reason = reason_of(requested, allocated or 0, reserved, limit_bytes)
    asked = f"a request of {bytes_text(requested)}" if requested else "a request"
    held = f"with {bytes_text(allocated or 0)} of tensors alive"
    words = {
        NEED: f"together more than the limit of {bytes_text(limit_bytes or 0)}",
        FRAGMENTATION: f"and {bytes_text((reserved or 0) - (allocated or 0))} cached in pieces too small: fragmentation, not need",
        LIMIT: "the limit of the process or the machine",
    }
    expected = peak_categories(predicted)
    return {
        "requested_bytes": requested,
        "allocated_bytes": allocated,
        "reserved_bytes": reserved,
        "free_bytes": free_bytes,
        "largest_free_bytes": largest_free_bytes,
        "limit_bytes": limit_bytes,
        "reason": reason,
        "text": f"{asked} failed {held}; {words[reason]}",
        "step": part,
        "live": [
            {"name": name, "predicted_bytes": expected[name], "live_bytes": alive[name]}
            for name in CATEGORIES
            if live is not None and (expected[name] or alive[name])
        ],
    }


def requested_bytes(text: str) -> int | None:
    """The size of the failing request in torch's own message; None where it does not say."""
    if match := CPU_REQUEST.search(text):
        return int(match[1])
    if match := CUDA_REQUEST.search(text):
        return bytes_from(match[1])
    return None


def reason_of(requested: int | None, allocated: int, reserved: int | None, limit_bytes: int | None) -> str:
    """`need`: alive and asked for are more than the limit; `fragmentation`: the cache holds enough, in pieces."""
    if limit_bytes is not None and requested is not None and allocated + requested > limit_bytes:
        return NEED
    if requested is not None and reserved is not None and reserved - allocated >= requested:
        return FRAGMENTATION
    return LIMIT


def live_categories(trace: StorageTrace) -> Counter[str]:
    """Bytes of each category at the last event; what nothing has claimed yet is temporary."""
    sums, ended = Counter[str](), {~event for event in trace.events if event < 0}
    for event in trace.events:
        if event >= 0 and event not in ended:
            allocation = trace.allocations[event]
            sums[allocation.category or TEMPORARIES] += rounded(allocation.bytes)
    return sums


def peak_categories(trace: StorageTrace) -> Counter[str]:
    """Bytes of each category at the predicted peak."""
    allocations, events = on_device(trace, None)
    now, best, most, total = Counter[str](), Counter[str](), 0, 0
    for event in events:
        allocation = allocations[event if event >= 0 else ~event]
        change = rounded(allocation.bytes) if event >= 0 else -rounded(allocation.bytes)
        now[allocation.category] += change
        total += change
        if total > most:
            most, best = total, Counter(now)
    return best
