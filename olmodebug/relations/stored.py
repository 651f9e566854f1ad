"""Pairs of runs that broke a rule, as values: what a run's `cases.json` holds, and whether they still break it.

A stored pair needs neither the probe that found it nor Hypothesis: token ids, masks, the part that must agree, and the
copy of the model it was run on.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..load import SubjectCodeError
from ..records import Case
from ..report import Finding, case_from, plain
from ..subject import Subject
from .invariance import Pair, limit_of, violation
from .relation import Part, model_sizes


def pair_record(twin: Subject, pair: Pair) -> dict[str, Any]:
    """A pair and the twin it was run on, as JSON values."""
    part = pair.part
    return {
        "left": plain(pair.left),
        "right": plain(pair.right),
        "rows": _ends(part.rows, part.batch),
        "columns": _ends(part.columns, part.seq),
        "hidden": pair.hidden,
        "change": pair.change,
        "dtype": str(twin.dtype).removeprefix("torch."),
        "training": twin.model.training,
        "attention": twin.attention,
    }


def still_broken(subject: Subject, records: list[Mapping[str, Any]]) -> Finding | None:
    """A finding when a stored pair still breaks its rule; None when each of them holds now."""
    for record in records:
        twin = subject.twin(dtype=getattr(torch, record["dtype"]), training=record["training"], attention=record["attention"])
        left, right = case_from(record["left"]), case_from(record["right"])
        pair = Pair(left=left, right=right, part=_part(twin, left, record), hidden=record["hidden"], change=record["change"])
        try:
            broken = violation(twin, pair, limit=limit_of(twin), place=False)
        except SubjectCodeError:
            continue  # a size that the model takes no more is the probe's own question
        if broken is not None:
            text = f"the recorded case still breaks the rule: a change of {broken.difference.max_abs:.3g} where nothing may change"
            return Finding(probe="", severity="error", message=text, case=right)
    return None


def _part(twin: Subject, case: Case, record: Mapping[str, Any]) -> Part:
    rows, columns = (slice(*record[name]) if record[name] else None for name in ("rows", "columns"))
    return Part(batch=case.batch_size, seq=case.seq_len, rows=rows, columns=columns, fixed=model_sizes(twin.model))


def _ends(part: slice | None, size: int) -> list[int] | None:
    return None if part is None else list(part.indices(size)[:2])
