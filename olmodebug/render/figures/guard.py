"""A run under the guards: how it ended, what held the memory when it ran out, and the processes."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from ...units import bytes_text, count_text, seconds_text
from .parts import COLOURS, legend, listed, paragraph, shares, table


def draw(section: Mapping[str, Any]) -> Markup:
    """The end of the command, its memory if that ran out, and a row for each process."""
    parts = [paragraph("Guards ", ", ".join(section["guards"]), "; the command ended with ", section["ended"]["text"], ".")]
    if section["memory"] is not None:
        parts.append(_memory(section["memory"]))
    heads = ["process", "rank", "ops", "steps", "backwards", "time", "findings", "ended"]
    rows = [
        [
            f"{process['program']} ({process['pid']})",
            process["rank"],
            count_text(process["ops"]),
            process["steps"],
            process["backwards"],
            seconds_text(process["seconds"]),
            process["findings"],
            process["ended"],
        ]
        for process in section["processes"]
    ]
    if rows:
        parts.append(table(heads, rows, numbers=frozenset(range(1, 7))))
    return Markup("").join(parts)


def _memory(memory: Mapping[str, Any]) -> Markup:
    """The bar of what was live, the request that did not fit, and what would have made it fit."""
    by_kind: dict[str, int] = {}
    for holder in memory["holders"]:
        by_kind[holder["category"]] = by_kind.get(holder["category"], 0) + holder["bytes"]
    rest = memory["live_bytes"] - sum(by_kind.values())
    entries = [(COLOURS[kind], kind, size) for kind, size in by_kind.items()]
    entries += [("c6", "other", rest)] if rest > 0 else []
    total = memory["total_bytes"] or memory["live_bytes"]
    request = f"{bytes_text(memory['requested_bytes'])} more were asked for"
    limit = f" of {bytes_text(memory['total_bytes'])}" if memory["total_bytes"] else ""
    facts = {"reserved by the allocator": memory["reserved_bytes"], "largest free block": memory["largest_free_bytes"]}
    known = ", ".join(f"{name} {bytes_text(size)}" for name, size in facts.items() if size is not None)
    mark = (memory["total_bytes"], f"{memory['device']} has {bytes_text(memory['total_bytes'])}") if memory["total_bytes"] else None
    return Markup("").join(
        [
            Markup("<h3>Memory when it ran out</h3>"),
            paragraph(
                f"{bytes_text(memory['live_bytes'])}{limit} were live on {memory['device']}, and {request}", f"; {known}." if known else "."
            ),
            shares(
                [*entries, ("bad", "asked for", memory["requested_bytes"])],
                total=total,
                title=f"memory live on {memory['device']} when an allocation failed",
                mark=mark,
            ),
            legend([*((colour, f"{kind} {bytes_text(size)}") for colour, kind, size in entries), ("bad", request)]),
            listed(f"fits with {text}" for text in memory["fits"]),
            table(
                ["held by", "what", "tensors", "size"],
                [[holder["place"], holder["category"], holder["count"], bytes_text(holder["bytes"])] for holder in memory["holders"]],
                numbers=frozenset({2, 3}),
            ),
        ]
    )
