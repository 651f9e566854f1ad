"""The recorded allocations of a real CUDA run beside the predicted ones: which belong together, and which nobody predicted."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..sources import short_path
from .allocator import rounded

MOST_UNPREDICTED = 20
LOOK_AHEAD = 48  # allocations that one side may have between two that both have
OUTSIDE = ("/torch/", "??", "<frozen", "<string>")


def allocations_of(device_trace: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The `alloc` entries of one device's recorded history, in order."""
    return [entry for entry in device_trace if entry["action"] == "alloc"]


@dataclass(frozen=True, slots=True)
class Predicted:
    """One predicted allocation: its bytes, and `op of module` in words."""

    bytes: int
    name: str


def aligned(predicted: Sequence[Predicted], real: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Predicted allocations against recorded ones, as blocks of 512 bytes: both counts, and what is left over on either side.

    How many are left over is counted by size alone; which they are is read from both sequences in their order. A real one is
    named with the innermost line outside torch, and where the history has none with the predicted one before it.
    """
    left, right = [rounded(one.bytes) for one in predicted], [rounded(int(entry["size"])) for entry in real]
    extra, missing = Counter(right) - Counter(left), Counter(left) - Counter(right)
    pairs = in_order(left, right)
    before = {j: predicted[i].name for i, j in pairs}
    rows, lost = Counter[tuple[int, str]](), Counter[tuple[int, str]]()
    last = "the beginning of the step"
    for j, size in _unmatched_first(right, {j for _, j in pairs}):
        if extra[size]:
            extra[size] -= 1
            last = next((before[k] for k in range(j, -1, -1) if k in before), last)
            rows[size, place_of(real[j].get("frames", ()), after=last)] += 1
    for i, size in _unmatched_first(left, {i for i, _ in pairs}):
        if missing[size]:
            missing[size] -= 1
            lost[size, predicted[i].name] += 1
    difference = None
    if rows or lost:
        difference = f"{rows.total()} real allocations that were not predicted, {lost.total()} predicted ones that were not made"
    return {
        "device": "cuda",
        "predicted": len(predicted),
        "measured": len(real),
        "identical": difference is None,
        "first_difference": difference,
        "unpredicted": _largest(rows),
        "missing": _largest(lost),
    }


def in_order(left: Sequence[int], right: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of places with equal numbers, in the order of both; after a difference the nearest place where three agree again."""
    pairs: list[tuple[int, int]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] == right[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
            continue
        steps = ((total - skip, skip) for total in range(1, LOOK_AHEAD) for skip in range(total + 1))
        found = next(((a, b) for a, b in steps if left[i + a : i + a + 3] == right[j + b : j + b + 3]), None)
        if found is None:
            i, j = i + 1, j + 1
        else:
            i, j = i + found[0], j + found[1]
    return pairs


def _unmatched_first(sizes: Sequence[int], matched: set[int]) -> Iterator[tuple[int, int]]:
    """(place, size): what has no partner in order, then what has."""
    yield from ((at, size) for at, size in enumerate(sizes) if at not in matched)
    yield from ((at, size) for at, size in enumerate(sizes) if at in matched)


def _largest(rows: Counter[tuple[int, str]]) -> list[dict[str, Any]]:
    """Alike allocations, the most bytes first."""
    made = [{"bytes": size, "count": count, "place": place} for (size, place), count in rows.items()]
    made.sort(key=lambda row: -int(row["bytes"]) * int(row["count"]))  # type: ignore[call-overload]
    return made[:MOST_UNPREDICTED]


def place_of(frames: Sequence[Mapping[str, Any]], *, after: str = "") -> str:
    """`file:line function` of the innermost frame outside torch; the innermost of all where there is no other.

    The backward pass runs on a thread that has no Python frames: there it is what came before.
    """
    chosen = next((f for f in frames if not any(part in f["filename"] for part in OUTSIDE)), frames[0] if frames else None)
    if chosen is None:
        return f"after {after}" if after else "not recorded"
    return f"{short_path(chosen['filename'])}:{chosen['line']} {chosen['name']}"
