"""Windows: nothing lost between documents, the same order for the same seed, and a resumed stream is the tail of the whole."""

from itertools import islice

import pytest

from olmodebug.errors import UsageError
from olmodebug.training.packing import Packing, train_windows, windows
from olmodebug.training.tokenization import Encoder


class Numbers:
    """A tokenizer of texts that are numbers."""

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list["Numbers"]:
        assert not add_special_tokens
        found = []
        for text in texts:
            item = Numbers()
            item.ids = [int(word) for word in text.split()]
            found.append(item)
        return found

    ids: list[int]


ENCODER = Encoder(name="numbers", tokenizer=Numbers(), eos_id=0, rows=1000)
TEXTS = [" ".join(str(10 * i + j) for j in range(1, 8)) for i in range(1, 13)]  # 12 documents of 7 ids and their end: 96


def take(count: int, *, skip: int = 0, seed: int = 0, document_tokens: int | None = None) -> list[list[int]]:
    packing = Packing(seq_len=8, seed=seed, document_tokens=document_tokens)
    return list(islice(windows(lambda: iter(TEXTS), ENCODER, packing, skip=skip), count))


def test_an_epoch_gives_every_id_once_with_an_end_behind_each_document() -> None:
    ids = [i for window in take(12) for i in window]
    assert sorted(i for i in ids if i) == sorted(int(word) for text in TEXTS for word in text.split())
    assert ids.count(0) == 12
    for window in take(12):
        assert window[7] == 0 and window[:7] == list(range(window[0], window[0] + 7))


def test_the_second_epoch_has_another_order_and_another_seed_too() -> None:
    both = take(24)
    assert sorted(both[:12]) == sorted(both[12:]) and both[:12] != both[12:]
    assert take(12, seed=1) != both[:12]
    assert take(24) == both


def test_a_resumed_stream_is_the_tail_of_the_whole_also_over_an_epochs_end() -> None:
    for skip in (1, 5, 12, 17):
        assert take(30 - skip, skip=skip) == take(30)[skip:]


def test_only_the_first_tokens_of_each_document_where_that_is_asked() -> None:
    ids = {i for window in take(4, document_tokens=3) for i in window}
    assert ids - {0} <= {10 * i + j for i in range(1, 13) for j in range(1, 4)}


def test_aligned_documents_start_windows_and_their_rests_are_joined() -> None:
    long = [" ".join(str(100 * i + j) for j in range(1, 20)) for i in range(1, 5)]  # 4 documents of 19 ids and their end
    packing = Packing(seq_len=8, aligned=True)
    first = list(islice(windows(lambda: iter(long), ENCODER, packing), 10))
    starts = {100 * i + 1 for i in range(1, 5)}
    assert starts <= {window[0] for window in first}
    ids = [i for window in first for i in window]
    assert sorted(ids) == sorted([i for text in long for i in map(int, text.split())] + [0] * 4)
    cut = list(islice(windows(lambda: iter(long), ENCODER, Packing(seq_len=8, aligned=True, document_tokens=8)), 4))
    assert {window[0] for window in cut} == starts


def test_documents_too_short_for_one_window_are_refused() -> None:
    with pytest.raises(UsageError, match="fill no window of 512 tokens"):
        next(windows(lambda: iter(["1 2 3"]), ENCODER, Packing(seq_len=512)))


def test_documents_begin_at_the_end_of_a_run_and_are_left_out_before() -> None:
    packing = Packing(seq_len=4, aligned=True)  # 12 documents of two windows: 1-4 and 5-7 with the end
    found = list(train_windows(lambda: iter(TEXTS), ENCODER, packing, count=18, starts=6))
    assert all(window[0] % 10 == 5 for window in found[:12])
    assert all(window[0] % 10 == 1 for window in found[12:])
    for skip in (0, 5, 12, 15):
        resumed = train_windows(lambda: iter(TEXTS), ENCODER, packing, count=18, starts=6, skip=skip)
        assert list(resumed) == found[skip:]


def test_documents_of_one_window_or_less_are_trained_on_whatever_the_order() -> None:
    for seq_len, starts in ((8, 4), (20, 1)):
        packing = Packing(seq_len=seq_len, aligned=True)
        found = list(train_windows(lambda: iter(TEXTS), ENCODER, packing, count=8, starts=starts))
        assert len(found) == 8 and all(len(window) == seq_len for window in found)
