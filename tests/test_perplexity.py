"""The perplexity of a model does not depend on how it is measured."""

import math

import pytest
import torch

from olmodebug.spec import Job, resolve
from olmodebug.subject import Subject
from olmodebug.training.head import find_head
from olmodebug.training.perplexity import Side, measure, pieces


@pytest.fixture(scope="module")
def subject() -> Subject:
    found = resolve(Job(spec="olmo2-tiny", seed=3))
    found.model.double()
    return found


def documents(lengths: tuple[int, ...]) -> list[tuple[list[int], int]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randint(60, (n,), generator=draw).tolist(), 4 * (n - 1)) for n in lengths]


DOCUMENTS = documents((9, 2, 30, 1, 17, 30))


def by_hand(subject: Subject) -> float:
    total = 0.0
    for ids, _ in DOCUMENTS:
        with torch.no_grad():
            logits = subject.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(float(logits[i, ids[i + 1]]) for i in range(len(ids) - 1))
    return math.exp(total / sum(len(ids) - 1 for ids, _ in DOCUMENTS))


@pytest.mark.parametrize("batch_size", [1, 2, 6])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("chunked", [True, False])
def test_the_same_number_for_every_batch_size_and_padding_side(subject: Subject, batch_size: int, side: Side, chunked: bool) -> None:
    head = find_head(subject) if chunked else None
    found = measure(subject, DOCUMENTS, window=32, batch_size=batch_size, side=side, pad_id=5, head=head)
    assert found.tokens == 8 + 1 + 29 + 0 + 16 + 29
    assert found.perplexity == pytest.approx(by_hand(subject), rel=1e-6)  # what does not use the head is upcast to float32
    assert found.bits_per_byte == pytest.approx(math.log2(found.perplexity) / 4)


def test_a_sliding_window_predicts_every_token_but_the_first_once_and_with_enough_before_it() -> None:
    for length in range(2, 40):
        ids = list(range(length))
        predicted = []
        for piece in pieces(ids, 8, 3):
            assert len(piece.ids) <= 8
            context = len(piece.ids) - piece.predicted
            assert context >= min(5, piece.ids[-piece.predicted])
            predicted += list(piece.ids[-piece.predicted :])
        assert predicted == ids[1:]


def test_a_window_longer_than_the_document_changes_nothing(subject: Subject) -> None:
    whole = measure(subject, DOCUMENTS, window=30)
    assert measure(subject, DOCUMENTS, window=64).nll == pytest.approx(whole.nll, rel=1e-9)
    assert measure(subject, DOCUMENTS, window=16).tokens == whole.tokens


def test_measuring_leaves_the_mode_of_the_model_as_it_was(subject: Subject) -> None:
    subject.model.train()
    measure(subject, DOCUMENTS[:1], window=16)
    assert subject.model.training
