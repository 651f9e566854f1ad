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


def compare(left: Mapping[str, Any], right: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Two sections category by category, the largest change first, and their figures side by side."""
    sides = [{share["name"]: share["bytes"] for share in side["categories"]} for side in (left, right)]
    rows = [
        {"name": name, "left_bytes": sides[0].get(name, 0), "right_bytes": sides[1].get(name, 0)}
        for name in dict.fromkeys([*sides[0], *sides[1]])
    ]
    rows.sort(key=lambda row: -abs(row["right_bytes"] - row["left_bytes"]))
    figures = []
    for name in ("tensors", "reserved", "process"):
        values = [(side["figures"].get(name) or {}).get("expected") for side in (left, right)]
        if None not in values:
            figures.append({"name": name, "left_bytes": values[0], "right_bytes": values[1]})
    return {"left": names[0], "right": names[1], "figures": figures, "categories": rows}


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
