"""Which position depends on which later token, and through which module it first does.

Measured, not derived: every token of one row is changed in turn, and the logits of every position are compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..compare import difference
from ..own_code import own_code, quiet
from ..records import Case
from ..settle import random_state_kept, set_seed
from ..subject import Subject
from ..tracing.tracer import KeptCall, Recording, record
from .invariance import run
from .relation import Part, model_sizes

LONGEST = 24  # tokens: each costs a forward


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleLeak:
    """How much a module's output at the positions before a change moves. `first`: what goes in does not move there, so
    the module itself lets it through."""

    module: str
    kind: str
    change: float
    first: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaks:
    """`matrix[t][p]`: the largest change of a logit at position p when token t is another; above `limit` it is none of
    rounding. In a causal model it is 0 wherever p < t. `modules` were compared with the token at `cut` and all after
    it changed."""

    input_ids: tuple[int, ...]
    matrix: tuple[tuple[float, ...], ...]
    limit: float
    cut: int
    modules: tuple[ModuleLeak, ...]
    setting: str = ""


def leaks(twin: Subject, ids: tuple[int, ...], *, limit: float, setting: str = "") -> Leaks:
    """The dependences of one row of token ids; `limit` is relative to the largest logit."""
    ids = ids[:LONGEST]
    case = Case(name="a row", input_ids=(ids,))
    base = run(twin, case)
    rows = []
    for t in range(len(ids)):
        moved = (run(twin, replace(case, input_ids=(_changed(twin, ids, t, t + 1),))) - base).abs()
        rows.append(tuple(float(x) for x in moved[0].amax(-1)))
    cut = max(1, len(ids) // 2)
    other = replace(case, input_ids=(_changed(twin, ids, cut, len(ids)),))
    return Leaks(
        input_ids=ids,
        matrix=tuple(rows),
        limit=limit * float(base.abs().max()),
        cut=cut,
        modules=_modules(twin, case, other, cut, limit),
        setting=setting,
    )


def section(measured: Leaks) -> dict[str, Any]:
    """The section `leaks` of a report."""
    from ..report import plain

    value: Mapping[str, Any] = plain(measured)
    return dict(value)


def _changed(twin: Subject, ids: tuple[int, ...], start: int, stop: int) -> tuple[int, ...]:
    """The ids with those from `start` to `stop` replaced by others of the vocabulary."""
    fresh = twin.token_ids(1, len(ids), seed=7)[0]
    spare = twin.token_ids(1, len(ids), seed=8)[0]
    return tuple(token if not start <= i < stop else fresh[i] if fresh[i] != token else spare[i] for i, token in enumerate(ids))


def _modules(twin: Subject, left: Case, right: Case, cut: int, limit: float) -> tuple[ModuleLeak, ...]:
    """Every module call whose output moves before the cut, in the order they end."""
    with torch.no_grad(), quiet(), random_state_kept():
        recordings: list[Recording] = []
        for case in (left, right):
            set_seed(twin.seed)
            with own_code(twin, case):
                recordings.append(record(twin.model, lambda c=case: twin.call(c), keep=True))  # type: ignore[misc]
    part = Part(batch=1, seq=left.seq_len, columns=slice(0, cut), fixed=model_sizes(twin.model))
    found = []
    for a, b in zip(recordings[0].kept_calls, recordings[1].kept_calls, strict=False):
        if a.module != b.module:
            break
        change = _change(a.outputs, b.outputs, part, limit)
        if change > 0:
            found.append(ModuleLeak(module=a.module, kind=a.kind, change=change, first=_is_first(a, b, part, limit)))
    inner = {leak.module for leak in found if leak.first}
    return tuple(
        replace(
            leak,
            first=leak.first
            and not any(name.startswith(f"{leak.module}." if leak.module else "") and name != leak.module for name in inner),
        )
        for leak in found
    )


def _is_first(a: KeptCall, b: KeptCall, part: Part, limit: float) -> bool:
    return _change(a.inputs, b.inputs, part, limit) == 0


def _change(left: list[Tensor], right: list[Tensor], part: Part, limit: float) -> float:
    """The largest change before the cut beyond rounding, over tensors that have positions; 0 where there is none."""
    most = 0.0
    for a, b in zip(left, right, strict=False):
        if a.shape != b.shape or not a.is_floating_point():
            continue
        gaps = [difference(x, y, relative_limit=limit) for x, y in zip(part.views(a), part.views(b), strict=True)]
        if gaps and all(gap is not None for gap in gaps):
            most = max(most, min(gap.max_abs for gap in gaps if gap is not None))
    return most
