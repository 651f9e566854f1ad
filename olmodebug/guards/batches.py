"""Silent faults of the data on its way to the loss: label shift, padding, eos, batches that repeat, means of means, eval mode.

Token ids are seen at the embedding, labels at the cross-entropy, the attention mask in the arguments of the outermost module.
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..report import Finding, Severity
from ..sources import Spot
from . import place
from .excerpts import lines_at
from .place import Place

SHIFT = "loop.labels-shifted-once"
PADDING = "loop.padding-unlabelled"
EOS = "loop.eos-is-learned"
FRESH = "loop.fresh-batches"
WEIGHTS = "loop.token-weighted-accumulation"
EVAL = "loop.evaluates-in-eval-mode"

LABELS_LOOKED_AT = 16  # losses whose labels are compared with the ids; a collator does the same to every batch
FEWEST = 8  # labels that must agree before a shift is believed
FEWEST_KINDS = 4  # different tokens among them: a constant sequence agrees under every shift
SAME_BATCHES = 4  # steps in a row
UNEQUAL = 1.05  # ratio of token counts from which on a mean of means is another mean
HASHED_TOKENS = 4096

aten = torch.ops.aten


@dataclass(slots=True)
class _Batch:
    """What the last forward read: ids, mask, labels as they were passed, the line and the model."""

    ids: Tensor
    mask: Tensor | None = None
    labels: Tensor | None = None
    model: nn.Module | None = None


@dataclass(slots=True)
class _Accumulated:
    """One mean cross-entropy of a window: which backward it belonged to, its weight in the gradient, how many labels it had."""

    backward: int
    weight: Tensor
    labels: Tensor


@dataclass(slots=True)
class _Seen:
    """The batches of the steps so far, as hashes."""

    now: list[int] = field(default_factory=list)
    steps: list[tuple[int, ...]] = field(default_factory=list)


class Batches:
    """Looks at the few ops that see tokens and labels."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.looks: dict[Any, Callable[..., None]] = {
            aten.embedding.default: self._embedding,
            aten.nll_loss_forward.default: self._loss,
            aten.nll_loss_backward.default: self._loss_backward,
            aten.native_dropout.default: self._dropout,
            aten.bernoulli_.float: self._dropout,
        }
        self.batch: _Batch | None = None
        self.losses = 0
        self.shifted_right: set[int] = set()
        self.forwards = 0
        self.accumulated: list[_Accumulated] = []
        self.backward_line: Spot | None = None
        self.dropped = False
        self.seen = _Seen()
        self.loaders: list[tuple[int, Spot | None, int]] = []
        self.eos_lost = self.eos_kept = 0
        self.twice: list[Callable[[], None]] = []
        self.told_ranks = False

    def listen(self) -> None:
        events = self.watch.events
        self.watch.observers.append(self.observe)
        events.on("backward", lambda roots, spot: setattr(self, "backward_line", spot))
        events.on("step", self._step)
        events.on("loader_iter", self._loader)

    def observe(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        look = self.looks.get(func)
        if look is not None:
            look(args, output)

    def finish(self) -> None:
        """Nothing waits for the end: what a loop does wrong, it does in its first steps."""

    def _tell(self, probe: str, severity: Severity, at: Place | Spot | None, message: str, op: str | None = None, **values: Any) -> None:
        where = at.at(op) if isinstance(at, Place) else place.where_of(at, op=op)
        self.watch.find(Finding(probe=probe, severity=severity, message=message, where=where, source=lines_at(where), **values))

    # Tokens

    def _embedding(self, args: Any, output: Any) -> None:
        ids = args[1]
        if ids.ndim != 2 or type(ids) is not Tensor or ids.device.type == "meta" or ids.shape[1] < 2:
            return
        if bool((ids[:, 1:] - ids[:, :-1] == 1).all()):
            return  # positions
        self.dropped = False
        self.batch = _Batch(ids=ids)
        if self.losses < LABELS_LOOKED_AT:
            here = place.here(sys._getframe(3))
            if here.call is not None:
                given = here.call[1]
                self.batch.mask = _matching(given.get("attention_mask"), ids)
                self.batch.labels = _matching(given.get("labels"), ids)
            self.batch.model = here.modules[0] if here.modules else None
        if torch.is_grad_enabled() and torch._C._current_autograd_node() is None:
            self.seen.now.append(hash(tuple(ids.flatten()[:HASHED_TOKENS].tolist())))

    # Labels

    def _loss(self, args: Any, output: Any) -> None:
        self._evaluation()
        batch, self.losses = self.batch, self.losses + 1
        if batch is None or self.losses > LABELS_LOOKED_AT or type(args[1]) is not Tensor:
            return
        ids, labels, ignore = batch.ids.cpu(), args[1].cpu(), args[4]
        rows = ids.shape[0]
        if labels.ndim != 1 or labels.numel() % rows or labels.numel() // rows not in range(ids.shape[1] - 2, ids.shape[1] + 1):
            return
        labels = labels.view(rows, -1)
        here = place.here(sys._getframe(3))
        shift = _shift(ids, labels, ignore)
        if shift == 1:
            self.shifted_right.add(self.watch.steps)
            if args[3] != 0:  # a mean or a sum; a loss per token may be masked afterwards
                self._padding(batch, labels, ignore, here)
                self._eos(batch, labels, ignore, here)
        elif shift == 2 and self.watch.steps not in self.shifted_right:
            handed = batch.labels is not None and not torch.equal(batch.labels.cpu(), ids)
            cause = (
                "the labels that were passed to the model are already shifted by one, and the model shifts them again"
                if handed
                else "labels[i] equals input_ids[i + 2] at every position"
            )
            fix = "pass labels=input_ids (the model shifts them)" if handed else "shift once: logits[:, :-1] against labels[:, 1:]"
            observed, expected = "token i + 2", "token i + 1"
            message = "labels are shifted twice: position i learns token i + 2"
            # told at the step: a head that predicts two ahead beside a loss on the next token is legal, in either order
            self.twice.append(
                lambda: self._tell(
                    SHIFT, "error", here, message, "cross_entropy", cause=cause, fix=fix, expected=expected, observed=observed
                )
            )
        elif shift == 0 and labels.shape[1] == ids.shape[1]:
            message = "labels are not shifted: position i learns token i, which it has just read"
            fix = "logits[:, :-1] against labels[:, 1:]; right only for a model that does not see its own token"
            self._tell(SHIFT, "warning", here, message, "cross_entropy", fix=fix, expected="token i + 1", observed="token i")

    def _padding(self, batch: _Batch, labels: Tensor, ignore: int, here: Place) -> None:
        """Labels at padded positions that all name one token: padding is learned. The first one of a row may be the eos."""
        if batch.mask is None:
            return
        real = batch.mask.cpu().bool()[:, 1 : labels.shape[1] + 1]
        told = labels[:, : real.shape[1]]
        wrong = (told != ignore) & ~real
        values = told[wrong]
        if int(wrong.sum(1).max()) < 2 or len(set(values.tolist())) != 1:
            return
        share = int(wrong.sum()) / max(1, int((told != ignore).sum()))
        self._tell(
            PADDING,
            "error",
            here,
            f"the loss is computed on padding: {int(wrong.sum())} labels at masked positions are token {int(values[0])}, not {ignore}",
            "cross_entropy",
            cause=f"attention_mask is 0 there, and {share:.0%} of all labels of this batch are padding",
            fix=f"labels[attention_mask == 0] = {ignore}",
            expected=f"{ignore} wherever attention_mask is 0",
            observed=f"token {int(values[0])} at {int(wrong.sum())} of {int((~real).sum())} masked positions",
            evidence={"share_of_labels": share},
        )

    def _eos(self, batch: _Batch, labels: Tensor, ignore: int, here: Place) -> None:
        """Attended eos tokens that are never a label though their neighbours are, in a model whose pad is its eos."""
        config = getattr(batch.model, "config", None)
        eos, pad = getattr(config, "eos_token_id", None), getattr(config, "pad_token_id", None)
        if batch.mask is None or not isinstance(eos, int) or pad not in (None, eos):
            return
        ids, mask = batch.ids.cpu(), batch.mask.cpu().bool()
        width = labels.shape[1]
        is_eos = ((ids == eos) & mask)[:, 1 : width + 1]
        asked = labels[:, : is_eos.shape[1]] != ignore
        before = torch.zeros_like(asked)
        before[:, 1:] = asked[:, :-1]
        self.eos_kept += int((is_eos & asked).sum())
        self.eos_lost += int((is_eos & ~asked & before).sum())
        if self.eos_lost >= 2 and not self.eos_kept:
            self._tell(
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

    # Evaluation

    def _dropout(self, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled() and torch._C._current_autograd_node() is None:
            self.dropped = True

    def _evaluation(self) -> None:
        """A loss without gradients after dropout ran: an evaluation in train mode. Checkpointing also runs without gradients."""
        if torch.is_grad_enabled() or not self.dropped or not self.watch.backwards:
            return
        frame: Any = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename.endswith("torch/utils/checkpoint.py"):
                return
            frame = frame.f_back
        self._tell(
            EVAL,
            "warning",
            place.here(sys._getframe(3)),
            "an evaluation runs with dropout: the loss is computed under no_grad, and the model is in train mode",
            "cross_entropy",
            cause="dropout drew random numbers in this forward, and no gradient was recorded",
            fix="model.eval() before the evaluation, model.train() after it",
        )

    # Accumulation

    def _loss_backward(self, args: Any, output: Any) -> None:
        weight, classes, reduction = args[0], args[3], args[4]
        if reduction == 1 and classes is None and weight.numel() == 1:
            self.accumulated.append(_Accumulated(self.watch.backwards, weight.detach().clone(), args[6].detach().clone()))

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        window, self.accumulated = self.accumulated, []
        if self.twice and self.watch.steps not in self.shifted_right:
            self.twice[0]()
        self.twice.clear()
        self._means_of_means(window)
        seen = self.seen
        if seen.now:
            seen.steps.append(tuple(seen.now))
            seen.now = []
            self._repeated()
        self.shifted_right.clear()

    def _means_of_means(self, window: list[_Accumulated]) -> None:
        counts = Counter(item.backward for item in window)
        if len(window) < 2 or len(counts) < 2 or max(counts.values()) > 1:
            return
        values = torch.stack([torch.stack([item.weight.double().cpu(), item.labels.double().cpu()]) for item in window])
        weights, labels = values[:, 0], values[:, 1]
        if float(labels.min()) <= 0 or float(labels.max() / labels.min()) < UNEQUAL or not torch.allclose(weights, weights[0], rtol=1e-4):
            return
        shown = ", ".join(f"{int(n)}" for n in labels.tolist()[:8])
        factor = float(labels.max() / labels.min())
        self._tell(
            WEIGHTS,
            "warning",
            self.backward_line,
            f"accumulation averages means over unequal lengths: a token of the shortest micro-batch counts {factor:.3g} times one of the longest",
            "backward",
            cause=f"every micro-batch's mean has the same weight {float(weights[0]):.3g}, and they hold {shown} labels",
            fix="sum the losses (reduction='sum') and divide by the labels of the whole window",
            expected="a weight in proportion to the number of labels",
            observed=f"equal weights for {shown} labels",
            evidence={"micro_batches": len(window), "ratio": factor},
        )

    # Batches that repeat

    def _loader(self, args: Any, kwargs: Any, spot: Spot | None) -> None:
        loader = args[0]
        workers = loader.num_workers if isinstance(loader.dataset, torch.utils.data.IterableDataset) else 0
        endless = workers or isinstance(loader.dataset, torch.utils.data.IterableDataset)
        if endless or len(loader) > 1:  # a data set of one batch gives that batch in every epoch
            self.loaders.append((self.watch.steps, spot, workers))

    def _repeated(self) -> None:
        steps = self.seen.steps
        if len(steps) == SAME_BATCHES and not self.told_ranks and torch.distributed.is_available() and torch.distributed.is_initialized():
            self.told_ranks = True
            replicated = any(type(root).__name__ == "DistributedDataParallel" for root in self.watch.models.roots())
            self.watch.journal.tell("batches", steps=[list(step) for step in steps], replicated=replicated)
        if len(steps) < SAME_BATCHES:
            return
        same = len(set(steps[-SAME_BATCHES:])) == 1
        started = [(step, spot) for step, spot, _ in self.loaders]
        if same and len([step for step, _ in started if step > len(steps) - SAME_BATCHES - 1]) >= SAME_BATCHES - 1:
            self._tell(
                FRESH,
                "warning",
                started[-1][1],
                f"the last {SAME_BATCHES} steps saw the same batch: the data loader is started anew for every step",
                "DataLoader.__iter__",
                cause="each step takes the first batch of a new iterator",
                fix="loop over the loader, or keep one iterator and call next on it",
            )
        workers = max((count for _, _, count in self.loaders), default=0)
        tail = steps[-2 * workers :]
        if workers > 1 and len(tail) == 2 * workers and len(set(tail)) == 2 and len(set(tail[:workers])) == 1:
            if len(set(tail[workers:])) == 1 and len(steps) == 2 * workers:
                self._tell(
                    FRESH,
                    "warning",
                    self.loaders[-1][1],
                    f"every batch comes {workers} times: each of the {workers} workers reads the whole IterableDataset",
                    "DataLoader.__iter__",
                    cause="torch hands every worker its own copy of an IterableDataset",
                    fix="in __iter__, take every n-th item by torch.utils.data.get_worker_info()",
                )


def _matching(value: Any, ids: Tensor) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.shape == ids.shape else None


def _shift(ids: Tensor, labels: Tensor, ignore: int) -> int | None:
    """The k for which labels[:, j] is ids[:, j + k] wherever it is asked; None where none fits or several could."""
    fits = {}
    for k in (0, 1, 2):
        width = min(labels.shape[1], ids.shape[1] - k)
        asked = labels[:, :width] != ignore
        values, tokens = labels[:, :width][asked], ids[:, k : k + width][asked]
        if values.numel() < FEWEST or len(set(values.tolist())) < FEWEST_KINDS:
            return None
        fits[k] = float((values == tokens).float().mean())
    exact = [k for k, share in fits.items() if share == 1.0]
    if len(exact) != 1 or any(share > 0.5 for k, share in fits.items() if k != exact[0]):
        return None
    return exact[0]
