"""What one attention of a traced run did: its effective scale, its cap, who sees whom, and where; written out or fused."""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..records import Event
from .tracer import Recording

# Projections to queries and keys under the names that people give them; in a fused one the values grow too.
QUERY_KEY = re.compile(
    r"(^|[._])(q|k|wq|wk|to_q|to_k|query|key|q_proj|k_proj|qkv|qkv_proj|wqkv|c_attn|att_proj|query_key_value|in_proj|q_norm|k_norm)[._]?weight$"
)
PRODUCTS = ("bmm", "mm", "baddbmm")
SOFTMAXES = ("_softmax", "_safe_softmax")


@dataclass(slots=True, kw_only=True)
class Attends:
    """One attention. `scale` is score / (q . k); `visible` `[T, S]` says which key any head or row attends to.

    None where it could not be read from the run. `scored` is where the scores are made, `weighed` where they become weights.
    """

    scored: Event
    weighed: Event
    scale: float | None = None
    capped: bool = False
    visible: Tensor | None = None


def attentions(recording: Recording, seq: int) -> list[Attends]:
    """Every attention of a run recorded with `keep=True`, over `seq` tokens, in the order they run."""
    found = []
    for index, event in enumerate(recording.events):
        if event.op.startswith("_scaled_dot_product"):
            found.append(_fused(event, recording.kept[index].arguments, seq))
        elif event.op in SOFTMAXES and event.outputs and event.outputs[0].shape[-1] == seq and len(event.outputs[0].shape) >= 3:
            call = _written_out(recording, index, seq)
            if call is not None:
                found.append(call)
    return found


def _fused(event: Event, arguments: dict[str, Any], seq: int) -> Attends:
    query = arguments["query"]
    scale = arguments.get("scale")
    visible = torch.ones(seq, seq, dtype=torch.bool)
    if arguments.get("is_causal"):
        visible = visible.tril()
    mask = arguments.get("attn_mask", arguments.get("attn_bias"))
    if isinstance(mask, Tensor):
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        visible = visible & seen.expand(*seen.shape[:-2], seq, seq).reshape(-1, seq, seq).any(0)
    given = float(scale) if isinstance(scale, float | int) else 1 / math.sqrt(query.shape[-1])
    return Attends(scored=event, weighed=event, scale=given, visible=visible)


def _written_out(recording: Recording, softmax: int, seq: int) -> Attends | None:
    """The scores and weights around a softmax; the product is the last one before it that gave `[..., seq, seq]`."""
    weights = recording.kept[softmax].outputs[0]
    visible = (weights > 0).reshape(-1, seq, seq).any(0) if weights.shape[-2:] == (seq, seq) else None
    for index in range(softmax - 1, max(-1, softmax - 30), -1):
        event = recording.events[index]
        if event.op in PRODUCTS and event.outputs[0].shape[-2:] == (seq, seq):
            between = recording.events[index + 1 : softmax]
            capped = any(e.op == "tanh" for e in between)
            scale = _scale(recording, index, softmax)
            return Attends(scored=event, weighed=recording.events[softmax], scale=scale, capped=capped, visible=visible)
    return None


def _scale(recording: Recording, product: int, softmax: int) -> float | None:
    """What the product is multiplied with before a mask is added; plain factors only.

    A factor on the queries before the product cannot be told from a larger query, and is not counted.
    """
    scale = 1.0
    for index in range(product + 1, softmax):
        event, kept = recording.events[index], recording.kept[index]
        other = kept.arguments.get("other")
        factor = float(other) if isinstance(other, float | int) or isinstance(other, Tensor) and other.ndim == 0 else None
        if event.op in ("mul", "mul_") and factor is not None:
            scale *= factor
        elif event.op in ("div", "div_") and factor:
            scale /= factor
        elif event.op in ("add", "add_", "masked_fill", "masked_fill_", "where", "tanh"):
            break
    return scale
