"""The corpus itself: clean and neutral models keep the rules, each mutant breaks one, by a few lines of torch independent of the tool."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmodebug.settings import set_attention

HERE = Path(__file__).parent
BATCH, SEQ_LEN, CUT = 3, 10, 6
TOLERANCE = 1e-4  # the models cast to float32 inside: rounding shows at 1e-6, the weakest fault of the corpus at 1e-3


def load(path: Path) -> ModuleType:
    """A module by its path, under a name that does not clash."""
    name = "corpus_" + str(path).replace("/", "_").replace(".", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


catalog = load(HERE / "catalog.py")
CLEAN = {style: load(HERE / "clean" / f"{style}.py") for style in ("hf_style", "nanogpt_style", "llama_style", "litgpt_style")}
CLEAN_BUILDS = [(style, name) for style, module in CLEAN.items() for name in vars(module) if name.startswith("build")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------------------------------------
# one way to call four styles


def is_nanogpt(model: nn.Module) -> bool:
    return hasattr(model, "transformer") and not hasattr(model, "last_loss")


def vocab_of(model: nn.Module) -> int:
    return getattr(model.config, "vocab_size", None) or model.config.padded_vocab_size


def call(model: nn.Module, ids: Tensor, **arguments: Any) -> Any:
    """Logits `[batch, seq_len, vocab]` of all positions."""
    if is_nanogpt(model):
        return model(ids, targets=torch.zeros_like(ids))[0]
    out = model(ids, **arguments)
    if isinstance(out, dict):
        return out["logits"]
    return out if isinstance(out, Tensor) else out.logits


def make(build: Callable[[], nn.Module], seed: int = 0, loud: bool = True) -> nn.Module:
    """The model in float64 and eval mode, its weights enlarged so that attention is far from uniform."""
    torch.manual_seed(seed)
    model = build().double().eval()
    if loud:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(0.2 / parameter.std().clamp(min=1e-3))
    return model


def ids_for(model: nn.Module, batch: int = BATCH, seq_len: int = SEQ_LEN, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_of(model), (batch, seq_len), generator=generator)


def changed(ids: Tensor, model: nn.Module) -> Tensor:
    """Other tokens everywhere."""
    return (ids + 5) % vocab_of(model)


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ by more than rounding; a NaN always does."""
    if not (a.isfinite().all() and b.isfinite().all()):
        return True
    scale = 1.0 + b.detach().abs().max().item()
    return not torch.allclose(a, b, rtol=0.0, atol=TOLERANCE * scale)


# --------------------------------------------------------------------------------------------------------------------------------
# the rules; each returns True where it is broken


def breaks_causality(build: Callable[[], nn.Module]) -> bool:
    model = make(build)
    ids = ids_for(model)
    other = ids.clone()
    other[:, CUT:] = changed(ids, model)[:, CUT:]
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            torch.manual_seed(3)
            first = call(model, ids)
            torch.manual_seed(3)
            second = call(model, other)
        if differ(first[:, :CUT], second[:, :CUT]):
            return True
    model.eval()
    return differ(call(model, ids[:, :CUT]), call(model, ids)[:, :CUT])  # a prefix gives what it gave in the whole


def breaks_mask(build: Callable[[], nn.Module]) -> bool:
    """Causality when the scores are far below any finite mask value."""
    model = make(build)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "wq.weight", "wk.weight", "c_attn.weight")):
                parameter.mul_(300)
    ids = ids_for(model)
    other = ids.clone()
    other[:, CUT:] = changed(ids, model)[:, CUT:]
    return differ(call(model, ids)[:, :CUT], call(model, other)[:, :CUT])


def breaks_batch(build: Callable[[], nn.Module]) -> bool:
    model = make(build)
    ids = ids_for(model)
    arguments = [{}]
    if "position_ids" in names(model):
        arguments.append({"position_ids": torch.arange(SEQ_LEN) * torch.tensor([[1], [2], [3]])})
    if "attention_mask" in names(model):
        arguments.append({"attention_mask": (torch.arange(SEQ_LEN) >= torch.tensor([[0], [2], [4]])).long()})
    if "document_ids" in names(model):
        arguments.append({"document_ids": (torch.arange(SEQ_LEN) >= torch.tensor([[3], [5], [7]])).long()})
    for given in arguments:
        whole = call(model, ids, **given)
        for row in (0, BATCH - 1):
            alone = call(model, ids[row : row + 1], **{name: value[row : row + 1] for name, value in given.items()})
            real = given.get("attention_mask", torch.ones_like(ids))[row].bool()
            if differ(alone[0][real], whole[row][real]):
                return True
    if not dropout_of(model):
        model.train()
        return differ(call(model, ids[:1]), call(model, ids)[:1])
    return False


def breaks_padding(build: Callable[[], nn.Module]) -> bool:
    model = make(build)
    if "attention_mask" not in names(model):
        return False
    lengths = (SEQ_LEN, SEQ_LEN - 2, SEQ_LEN - 5)
    ids = ids_for(model)
    for left in (True, False):
        padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            place = slice(SEQ_LEN - length, None) if left else slice(0, length)
            padded[row, place], mask[row, place] = ids[row, :length], 1
        logits = call(model, padded, attention_mask=mask)
        if not logits.isfinite().all():
            return True
        refilled = torch.where(mask.bool(), padded, changed(padded, model))
        again = call(model, refilled, attention_mask=mask)
        for row, length in enumerate(lengths):
            alone = call(model, ids[row : row + 1, :length])[0]
            real = mask[row].bool()
            if differ(logits[row][real], alone) or differ(again[row][real], alone):
                return True
    return False


def breaks_cache(build: Callable[[], nn.Module]) -> bool:
    model = make(build)
    ids = ids_for(model)
    if hasattr(model, "set_kv_cache"):
        expected = call(model, ids)
        for chunks in ((3, 1, 4, 2), (7, 1, 1, 1)):
            model.set_kv_cache(BATCH, SEQ_LEN)
            ends = list(itertools.accumulate(chunks, initial=0))
            places = [torch.arange(a, b) for a, b in itertools.pairwise(ends)]
            if differ(torch.cat([model(ids[:, p], input_pos=p) for p in places], dim=1), expected):
                return True
        return False
    if "past_key_values" not in names(model):
        return False
    for pads in ((0, 0, 0), (0, 2, 4)):
        alone = [call(model, ids[row : row + 1, pad:])[0] for row, pad in enumerate(pads)]
        mask = (torch.arange(SEQ_LEN) >= torch.tensor(pads)[:, None]).long()
        for given in (mask,) if any(pads) else (mask, None):
            for chunks in ((3, 1, 4, 2), (7, 1, 1, 1)):
                past, pieces, start = None, [], 0
                for size in chunks:
                    arguments = {} if given is None else {"attention_mask": given[:, : start + size]}
                    out = model(ids[:, start : start + size], past_key_values=past, use_cache=True, **arguments)
                    past, start = out.past_key_values, start + size
                    pieces.append(out.logits)
                cached = torch.cat(pieces, dim=1)
                if any(differ(cached[row, pad:], alone[row]) for row, pad in enumerate(pads)):
                    return True
    return False


def breaks_loss(build: Callable[[], nn.Module]) -> bool:
    model = make(build)
    ids = ids_for(model)
    if "labels" in names(model):
        labels, shift, ignored = ids.clone(), 1, -100
    elif "targets" in names(model):
        labels, shift, ignored = changed(ids, model), 0, -1
    else:
        return False
    labels[0, 4:7] = ignored
    labels[1, 1] = 0
    kept, given = labels.clone(), labels.clone()
    out = model(ids, labels=given) if shift else model(ids, given)
    loss = model.last_loss if isinstance(out, Tensor) else out["loss"] if isinstance(out, dict) else out.loss if shift else out[1]
    logits = call(model, ids)
    total, count = 0.0, 0
    for row in range(BATCH):
        for position in range(SEQ_LEN - shift):
            label = kept[row, position + shift].item()
            if label != ignored:
                total, count = total - F.log_softmax(logits[row, position], dim=-1)[label].item(), count + 1
    if abs(loss.item() - total / count) > 1e-4:
        return True
    if not hasattr(out, "loss"):
        return False  # a plain mean, whose NaN where every label is ignored is the common idiom
    return not model(ids, labels=torch.full_like(ids, ignored)).loss.isfinite()


def breaks_determinism(build: Callable[[], nn.Module]) -> bool:
    model = make(build)
    ids = ids_for(model)
    return not torch.equal(call(model, ids), call(model, ids))


def breaks_state(build: Callable[[], nn.Module]) -> bool:
    """A call leaves no trace: not in its arguments, not in what later calls give, not in a later backward."""
    model = make(build)
    ids, other = ids_for(model), ids_for(model, seed=5)
    cases: list[dict[str, Tensor]] = [{}]
    if "attention_mask" in names(model):
        cases.append({"attention_mask": (torch.arange(SEQ_LEN) >= torch.tensor([[0], [2], [4]])).long()})
    if "position_ids" in names(model):
        cases.append({"position_ids": torch.arange(SEQ_LEN).expand(BATCH, -1) * 3})
    given, labels = ids.clone(), ids.clone()
    labels[:, 3] = 0
    given_labels = labels.clone()
    with torch.no_grad():
        fresh = [call(copy.deepcopy(model), ids.clone(), **case) for case in cases]
        for _ in range(2):
            for case, expected in zip(cases, fresh, strict=True):
                call(model, other, **case)
                if differ(call(model, given, **case), expected):
                    return True
        if "labels" in names(model):
            model(ids, labels=given_labels)
    for _ in range(2):  # raises where a graph is kept from one call to the next
        call(model, given).sum().backward()
    return not torch.equal(given, ids) or not torch.equal(given_labels, labels)


def breaks_kernels(build: Callable[[], nn.Module]) -> bool:
    """Eager and fused attention agree."""
    model = make(build)
    field = {"attn_implementation": ("eager", "sdpa"), "flash": (False, True)}
    name = next((name for name in field if hasattr(model.config, name)), None)
    if name is None:
        return False
    there = next(value for value in field[name] if value != getattr(model.config, name))
    other = type(model)(dataclasses.replace(model.config, **{name: there})).double().eval()
    other.load_state_dict(model.state_dict(), strict=False)
    ids = ids_for(model)
    return differ(call(model, ids), call(other, ids))


def breaks_gradients(build: Callable[[], nn.Module]) -> bool:
    """Each parameter has a gradient, also with frozen embeddings, and the gradients are the derivative."""
    plain = make(build, loud=False).train()
    ids = ids_for(plain)
    rows = ids_for(plain, batch=4, seq_len=24)
    F.cross_entropy(call(plain, rows).flatten(0, 1), changed(rows, plain).flatten()).backward()
    for parameter in plain.parameters():
        if parameter.grad is None or not parameter.grad.abs().max() > 1e-12:
            return True
    for module in plain.modules():
        if isinstance(module, nn.Embedding) and not getattr(plain.config, "tie_word_embeddings", hasattr(plain, "transformer")):
            module.requires_grad_(False)
    plain.zero_grad()
    with warnings.catch_warnings(action="ignore"):  # of reentrant checkpointing; its gradients are looked at below
        F.cross_entropy(call(plain, ids).flatten(0, 1), changed(ids, plain).flatten()).backward()
    if any(parameter.requires_grad and parameter.grad is None for parameter in plain.parameters()):
        return True

    model = make(build)
    weight = torch.randn(*ids.shape, vocab_of(model), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    value = (call(model, ids) * weight).mean()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(value, parameters)
    # Along the gradient itself in all weights and in the first, and along chance in the first layer's matrices: a part of a
    # gradient that is missing altogether does not show along what is left of it.
    first_layer = [i for i, (name, p) in enumerate(model.named_parameters()) if ".0." in name and p.ndim == 2][:3]
    generator = torch.Generator().manual_seed(6)
    directions = [(range(len(parameters)), gradients), ([0], gradients[:1])]
    directions += [([i], [torch.randn(parameters[i].shape, generator=generator, dtype=torch.float64)]) for i in first_layer]
    for chosen, direction in directions:
        length = math.sqrt(sum(d.square().sum().item() for d in direction))
        slope = sum((gradients[i] * d).sum().item() for i, d in zip(chosen, direction, strict=True)) / length
        usual = math.sqrt(sum(gradients[i].square().sum().item() for i in chosen))
        if direction[0] is not gradients[0]:
            usual /= math.sqrt(direction[0].numel())
        step, values = 1e-3, []
        with torch.no_grad():
            for move in (step, -2 * step, step):
                for i, d in zip(chosen, direction, strict=True):
                    parameters[i].add_(d, alpha=move / length)
                values.append((call(model, ids) * weight).mean().item())
        if abs((values[0] - values[1]) / (2 * step) - slope) > 0.05 * usual:
            return True
    return False


def breaks_lifecycle(build: Callable[[], nn.Module]) -> bool:
    """deepcopy, and a build on meta + to_empty (filled with NaN) + load_state_dict, give the same model, tied where it was."""
    model = make(build)
    ids = ids_for(model)
    expected = call(model, ids)
    if differ(call(copy.deepcopy(model), ids), expected):
        return True
    with torch.device("meta"):
        empty = build()
    torch.use_deterministic_algorithms(True)  # to_empty() then fills with NaN
    try:
        empty.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    empty = empty.double().eval()
    empty.load_state_dict(model.state_dict())
    memories = {len({p.data_ptr() for _, p in m.named_parameters(remove_duplicate=False)}) for m in (model, empty)}
    return differ(call(empty, ids), expected) or len(memories) > 1 or not is_tied(empty)


def is_tied(model: nn.Module) -> bool:
    """Whether a model whose config ties really is one parameter in embedding and head."""
    wanted = getattr(model.config, "tie_word_embeddings", is_nanogpt(model))
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    return not wanted or model.lm_head.weight is embedding.weight


def breaks_structure(build: Callable[[], nn.Module]) -> bool:
    """The layers are registered, and casting the model casts all of it."""
    model = build()
    layers = getattr(model.config, "num_hidden_layers", getattr(model.config, "n_layer", getattr(model.config, "n_layers", 0)))
    per_layer = sum(1 for _ in model.parameters())
    return per_layer < 5 * layers or not is_tied(model)


def breaks_position(build: Callable[[], nn.Module]) -> bool:
    """Logits depend on distances and on nothing else of position_ids."""
    model = make(build)
    if "position_ids" not in names(model):
        return False
    ids = ids_for(model)
    positions = torch.arange(SEQ_LEN).expand(BATCH, -1)
    expected = call(model, ids)
    shifted = call(model, ids, position_ids=positions + 37)
    stretched = call(model, ids, position_ids=positions * 3)
    return differ(shifted, expected) or not differ(stretched, expected)


def breaks_precision(build: Callable[[], nn.Module]) -> bool:
    """A cast to bfloat16 and back leaves tables alone; float16 survives activations of 600."""
    torch.manual_seed(0)
    model = build().eval()
    tables = {name: value.clone() for name, value in model.named_buffers() if name not in model.state_dict()}
    cast = copy.deepcopy(model).to(torch.bfloat16)
    for name, value in cast.named_buffers():
        if name in tables and differ(value if value.is_complex() else value.float(), tables[name]):
            return True
    with torch.no_grad():
        embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
        if getattr(getattr(model, "lm_head", None), "weight", None) is not embedding.weight:
            embedding.weight.mul_(600 / embedding.weight.std())
            ids = ids_for(model)
            half = call(copy.deepcopy(model).half(), ids).float()
            full = call(model, ids)
            return not (half - full).abs().max() < 0.1 * full.abs().max()
    return False


def breaks_window(build: Callable[[], nn.Module]) -> bool:
    """One sliding layer alone sees exactly config.sliding_window tokens, itself counted."""
    model = make(build)
    window = getattr(model.config, "sliding_window", getattr(model.config, "sliding_window_size", None))
    if window is None:
        return False
    one = {"n_layer": 1} if hasattr(model.config, "n_layer") else {"num_hidden_layers": 1, "layer_types": ("sliding_attention",)}
    config = dataclasses.replace(model.config, **one)
    single = make(lambda: type(model)(config))
    ids = ids_for(single)
    other = ids.clone()
    other[:, 0] = changed(ids, single)[:, 0]
    moved = (call(single, ids) - call(single, other)).abs().amax(dim=(0, 2)) > TOLERANCE
    return moved.tolist() != [position < window for position in range(SEQ_LEN)]


def breaks_packing(build: Callable[[], nn.Module]) -> bool:
    model = make(build)
    if "document_ids" not in names(model):
        return False
    ids = ids_for(model)
    starts = torch.tensor([3, 5, 7])
    documents = (torch.arange(SEQ_LEN) >= starts[:, None]).long()
    packed = call(model, ids, document_ids=documents)
    return any(differ(packed[row, start:], call(model, ids[row : row + 1, start:])[0]) for row, start in enumerate(starts.tolist()))


def breaks_device(build: Callable[[], nn.Module]) -> bool:
    """The whole forward runs on another device: meta."""
    with torch.device("meta"):
        model = build()
    try:
        call(model, torch.zeros(BATCH, SEQ_LEN, dtype=torch.long, device="meta"))
    except (RuntimeError, AssertionError):
        return True
    return False


RULES: dict[str, Callable[[Callable[[], nn.Module]], bool]] = {
    "causality": breaks_causality,
    "mask": breaks_mask,
    "batch": breaks_batch,
    "padding": breaks_padding,
    "cache": breaks_cache,
    "loss": breaks_loss,
    "determinism": breaks_determinism,
    "state": breaks_state,
    "kernels": breaks_kernels,
    "gradients": breaks_gradients,
    "lifecycle": breaks_lifecycle,
    "structure": breaks_structure,
    "position": breaks_position,
    "precision": breaks_precision,
    "window": breaks_window,
    "packing": breaks_packing,
    "device": breaks_device,
}
DEAR = ("gradients", "lifecycle", "state", "device")  # a tenth of a second each


def names(model: nn.Module) -> tuple[str, ...]:
    """The argument names of a model's forward."""
    code = type(model).forward.__code__
    return code.co_varnames[: code.co_argcount]


def dropout_of(model: nn.Module) -> float:
    return max((m.p for m in model.modules() if isinstance(m, nn.Dropout)), default=0.0)


def broken(rule: str, build: Callable[[], nn.Module]) -> bool:
    """Whether a model breaks a rule; raising is breaking it."""
    try:
        with contextlib.nullcontext() if rule in ("gradients", "state") else torch.no_grad():
            return RULES[rule](build)
    except (RuntimeError, IndexError, AssertionError, ValueError):
        return True


# --------------------------------------------------------------------------------------------------------------------------------
# the corpus


def test_names_are_unique_and_every_style_has_its_share() -> None:
    everything = catalog.MUTANTS + catalog.NEUTRAL
    assert len({m.name for m in everything}) == len(everything)
    for style in CLEAN:
        assert sum(m.base == style for m in catalog.MUTANTS) >= 12
    assert len(catalog.NEUTRAL) >= 25


def test_every_row_of_the_corpus_has_a_mutant_or_a_reason() -> None:
    coverage = load(HERE / "coverage.py")
    rows = {row for m in catalog.MUTANTS for row in m.row.split(",") if row}
    assert len(coverage.ROWS) == len(set(coverage.ROWS)) == 125
    assert rows | coverage.LEFT_OUT.keys() == set(coverage.ROWS)
    assert not rows & coverage.LEFT_OUT.keys()


def test_every_edit_applies_once_and_every_function_named_exists() -> None:
    for mutant in catalog.MUTANTS + catalog.NEUTRAL:
        text = catalog.source(mutant)  # raises where an edit does not apply exactly once
        compile(text, mutant.name, "exec")
        assert f"def {mutant.build}(" in text
        for place in (mutant.function, *mutant.also):
            for part in place.split(".") if place else ():
                assert f"def {part}(" in text or f"class {part}" in text, (mutant.name, place)


@pytest.mark.parametrize("mutant", [m for m in catalog.MUTANTS if m.loud], ids=lambda m: m.name)
def test_loud_mutants_raise(mutant: Any, tmp_path: Path) -> None:
    model = getattr(load(catalog.materialize(mutant, tmp_path)), mutant.build)()
    with pytest.raises((RuntimeError, AssertionError)):
        call(model, ids_for(model))


@pytest.mark.parametrize(("style", "build"), CLEAN_BUILDS)
def test_clean_models_keep_the_rules(style: str, build: str) -> None:
    rules = [rule for rule in RULES if build == "build" or rule not in DEAR]
    assert [rule for rule in rules if broken(rule, getattr(CLEAN[style], build))] == []


@pytest.mark.slow
@pytest.mark.parametrize(("style", "build"), CLEAN_BUILDS)
def test_clean_models_keep_the_dear_rules_in_every_build(style: str, build: str) -> None:
    assert [rule for rule in DEAR if broken(rule, getattr(CLEAN[style], build))] == []


# Legal, and yet against a rule that only the clean idiom promises.
EXCUSED = {
    "nanogpt/untied": {"structure", "lifecycle"},  # it has a tie_weights that does nothing
    "lit/tied": {"lifecycle"},  # to_empty unties it, and a warning says so
    "lit/labels-aligned-by-the-loader": {"loss"},  # the rule shifts them once more
    "hf/norm-after-branch": {"precision"},  # activations of 600 reach the projections, which float16 does not hold
}


@pytest.mark.parametrize("neutral", catalog.NEUTRAL, ids=lambda m: m.name)
def test_neutral_variants_are_causal_and_safe_in_batches_and_padding(neutral: Any, tmp_path: Path) -> None:
    build = getattr(load(catalog.materialize(neutral, tmp_path)), neutral.build)
    assert [rule for rule in ("causality", "batch", "padding") if broken(rule, build)] == []


@pytest.mark.slow
@pytest.mark.parametrize("neutral", catalog.NEUTRAL, ids=lambda m: m.name)
def test_neutral_variants_keep_every_rule(neutral: Any, tmp_path: Path) -> None:
    build = getattr(load(catalog.materialize(neutral, tmp_path)), neutral.build)
    assert {rule for rule in RULES if broken(rule, build)} - EXCUSED.get(neutral.name, set()) == set()


# Judged against the config, an init formula or low-precision values, which the rules above do not look at.
SHOWN_BY_CONFIG_OR_VALUES = frozenset(
    [
        "hf/scale-by-hidden-size",
        "hf/scaled-twice",
        "hf/final-softcap-missing",
        "hf/attention-softcap-missing",
        "hf/activation-left-out",
        "hf/positions-in-model-dtype",
        "hf/rope-theta-ignored",
        "hf/attention-factor-twice",
        "hf/partial-rotary-exponent",
        "hf/rope-scaling-ignored",
        "hf/eps-ignored",
        "hf/wrong-activation",
        "hf/residual-overwritten-by-norm",
        "hf/pad-token-outside",
        "hf/zero-embedding-rows",
        "hf/embedding-scaled-for-ids-only",
        "hf/residual-init-never-applied",
        "hf/residual-init-twice",
        "hf/init-never-called",
        "nanogpt/mixed-rope-styles",
        "nanogpt/phase-in-bfloat16",
        "nanogpt/unbiased-std",
        "nanogpt/residual-overwritten-by-norm",
        "nanogpt/residual-forgotten",
        "nanogpt/loss-over-padded-vocabulary",
        "nanogpt/residual-init-never-applied",
        "nanogpt/init-never-called",
        "nanogpt/init-too-large",
        "llama/scale-by-width",
        "llama/scale-missing",
        "llama/frequencies-in-bfloat16",
        "llama/rope-theta-ignored",
        "llama/table-too-short",
        "llama/eps-ignored",
        "llama/residual-overwritten-by-norm",
        "llama/router-weights-renormalised",
        "llama/residual-init-on-w3",
        "llama/residual-init-twice",
        "llama/init-never-called",
        "hf/norm-without-division",
        "llama/norm-result-unused",
        "llama/norm-without-division",
        "lit/softcap-in-softmax-bf16",
        "lit/scale-by-embedding",
        "lit/keys-turned-backwards",
        "lit/values-rotated-too",
        "lit/rope-base-ignored",
        "lit/partial-rotary-exponent",
        "lit/angles-in-bfloat16",
        "lit/eps-inside-config-ignored",
        "lit/normed-residual",
        "lit/parallel-residual-forgotten",
        "lit/residual-init-on-the-wrong-name",
    ]
)


# Built with sdpa, and right there.
SHOWN_BY_EAGER_ATTENTION = frozenset(["hf/dropout-rate-forgotten-eager", "hf/raises-in-eager-alone"])


def in_training(build: Callable[[], nn.Module], attention: str) -> bool:
    """Whether a model runs in train mode, and repeats itself, with this attention."""
    model = build().train()
    set_attention(model, attention)
    try:
        return torch.equal(call(model, ids_for(model)), call(model, ids_for(model)))
    except UnboundLocalError:
        return False


def fingerprint(build: Callable[[], nn.Module]) -> list[object]:
    """What a model is: its config, its weights at the start, its logits in three dtypes at two places."""
    torch.manual_seed(0)
    model = build().eval()
    ids = ids_for(model)
    seen: list[object] = [dataclasses.astuple(model.config), [p.double().std().item() for p in model.parameters() if p.numel() > 1]]
    far = {"position_ids": torch.arange(500, 500 + SEQ_LEN).expand(BATCH, -1)} if hasattr(model, "model") else {}
    for dtype in (torch.float32, torch.bfloat16):
        for arguments in ({}, far):
            with torch.no_grad():
                seen.append(call(copy.deepcopy(model).to(dtype), ids, **arguments).double().tolist())
    if "labels" in names(model):
        with torch.no_grad():
            seen.append(model(ids, labels=ids).loss.item())
    try:
        seen.append(call(model, ids_for(model, batch=1, seq_len=60)).double().sum().item())
    except (AssertionError, RuntimeError) as error:
        seen.append(type(error).__name__)
    return seen


@pytest.mark.parametrize("mutant", [m for m in catalog.MUTANTS if not m.loud], ids=lambda m: m.name)
def test_mutants_break_a_rule_of_theirs_or_at_least_differ(mutant: Any, tmp_path: Path) -> None:
    build = getattr(load(catalog.materialize(mutant, tmp_path)), mutant.build)
    if mutant.name in SHOWN_BY_EAGER_ATTENTION:
        assert in_training(build, "sdpa") and not in_training(build, "eager")
    elif mutant.name in SHOWN_BY_CONFIG_OR_VALUES:
        assert fingerprint(build) != fingerprint(getattr(CLEAN[mutant.base], mutant.build))
    else:
        rules = [topic for topic in mutant.topics if topic in RULES]
        assert any(broken(rule, build) for rule in rules), f"breaks none of {rules}"


# --------------------------------------------------------------------------------------------------------------------------------
# the reconstructions in bugs/


def repaired(tmp_path: Path, name: str, *edits: tuple[str, str]) -> ModuleType:
    """A file of bugs/ with its one bug mended."""
    text = (HERE / "bugs" / f"{name}.py").read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / f"{name}_repaired.py"
    path.write_text(text)
    return load(path)


def olmo_rules(module: ModuleType, build: str = "build") -> list[str]:
    """The rules that a model of bugs/ breaks; it returns a dict, the rules read attributes."""
    return [rule for rule in RULES if broken(rule, getattr(module, build))]


def test_inv_freq_twice_is_only_that(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="inv_freq"):
        load(HERE / "bugs" / "inv_freq_twice.py").build()
    module = repaired(
        tmp_path,
        "inv_freq_twice",
        ("        self.inv_freq = 1.0 /", "        inv_freq = 1.0 /"),
        ('register_buffer("inv_freq", self.inv_freq)', 'register_buffer("inv_freq", inv_freq)'),
    )
    assert olmo_rules(module) == []


def test_vocab_too_small_is_only_that() -> None:
    module = load(HERE / "bugs" / "vocab_too_small.py")
    ids = torch.tensor([[1, 17, 50279]])
    for size in (50254, 50257):
        with pytest.raises(IndexError):
            getattr(module, f"build_{size}")()(ids)
    for size in (50280, 50304):
        assert getattr(module, f"build_{size}")()(ids)["logits"].shape == (1, 3, size)
    assert [rule for rule in ("causality", "batch", "loss") if broken(rule, module.build_50280)] == []


def test_short_rope_table_is_only_that(tmp_path: Path) -> None:
    module = load(HERE / "bugs" / "short_rope_table.py")
    assert module.build()(torch.zeros(1, 32, dtype=torch.long))["logits"].shape[1] == 32
    with pytest.raises(RuntimeError, match="32"):
        module.build()(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(RuntimeError, match="dimension 1"):
        module.build_two_dimensional_index()(torch.zeros(3, 7, dtype=torch.long))
    module = repaired(
        tmp_path,
        "short_rope_table",
        ("max_len=32", "max_len=128"),
        (
            "        return self.cos[position_ids], self.sin[position_ids]\n",
            "        return self.cos[position_ids].unsqueeze(1), self.sin[position_ids].unsqueeze(1)\n",
        ),
        ("max_len=config.max_position_embeddings", "max_len=128"),
    )
    assert olmo_rules(module) == []
    assert olmo_rules(module, "build_two_dimensional_index") == []


def test_mask_added_is_only_that(tmp_path: Path) -> None:
    module = load(HERE / "bugs" / "mask_added.py")
    assert not breaks_causality(module.build_loud)
    assert breaks_causality(module.build_repaired)
    with pytest.raises(RuntimeError, match="must match"):
        module.build_loud()(torch.zeros(3, 7, dtype=torch.long), torch.ones(3, 7))
    module.build_loud()(torch.zeros(7, 7, dtype=torch.long), torch.ones(7, 7))
    keep = "scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)"
    added = "        if attention_mask is not None:\n            scores = scores + attention_mask"
    causal = '        scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf"))\n'
    module = repaired(
        tmp_path,
        "mask_added",
        (f"{added}\n", f"        if attention_mask is not None:\n            {keep}\n"),
        (f"{added}[:, None, None, :]\n", f"{causal}        if attention_mask is not None:\n            {keep}\n"),
    )
    assert olmo_rules(module, "build_loud") == []
    assert set(olmo_rules(module, "build_repaired")) <= {"device"}  # our own repair leaves the device out
