"""The timeline of a memory section as a trace for chrome://tracing and Perfetto: bytes by category, and the steps' parts."""

import json
from collections.abc import Mapping
from typing import Any

MICROSECONDS_EACH = 10  # events have an order and no time of their own; a viewer needs some distance


def chrome_trace(section: Mapping[str, Any]) -> str:
    """Counter and span events in the Trace Event Format; the horizontal axis is the number of the event."""
    timeline = section["timeline"]
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "olmodebug memory (axis: allocation events)"}}
    ]
    points = timeline["points"] if timeline else []
    for point in points:
        at = point["event"] * MICROSECONDS_EACH
        values = dict(zip(timeline["names"], point["categories"], strict=True))
        events.append({"ph": "C", "pid": 1, "ts": at, "name": "allocated bytes", "args": values})
        if point["reserved_bytes"] is not None:
            events.append({"ph": "C", "pid": 1, "ts": at, "name": "reserved bytes", "args": {"reserved": point["reserved_bytes"]}})
    marks = timeline["marks"] if timeline else []
    for i, mark in enumerate(marks):
        first = points[mark["point"] - 1]["event"] if mark["point"] else 0
        last = points[marks[i + 1]["point"] - 1]["event"] if i + 1 < len(marks) else points[-1]["event"]
        name = f"step {mark['step']} {mark['phase']}" if mark["step"] else mark["phase"]
        span = {
            "ph": "X",
            "pid": 1,
            "tid": 1,
            "ts": first * MICROSECONDS_EACH,
            "dur": max(1, (last - first) * MICROSECONDS_EACH),
            "name": name,
        }
        events.append(span)
    if timeline and section["peak"]:
        at = points[timeline["peak"]]["event"] * MICROSECONDS_EACH
        events.append({"ph": "i", "pid": 1, "tid": 1, "ts": at, "s": "g", "name": f"peak: {section['peak']['owner']}"})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"
