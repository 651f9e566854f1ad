"""The recorded allocations of a real CUDA run beside the predicted ones: which belong together, and which nobody predicted."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ..sources import short_path
from .allocator import rounded

MOST_UNPREDICTED = 20
OUTSIDE = ("/torch/", "??", "<frozen", "<string>")


def allocations_of(device_trace: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The `alloc` entries of one device's recorded history, in order."""
    return [entry for entry in device_trace if entry["action"] == "alloc"]


def aligned(predicted: Sequence[int], real: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Predicted sizes against recorded allocations, by size and then order: both counts, and what is left over.

    Sizes count as blocks of 512 bytes. Every real allocation that no predicted one of its size is left for is named with
    the innermost line outside torch.
    """
    waiting: dict[int, int] = Counter(rounded(size) for size in predicted)
    left: dict[tuple[int, str], int] = defaultdict(int)
    matched = 0
    for entry in real:
        size = rounded(int(entry["size"]))
        if waiting[size]:
            waiting[size] -= 1
            matched += 1
        else:
            left[size, place_of(entry.get("frames", ()))] += 1
    rows = [{"bytes": size, "count": count, "place": place} for (size, place), count in left.items()]
    rows.sort(key=lambda row: -int(row["bytes"]) * int(row["count"]))  # type: ignore[call-overload]
    missing = sum(waiting.values())
    difference = None
    if rows or missing:
        difference = f"{sum(left.values())} real allocations that were not predicted, {missing} predicted ones that were not made"
    return {
        "device": "cuda",
        "predicted": len(predicted),
        "measured": len(real),
        "identical": difference is None,
        "first_difference": difference,
        "unpredicted": rows[:MOST_UNPREDICTED],
    }


def place_of(frames: Sequence[Mapping[str, Any]]) -> str:
    """`file:line function` of the innermost frame outside torch; the innermost of all where there is no other."""
    chosen = next((f for f in frames if not any(part in f["filename"] for part in OUTSIDE)), frames[0] if frames else None)
    if chosen is None:
        return "not recorded"
    return f"{short_path(chosen['filename'])}:{chosen['line']} {chosen['name']}"


def peak_of_history(device_trace: Sequence[Mapping[str, Any]]) -> int:
    """The most bytes that the recorded events had allocated at once, beyond what was there when recording began."""
    now = most = 0
    for entry in device_trace:
        if entry["action"] == "alloc":
            now += int(entry["size"])
            most = max(most, now)
        elif entry["action"] == "free_completed":
            now -= int(entry["size"])
    return most
