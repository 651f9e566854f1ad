"""Who sees whom in an attention, and what is wrong with that: the causal mask and the padding mask, by the weights they leave."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import Where
from ..report import Scalar
from .relation import Part
from .repair import Edit

MASKED = -1e30  # below any real score; finfo.min of float32 is -3e38
FILLED = -1e4  # the largest number in use for masked scores


@dataclass(slots=True, kw_only=True)
class Diagnosis:
    """A cause that the captured tensors establish (None: not known), a repair in words, and the edits that make it. `where`:
    the place of the slip, where it is another than that of the op where the runs part."""

    cause: str | None = None
    fix: str | None = None
    where: Where | None = None
    edits: tuple[Edit, ...] = ()
    evidence: dict[str, Scalar] | None = None
    ruled_out: tuple[str, ...] = ()


def without_sink(scores: Tensor, part: Part) -> Tensor:
    """Scores or weights `[..., T, T]`, of those that have one more column at their end, a sink that takes what no key gets."""
    return scores[..., :-1] if scores.ndim > 2 and scores.shape[-2:] == (part.seq, part.seq + 1) else scores


def attention_pattern(weights: Tensor, part: Part) -> Tensor | None:
    """Which key each query attends to in any row or head, `[T, T]` of bool, from weights `[..., T, T]`; None else."""
    if (weights := without_sink(weights, part)).shape[-2:] != (part.seq, part.seq):
        return None
    return (weights > 0).reshape(-1, part.seq, part.seq).any(0)


def without_keys(weights: Tensor, scores: Tensor, part: Part) -> Diagnosis | None:
    """Queries whose keys are all masked by a finite number: to the softmax they are all alike, and each gets its share. None
    where another query too gives weight to what it must not see. Weights and scores are `[..., T, T]`."""
    if scores.shape[-2:] != (part.seq, part.seq) or weights.numel() != scores.numel():
        return None
    start, stop, _ = (part.columns or slice(None)).indices(part.seq)
    queries = torch.arange(part.seq)
    hidden = (queries > queries[:, None]) | (queries < start)
    leaking = ((weights.reshape(-1, part.seq, part.seq) > 0) & hidden).any(-1)[:, start:stop]
    scores = scores.reshape(-1, part.seq, part.seq)
    masked = (scores <= FILLED) & scores.isfinite()
    blind = (masked.all(-1) & ((scores < MASKED).all(-1) | (scores == scores[..., :1]).all(-1)))[:, start:stop]
    first = int(leaking.any(0).nonzero()[0]) if bool(leaking.any()) else None
    if first is None or bool((leaking & ~blind).any()):
        return None
    own = bool(masked.diagonal(dim1=-2, dim2=-1).all()) and not bool(masked.all())
    return Diagnosis(
        cause=f"query {first + start} sees no key at all: its scores are masked by a finite number"
        + (", as the mask hides every query's own key" if own else "")
        + ". To the softmax they are alike, and each key gets the same weight, later and padded ones too",
        fix="mask the keys after the query only, key > query: torch.ones(T, T).triu(1)"
        if own
        else "hide padded and later keys, and none else: every real query sees its own",
        evidence={"queries without a key": ", ".join(str(int(q) + start) for q in leaking.any(0).nonzero().flatten()[:8])},
    )


def pattern_told(pattern: Tensor, hidden: str) -> Diagnosis:
    """What is wrong with a pattern of who sees whom, `[T, T]`."""
    size = pattern.shape[0]
    ones = torch.ones(size, size, dtype=torch.bool)
    future, past = ones.triu(1), ones.tril(-1)
    seen = pattern & future
    evidence: dict[str, Scalar] = {"query-key pairs that see the future": f"{int(seen.sum())} of {int(future.sum())}"}
    if not bool(seen.any()):
        return Diagnosis()
    sees_past = bool((pattern & past)[:-1].any())  # under an inverted mask the last query sees nothing, or all alike
    if bool(seen.sum() == future.sum()):
        if not sees_past:
            return Diagnosis(
                cause="the causal mask is inverted: every query sees the later keys and none of the earlier ones",
                fix="invert the mask: True (or 0) where key <= query",
                evidence=evidence,
            )
        return Diagnosis(
            cause="no causal mask reaches this softmax: every query gives weight to every later key",
            fix="apply the causal mask to the scores before the softmax",
            evidence=evidence,
        )
    offsets = [k for k in range(1, size) if bool(torch.diagonal(pattern, k).any())]
    full = [k for k in range(1, size) if bool(torch.diagonal(pattern, k).all())]
    if offsets == full and offsets == list(range(1, len(offsets) + 1)):
        reach = len(offsets)
        return Diagnosis(
            cause=f"the causal mask is off by {reach}: every query sees the next {reach} key{'s' if reach > 1 else ''} too",
            fix=f"move the mask's diagonal by {reach}",
            evidence=evidence,
        )
    if not sees_past:
        return Diagnosis(
            cause="the mask shows queries later keys and no earlier ones",
            fix="build the mask so that query i sees keys 0..i only",
            evidence=evidence,
        )
    return Diagnosis(
        cause="the mask does not hide all later keys",
        fix="build the mask so that query i sees keys 0..i only",
        evidence=evidence,
    )


def padding_seen(pattern: Tensor, values: Tensor, part: Part, what: str) -> Diagnosis:
    """Padded keys take part; is the mask absent, inverted, or laid on the queries?"""
    columns = part.columns or slice(None)
    start, stop, _ = columns.indices(part.seq)
    padded = [i for i in range(part.seq) if not start <= i < stop]
    real = list(range(start, stop))
    if not padded or not bool(pattern[real][:, padded].any()):
        return Diagnosis()
    own = torch.tensor([[i == j for j in range(part.seq)] for i in range(part.seq)])
    sees_real = bool((pattern & ~own)[real][:, real].any())
    if not sees_real:
        return Diagnosis(cause=f"the padding mask is inverted: {what} hide the real tokens and show the padded ones", fix="invert the mask")
    return Diagnosis(
        cause=f"the padding mask does not reach {what}: real queries give weight to padded keys",
        fix="turn the [batch, seq_len] mask into mask[:, None, None, :] and set the scores of padded keys to finfo.min before the softmax",
    )
