"""The `memory` section of a report, as `report.schema.json` gives it: one form for predictions, snapshots and comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .records import MemoryEstimate, Range

NOT_MODELLED = (
    "torch.compile and CUDA graphs",
    "several GPUs: buckets of DDP, shards of FSDP, NCCL's buffers",
    "gradient clipping, exponential averages, and whatever else a training script keeps",
    "scratch memory of kernels outside the table (attention, sums over rows, embedding, cuBLAS)",
)

EMPTY: dict[str, Any] = {
    "kind": "prediction",
    "plan": None,
    "gpu": None,
    "budget_bytes": None,
    "fits": None,
    "figures": {"tensors": None, "reserved": None, "process": None},
    "peak": None,
    "categories": [],
    "modules": [],
    "holders": [],
    "phases": [],
    "timeline": None,
    "allocator": None,
    "what_ifs": [],
    "largest": [],
    "confirmation": None,
    "snapshot": None,
    "comparison": None,
    "opaque": [],
    "not_modelled": [],
    "predict_seconds": None,
    "notes": [],
}


def section(estimate: MemoryEstimate | None = None, **fields: Any) -> dict[str, Any]:
    """The section of an estimate with further fields; every field is there, null or empty where it says nothing."""
    unknown = set(fields) - set(EMPTY)
    assert not unknown, f"no such field of the memory section: {unknown}"
    body = {
        name: (dict(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else value)
        for name, value in EMPTY.items()
    }
    if estimate is not None:
        body |= {
            "figures": {name: _range(getattr(estimate, name)) for name in ("tensors", "reserved", "process")},
            "peak": asdict(estimate.peak),
            "categories": [asdict(share) for share in estimate.categories],
            "modules": [asdict(share) for share in estimate.modules],
            "holders": [{**asdict(holder), "shape": list(holder.shape)} for holder in estimate.holders],
            "phases": [asdict(phase) for phase in estimate.phases],
            "timeline": _timeline(estimate),
            "allocator": asdict(estimate.segments) if estimate.segments else None,
            "opaque": list(estimate.opaque),
            "not_modelled": list(NOT_MODELLED),
        }
    return body | fields


def verdict(needed: Range, budget_bytes: int | None) -> bool | None:
    """Whether it fits: the expected figure within the budget; None without one."""
    return None if budget_bytes is None else needed.expected <= budget_bytes


BY_CATEGORY, AT_PEAK, AT_END = "category, at the peak", "place, at the recorded peak", "place, at the end"


def compare(left: Mapping[str, Any], right: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Two sections side by side: their figures, and category by category (of snapshots, which have none, place by place) the
    largest change first. A snapshot beside a prediction has no rows but the figures."""
    shares = [_shares(side) for side in (left, right)]
    by = next((kind for kind in (BY_CATEGORY, AT_PEAK, AT_END) if all(kind in side for side in shares)), None)
    rows = _rows(*(side[by] for side in shares)) if by is not None else []
    rows.sort(key=lambda row: -abs(row["right_bytes"] - row["left_bytes"]))
    numbers = [_figures(side) for side in (left, right)]
    both = [{name: side[name] for name in numbers[0] if name in numbers[1]} for side in numbers]
    return {"left": names[0], "right": names[1], "figures": _rows(*both), "by": by, "categories": rows}


def _rows(left: Mapping[str, int], right: Mapping[str, int]) -> list[dict[str, Any]]:
    names = dict.fromkeys([*left, *right])
    return [{"name": name, "left_bytes": left.get(name, 0), "right_bytes": right.get(name, 0)} for name in names]


def _shares(side: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """What a section divides its bytes into."""
    if side["kind"] != "snapshot":
        return {BY_CATEGORY: {share["name"]: share["bytes"] for share in side["categories"]}}
    found = {AT_END: side["snapshot"]["owners"], AT_PEAK: side["snapshot"].get("peak_owners")}
    return {by: {owner["place"]: owner["bytes"] for owner in owners} for by, owners in found.items() if owners}


def _figures(side: Mapping[str, Any]) -> dict[str, int]:
    """The expected figures of a prediction, the recorded ones of a snapshot, under the same names where they are the same."""
    if side["kind"] != "snapshot":
        figures = side["figures"]
        return {name: figures[name]["expected"] for name in ("tensors", "reserved", "process") if figures.get(name)}
    line, snapshot = side["timeline"], side["snapshot"]
    peak = {"tensors": line["points"][line["peak"]]["allocated_bytes"]} if line else {}
    return peak | {
        "reserved": snapshot["reserved_bytes"],
        "tensors at the end": snapshot["allocated_bytes"],
        "free in segments": snapshot["stranded_bytes"],
        "largest free block": snapshot["largest_free_bytes"],
    }


def _range(value: Range | None) -> dict[str, int] | None:
    return None if value is None else asdict(value)


def _timeline(estimate: MemoryEstimate) -> dict[str, Any]:
    line = estimate.timeline
    return {
        "names": list(line.names),
        "peak": line.peak,
        "marks": [asdict(mark) for mark in line.marks],
        "points": [{**asdict(point), "categories": list(point.categories)} for point in line.points],
    }
