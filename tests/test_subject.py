"""The subject: sizes, cases, twins, and that looking at it changes nothing."""

import copy
import dataclasses
import importlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from olmodebug.errors import SubjectError
from olmodebug.examine import run_probe
from olmodebug.first_run import from_model
from olmodebug.model import Olmo
from olmodebug.presets import preset
from olmodebug.probe import shipped_probes
from olmodebug.records import Case
from olmodebug.settings import attention_choices
from olmodebug.subject import Subject


class Tiny(nn.Module):
    """A language model that looks at one token only, with everything in it that a check could disturb."""

    def __init__(self, rows: int = 31, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, 8)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, rows)
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.head(self.drop(self.embed(input_ids)) * self.frozen)


class Crashes(Tiny):
    """Fails when it is padded, and draws random numbers before it does."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        logits = super().forward(input_ids) + 0.0 * torch.rand(())
        if attention_mask is not None:
            raise RuntimeError("no padding, please")
        return logits


def reference() -> nn.Module:
    config = dataclasses.replace(preset("olmo3-tiny"), num_hidden_layers=2, layer_types=("sliding_attention", "full_attention"))
    return Olmo(config, generator=torch.Generator().manual_seed(0))


def portrait(model: nn.Module) -> dict[str, Any]:
    """Everything that must not change, as comparable values."""
    values: dict[str, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        grad = None if parameter.grad is None else (id(parameter.grad), parameter.grad.clone())
        values[name] = (id(parameter), parameter.detach().clone(), parameter.requires_grad, parameter.dtype, grad)
    for name, buffer in model.named_buffers():
        values[name] = (id(buffer), buffer.clone())
    for name, module in model.named_modules():
        hooks = {key: list(value) for key, value in vars(module).items() if key.endswith("_hooks") and value}
        attributes = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        values[f"module {name}"] = (id(module), module.training, hooks, attributes)
    return values


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


@pytest.mark.parametrize("build", [reference, Tiny, lambda: Tiny(dropout=0.2), Crashes])
def test_a_complete_check_leaves_the_subject_exactly_as_it_was(build: Any) -> None:
    torch.manual_seed(4)
    model = build()
    model.train()
    next(iter(model.children())).eval()  # modes need not agree
    first = next(model.parameters())
    first.grad = torch.full_like(first, 0.5)
    model.register_forward_hook(lambda *_: None)
    model.register_full_backward_hook(lambda *_: None)
    before, random, dtype = portrait(model), torch.get_rng_state(), torch.get_default_dtype()
    subject = from_model(model)
    statuses = []
    for probe in shipped_probes():
        if probe.cost == "quick":
            statuses.append(run_probe(probe, subject).outcome.status)
    after = portrait(model)
    changed = [name for name in before if not same(before[name], after.get(name))]
    assert (changed, list(before) == list(after)) == ([], True)
    assert torch.equal(torch.get_rng_state(), random), "the random state moved"
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (dtype, True)
    assert statuses.count("passed") > 5
    assert "error" not in statuses
    if build in (reference, Crashes):
        assert ("failed" in statuses) == (build is Crashes), statuses


def test_a_twin_shares_nothing_with_the_subject_and_is_made_once() -> None:
    subject = from_model(Tiny())
    twin = subject.twin()
    assert subject.twin() is twin
    assert subject.fresh_twin() is not subject.fresh_twin()
    assert (twin.dtype, twin.model.training, subject.dtype) == (torch.float64, False, torch.float32)
    assert subject.twin(training=True).model.training
    with torch.no_grad():
        twin.model.embed.weight.fill_(7.0)  # type: ignore[union-attr,operator]
    assert not bool((subject.model.embed.weight == 7.0).any())  # type: ignore[union-attr,operator]


def test_a_twin_of_a_tied_model_stays_tied() -> None:
    twin = from_model(Olmo(preset("olmo1-tiny"))).twin()
    assert twin.model.lm_head.weight is twin.model.model.embed_tokens.weight  # type: ignore[union-attr]


def test_a_model_that_runs_in_its_own_dtype_only_is_checked_in_that_and_says_so() -> None:
    class Stubborn(Tiny):
        def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            return self.head(self.embed(input_ids).float())

    subject = from_model(Stubborn())
    assert subject.twin().dtype == torch.float32
    assert any("float32 only" in text for text in subject.assumptions)


def test_a_class_of_its_attention_is_offered_and_switched() -> None:
    subject = from_model(Olmo(preset("olmo2-tiny")))
    assert attention_choices(Tiny()) == []
    if choices := attention_choices(subject.model):
        assert set(choices) == {"eager", "sdpa"}


@pytest.mark.parametrize("name", ["olmo1-tiny", "olmo2-tiny", "olmo3-tiny", "datadecide-tiny"])
def test_batch_and_sequence_divide_no_size_of_the_model(name: str) -> None:
    subject = from_model(Olmo(preset(name)))
    batch, seq = subject.sizes()
    assert batch != seq
    config = preset(name)
    for size in (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.head_dim, config.vocab_size):
        assert size % seq != 0 or size < seq, (size, seq)
        assert size != batch


def test_the_first_run_has_sizes_unlike_the_heads() -> None:
    model = Tiny()
    model.config = {"num_attention_heads": 5, "n_head": 5}  # type: ignore[assignment]
    case = from_model(model).first_case()
    assert case.batch_size != case.seq_len
    assert 5 not in (case.batch_size, case.seq_len)
    assert case.seq_len <= 7


def test_a_short_context_is_respected() -> None:
    model = Tiny()
    model.config = {"max_position_embeddings": 3}  # type: ignore[assignment]
    subject = from_model(model)
    assert subject.max_positions == 3
    assert subject.first_case().seq_len <= 3
    assert subject.sizes()[1] <= 3


@given(rows=st.integers(3, 60), seed=st.integers(0, 5), shape=st.tuples(st.integers(1, 4), st.integers(1, 9)))
def test_token_ids_lie_in_the_vocabulary_miss_the_special_ones_and_follow_from_the_seed(
    rows: int, seed: int, shape: tuple[int, int]
) -> None:
    subject = Subject(spec="", model=nn.Embedding(rows, 2), convention=None, config={"pad_token_id": 1, "eos_token_id": 2})  # type: ignore[arg-type]
    ids = subject.token_ids(*shape, seed=seed)
    assert (len(ids), {len(row) for row in ids}) == (shape[0], {shape[1]})
    assert all(0 <= token < rows and token not in (1, 2) for row in ids for token in row)
    assert ids == subject.token_ids(*shape, seed=seed)


def test_the_vocabulary_is_the_smaller_of_config_and_table_or_what_was_stated() -> None:
    def subject(**options: Any) -> Subject:
        return Subject(spec="x", model=nn.Embedding(20, 2), convention=None, **options)  # type: ignore[arg-type]

    assert subject().vocab_size == 20
    assert subject(config={"vocab_size": 12}).vocab_size == 12
    assert subject(config={"vocab_size": 32}).vocab_size == 20
    assert subject(config={"vocab_size": 32}, declared_vocab=7).vocab_size == 7
    with pytest.raises(SubjectError, match="--vocab-size"):
        _ = Subject(spec="x", model=nn.Linear(2, 2), convention=None).vocab_size  # type: ignore[arg-type]


def test_settings_are_read_from_dicts_objects_and_a_text_config() -> None:
    nested = type("C", (), {"text_config": type("T", (), {"n_head": 3})()})()
    for config in ({"n_head": 3}, type("C", (), {"n_head": 3})(), nested):
        subject = Subject(spec="", model=nn.Linear(1, 1), convention=None, config=config)  # type: ignore[arg-type]
        assert subject.setting("num_heads", "n_head") == 3
        assert subject.setting("colour") is None


def test_a_model_without_logits_for_all_positions_is_called_with_labels() -> None:
    class Last(Tiny):
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
            logits = self.head(self.embed(idx))
            return (logits[:, [-1]], None) if targets is None else (logits, logits.mean())

    subject = from_model(Last())
    assert subject.convention.logits_need_labels
    assert subject.logits(Case(name="", input_ids=((1, 2, 3),))).shape == (1, 3, 31)


def test_a_model_that_cannot_be_copied_and_not_be_rebuilt_is_the_users_to_mend() -> None:
    class Locked(Tiny):
        def __deepcopy__(self, memo: Any) -> nn.Module:
            raise TypeError("cannot pickle")

    with pytest.raises(TypeError):
        copy.deepcopy(Locked())
    with pytest.raises((SubjectError, importlib.import_module("olmodebug.load").SubjectCodeError)):
        from_model(Locked()).twin()
    result = run_probe(shipped_probes()[0], from_model(Locked()))
    assert result.outcome.status == "failed", "a fault of the model is no fault of ours"
    assert "copying the model" in result.findings[0].message


def test_labels_are_aligned_where_the_documentation_of_forward_says_so() -> None:
    class Shifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(31, 8)
            self.head = nn.Linear(8, 31)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            """The labels are shifted inside."""
            return self.head(self.embed(input_ids))

    class Aligned(Shifting):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            """The labels are **not shifted**
            inside the model."""
            return super().forward(input_ids, labels)

    assert not from_model(Shifting()).convention.labels_aligned
    assert from_model(Aligned()).convention.labels_aligned


def test_what_depends_on_a_probe_that_was_left_out_is_left_out_for_the_same_root() -> None:
    probes = {probe.name: probe for probe in shipped_probes()}
    subject, failed = from_model(Tiny()), {"causality.no-future": "causality.no-future"}
    for name in ("cache.matches-full-forward", "cache.left-padded-rows-decode"):
        result = run_probe(probes[name], subject, failed=failed)
        assert result.outcome.reason == "it depends on causality.no-future, which failed"
        failed[name] = result.root or ""
    assert run_probe(probes["determinism.eval-repeats"], subject, failed=failed).outcome.status == "passed"


def test_a_forward_that_needs_its_first_position_is_called_with_nought() -> None:
    class Started(Tiny):
        def forward(self, tokens: Tensor, start_pos: int) -> Tensor:  # type: ignore[override]
            assert start_pos == 0
            return self.head(self.embed(tokens))

    subject = from_model(Started())
    assert subject.forward({subject.convention.ids: torch.tensor([[1, 2, 3]])}).shape == (1, 3, 31)


class Single(nn.Module):
    """Starts from a state in the default dtype, and divides by it: it runs in float32 only, and its logits are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(19, 8), nn.Linear(8, 19)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(len(input_ids), input_ids.shape[1], 8)
        return self.head(state) / (self.embed(input_ids) * 0).sum(-1, keepdim=True)


def test_a_model_that_runs_in_its_own_dtype_only_stays_in_it_where_its_logits_are_not_finite_too() -> None:
    twin = from_model(Single()).twin()
    assert (twin.dtype, twin.runs()) == (torch.float32, False)
