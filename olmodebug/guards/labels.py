"""Silent faults of the labels: shifted twice or not at all, padding that is learned, an eos that is not.

Token ids are seen at the embedding, labels at the cross-entropy, the attention mask in the arguments of the outermost module.
"""

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..sources import Spot
from . import place
from .index import are_positions
from .part import Part
from .place import Place

SHIFT = "loop.labels-shifted-once"
PADDING = "loop.padding-unlabelled"
EOS = "loop.eos-is-learned"

LABELS_LOOKED_AT = 16  # losses whose labels are compared with the ids; a collator does the same to every batch
FEWEST = 8  # labels that must agree before a shift is believed
LONG_RUN = 4  # equal tokens at the end of a row before they are taken for padding
FEWEST_KINDS = 4  # different tokens among them: a constant sequence agrees under every shift

aten = torch.ops.aten


@dataclass(slots=True)
class _Batch:
    """What the last forward read: ids, which of them are real, labels as they were passed, and the model."""

    ids: Tensor
    real: Tensor | None = None
    known_by: str = ""  # in words
    marked: bool = True  # by a mask or a padding_idx; else it is only what the rows look like
    labels: Tensor | None = None
    model: nn.Module | None = None


class Labels(Part):
    """Compares the labels of the first losses with the ids that were read before."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.batch: _Batch | None = None
        self.losses = 0
        self.shifted_right: set[int] = set()
        self.eos_lost = self.eos_kept = 0
        self.by_token: deque[tuple[int, _Batch, Tensor, Place]] = deque(maxlen=4)
        self.twice: list[Callable[[], None]] = []

    def listen(self) -> None:
        self.watch.look(aten.embedding.default, self._embedding)
        for op in (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default):
            self.watch.look(op, self._loss)
        for op in (aten.nll_loss_backward.default, aten.nll_loss2d_backward.default):
            self.watch.look(op, self._loss_backward)
        self.watch.events.on("step", self._step)

    def _embedding(self, args: Any, output: Any) -> None:
        ids = args[1]
        if self.losses >= LABELS_LOOKED_AT or not are_tokens(ids):
            return
        if self.batch is not None and self.batch.ids.shape == ids.shape and ids.unique().numel() < FEWEST_KINDS:
            return  # the types of the tokens before
        batch = self.batch = _Batch(ids=ids)
        here = place.here(sys._getframe(3))
        batch.model = here.modules[0] if here.modules else None
        if here.call is not None:
            given = here.call[1]
            mask = _matching(given.get("attention_mask"), ids)
            batch.labels = _matching(given.get("labels"), ids)
            if mask is not None:
                batch.real, batch.known_by = mask.bool(), "attention_mask is 0 there"
        padding = args[2] if len(args) > 2 else -1
        if batch.real is None and padding >= 0:
            batch.real = ~_trailing(ids == padding)
            batch.known_by = f"the embedding's padding_idx is {padding}, and it fills the rows there"
        filler = _filler(ids) if batch.real is None else None
        if filler is not None:
            batch.real, batch.marked = ~_trailing(ids == filler), False
            batch.known_by = f"rows end in runs of token {filler} of different lengths, and it stands nowhere else"

    def _loss(self, args: Any, output: Any) -> None:
        batch, self.losses = self.batch, self.losses + 1
        if batch is None or self.losses > LABELS_LOOKED_AT or type(args[1]) is not Tensor:
            return
        ids, labels, ignore = batch.ids.cpu(), args[1].cpu(), args[4]
        rows = ids.shape[0]
        if labels.numel() % rows or labels.numel() // rows not in range(ids.shape[1] - 2, ids.shape[1] + 1):
            return
        labels = labels.reshape(rows, -1)
        here = place.here(sys._getframe(3))
        padding = set(ids[~batch.real.cpu()].tolist()) if batch.real is not None else set()
        shift = _shift(ids, labels, ignore, padding.pop() if len(padding) == 1 else ignore)
        if shift == 1:
            self.shifted_right.add(self.watch.steps)
            if args[3] != 0:  # a mean or a sum
                self._padding(batch, labels, ignore, here)
                self._eos(batch, labels, ignore, here)
            else:  # a loss per token, which may be masked afterwards: its backward knows
                self.by_token.append((args[1].data_ptr(), batch, labels, here))
        elif shift == 2 and self.watch.steps not in self.shifted_right:
            self._shifted_twice(batch, here)
        elif shift == 0 and labels.shape[1] == ids.shape[1]:
            message = "labels are not shifted: position i learns token i, which it has just read"
            fix = "logits[:, :-1] against labels[:, 1:]; right only for a model that does not see its own token"
            self.watch.tell(SHIFT, "warning", here, message, "cross_entropy", fix=fix, expected="token i + 1", observed="token i")

    def _loss_backward(self, args: Any, output: Any) -> None:
        """Losses by token that have no part in the gradient are as if their labels were ignored."""
        weight, target, ignore = args[0], args[2], args[5]
        known = next((item for item in self.by_token if item[0] == target.data_ptr()), None)
        if known is None or weight.numel() != known[2].numel():
            return
        self.by_token.remove(known)
        _, batch, labels, here = known
        self._padding(batch, labels.masked_fill(weight.cpu().reshape(labels.shape) == 0, ignore), ignore, here)

    def _shifted_twice(self, batch: _Batch, here: Place) -> None:
        """Told at the step: a head that predicts two ahead beside a loss on the next token is legal, in either order."""
        handed = batch.labels is not None and not torch.equal(batch.labels.cpu(), batch.ids.cpu())
        cause = (
            "the labels that were passed to the model are already shifted by one, and the model shifts them again"
            if handed
            else "labels[i] equals input_ids[i + 2] at every position"
        )
        fix = "pass labels=input_ids (the model shifts them)" if handed else "shift once: logits[:, :-1] against labels[:, 1:]"
        message, words = "labels are shifted twice: position i learns token i + 2", ("token i + 1", "token i + 2")

        def tell() -> None:
            self.watch.tell(SHIFT, "error", here, message, "cross_entropy", cause=cause, fix=fix, expected=words[0], observed=words[1])

        self.twice.append(tell)

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        if self.twice and self.watch.steps not in self.shifted_right:
            self.twice[0]()
        self.twice.clear()
        self.shifted_right.clear()

    def _padding(self, batch: _Batch, labels: Tensor, ignore: int, here: Place) -> None:
        """Labels at padded positions that all name one token: padding is learned. The first one of a row may be the eos."""
        if batch.real is None:
            return
        real = batch.real.cpu()[:, 1 : labels.shape[1] + 1]
        told = labels[:, : real.shape[1]]
        wrong = (told != ignore) & ~real
        values = told[wrong]
        if int(wrong.sum(1).max()) < 2 or len(set(values.tolist())) != 1:
            return
        share = int(wrong.sum()) / max(1, int((told != ignore).sum()))
        self.watch.tell(
            PADDING,
            "error" if batch.marked else "warning",
            here,
            f"the loss is computed on padding: {int(wrong.sum())} labels at padded positions are token {int(values[0])}, not {ignore}",
            "cross_entropy",
            cause=f"{batch.known_by}, and {share:.0%} of all labels of this batch are padding",
            fix=f"labels[attention_mask == 0] = {ignore}"
            if "attention_mask" in batch.known_by
            else f"make the labels of the filling {ignore}, and keep one eos",
            expected=f"{ignore} wherever a position is padding",
            observed=f"token {int(values[0])} at {int(wrong.sum())} of {int((~real).sum())} padded positions",
            evidence={"share_of_labels": share},
        )

    def _eos(self, batch: _Batch, labels: Tensor, ignore: int, here: Place) -> None:
        """Attended eos tokens that are never a label though their neighbours are, in a model whose pad is its eos."""
        config = getattr(batch.model, "config", None)
        eos, pad = getattr(config, "eos_token_id", None), getattr(config, "pad_token_id", None)
        if batch.real is None or not isinstance(eos, int) or pad not in (None, eos):
            return
        ids, mask = batch.ids.cpu(), batch.real.cpu()
        width = labels.shape[1]
        is_eos = ((ids == eos) & mask)[:, 1 : width + 1]
        asked = labels[:, : is_eos.shape[1]] != ignore
        before = torch.zeros_like(asked)
        before[:, 1:] = asked[:, :-1]
        self.eos_kept += int((is_eos & asked).sum())
        self.eos_lost += int((is_eos & ~asked & before).sum())
        if self.eos_lost >= 2 and not self.eos_kept:
            self.watch.tell(
                EOS,
                "warning",
                here,
                f"no eos is ever a label: {self.eos_lost} of {self.eos_lost} attended eos tokens ({eos}) are masked, so the model never learns to stop",
                "cross_entropy",
                cause="pad_token_id equals eos_token_id, and the labels are masked by token and not by attention_mask"
                if pad == eos
                else "labels are masked wherever the token is eos, though attention_mask is 1 there",
                fix="mask labels by attention_mask == 0, or give padding a token of its own",
            )


def are_tokens(ids: Tensor) -> bool:
    """Whether an embedding's index `[batch, seq]` is read as text: no positions."""
    return ids.ndim == 2 and type(ids) is Tensor and ids.device.type != "meta" and ids.shape[1] > 1 and not are_positions(ids)


def _matching(value: Any, ids: Tensor) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.shape == ids.shape else None


def _filler(ids: Tensor) -> int | None:
    """The one token with which rows are filled up: at the ends of at least two rows, in runs of different lengths, and nowhere else."""
    last = ids[:, -1]
    value = int(last.mode().values)
    filled = _trailing(ids == value)
    lengths = filled.sum(1)
    runs = lengths[lengths > 1]
    elsewhere = bool(((ids == value) & ~filled).any())
    if elsewhere or len(runs) < 2 or len(runs.unique()) < 2 or int(runs.max()) < LONG_RUN or bool((lengths == ids.shape[1]).any()):
        return None
    return value


def _trailing(padded: Tensor) -> Tensor:
    """Where a row is padding up to its end."""
    return padded.flip(1).long().cumprod(1).bool().flip(1)


def _shift(ids: Tensor, labels: Tensor, ignore: int, padding: int) -> int | None:
    """The k for which labels[:, j] is ids[:, j + k] wherever it is asked; None where none fits or several could. Padding fits any."""
    fits = {}
    for k in (0, 1, 2):
        width = min(labels.shape[1], ids.shape[1] - k)
        asked = (labels[:, :width] != ignore) & (labels[:, :width] != padding)
        values, tokens = labels[:, :width][asked], ids[:, k : k + width][asked]
        if values.numel() < FEWEST or len(set(values.tolist())) < FEWEST_KINDS:
            return None
        fits[k] = float((values == tokens).float().mean())
    exact = [k for k, share in fits.items() if share == 1.0]
    if len(exact) != 1 or any(share > 0.5 for k, share in fits.items() if k != exact[0]):
        return None
    return exact[0]
