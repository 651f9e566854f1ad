"""A file of `torch.cuda.memory._dump_snapshot` read without a GPU and without running what it contains.

The format is that of https://docs.pytorch.org/docs/stable/torch_cuda_memory.html: segments with their blocks, and for each
device the recorded events. Only plain containers, text and numbers are read from the pickle: a file that names anything
else is refused.
"""

import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ReportError
from ..units import bytes_text
from .history import place_of
from .section import section

MOST_POINTS = 240
MOST_OWNERS = 1000  # places; a comparison looks each of them up on the other side
BEFORE = "before the recording"
RECORDED = "recorded"


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ReportError(f"no snapshot of torch.cuda.memory: the pickle names {module}.{name}, which a snapshot does not")


def read_snapshot(path: Path) -> dict[str, Any]:
    """The snapshot in a file; ReportError when it is none."""
    try:
        with path.open("rb") as file:
            body = _Plain(file).load()
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from None
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise ReportError(f"{path} is no pickle that can be read: {type(error).__name__}: {error}") from None
    if not isinstance(body, dict) or not isinstance(body.get("segments"), list):
        raise ReportError(f"{path} is no snapshot of torch.cuda.memory: it has no list of segments")
    return body


def snapshot_section(path: Path) -> dict[str, Any]:
    """The memory section of a snapshot: what is allocated at its end and by whom, what is free in pieces, and the recorded
    course with its peak."""
    body = read_snapshot(path)
    try:
        return _section(body, path.name)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path} is a damaged snapshot: {type(error).__name__}: {error}") from None


def _section(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    segments = body["segments"]
    blocks = [block for segment in segments for block in segment["blocks"]]
    used = [block for block in blocks if block["state"] != "inactive"]
    free = [int(block["size"]) for block in blocks if block["state"] == "inactive"]
    allocated = sum(int(block["size"]) for block in used)
    traces = body.get("device_traces") or []
    # the device with the longest history; the others' blocks are in the table all the same
    history: Sequence[Mapping[str, Any]] = max(traces, key=len, default=[])
    device = traces.index(history) if history else 0
    at_end = sum(int(b["size"]) for s in segments if s.get("device", 0) == device for b in s["blocks"] if b["state"] != "inactive")
    timeline, peak, at_peak = _course(history, at_end)
    lost = [entry for trace in traces for entry in trace if entry["action"] == "oom"]
    return section(
        kind="snapshot",
        peak=peak,
        timeline=timeline,
        snapshot={
            "file": name,
            "allocated_bytes": allocated,
            "reserved_bytes": sum(int(segment["total_size"]) for segment in segments),
            "segments": len(segments),
            "largest_free_bytes": max(free, default=0),
            "stranded_bytes": sum(free),
            "devices": sorted({int(segment.get("device", 0)) for segment in segments}),
            "events": sum(map(len, traces)),
            "out_of_memory": [{"requested_bytes": int(entry["size"]), "free_bytes": int(entry["device_free"])} for entry in lost],
            "owners": _owners(used),
            "peak_owners": at_peak,
        },
        notes=[] if history else ["no events were recorded: call torch.cuda.memory._record_memory_history() before the run"],
    )


def _owners(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Blocks by the place that made them, the most bytes first."""
    sums, counts = Counter[str](), Counter[str]()
    for block in blocks:
        place = place_of(block.get("frames") or ())
        sums[place] += int(block["size"])
        counts[place] += 1
    return [{"place": place, "bytes": size, "count": counts[place]} for place, size in sums.most_common(MOST_OWNERS)]


def _course(history: Sequence[Mapping[str, Any]], at_end: int) -> tuple[dict[str, Any] | None, dict[str, Any] | None, list[dict[str, Any]]]:
    """The allocated bytes over the recorded events, the peak in one sentence, and who held it."""
    changes = [_change(entry) for entry in history]
    if not any(changes):
        return None, None, []
    # What the recording does not know to begin was there before; a free of it is recorded all the same.
    known: dict[int, Mapping[str, Any]] = {}
    now, recorded = at_end - sum(changes), 0
    points: list[dict[str, Any]] = []
    stretch = max(1, -(-len(history) // MOST_POINTS))
    best: tuple[int, int, int] | None = None
    top, top_event = -1, 0
    top_live: list[Mapping[str, Any]] = []
    for at, (entry, change) in enumerate(zip(history, changes, strict=True)):
        now += change
        address = entry.get("addr")
        if entry["action"] == "alloc" and address is not None:
            known[address] = entry
            recorded += change
        elif entry["action"] == "free_completed" and known.pop(address, None) is not None:  # type: ignore[arg-type]
            recorded += change
        if now > top:
            top, top_event, top_live = now, at, list(known.values()) if change > 0 else top_live
        if best is None or now > best[0]:
            best = (now, at, recorded)
        if at % stretch == stretch - 1 or at == len(history) - 1:
            points.append(
                {
                    "event": best[1],
                    "step": 0,
                    "phase": RECORDED,
                    "allocated_bytes": best[0],
                    "reserved_bytes": None,
                    "categories": [best[0] - best[2], best[2]],
                }
            )
            best = None
    fullest = max(range(len(points)), key=lambda i: points[i]["allocated_bytes"])
    timeline = {"names": [BEFORE, RECORDED], "peak": fullest, "marks": [{"point": 0, "step": 0, "phase": RECORDED}], "points": points}
    owners = _owners(top_live)
    before = top - sum(owner["bytes"] for owner in owners)
    there = [{"place": BEFORE, "bytes": before, "count": 0}] if before > 0 else []
    return timeline, _peak(top, top_event, owners), owners + there


def _peak(top: int, event: int, owners: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    held, size = "what was there before the recording", top
    if owners:
        times = f"{owners[0]['count']} blocks" if owners[0]["count"] > 1 else "one block"
        held, size = f"{times} made at {owners[0]['place']}", owners[0]["bytes"]
    share = 100 * size / top if top else 0
    return {
        "event": event,
        "step": 0,
        "phase": RECORDED,
        "module": "",
        "op": "alloc",
        "file": None,
        "line": None,
        "owner": f"{share:.0f} % of the recorded peak of {bytes_text(top)} is {held}, {bytes_text(size)}",
    }


def _change(entry: Mapping[str, Any]) -> int:
    return {"alloc": 1, "free_completed": -1}.get(entry["action"], 0) * int(entry.get("size", 0))
