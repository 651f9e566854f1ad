"""A perplexity that is true: the summed loss of every predicted token over their number, whatever the batches.

The first token of a document is predicted from nothing and does not count, nor does padding. A document longer than the
window slides: every token is predicted once, from at least `window - stride` tokens before it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import IGNORE_INDEX
from ..subject import Subject
from .head import Head, run_on
from .loss import nll_sum

Side = Literal["right", "left"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """`nll` is the summed negative log-likelihood in nats; `bytes` are those of the predicted text in UTF-8."""

    nll: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """The mean loss of a predicted token."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of ids and how many of the last ones are to be predicted."""

    ids: Sequence[int]
    predicted: int


def pieces(ids: Sequence[int], window: int, stride: int) -> Iterator[Piece]:
    """A document in windows that predict each token but the first exactly once."""
    if len(ids) < 2:
        return
    end = min(window, len(ids))
    yield Piece(ids[:end], end - 1)
    while end < len(ids):
        step = min(stride, len(ids) - end)
        yield Piece(ids[end + step - window : end + step], step)
        end += step


def measure(
    subject: Subject,
    documents: Iterable[tuple[Sequence[int], int]],
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
    side: Side = "right",
    pad_id: int = 0,
    head: Head | None = None,
) -> Perplexity:
    """The perplexity of a subject on documents: the ids of each, and the bytes of the text behind its first token.

    Computed in evaluation mode without autocast. Left padding needs a model that takes a mask and positions.
    """
    model = subject.model
    training = model.training
    model.eval()
    total, count, size = 0.0, 0, 0
    try:
        with torch.no_grad():
            todo: list[Piece] = []
            for ids, text_bytes in documents:
                size += text_bytes if len(ids) > 1 else 0
                todo += pieces(ids, window, stride or window // 2)
            # Like lengths together: less padding. The sum does not depend on the order.
            todo.sort(key=lambda piece: -len(piece.ids))
            for start in range(0, len(todo), batch_size):
                nll, tokens = _batch(subject, todo[start : start + batch_size], side, pad_id, head)
                total += nll
                count += tokens
    finally:
        model.train(training)
    return Perplexity(nll=total, tokens=count, bytes=size)


def _batch(subject: Subject, batch: Sequence[Piece], side: Side, pad_id: int, head: Head | None) -> tuple[float, int]:
    longest = max(len(piece.ids) for piece in batch)
    ids = torch.full((len(batch), longest), pad_id, dtype=torch.long)
    targets = torch.full_like(ids, IGNORE_INDEX)
    mask = torch.zeros_like(ids)
    for row, piece in enumerate(batch):
        length = len(piece.ids)
        first = longest - length if side == "left" else 0
        ids[row, first : first + length] = torch.tensor(piece.ids)
        mask[row, first : first + length] = 1
        last = first + length
        targets[row, last - piece.predicted : last] = ids[row, last - piece.predicted : last]
    device = subject.device
    ids, mask, targets = ids.to(device), mask.to(device), targets.to(device)
    # Right padding is behind every token that counts, so that a causal model without a mask needs none.
    padded = side == "left" and bool((mask == 0).any())
    positions = (mask.cumsum(1) - 1).clamp(min=0) if padded else None
    wanted = F.pad(targets, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()
    total, count = _nll(subject, ids, mask if padded else None, positions, wanted, head)
    return float(total), count


def _nll(
    subject: Subject, ids: Tensor, mask: Tensor | None, positions: Tensor | None, wanted: Tensor, head: Head | None
) -> tuple[Tensor, int]:
    if head is not None:
        states = head.hidden_states(lambda: run_on(subject, ids, attention_mask=mask, position_ids=positions))
        return nll_sum(states.flatten(0, 1), head.module.weight, wanted)
    from ..convention import find_logits

    result = run_on(subject, ids, attention_mask=mask, position_ids=positions)
    logits = find_logits(result, batch_size=ids.shape[0], seq_len=ids.shape[1]).logits.flatten(0, 1)
    rows = (wanted != IGNORE_INDEX).nonzero().flatten()
    total = torch.zeros((), dtype=torch.float64)
    for part in rows.split(256):
        total += F.cross_entropy(logits[part].float(), wanted[part], reduction="sum").double().cpu()
    return total, len(rows)
