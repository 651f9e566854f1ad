"""The reference model against ai2-olmo, the code that trained OLMo 1 and the DataDecide ladder.

Skipped where `pip install ai2-olmo datasets` was not run; ai2-olmo imports datasets without asking for it.
"""

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from olmodebug.model import Olmo, OlmoConfig

ai2 = pytest.importorskip("olmo", reason="ai2-olmo cannot be imported: pip install ai2-olmo datasets")

OLMO1 = OlmoConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=6,
    max_position_embeddings=64,
    norm="layer_norm",
    norm_eps=1e-5,
)
DATADECIDE = replace(OLMO1, norm="rms_norm", norm_eps=1e-6, norm_casts_before_weight=True)
OLMO2 = replace(DATADECIDE, norm_position="post", qk_norm=True, rope_theta=500000.0, norm_casts_before_weight=False)
CONFIGS = {
    "olmo1": OLMO1,
    "olmo1-clipped-tied": replace(OLMO1, clip_qkv=0.3, tie_word_embeddings=True),
    "datadecide": DATADECIDE,
    "olmo2": OLMO2,
    "olmo2-grouped": replace(OLMO2, num_key_value_heads=2),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())

# As against transformers: a fault is 1e-3 or more.
LOGITS_ATOL = 1e-5
GRADIENT_ATOL = 5e-6

pytestmark = pytest.mark.filterwarnings("ignore:torch.is_autocast_cpu_enabled:DeprecationWarning")


def ai2_model(config: OlmoConfig) -> Any:
    """ai2-olmo's model for a configuration of ours, with random weights."""
    settings = importlib.import_module("olmo.config")
    layer_norm_type = settings.LayerNormType.default if config.norm == "layer_norm" else settings.LayerNormType.rms
    theirs = ai2.OLMo(
        settings.ModelConfig(
            d_model=config.hidden_size,
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            n_layers=config.num_hidden_layers,
            mlp_hidden_size=2 * config.intermediate_size,
            clip_qkv=config.clip_qkv,
            rope=True,
            rope_theta=int(config.rope_theta),
            attention_dropout=0.0,
            residual_dropout=0.0,
            embedding_dropout=0.0,
            layer_norm_type=layer_norm_type,
            layer_norm_with_affine=config.norm == "rms_norm",
            layer_norm_eps=config.norm_eps,
            attention_layer_norm=config.qk_norm,
            norm_after=config.norm_position == "post",
            bias_for_layer_norm=False,
            include_bias=False,
            max_sequence_length=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            embedding_size=config.vocab_size,
            weight_tying=config.tie_word_embeddings,
            eos_token_id=0,
            pad_token_id=1,
            init_device="cpu",
            init_fn=settings.InitFnType.normal,
        )
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.05 * noise)
    return theirs.eval()


def with_our_names(tensors: dict[str, Tensor], config: OlmoConfig) -> dict[str, Tensor]:
    """ai2-olmo's weights or gradients under our names; it fuses q, k, v and, in this order, up and gate."""
    keys = config.num_key_value_heads * config.head_dim
    attention_norm, feed_forward_norm = {
        "pre": ("input_layernorm", "post_attention_layernorm"),
        "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    }[config.norm_position]
    renamed = {
        "wte.weight": ["model.embed_tokens.weight"],
        "ln_f.weight": ["model.norm.weight"],
        "ff_out.weight": ["lm_head.weight"],
    }
    for index in range(config.num_hidden_layers):
        there, here = f"blocks.{index}.", f"model.layers.{index}."
        projections = [f"{here}self_attn.{name}_proj.weight" for name in "qkv"]
        renamed |= {
            f"{there}att_proj.weight": projections,
            f"{there}attn_out.weight": [f"{here}self_attn.o_proj.weight"],
            f"{there}ff_proj.weight": [f"{here}mlp.up_proj.weight", f"{here}mlp.gate_proj.weight"],
            f"{there}ff_out.weight": [f"{here}mlp.down_proj.weight"],
            f"{there}q_norm.weight": [f"{here}self_attn.q_norm.weight"],
            f"{there}k_norm.weight": [f"{here}self_attn.k_norm.weight"],
            f"{there}attn_norm.weight": [f"{here}{attention_norm}.weight"],
            f"{there}ff_norm.weight": [f"{here}{feed_forward_norm}.weight"],
        }
    sizes = {3: [config.hidden_size, keys, keys], 2: [config.intermediate_size] * 2}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        targets = renamed[name.removeprefix("transformer.")]
        parts = tensor.split(sizes[len(targets)]) if len(targets) > 1 else [tensor]
        found.update(zip(targets, parts, strict=True))
    if config.tie_word_embeddings:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


def both(config: OlmoConfig, dtype: torch.dtype = torch.float32) -> tuple[Olmo, Any]:
    theirs = ai2_model(config)
    ours = Olmo(config)
    ours.load_state_dict(with_our_names(theirs.state_dict(), config), strict=True)
    return ours.eval().to(dtype), theirs.to(dtype)


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(1))


def largest_difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return float((left.detach().double() - right.detach().double()).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@every_config
def test_logits_loss_and_every_gradient_equal_ai2_olmo(config: OlmoConfig, attn_implementation: Any, dtype: torch.dtype) -> None:
    ours, theirs = both(replace(config, attn_implementation=attn_implementation), dtype)
    input_ids = random_ids(2, 13)
    observed, expected = ours(input_ids, labels=input_ids), theirs(input_ids)
    assert largest_difference(observed.logits, expected.logits) < LOGITS_ATOL

    their_loss = torch.nn.functional.cross_entropy(expected.logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    assert largest_difference(observed.loss, their_loss) < LOGITS_ATOL
    observed.loss.backward()
    their_loss.backward()
    gradients = with_our_names({name: parameter.grad for name, parameter in theirs.named_parameters()}, config)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert largest_difference(parameter.grad, gradients[name]) < GRADIENT_ATOL, name


@pytest.mark.parametrize("config", [DATADECIDE, replace(OLMO2, norm_casts_before_weight=True)], ids=["datadecide", "olmo2"])
def test_bfloat16_equals_ai2_olmo_bit_for_bit(config: OlmoConfig) -> None:
    """OLMo 1 is left out: ai2-olmo hands torch's LayerNorm bfloat16, where transformers and we hand it float32."""
    ours, theirs = both(config, torch.bfloat16)
    input_ids = random_ids(2, 13)
    assert torch.equal(ours(input_ids).logits, theirs(input_ids).logits)


@every_config
def test_cached_decoding_equals_ai2_olmo_which_caches_keys_before_their_rotation(config: OlmoConfig) -> None:
    ours, theirs = both(config)
    input_ids = random_ids(2, 12)
    our_cache, their_cache = None, None
    for chunk in input_ids.split([9, 1, 1, 1], dim=1):
        observed = ours(chunk, past_key_values=our_cache, use_cache=True)
        expected = theirs(chunk, past_key_values=their_cache, use_cache=True)
        assert largest_difference(observed.logits, expected.logits) < LOGITS_ATOL
        our_cache, their_cache = observed.past_key_values, expected.attn_key_values


@every_config
def test_padded_batches_equal_ai2_olmo_at_default_positions(config: OlmoConfig) -> None:
    ours, theirs = both(config)
    input_ids, attention_mask = random_ids(3, 11), torch.ones(3, 11)
    attention_mask[0, :6] = 0
    attention_mask[1, 8:] = 0
    observed = ours(input_ids, attention_mask).logits[attention_mask.bool()]
    expected = theirs(input_ids, attention_mask=attention_mask).logits[attention_mask.bool()]
    assert largest_difference(observed, expected) < LOGITS_ATOL


def test_the_comparison_with_ai2_olmo_can_fail() -> None:
    ours, theirs = both(DATADECIDE)
    input_ids = random_ids(2, 13)
    expected = theirs(input_ids).logits
    for changes in ({"rope_theta": 500000.0}, {"norm_eps": 1e-3}):
        wrong = Olmo(replace(DATADECIDE, **changes))  # type: ignore[arg-type]
        wrong.load_state_dict(ours.state_dict())
        assert largest_difference(wrong(input_ids).logits, expected) > 100 * LOGITS_ATOL
