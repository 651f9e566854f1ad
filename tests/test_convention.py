"""How a model wants to be called, from its signature, and what counts as logits."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from olmodebug.caches import keeps_its_cache
from olmodebug.convention import (
    CACHE_NAMES,
    IDS_NAMES,
    Convention,
    NoLogits,
    find_logits,
    first_embedding,
    ids_tensor,
    is_scalar_loss,
    read_signature,
)
from olmodebug.errors import SubjectError
from olmodebug.examine import run_probe
from olmodebug.first_run import from_model
from olmodebug.probe import select, shipped_probes

LOGITS, LOSS = torch.zeros(2, 5, 7), torch.tensor(1.5)


def hugging_face(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, labels=None, use_cache=None, **kwargs): ...  # type: ignore[no-untyped-def]
def nanogpt(idx, targets=None): ...  # type: ignore[no-untyped-def]
def plain(tokens): ...  # type: ignore[no-untyped-def]
def cache_without_switch(input_ids, past_key_values=None): ...  # type: ignore[no-untyped-def]
def odd_names(flavour, *, positions=None, padding_mask=None): ...  # type: ignore[no-untyped-def]


def test_the_signature_of_a_hugging_face_model_is_read() -> None:
    assert read_signature(hugging_face) == Convention(
        ids="input_ids",
        attention_mask="attention_mask",
        position_ids="position_ids",
        cache="past_key_values",
        use_cache="use_cache",
        labels="labels",
    )


def test_targets_are_aligned_already_and_labels_are_not() -> None:
    assert read_signature(nanogpt) == Convention(ids="idx", labels="targets", labels_aligned=True)
    assert not read_signature(hugging_face).labels_aligned


def test_the_first_argument_is_the_ids_where_no_name_is_known() -> None:
    assert read_signature(odd_names) == Convention(ids="flavour", attention_mask="padding_mask", position_ids="positions")
    assert read_signature(plain).ids == "tokens"


def test_a_model_without_a_forward_is_refused_with_the_way_out() -> None:
    with pytest.raises(SubjectError, match=r"no forward\(\); state the call with --adapter"):
        from_model(nn.Module())


def test_what_must_be_given_is_the_ids_before_what_may_be() -> None:
    assert read_signature(lambda input, return_type="logits", tokens=None: None).ids == "input"


def test_a_cache_that_cannot_be_asked_for_is_no_cache() -> None:
    assert read_signature(cache_without_switch).cache is None


@given(st.sampled_from(IDS_NAMES))
def test_every_known_name_of_the_ids_is_found_behind_other_optional_arguments(name: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def forward(other=None, {name}=None): ...", scope)
    assert read_signature(scope["forward"]).ids == name


@pytest.mark.parametrize("text", ["lambda: 0", "lambda **kwargs: 0", "lambda input_ids, temperature: 0", "max"])
def test_what_cannot_be_guessed_is_refused_with_the_way_out(text: str) -> None:
    with pytest.raises(SubjectError, match="--adapter"):
        read_signature(eval(text))


def test_a_convention_reads_as_a_call() -> None:
    assert str(read_signature(nanogpt)) == "forward(idx, targets); targets already aligned with the logits"
    assert "labels shifted inside" in str(read_signature(hugging_face))


@pytest.mark.parametrize(
    "result",
    [
        LOGITS,
        (LOGITS, LOSS),
        (LOSS, LOGITS),
        [LOGITS, None],
        {"logits": LOGITS, "loss": LOSS},
        SimpleNamespace(logits=LOGITS, loss=LOSS),
        SimpleNamespace(logits=LOGITS),
    ],
)
def test_logits_are_found_in_a_tensor_a_tuple_a_dict_and_an_object(result: object) -> None:
    output = find_logits(result, batch_size=2, seq_len=5)
    assert output.logits is LOGITS
    assert output.loss is (LOSS if "1.5" in repr(result) else None)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_comes_back_under_every_name(name: str) -> None:
    assert find_logits({"logits": LOGITS, name: "kept"}, batch_size=2, seq_len=5).cache == "kept"


def test_the_last_position_alone_counts_as_logits() -> None:
    assert find_logits(torch.zeros(2, 1, 7), batch_size=2, seq_len=5).logits.shape == (2, 1, 7)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, "NoneType"),
        (torch.zeros(2, 5), r"\(2, 5\)"),
        (torch.zeros(5, 2, 7), r"\(5, 2, 7\)"),
        (torch.zeros(2, 5, 7, dtype=torch.long), "int64"),
        ((torch.zeros(2), None), r"tuple with \(2,\)"),
        ((), "no tensor"),
        ({"hidden": LOGITS}, "without a `logits` tensor"),
        ("text", "str"),
    ],
)
def test_what_are_no_logits_is_described(result: object, words: str) -> None:
    with pytest.raises(NoLogits, match=words):
        find_logits(result, batch_size=2, seq_len=5)


def test_the_first_embedding_is_the_first_registered() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Embedding(5, 2)), nn.Embedding(9, 2))
    assert first_embedding(model) is model[1][0]
    assert first_embedding(nn.Linear(2, 2)) is None


def test_a_loss_is_one_floating_number() -> None:
    assert is_scalar_loss(LOSS)
    assert is_scalar_loss(torch.tensor([1.0]))
    for value in (1.0, None, torch.tensor(1), torch.zeros(2)):
        assert not is_scalar_loss(value)


def test_rows_become_an_int64_tensor() -> None:
    tensor = ids_tensor(((1, 2), (3, 4)))
    assert tensor is not None
    assert (tensor.dtype, tensor.tolist()) == (torch.int64, [[1, 2], [3, 4]])
    assert ids_tensor(None) is None


def test_a_model_that_keeps_its_cache_says_where_new_tokens_stand() -> None:
    def meta(tokens: torch.Tensor, start_pos: int) -> torch.Tensor: ...
    def lit(idx: torch.Tensor, input_pos: torch.Tensor | None = None) -> torch.Tensor: ...

    assert read_signature(meta).start == "start_pos"
    assert read_signature(lit).places == "input_pos"
    assert read_signature(lit).start is read_signature(meta).places is None


def test_the_cache_is_found_under_the_name_that_transformers_gives_it_from_5_24_on() -> None:
    def forward(input_ids: torch.Tensor, cache: object = None, use_cache: bool = False) -> torch.Tensor: ...

    assert read_signature(forward).cache == "cache"


class Odd(nn.Module):
    """Says what it is called with by the way it answers."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.embed, self.answer = nn.Embedding(29, 7), forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(self.embed, *args, **kwargs)


def test_all_arguments_passed_on_take_the_ids_in_the_first_place() -> None:
    subject = from_model(Odd(lambda embed, ids: embed(ids)))
    assert subject.logits(subject.first_case()).shape[-1] == 7


class Refusing(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.kind = nn.Embedding(29, 7), kind

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        assert self.kind != "flat" or idx.ndim == 1, "one row without a batch"
        return self.embed(idx).square().mean() + targets.sum()


@pytest.mark.parametrize(("kind", "words"), [("flat", "one row without a batch.*--adapter"), ("loss", "a loss and no logits.*--adapter")])
def test_a_call_that_the_model_itself_declines_or_answers_with_a_loss_is_no_fault_of_the_model(kind: str, words: str) -> None:
    with pytest.raises(SubjectError, match=words):
        from_model(Refusing(kind))


class Mixing(nn.Module):
    """Sums up along the first dimension, as an LSTM without batch_first, behind positions along the second."""

    def __init__(self, *, positions: bool, both: bool) -> None:
        super().__init__()
        self.embed, self.places, self.positions, self.both = nn.Embedding(29, 7), nn.Embedding(40, 7), positions, both

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids).cumsum(0)
        hidden = hidden.cumsum(1) if self.both else hidden
        return hidden + self.places.weight[: ids.shape[1]] if self.positions else hidden


@pytest.mark.parametrize(("positions", "both", "order"), [(False, False, True), (True, False, False), (False, True, False)])
def test_rows_that_are_mixed_by_mistake_are_no_sequence_that_comes_first(positions: bool, both: bool, order: bool) -> None:
    assert from_model(Mixing(positions=positions, both=both)).convention.sequence_first is order


class Weighted(nn.Module):
    """A softmax written out along the first dimension: the largest key of all rows is taken off, and rounds anew."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.key = nn.Embedding(29, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        value = self.embed(ids)
        weight = (self.key(value) - self.key(value).max(0, keepdim=True)[0]).exp()
        return (weight * value).cumsum(0) / weight.cumsum(0)


def test_rows_that_only_round_with_what_stands_after_them_are_a_sequence_that_comes_first() -> None:
    torch.manual_seed(0)
    assert from_model(Weighted()).convention.sequence_first


class Strict(nn.Module):
    """Keeps a cache of a dtype that it is told, cannot empty one that it has not made, and fills one only with a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cache = nn.Embedding(29, 29), None

    def setup_caches(self, batch_size: int, dtype: torch.dtype) -> None:
        self.cache = torch.zeros(batch_size, 16, 29, dtype=dtype)

    def reset_caches(self) -> None:
        if self.cache is None:
            raise RuntimeError("set up the caches first")

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None) -> Tensor:
        if self.cache is not None and mask is None:
            raise ValueError("a mask must be given beside a cache")
        return self.embed(tokens)


def test_a_cache_that_wants_more_than_can_be_guessed_is_left_alone() -> None:
    subject = from_model(Strict())
    assert (subject.convention.places, keeps_its_cache(subject), subject.model.cache) == (None, False, None)
    assert subject.assumptions[-1].endswith("(ValueError: a mask must be given beside a cache)")


class Emptied(nn.Module):
    """Makes its cache where it is first told places, and has a method to empty it, which needs one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.kept = nn.Embedding(29, 29), None

    def reset_cache(self) -> None:
        self.kept.zero_()
        self.kept = None

    def forward(self, idx: Tensor, input_pos: Tensor | None = None) -> Tensor:
        x = self.embed(idx)
        if input_pos is None:
            return x.cumsum(1)
        if self.kept is None:
            self.kept = x.new_zeros(len(idx), 40, 29)
        self.kept[:, input_pos] = x
        return self.kept.cumsum(1)[:, input_pos]


def test_a_cache_that_only_has_a_method_to_empty_it_is_the_models_own() -> None:
    torch.manual_seed(0)
    subject = from_model(Emptied())
    assert keeps_its_cache(subject)
    assert run_probe(next(iter(select(shipped_probes(), "matches-full-forward"))), subject).outcome.status == "passed"


class SumCache:
    """What a sequence has come to, and how long it was."""

    def __init__(self) -> None:
        self.seen, self.total = 0, torch.zeros(())


class Again(nn.Module):
    """Wants the whole sequence with its cache, and reads what is new."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 29)

    def forward(self, ids: Tensor, cache: SumCache | None = None) -> Tensor:
        cache = cache or SumCache()
        new = self.embed(ids[:, cache.seen :])
        sums = cache.total + new.view(len(ids), -1, new.shape[1], 29).sum(1).cumsum(1)  # which is ambiguous for nothing new
        cache.seen, cache.total = ids.shape[1], sums[:, -1:]
        return sums


def test_a_cache_that_goes_with_the_whole_sequence_again_is_not_asked_with_new_tokens_alone() -> None:
    assert from_model(Again()).convention.cache is None
