"""The reference model against transformers', from the same weights, and on its own."""

import copy
import inspect
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from olmodebug.model import KVCache, LayerType, Olmo, OlmoConfig, OlmoRMSNorm, OlmoRotaryEmbedding, YarnScaling

PAD = 1

OLMO1 = OlmoConfig(
    vocab_size=59,
    hidden_size=48,
    intermediate_size=52,
    num_hidden_layers=3,
    num_attention_heads=6,
    max_position_embeddings=64,
    norm="layer_norm",
    norm_eps=1e-5,
    pad_token_id=PAD,
)
DATADECIDE = replace(OLMO1, norm="rms_norm", norm_eps=1e-6, norm_casts_before_weight=True)
OLMO2 = replace(OLMO1, norm="rms_norm", norm_eps=1e-6, norm_position="post", qk_norm=True, rope_theta=500000.0)
OLMO2_GROUPED = replace(OLMO2, num_key_value_heads=2)
OLMO3 = replace(
    OLMO2_GROUPED,
    rope_theta=100.0,
    rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=64),
    sliding_window=5,
    layer_types=("sliding_attention", "full_attention", "sliding_attention"),
)
CONFIGS = {
    "olmo1": OLMO1,
    "olmo1-clipped-tied": replace(OLMO1, clip_qkv=0.3, tie_word_embeddings=True),
    "datadecide": DATADECIDE,
    "datadecide-grouped": replace(DATADECIDE, num_key_value_heads=3),
    "olmo2": OLMO2,
    "olmo2-grouped": OLMO2_GROUPED,
    "olmo3": OLMO3,
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
every_implementation = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
one_of_each_generation = pytest.mark.parametrize("config", [OLMO1, DATADECIDE, OLMO2, OLMO3], ids=["olmo1", "datadecide", "olmo2", "olmo3"])

# Measured on these models on one thread, logits up to 1.6: 0.0 in float32, both implementations. Over 56 other shapes
# it was at most 7.7e-6, and a fault is 1e-3 or more, as test_the_comparison_with_transformers_can_fail shows.
LOGITS_ATOL = 1e-5
# Measured 4.7e-7. It is not 1e-15 because transformers computes norms, RoPE, softmax and loss in float32 there too.
LOGITS_ATOL_FLOAT64 = 2e-6
# Measured 4.0e-7 at gradients up to 0.97, where transformers gives grouped heads to sdpa and we repeat them; else 1e-7.
GRADIENT_ATOL = 5e-6
# Two runs of ours in float64 differ by the order of sums alone.
FLOAT64_ATOL = 1e-12


def transformers_model(config: OlmoConfig) -> Any:
    """transformers' class for a configuration of ours, with random weights of a size that shows every norm and clip."""
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": config.attn_implementation,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    torch.manual_seed(0)
    name: str
    extra: dict[str, Any]
    if config.norm == "layer_norm":
        name, extra = "Olmo", {"clip_qkv": config.clip_qkv, "rope_parameters": rope}
    elif config.norm_position == "pre":
        name, extra = "Llama", {"rms_norm_eps": config.norm_eps, "rope_parameters": rope}
    elif config.rope_scaling is None:
        name, extra = "Olmo2", {"rms_norm_eps": config.norm_eps, "rope_parameters": rope}
    else:
        yarn = config.rope_scaling
        # Flat rope_parameters of type yarn are silently ignored by Olmo3Config (transformers 5.23).
        stretched = {
            "rope_type": "yarn",
            "rope_theta": config.rope_theta,
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
        }
        name = "Olmo3"
        extra = {
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": {"full_attention": stretched, "sliding_attention": rope},
            "sliding_window": config.sliding_window,
            "layer_types": list(config.layer_types),
        }
    theirs = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**common, **extra))
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.05 * noise)
    return theirs.eval()


def both(config: OlmoConfig, dtype: torch.dtype = torch.float32) -> tuple[Olmo, Any]:
    """Our model and transformers' with the same weights: strictly loaded, no converter."""
    theirs = transformers_model(config)
    ours = Olmo(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    tables = {name: buffer.clone() for name, buffer in theirs.named_buffers()}
    ours.to(dtype).eval()
    theirs.to(dtype)
    for name, buffer in tables.items():
        # .to(bfloat16) rounds transformers' inv_freq, which from_pretrained(dtype=torch.bfloat16) keeps in float32.
        module, _, attribute = name.rpartition(".")
        setattr(theirs.get_submodule(module), attribute, buffer)
    return ours, theirs


def random_ids(*shape: int, seed: int = 1, vocab_size: int = 59) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def padding_mask(lengths: list[int], side: str) -> Tensor:
    """1 at the real tokens of rows of these lengths, padded to the longest."""
    rows = torch.arange(max(lengths)).expand(len(lengths), -1)
    kept = torch.tensor(lengths)[:, None]
    return (rows < kept if side == "right" else rows >= max(lengths) - kept).long()


def small_model(config: OlmoConfig, dtype: torch.dtype = torch.float64) -> Olmo:
    """Ours alone, with weights large enough that every part matters."""
    model = Olmo(config, generator=torch.Generator().manual_seed(0)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def largest_difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return float((left.detach().double() - right.detach().double()).abs().max())


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_config
def test_logits_loss_and_every_gradient_equal_transformers(config: OlmoConfig, dtype: torch.dtype, attn_implementation: Any) -> None:
    ours, theirs = both(replace(config, attn_implementation=attn_implementation), dtype)
    input_ids = random_ids(2, 13)
    input_ids[0, 3] = PAD
    labels = input_ids.clone()
    labels[1, 4:7] = -100

    observed, expected = ours(input_ids, labels=labels), theirs(input_ids, labels=labels)
    atol = LOGITS_ATOL_FLOAT64 if dtype == torch.float64 else LOGITS_ATOL
    assert observed.logits.dtype == dtype
    assert largest_difference(observed.logits, expected.logits) < atol
    assert largest_difference(observed.loss, expected.loss) < atol

    observed.loss.backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert largest_difference(parameter.grad, gradients[name]) < GRADIENT_ATOL, name
        assert parameter.grad.abs().max() > 1e-4, name


@every_implementation
@pytest.mark.parametrize("config", [OLMO1, OLMO2_GROUPED, OLMO3], ids=["olmo1", "olmo2-grouped", "olmo3"])
def test_bfloat16_equals_transformers_bit_for_bit(config: OlmoConfig, attn_implementation: Any) -> None:
    """Llama is left out: it rounds RoPE's cosines to bfloat16, where ai2-olmo, the ladder's own code, keeps float32."""
    ours, theirs = both(replace(config, attn_implementation=attn_implementation), torch.bfloat16)
    input_ids = random_ids(2, 13)
    observed = ours(input_ids, labels=input_ids)
    expected = theirs(input_ids, labels=input_ids)
    assert observed.logits.dtype == torch.bfloat16
    assert torch.equal(observed.logits, expected.logits)
    assert torch.equal(observed.loss, expected.loss)


def test_norms_round_in_bfloat16_as_their_generation_does() -> None:
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    hidden_states = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = (1 + 0.2 * torch.randn(48, generator=torch.Generator().manual_seed(1))).bfloat16()
    outputs = []
    for config, norm_class in ((DATADECIDE, LlamaRMSNorm), (OLMO2, Olmo2RMSNorm)):
        ours, theirs = OlmoRMSNorm(48, config), norm_class(48, eps=config.norm_eps)
        for norm in (ours, theirs):
            norm.weight = nn.Parameter(weight)
        assert torch.equal(ours(hidden_states), theirs(hidden_states))
        outputs.append(ours(hidden_states))
    assert not torch.equal(*outputs)


def cache_name(model: Any) -> str:
    """What transformers calls the cache: `cache` from 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@every_implementation
@pytest.mark.parametrize("chunks", [[9, 1, 1, 1, 1], [1, 5, 2, 4, 1]], ids=str)
@every_config
def test_cached_decoding_equals_transformers(config: OlmoConfig, chunks: list[int], attn_implementation: Any) -> None:
    ours, theirs = both(replace(config, attn_implementation=attn_implementation))
    input_ids = random_ids(3, sum(chunks))
    our_cache, their_cache = None, None
    for chunk in input_ids.split(chunks, dim=1):
        observed = ours(chunk, past_key_values=our_cache, use_cache=True)
        expected = theirs(chunk, **{cache_name(theirs): their_cache}, use_cache=True)
        assert largest_difference(observed.logits, expected.logits) < LOGITS_ATOL
        our_cache, their_cache = observed.past_key_values, expected[cache_name(theirs)]
    assert our_cache is not None
    assert our_cache.seq_length == sum(chunks)


@every_implementation
@pytest.mark.parametrize("side", ["left", "right"])
@every_config
def test_padded_batches_equal_transformers(config: OlmoConfig, side: str, attn_implementation: Any) -> None:
    ours, theirs = both(replace(config, attn_implementation=attn_implementation))
    input_ids = random_ids(3, 13)
    attention_mask = padding_mask([13, 4, 8], side)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    observed = ours(input_ids, attention_mask, position_ids).logits
    expected = theirs(input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
    real = attention_mask.bool()
    assert largest_difference(observed[real], expected[real]) < LOGITS_ATOL


@pytest.mark.parametrize("config", [OLMO1, OLMO3], ids=["olmo1", "olmo3"])
def test_left_padded_decoding_equals_transformers(config: OlmoConfig) -> None:
    ours, theirs = both(config)
    input_ids, attention_mask = random_ids(3, 13), padding_mask([13, 4, 8], "left")
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    our_cache, their_cache = None, None
    for start, end in [(0, 10), (10, 11), (11, 13)]:
        arguments = {"attention_mask": attention_mask[:, :end], "position_ids": position_ids[:, start:end]}
        observed = ours(input_ids[:, start:end], **arguments, past_key_values=our_cache, use_cache=True)
        expected = theirs(input_ids[:, start:end], **arguments, **{cache_name(theirs): their_cache}, use_cache=True)
        real = attention_mask[:, start:end].bool()
        assert largest_difference(observed.logits[real], expected.logits[real]) < LOGITS_ATOL
        our_cache, their_cache = observed.past_key_values, expected[cache_name(theirs)]


def test_default_positions_count_from_the_cache_and_not_from_the_mask_as_in_transformers() -> None:
    ours, theirs = both(OLMO1)
    input_ids, attention_mask = random_ids(2, 9), padding_mask([9, 4], "left")
    observed = ours(input_ids, attention_mask).logits[attention_mask.bool()]
    expected = theirs(input_ids, attention_mask=attention_mask).logits[attention_mask.bool()]
    assert largest_difference(observed, expected) < LOGITS_ATOL


def wrong_theta(config: OlmoConfig, weights: dict[str, Tensor]) -> OlmoConfig:
    return replace(config, rope_theta=7 * config.rope_theta)


def wrong_eps(config: OlmoConfig, weights: dict[str, Tensor]) -> OlmoConfig:
    return replace(config, norm_eps=1e-3)


def wrong_window(config: OlmoConfig, weights: dict[str, Tensor]) -> OlmoConfig:
    return replace(config, sliding_window=6)


def no_yarn(config: OlmoConfig, weights: dict[str, Tensor]) -> OlmoConfig:
    return replace(config, rope_scaling=None)


def no_clip(config: OlmoConfig, weights: dict[str, Tensor]) -> OlmoConfig:
    return replace(config, clip_qkv=None)


def gate_for_up(config: OlmoConfig, weights: dict[str, Tensor]) -> OlmoConfig:
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    weights[gate], weights[up] = weights[up], weights[gate]
    return config


def queries_for_keys(config: OlmoConfig, weights: dict[str, Tensor]) -> OlmoConfig:
    query, key = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    weights[query], weights[key] = weights[key], weights[query]
    return config


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (OLMO1, wrong_theta),
        (OLMO1, wrong_eps),
        (OLMO1, gate_for_up),
        (OLMO1, queries_for_keys),
        (CONFIGS["olmo1-clipped-tied"], no_clip),
        (DATADECIDE, wrong_eps),
        (OLMO2, gate_for_up),
        (OLMO3, wrong_theta),
        (OLMO3, wrong_window),
        (OLMO3, no_yarn),
    ],
)
def test_the_comparison_with_transformers_can_fail(config: OlmoConfig, fault: Any) -> None:
    theirs = transformers_model(config)
    weights = dict(theirs.state_dict())
    ours = Olmo(fault(config, weights)).eval()
    ours.load_state_dict(weights, strict=True)
    input_ids = random_ids(2, 13)
    assert largest_difference(ours(input_ids).logits, theirs(input_ids).logits) > 100 * LOGITS_ATOL


def test_a_missing_or_surplus_weight_does_not_load() -> None:
    weights = transformers_model(OLMO2).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*q_norm"):
        Olmo(replace(OLMO2, qk_norm=False)).load_state_dict(weights)
    with pytest.raises(RuntimeError, match=r"Missing key.*input_layernorm"):
        Olmo(replace(OLMO2, norm_position="pre")).load_state_dict(weights)


def test_published_yarn_frequencies_equal_transformers_and_the_formula() -> None:
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    yarn = YarnScaling(factor=8.0, original_max_position_embeddings=8192)
    config = replace(OLMO3, hidden_size=6 * 128, rope_theta=500000.0, rope_scaling=yarn)
    rotary_emb = OlmoRotaryEmbedding(config, yarn)
    assert rotary_emb.attention_factor == 1.2079441541679836

    theirs = transformers.Olmo3Config(
        hidden_size=6 * 128,
        num_attention_heads=6,
        num_hidden_layers=1,
        max_position_embeddings=65536,
        layer_types=["full_attention"],
        rope_theta=500000.0,
        rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu", layer_type="full_attention")
    assert torch.equal(rotary_emb.inv_freq, inv_freq)
    assert attention_factor == rotary_emb.attention_factor

    # Pairs that turn 32 times or more over 8192 positions are kept, those below one turn are stretched by 8.
    plain = 500000.0 ** -(torch.arange(64, dtype=torch.float64) / 64)
    turns = 8192 * plain / (2 * torch.pi)
    ratio = rotary_emb.inv_freq.double() / plain
    assert ratio[turns > 40].sub(1).abs().max() < 1e-6
    assert ratio[turns < 0.8].sub(1 / 8).abs().max() < 1e-6
    assert (ratio[:-1] - ratio[1:] > -1e-6).all()


@every_config
def test_eager_attention_equals_sdpa_with_and_without_padding(config: OlmoConfig) -> None:
    eager = small_model(replace(config, attn_implementation="eager"))
    sdpa = small_model(replace(config, attn_implementation="sdpa"))
    input_ids = random_ids(3, 13)
    for attention_mask in (None, padding_mask([13, 4, 8], "left"), padding_mask([13, 4, 8], "right")):
        observed, expected = eager(input_ids, attention_mask).logits, sdpa(input_ids, attention_mask).logits
        assert largest_difference(observed, expected) < FLOAT64_ATOL


@every_implementation
@pytest.mark.parametrize("side", ["left", "right"])
@one_of_each_generation
def test_a_padded_row_equals_the_row_alone_also_when_decoded_with_a_cache(config: OlmoConfig, side: str, attn_implementation: Any) -> None:
    model = small_model(replace(config, attn_implementation=attn_implementation))
    lengths = [12, 3, 7]
    attention_mask = padding_mask(lengths, side)
    input_ids = random_ids(3, 12)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    next_ids = random_ids(3, 1, seed=2)

    prefill = model(input_ids, attention_mask, position_ids, use_cache=True)
    step = model(
        next_ids,
        torch.cat([attention_mask, torch.ones(3, 1)], dim=1),
        attention_mask.sum(1, keepdim=True),
        prefill.past_key_values,
    )
    for row, length in enumerate(lengths):
        real = attention_mask[row].bool()
        alone = torch.cat([input_ids[row, real], next_ids[row]])[None]
        expected = model(alone).logits[0]
        assert largest_difference(prefill.logits[row, real], expected[:length]) < FLOAT64_ATOL
        if side == "left" or config.sliding_window is None:
            # Right padding stands between the last real token and the next one, and a window counts it.
            assert largest_difference(step.logits[row, 0], expected[length]) < FLOAT64_ATOL


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_implementation
@one_of_each_generation
def test_fully_masked_rows_give_no_nan_forward_or_backward(config: OlmoConfig, attn_implementation: Any, dtype: torch.dtype) -> None:
    model = small_model(replace(config, attn_implementation=attn_implementation), dtype)
    input_ids, attention_mask = random_ids(3, 9), padding_mask([9, 2, 0], "left")
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    output = model(input_ids, attention_mask, labels=labels)
    assert output.logits.isfinite().all()
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@every_implementation
def test_a_query_that_sees_no_key_attends_to_nothing(attn_implementation: Any) -> None:
    model = small_model(replace(OLMO1, attn_implementation=attn_implementation))
    attended: list[Tensor] = []
    model.get_submodule("model.layers.0.self_attn").register_forward_hook(lambda module, inputs, output: attended.append(output))
    model(random_ids(2, 6), padding_mask([6, 4], "left"))
    assert attended[0][1, :2].abs().max() == 0.0
    assert attended[0][1, 2:].abs().amax(-1).min() > 0.0


@every_implementation
def test_a_sliding_window_of_five_sees_five_keys_itself_included(attn_implementation: Any) -> None:
    layer_types: tuple[LayerType, ...] = ("sliding_attention",)
    config = replace(OLMO3, num_hidden_layers=1, layer_types=layer_types, attn_implementation=attn_implementation)
    model = small_model(config)
    # The first layer's input is the embedding itself, so a token is seen by exactly the rows whose logits it changes.
    input_ids = random_ids(1, 13)
    changed = input_ids.clone()
    changed[0, 4] = (changed[0, 4] + 1) % config.vocab_size
    moved = (model(input_ids).logits - model(changed).logits)[0].abs().amax(-1) > 0
    assert moved.nonzero().flatten().tolist() == [4, 5, 6, 7, 8]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    config=st.sampled_from([OLMO1, DATADECIDE, OLMO2, OLMO3]),
    chunks=st.lists(st.integers(min_value=1, max_value=6), min_size=1, max_size=5),
    implementation=st.sampled_from(["eager", "sdpa"]),
)
def test_any_chunking_with_a_cache_equals_one_forward(config: OlmoConfig, chunks: list[int], implementation: Any) -> None:
    model = small_model(replace(config, attn_implementation=implementation))
    input_ids = random_ids(2, sum(chunks))
    cache = KVCache()
    with torch.no_grad():
        pieces = [model(chunk, past_key_values=cache).logits for chunk in input_ids.split(chunks, dim=1)]
        expected = model(input_ids).logits
    assert largest_difference(torch.cat(pieces, dim=1), expected) < FLOAT64_ATOL


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    config=st.sampled_from([OLMO1, DATADECIDE, OLMO2, OLMO3]),
    cut=st.integers(min_value=1, max_value=10),
    offset=st.integers(min_value=1, max_value=1000),
)
def test_logits_depend_on_earlier_tokens_and_on_distances_only(config: OlmoConfig, cut: int, offset: int) -> None:
    model = small_model(config)
    input_ids = random_ids(2, 11)
    changed = input_ids.clone()
    changed[:, cut:] = random_ids(2, 11 - cut, seed=3)
    shifted = torch.arange(11)[None] + offset
    with torch.no_grad():
        expected = model(input_ids).logits
        assert largest_difference(model(changed).logits[:, :cut], expected[:, :cut]) < FLOAT64_ATOL
        # An angle of 1000 radians in float64 is exact to 1e-13.
        assert largest_difference(model(input_ids, position_ids=shifted).logits, expected) < 1e-10
        stretched = model(input_ids, position_ids=3 * torch.arange(11)[None]).logits
        assert largest_difference(stretched, expected) > 1e-4


@every_implementation
@one_of_each_generation
def test_a_float64_model_computes_in_float64_throughout(config: OlmoConfig, attn_implementation: Any) -> None:
    seen: set[torch.dtype] = set()

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            outputs = func(*args, **(kwargs or {}))
            seen.update(leaf.dtype for leaf in _tensors(outputs))
            return outputs

    model = small_model(replace(config, attn_implementation=attn_implementation))
    input_ids = random_ids(2, 7)
    with Dtypes():
        model(input_ids, padding_mask([7, 5], "left"), labels=input_ids).loss.backward()
    assert {dtype for dtype in seen if dtype.is_floating_point} == {torch.float64}


def _tensors(outputs: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.int32, torch.float32], ids=str)
def test_any_dtype_of_mask_means_the_same(mask_dtype: torch.dtype) -> None:
    model, input_ids, attention_mask = small_model(OLMO2), random_ids(2, 9), padding_mask([9, 5], "left")
    expected = model(input_ids, attention_mask).logits
    assert torch.equal(model(input_ids, attention_mask.to(mask_dtype)).logits, expected)


def test_a_mask_of_another_shape_is_refused_with_both_shapes() -> None:
    model = small_model(OLMO1)
    with pytest.raises(ValueError, match=r"expected shape \[2, 9\].*observed \[2, 8\]"):
        model(random_ids(2, 9), torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"expected shape \[2, 9\].*observed \[2, 1, 9, 9\]"):
        model(random_ids(2, 9), torch.ones(2, 1, 9, 9))
    cache = model(random_ids(2, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"expected shape \[2, 6\] \(batch, 5 cached \+ 1 new tokens\)"):
        model(random_ids(2, 1), torch.ones(2, 1), past_key_values=cache)


def test_the_loss_is_the_mean_over_counted_labels_of_the_next_token() -> None:
    model, input_ids = small_model(OLMO2), random_ids(2, 9)
    labels = input_ids.clone()
    labels[0, 2:5] = -100
    output = model(input_ids, labels=labels)
    log_probabilities = output.logits.log_softmax(-1)
    surprises = [
        -log_probabilities[row, position, labels[row, position + 1]]
        for row in range(2)
        for position in range(8)
        if labels[row, position + 1] != -100
    ]
    assert len(surprises) == 2 * 8 - 3
    assert largest_difference(output.loss, sum(surprises, torch.zeros(())) / len(surprises)) < FLOAT64_ATOL


def test_a_batch_without_counted_labels_has_loss_zero_where_transformers_has_nan() -> None:
    ours, theirs = both(OLMO1)
    input_ids, labels = random_ids(2, 5), torch.full((2, 5), -100)
    loss = ours(input_ids, labels=labels).loss
    loss.backward()
    assert loss == 0.0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in ours.parameters())
    assert theirs(input_ids, labels=labels).loss.isnan()


def test_greedy_generation_equals_recomputing_and_left_padding_changes_nothing() -> None:
    model = small_model(OLMO3)
    input_ids, attention_mask = random_ids(3, 7), padding_mask([7, 2, 4], "left")
    generated = model.generate(input_ids, 8, attention_mask)
    assert torch.equal(generated[:, :7], input_ids)
    for row, length in enumerate([7, 2, 4]):
        ids = input_ids[row : row + 1, 7 - length :]
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(generated[row, 7 - length :], ids[0])


def test_tied_weights_are_one_parameter_through_every_move() -> None:
    config = CONFIGS["olmo1-clipped-tied"]
    with torch.device("meta"):
        from_meta = Olmo(config)
    assigned = copy.deepcopy(from_meta)
    from_meta.to_empty(device="cpu")
    assigned.load_state_dict(Olmo(config).state_dict(), assign=True)
    fresh = Olmo(config)
    models = [fresh, from_meta, assigned, copy.deepcopy(fresh), Olmo(config).to(torch.float64)]
    for model in models:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert "lm_head.weight" in model.state_dict()
        assert len({id(parameter) for parameter in model.parameters()}) == len(list(model.parameters()))
    assert assigned(random_ids(1, 5)).logits.isfinite().all()
    untied = Olmo(OLMO1)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@every_config
def test_a_model_built_on_meta_and_reset_equals_one_built_at_once(config: OlmoConfig) -> None:
    expected = Olmo(config, generator=torch.Generator().manual_seed(7))
    with torch.device("meta"):
        model = Olmo(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(torch.nan)
    model.reset_parameters(torch.Generator().manual_seed(7))
    input_ids = random_ids(2, 7)
    assert torch.equal(model(input_ids).logits, expected(input_ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casting_the_model_leaves_the_rope_frequencies_alone(dtype: torch.dtype) -> None:
    model = Olmo(OLMO3)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert sorted(before) == [
        "model.rotary_emb.full_attention.inv_freq",
        "model.rotary_emb.sliding_attention.inv_freq",
    ]
    assert not [name for name in model.state_dict() if "rotary" in name]
    model.to(dtype)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_initial_weights_are_normal_cut_at_three_sigma_with_norms_one_and_a_zero_pad_row() -> None:
    model = Olmo(replace(OLMO2, initializer_range=0.1), generator=torch.Generator().manual_seed(0))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert parameter.abs().max() <= 0.3, name
    # A normal cut at 3 sigma has standard deviation 0.98658.
    drawn = torch.cat([matrix.flatten() for matrix in matrices if matrix is not model.model.embed_tokens.weight])
    assert abs(float(drawn.detach().std()) - 0.098658) < 0.001
    assert not model.model.embed_tokens.weight[PAD].any()
    again = Olmo(replace(OLMO2, initializer_range=0.1), generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(left, right) for left, right in zip(model.parameters(), again.parameters(), strict=True))


def test_the_pad_row_is_trained_only_where_no_pad_token_is_named() -> None:
    input_ids = torch.full((1, 4), PAD)
    for pad_token_id, trained in ((PAD, False), (None, True)):
        model = Olmo(replace(OLMO1, pad_token_id=pad_token_id))
        model(input_ids, labels=random_ids(1, 4)).loss.backward()
        gradient = model.model.embed_tokens.weight.grad
        assert gradient is not None
        assert bool(gradient[PAD].any()) == trained


@every_implementation
@one_of_each_generation
def test_the_model_runs_on_meta_and_fake_tensors_under_autocast_and_compiled(config: OlmoConfig, attn_implementation: Any) -> None:
    config = replace(config, attn_implementation=attn_implementation)
    input_ids, attention_mask = random_ids(2, 7), padding_mask([7, 5], "left")
    model = Olmo(config).train()
    expected = model(input_ids, attention_mask, labels=input_ids)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids, attention_mask, labels=input_ids)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert largest_difference(output.logits, expected.logits) < 0.02 * float(expected.logits.detach().abs().max())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own use of itself while it compiles
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert largest_difference(compiled(input_ids, attention_mask).logits, expected.logits) < LOGITS_ATOL
    torch.compiler.reset()

    with FakeTensorMode():
        fake = Olmo(config)(torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 7))
        assert fake.logits.shape == (2, 7, config.vocab_size)
    with torch.device("meta"):
        meta = Olmo(config)(torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 7), labels=torch.zeros(2, 7).long())
        assert meta.logits.shape == (2, 7, config.vocab_size)
        assert meta.loss.is_meta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 50}, "hidden_size: expected a positive multiple of num_attention_heads 6, observed 50"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: expected a divisor of num_attention_heads 6, observed 4"),
        ({"num_attention_heads": 0}, "hidden_size: expected a positive multiple of num_attention_heads 0"),
        ({"hidden_size": 54}, "head_dim: expected an even number, because RoPE rotates pairs, observed 9"),
        ({"num_hidden_layers": 2}, "layer_types: expected 2 of full_attention or sliding_attention, one a layer"),
        ({"layer_types": ("full",) * 3}, "layer_types: expected 3 of full_attention or sliding_attention"),
        ({"layer_types": ("sliding_attention",) * 3}, "sliding_window: expected at least 1 .* observed None"),
        ({"pad_token_id": 59}, "pad_token_id: expected an id below vocab_size 59, observed 59"),
        ({"vocab_size": 0, "pad_token_id": None}, "vocab_size: expected at least 1, observed 0"),
        ({"norm": "rmsnorm"}, "norm: expected layer_norm or rms_norm, observed 'rmsnorm'"),
        ({"norm_position": "sandwich"}, "norm_position: expected pre or post, observed 'sandwich'"),
        ({"attn_implementation": "flash"}, "attn_implementation: expected eager or sdpa, observed 'flash'"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        replace(OLMO1, **changes)
    assert "\n" not in str(caught.value)


@every_config
def test_a_configuration_survives_json(config: OlmoConfig) -> None:
    assert OlmoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected fields among vocab_size, .*observed rms_norm_eps"):
        OlmoConfig.from_dict({**OLMO1.to_dict(), "rms_norm_eps": 1e-6})


def test_modules_have_no_parameters_beyond_weights_of_matrices_and_norms() -> None:
    kinds = {type(module).__name__ for module in Olmo(OLMO3).modules() if list(module.parameters(recurse=False))}
    assert kinds == {nn.Embedding.__name__, nn.Linear.__name__, "OlmoRMSNorm"}
