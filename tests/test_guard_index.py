"""The index guard: every index op is checked before it runs, and the finding names table, value, place and cause."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from olmodebug.guards.index import improper_probabilities
from olmodebug.guards.journal import Journal
from olmodebug.guards.watch import Watch
from olmodebug.report import Finding

pytestmark = pytest.mark.usefixtures("_only_young_objects")


class Attention(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("cos", torch.rand(rows, 12), persistent=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return x * self.cos[positions]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 12)
        self.attn = Attention(64)
        self.head = nn.Linear(12, 97)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.attn(self.embed(ids), torch.arange(ids.shape[1])))


def found(run: Callable[[], Any], *, raises: bool = True) -> list[Finding]:
    """The findings of the index guard; the op itself raises, and that ends the guarded block."""
    journal = Journal(None)
    with pytest.raises((IndexError, RuntimeError)) if raises else contextlib.nullcontext(), Watch(("index",), journal):
        run()
    return journal.findings


def line_of(function: Callable[..., Any], text: str) -> int:
    import inspect

    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if text in line)


def test_a_sequence_longer_than_the_rotary_table_is_placed_at_the_indexing_line() -> None:
    model = Model()
    (finding,) = found(lambda: model(torch.randint(0, 97, (2, 65))))
    assert finding.probe == "index.in-bounds"
    assert finding.message == "index 64 is out of range: `attn.cos` has 64 rows"
    assert finding.observed == "64 at (64,); 1 of 65 values out of range"
    assert finding.cause == "position 64 is asked of a table of 64 rows"
    assert finding.where.module == "attn"
    assert finding.where.line == line_of(Attention.forward, "self.cos[positions]")


def test_positions_that_begin_anew_in_a_row_are_told_from_tokens() -> None:
    places = nn.Embedding(8, 4)
    (finding,) = found(lambda: places(torch.tensor([[*range(10), *range(5), 0, 0]])))
    assert finding.cause == "position 9 is asked of a table of 8 rows"


def test_a_token_beyond_the_vocabulary_names_the_embedding() -> None:
    model = Model()
    ids = torch.full((2, 7), 5)
    ids[1, 3] = 97
    (finding,) = found(lambda: model(ids))
    assert finding.message == "index 97 is out of range: `embed.weight` has 97 rows"
    assert finding.observed is not None and finding.observed.startswith("97 at (1, 3); 1 of 14")
    assert finding.cause is not None and "token id 97" in finding.cause


def test_minus_100_among_the_token_ids_is_told_apart_from_a_token() -> None:
    model = Model()
    (finding,) = found(lambda: model(torch.tensor([[3, -100, 5]])))
    assert finding.cause is not None and "label of a masked position" in finding.cause


def test_a_label_beyond_the_classes_is_named_and_ignored_labels_are_not() -> None:
    logits = torch.randn(5, 10)
    (finding,) = found(lambda: F.cross_entropy(logits, torch.tensor([1, 2, -100, 10, 3])))
    assert finding.message == "label 10 is out of range: the logits have 10 classes"
    assert finding.where.line == line_of(test_a_label_beyond_the_classes_is_named_and_ignored_labels_are_not, "F.cross_entropy")
    assert not found(lambda: F.cross_entropy(logits, torch.tensor([1, 2, -100, 9, 3])), raises=False)


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("gather", lambda x, i: x.gather(1, i)),
        ("scatter", lambda x, i: x.scatter(1, i, 1.0)),
        ("scatter", lambda x, i: x.scatter_add_(1, i, torch.ones(3, 2))),
        ("index_select", lambda x, i: x.index_select(1, i[0])),
        ("index_select", lambda x, i: x.index_add(1, i[0], torch.ones(3, 2))),
        ("tensor indexing", lambda x, i: x[:, i[0]]),
        ("tensor indexing", lambda x, i: x.index_put_((i[0],), torch.zeros(()))),
        ("scatter", lambda x, i: F.one_hot(i, 7)),
    ],
)
def test_every_index_op_is_checked(name: str, run: Callable[..., Any]) -> None:
    x, index = torch.randn(3, 7), torch.tensor([[0, 7], [1, 2], [3, 4]])
    findings = found(lambda: run(x, index))
    # one_hot on the CPU refuses by itself before any op runs
    assert [f.where.op for f in findings] == [name] or (not findings and run(x, torch.zeros(1, 1, dtype=torch.long)).shape[-1] == 7)


def test_take_counts_over_all_elements() -> None:
    x = torch.randn(3, 7)
    (finding,) = found(lambda: torch.take(x, torch.tensor([0, 21])))
    assert finding.message.startswith("index 21 is out of range")


def test_legal_indexing_is_silent() -> None:
    model = Model()
    x = torch.randn(3, 7)

    def run() -> None:
        model(torch.randint(0, 97, (2, 64)))
        x[torch.tensor([True, False, True])]
        x[:, -1], x[torch.arange(3), -1], x[torch.tensor([-1])]
        x[[0, 2]], x[..., None], x[torch.empty(0, dtype=torch.long)]
        F.cross_entropy(torch.randn(2, 10, 4), torch.full((2, 4), 3))
        F.cross_entropy(x, torch.full((3,), -100))
        torch.zeros(3, 7, device="meta")[torch.tensor([9], device="meta")]

    assert not found(run, raises=False)


def test_negative_indices_among_others_are_a_warning() -> None:
    log_probs = torch.randn(128, 30)
    (finding,) = found(lambda: log_probs[torch.tensor([3, -100, 5])], raises=False)
    assert (finding.probe, finding.severity) == ("index.no-negative-wrap", "warning")
    assert "row 28 of 128" in finding.message


def test_improper_probabilities_are_told_by_their_kind() -> None:
    assert improper_probabilities(torch.tensor([0.5, 0.5])) is None
    assert improper_probabilities(torch.tensor([0.5, float("nan")])) == "inf or nan"
    assert improper_probabilities(torch.tensor([0.5, -0.1])) == "a negative number"


def test_the_guard_changes_no_bit_and_no_random_number() -> None:
    def step() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        model = Model()
        loss = F.cross_entropy(F.dropout(model(torch.randint(0, 97, (2, 9)))).flatten(0, 1), torch.randint(0, 97, (18,)))
        loss.backward()
        return loss.detach(), torch.rand(3)

    plain = step()
    with Watch(("index",), Journal(None)):
        guarded = step()
    assert torch.equal(plain[0], guarded[0]) and torch.equal(plain[1], guarded[1])


def test_the_guard_leaves_nothing_behind_after_an_exception() -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    with pytest.raises(ZeroDivisionError), Watch(("index",), Journal(None)):
        raise ZeroDivisionError
    assert _get_current_dispatch_mode() is None


@pytest.mark.gpu
def test_on_a_device_the_context_survives_a_bad_index() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    table = torch.rand(64, 12, device="cuda")
    (finding,) = found(lambda: table[torch.tensor([3, 64], device="cuda")])
    assert finding.evidence["device"] == "cuda:0"
    assert float(table.sum()) > 0  # the context is still usable
