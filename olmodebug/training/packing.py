"""Documents as training windows: shuffled, encoded, joined with the end-of-document token between them, cut to equal length.

The same seed gives the same windows in the same order whatever was read before, so a run resumes by skipping what it has
used. Two buffers bound the memory: one of documents and one of windows.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, TypeVar

from ..errors import UsageError
from .tokenization import Encoder

DOCUMENT_BUFFER = 1024
WINDOW_BUFFER = 2048  # of 512 ids: 8 MiB; apart in the data, so that a batch is not eight pieces of one document
ENCODED_AT_ONCE = 16

Window = list[int]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How documents become windows. `document_tokens`: only so many of each document's first tokens; None takes all.

    `aligned`: every document starts a window, so that first tokens stand at first positions, as where documents are evaluated
    from their start; what fills no window of its own is joined with the rests of others. `first`: the tokens of a
    document's first window are left out, or are all there is; a document shorter than a window is kept whole in either.
    """

    seq_len: int
    seed: int = 0
    document_tokens: int | None = None
    aligned: bool = False
    first: Literal["kept", "left out", "only"] = "kept"


def windows(texts: Callable[[], Iterable[str]], encoder: Encoder, packing: Packing, *, skip: int = 0) -> Iterator[Window]:
    """Windows without end, epoch after epoch, each epoch in an order of its own; the first `skip` are left out.

    `texts` gives the training texts anew for each epoch. UsageError when an epoch fills no window.
    """
    given, epoch = 0, 0
    while True:
        before = given
        for window in _epoch(texts(), encoder, packing, random.Random(f"{packing.seed}/{epoch}")):
            given += 1
            if given > skip:
                yield window
        if given == before:
            raise UsageError(f"the training documents fill no window of {packing.seq_len} tokens; give more data or a shorter --seq-len")
        epoch += 1


def train_windows(
    texts: Callable[[], Iterable[str]], encoder: Encoder, packing: Packing, *, count: int, starts: int, skip: int = 0
) -> Iterator[Window]:
    """The `count` windows of a run, of which the last `starts` are those with which documents begin, and the others are not,
    where documents are long enough for others. UsageError when they fill no window."""
    before = count - starts
    if skip < before:
        others = replace(packing, first="left out" if starts else "kept")
        try:
            next(windows(texts, encoder, others))
        except UsageError:
            others = packing
        yield from islice(windows(texts, encoder, others, skip=skip), before - skip)
    if starts:
        only = replace(packing, first="only")
        yield from islice(windows(texts, encoder, only, skip=max(0, skip - before)), count - max(skip, before))


def _epoch(texts: Iterable[str], encoder: Encoder, packing: Packing, draw: random.Random) -> Iterator[Window]:
    shuffled = _shuffled(texts, DOCUMENT_BUFFER, draw)
    return _shuffled(_packed(_encoded(shuffled, encoder), encoder.eos_id, packing), WINDOW_BUFFER, draw)


def _encoded(texts: Iterable[str], encoder: Encoder) -> Iterator[list[int]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == ENCODED_AT_ONCE:
            yield from encoder.encode(batch)
            batch = []
    yield from encoder.encode(batch)


def _packed(documents: Iterable[list[int]], eos_id: int, packing: Packing) -> Iterator[Window]:
    """All ids in a row with `eos_id` at each document's end, cut; what fills no window at the end is left out."""
    rest: Window = []
    for ids in documents:
        whole = [*ids, eos_id]
        if packing.document_tokens is not None:
            whole = whole[: packing.document_tokens]
        if packing.first == "only":
            whole = whole[: packing.seq_len]
        elif packing.first == "left out" and len(whole) >= packing.seq_len:
            whole = whole[packing.seq_len :]
        if packing.aligned:
            while len(whole) >= packing.seq_len:
                yield whole[: packing.seq_len]
                whole = whole[packing.seq_len :]
        rest += whole
        while len(rest) >= packing.seq_len:
            yield rest[: packing.seq_len]
            rest = rest[packing.seq_len :]


def _shuffled(items: Iterable[T], size: int, draw: random.Random) -> Iterator[T]:
    """The items in another order, `size` of them in memory: a full shuffle of what fits."""
    buffer: list[T] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        i = draw.randrange(size)
        buffer[i], item = item, buffer[i]
        yield item
    draw.shuffle(buffer)
    yield from buffer
