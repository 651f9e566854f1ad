"""Two runs that must agree in part, as a value, and as the JSON values that make them again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..records import Case
from ..report import case_from, plain
from ..subject import Subject
from .relation import Part, model_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two cases that must agree in `part`; `hidden` says in words what may not show, `change` what was changed."""

    left: Case
    right: Case
    part: Part
    hidden: str
    change: str


def pair_record(twin: Subject, pair: Pair) -> dict[str, Any]:
    """A pair and the twin it was run on."""
    part = pair.part
    return {
        "kind": "relation",
        "left": plain(pair.left),
        "right": plain(pair.right),
        "rows": _ends(part.rows, part.batch),
        "columns": _ends(part.columns, part.seq),
        "hidden": pair.hidden,
        "change": pair.change,
        **twin_record(twin),
    }


def pair_from(twin: Subject, record: Mapping[str, Any]) -> Pair:
    """The pair of a record, for this twin."""
    left, right = case_from(record["left"]), case_from(record["right"])
    rows, columns = (slice(*record[name]) if record[name] else None for name in ("rows", "columns"))
    part = Part(batch=left.batch_size, seq=left.seq_len, rows=rows, columns=columns, fixed=model_sizes(twin.model))
    return Pair(left=left, right=right, part=part, hidden=record["hidden"], change=record["change"])


def twin_record(twin: Subject) -> dict[str, Any]:
    """What a twin was asked for: dtype, mode and attention implementation."""
    return {"dtype": str(twin.dtype).removeprefix("torch."), "training": twin.model.training, "attention": twin.attention}


def _ends(part: slice | None, size: int) -> list[int] | None:
    return None if part is None else list(part.indices(size)[:2])
