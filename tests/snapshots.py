"""A snapshot as torch documents it, built by hand: no file of a real card was at hand."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

MIB = 1 << 20


def frames(line: int, name: str = "forward", file: str = "train.py") -> list[dict[str, Any]]:
    """Innermost first, as torch writes them."""
    return [
        {"filename": "/site-packages/torch/nn/functional.py", "line": 2300, "name": "linear"},
        {"filename": file, "line": line, "name": name},
        {"filename": file, "line": 99, "name": "<module>"},
    ]


def block(address: int, size: int, state: str, line: int = 0) -> dict[str, Any]:
    return {
        "address": address,
        "size": size,
        "requested_size": size - 100 if state != "inactive" else 0,
        "state": state,
        "frames": frames(line) if line else [],
    }


def event(action: str, address: int, size: int, line: int) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": 0, "time_us": 0, "frames": frames(line)}


def snapshot() -> dict[str, Any]:
    """Weights of 40 MiB from before the recording; 30 and 20 MiB come, 30 go again; a request of 100 MiB fails."""
    base = 0x7F0000000000
    segments = [
        {
            "device": 0,
            "address": base,
            "stream": 0,
            "total_size": 60 * MIB,
            "allocated_size": 60 * MIB,
            "active_size": 60 * MIB,
            "segment_type": "large",
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": frames(12),
            "blocks": [
                block(base, 40 * MIB, "active_allocated", 12),
                block(base + 40 * MIB, 20 * MIB, "active_allocated", 31),
            ],
        },
        {
            "device": 0,
            "address": base + 1000 * MIB,
            "stream": 0,
            "total_size": 32 * MIB,
            "allocated_size": 0,
            "active_size": 0,
            "segment_type": "large",
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": frames(30),
            "blocks": [block(base + 1000 * MIB, 32 * MIB, "inactive")],
        },
    ]
    events = [
        {"action": "segment_alloc", "addr": base + 1000 * MIB, "size": 32 * MIB, "stream": 0, "time_us": 0, "frames": frames(30)},
        event("alloc", base + 1000 * MIB, 30 * MIB, 30),
        event("alloc", base + 40 * MIB, 20 * MIB, 31),
        event("free_requested", base + 1000 * MIB, 30 * MIB, 40),
        event("free_completed", base + 1000 * MIB, 30 * MIB, 40),
        {"action": "oom", "size": 100 * MIB, "stream": 0, "time_us": 0, "device_free": 7 * MIB, "frames": frames(50)},
        {"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "time_us": 0, "frames": []},
    ]
    return {"segments": segments, "device_traces": [events], "allocator_settings": {"expandable_segments": False}}


def write(path: Path, body: Any | None = None) -> Path:
    path.write_bytes(pickle.dumps(snapshot() if body is None else body))
    return path
