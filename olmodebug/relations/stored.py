"""Findings as values that are judged again: what a run's `cases.json` holds for each, and whether it still breaks its rule.

Three kinds. `relation`: two runs that must agree in part. `chunks`: one sequence with a cache and without. `draws`: all
that a probe drew of the subject, for a probe that judges one run; it runs again on these values. The first two need
neither the probe nor Hypothesis. A probe that drew nothing, as one that looks at the modules only, has no record.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..compare import roundings_limit
from ..report import Finding, plain
from ..subject import Subject
from .invariance import limit_of, violation
from .pair import pair_from
from .ways import breach, way_from

RELATION, CHUNKS, DRAWS = "relation", "chunks", "draws"


def draws_record(subject: Subject) -> dict[str, Any] | None:
    """What the probe that is running has drawn so far; None where it drew nothing."""
    return {"kind": DRAWS, **plain(subject.draws.made)} if subject.draws.made else None


def drawn_before(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The values of all `draws` records, to be handed out again."""
    return {
        name: value for record in records if record.get("kind") == DRAWS for name, value in record.items() if name not in ("kind", "probe")
    }


def broken_by(subject: Subject, record: Mapping[str, Any]) -> Finding | None:
    """A finding when a stored pair or cache still breaks its rule, None when it holds now; SubjectCodeError when the model
    no longer runs on it."""
    twin = subject.fresh_twin(dtype=getattr(torch, record["dtype"]), training=record["training"], attention=record["attention"])
    limit = limit_of(twin)
    if record["kind"] == CHUNKS:
        way = way_from(record)
        case, rule = way.case, "between one full forward and the recorded chunks with the cache"
        apart = breach(twin, way, limit if twin.dtype == torch.float64 else max(limit, roundings_limit({"float32"})))
    else:
        pair = pair_from(twin, record)
        case, rule = pair.right, f"in logits that {pair.hidden} may not change"
        broken = violation(twin, pair, limit=limit, place=False)
        apart = broken.difference if broken else None
    if apart is None:
        return None
    return Finding(probe="", severity="error", message=f"the recorded case still breaks the rule: {apart.max_abs:.3g} {rule}", case=case)
