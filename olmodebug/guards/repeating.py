"""Batches that come again and again: a loader started anew for every step, an order that every epoch repeats, workers and ranks alike."""

import weakref
from typing import Any

import torch
import torch.utils.data

from ..sources import Spot
from .labels import are_tokens
from .part import Part

FRESH = "loop.fresh-batches"

SAME_BATCHES = 4  # steps in a row
SAME_ORDER = 2  # first batches of two passes that are compared
HASHED_TOKENS = 4096

aten = torch.ops.aten


class Repeating(Part):
    """Remembers every batch that was trained on by a hash of its tokens."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.now: list[int] = []
        self.steps: list[tuple[int, ...]] = []
        self.loaders: list[tuple[int, Spot | None, int]] = []
        # by sampler: its epoch, and the first step of it
        self.epochs: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()
        self.again: list[tuple[Spot | None, int, int, int]] = []  # where, the epoch, and the first steps of its two passes

    def listen(self) -> None:
        self.watch.look(aten.embedding.default, self._embedding)
        self.watch.events.on("step", self._step)
        self.watch.events.on("loader_iter", self._loader)

    def _embedding(self, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and torch._C._current_autograd_node() is None and are_tokens(args[1]):
            self.now.append(hash(tuple(args[1].flatten()[:HASHED_TOKENS].tolist())))

    def _loader(self, args: Any, kwargs: Any, spot: Spot | None) -> None:
        loader = args[0]
        workers = loader.num_workers if isinstance(loader.dataset, torch.utils.data.IterableDataset) else 0
        endless = workers or isinstance(loader.dataset, torch.utils.data.IterableDataset)
        if endless or len(loader) > 1:  # a data set of one batch gives that batch in every epoch
            self.loaders.append((self.watch.steps, spot, workers))
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, torch.utils.data.DistributedSampler) and sampler.shuffle:
            epoch, first = self.epochs.get(sampler, (-1, 0))
            self.epochs[sampler] = (sampler.epoch, len(self.steps))
            if sampler.epoch == epoch and len(self.steps) - first >= SAME_ORDER:
                self.again.append((spot, epoch, first, len(self.steps)))

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        if not self.now:
            return
        steps = self.steps
        steps.append(tuple(self.now))
        self.now = []
        if self.again:
            self._same_order()
        if len(steps) >= SAME_BATCHES:
            self._started_anew()
            self._every_worker_alike()

    def _started_anew(self) -> None:
        same = len(set(self.steps[-SAME_BATCHES:])) == 1
        started = [(step, spot) for step, spot, _ in self.loaders]
        if same and len([step for step, _ in started if step > len(self.steps) - SAME_BATCHES - 1]) >= SAME_BATCHES - 1:
            self.watch.tell(
                FRESH,
                "warning",
                started[-1][1],
                f"the last {SAME_BATCHES} steps saw the same batch: the data loader is started anew for every step",
                "DataLoader.__iter__",
                cause="each step takes the first batch of a new iterator",
                fix="loop over the loader, or keep one iterator and call next on it",
            )

    def _same_order(self) -> None:
        """Two passes over the same sampler in the same epoch, and their first batches are those of the other."""
        spot, epoch, first, second = self.again[0]
        if len(self.steps) < second + SAME_ORDER:
            return
        self.again.clear()
        before, now = self.steps[first : first + SAME_ORDER], self.steps[second : second + SAME_ORDER]
        if before == now and len(set(now)) == SAME_ORDER:
            self.watch.tell(
                FRESH,
                "warning",
                spot,
                "every pass over the data has the same order: DistributedSampler shuffles by its epoch, which stays the same",
                "DataLoader.__iter__",
                cause=f"sampler.epoch was {epoch} in both passes, and their first {SAME_ORDER} batches are equal",
                fix="sampler.set_epoch(epoch) before each pass",
            )

    def _every_worker_alike(self) -> None:
        steps = self.steps
        workers = max((count for _, _, count in self.loaders), default=0)
        tail = steps[-2 * workers :]
        if workers < 2 or len(steps) != 2 * workers or len(tail) != 2 * workers or len(set(tail)) != 2:
            return
        if len(set(tail[:workers])) == 1 and len(set(tail[workers:])) == 1:
            self.watch.tell(
                FRESH,
                "warning",
                self.loaders[-1][1],
                f"every batch comes {workers} times: each of the {workers} workers reads the whole IterableDataset",
                "DataLoader.__iter__",
                cause="torch hands every worker its own copy of an IterableDataset",
                fix="in __iter__, take every n-th item by torch.utils.data.get_worker_info()",
            )
