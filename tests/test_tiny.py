"""Tiny models of transformers' classes: small, finite, reproducible, and built without the network."""

from __future__ import annotations

import socket
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from olmodebug.tiny import PLAIN_TOKEN_IDS, build_tiny, causal_lm_class, tiny_config  # noqa: E402

REPRESENTATIVE = [
    "LlamaForCausalLM",
    "OlmoForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",  # sliding and full layers
    "OlmoeForCausalLM",  # mixture of experts
    "GPT2LMHeadModel",  # learned positions, fields of other names
    "GPTNeoXForCausalLM",  # partial rotary
    "MistralForCausalLM",  # sliding window
    "DeepseekV3ForCausalLM",  # latent attention, dense and expert layers
    "BloomForCausalLM",  # ALiBi
    "MambaForCausalLM",  # state space
    "Gemma2ForCausalLM",  # soft caps, sliding and full layers
    "JambaForCausalLM",  # a layer pattern that is no list
    "Gemma3ForConditionalGeneration",  # the language model is a part
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a tiny model asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_tiny_model_is_small_finite_and_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, config = build_tiny(name)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 300_000
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in [*model.parameters(), *model.buffers()])
    input_ids = torch.randint(PLAIN_TOKEN_IDS.start, PLAIN_TOKEN_IDS.stop, (2, 11))
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits
    assert tuple(logits.shape) == (2, 11, config.get_text_config(decoder=True).vocab_size)
    assert logits.isfinite().all()
    assert capsys.readouterr().out == ""


def test_the_sizes_of_a_tiny_model_are_unlike_each_other_and_unlike_the_probes() -> None:
    config = tiny_config(transformers.LlamaConfig)
    sizes = [config.vocab_size, config.hidden_size, config.intermediate_size, config.max_position_embeddings]
    sizes += [config.num_attention_heads, config.num_key_value_heads, config.head_dim]
    assert len(set(sizes)) == len(sizes)
    assert not {3, 5, 7, 11, 13} & set(sizes)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("Olmo3ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("Qwen3NextForCausalLM", {"layer_types": ["linear_attention", "full_attention"]}),
        ("Glm4MoeLiteForCausalLM", {"mlp_layer_types": ["dense", "sparse"]}),
        ("JambaForCausalLM", {"layer_types": ["linear_attention", "full_attention"]}),
        ("MistralForCausalLM", {"sliding_window": 6}),
        ("Qwen2ForCausalLM", {"sliding_window": None}),  # off by default, so off
    ],
)
def test_every_kind_of_layer_of_the_defaults_appears(name: str, pattern: dict[str, Any]) -> None:
    config = tiny_config(causal_lm_class(name)[1])
    assert {field: getattr(config, field) for field in pattern} == pattern


def test_overrides_win_over_the_table_the_exceptions_and_the_pattern() -> None:
    assert tiny_config(transformers.LlamaConfig, hidden_size=96).hidden_size == 96
    assert tiny_config(transformers.GPT2Config, hidden_size=96).n_embd == 96  # the class's other name for the field
    assert tiny_config(transformers.JambaConfig, attn_layer_period=4).attn_layer_period == 4
    olmo3 = tiny_config(transformers.Olmo3Config, num_hidden_layers=3)
    assert olmo3.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert tiny_config(transformers.Olmo3Config, layer_types=["full_attention"] * 3).num_hidden_layers == 3


def test_overrides_of_a_multimodal_class_reach_its_language_model() -> None:
    config = tiny_config(transformers.Gemma3Config, intermediate_size=72)
    assert config.text_config.intermediate_size == 72


def test_an_unknown_override_names_the_near_ones() -> None:
    with pytest.raises(ValueError, match=r"LlamaConfig has no field 'num_layer'.*num_hidden_layers"):
        build_tiny("LlamaForCausalLM", num_layer=3)


@pytest.mark.parametrize("name", ["OlmoForCasualLM", "OlmoForCausalLm"])
def test_an_unknown_class_names_the_near_ones(name: str) -> None:
    with pytest.raises(ValueError, match=rf"no model class '{name}'.*OlmoForCausalLM"):
        causal_lm_class(name)


def test_a_name_that_is_no_model_is_an_unknown_class() -> None:
    with pytest.raises(ValueError, match="no model class 'OlmoConfig'"):
        causal_lm_class("OlmoConfig")


def test_the_seed_decides_the_weights_and_the_global_random_state_stays() -> None:
    before = torch.get_rng_state()
    first, again, other = (build_tiny("OlmoForCausalLM", seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
