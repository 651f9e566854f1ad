"""Every preset builds the model that it names."""

import pytest
import torch

from olmodebug.model import Olmo, OlmoConfig
from olmodebug.presets import PRESETS, names, preset

# Published totals: the ladder from ai2-olmo's own num_params and the size of a published safetensors file, OLMo 1, 2
# and 3 from OLMo-core or the checkpoints' pages.
PUBLISHED = {
    "datadecide-4M": 6_964_288,
    "datadecide-6M": 10_839_648,
    "datadecide-8M": 14_977_152,
    "datadecide-10M": 17_144_208,
    "datadecide-14M": 24_038_592,
    "datadecide-16M": 26_467_792,
    "datadecide-20M": 28_760_256,
    "datadecide-60M": 76_394_880,
    "datadecide-90M": 124_507_152,
    "datadecide-150M": 190_532_352,
    "datadecide-300M": 371_491_840,
    "datadecide-530M": 597_683_520,
    "datadecide-750M": 758_564_352,
    "datadecide-1B": 1_279_854_592,
    "olmo1-4M": 3_742_016,
    "olmo1-1B": 1_176_764_416,
    "olmo1-7B": 6_888_095_744,
    "olmo2-1B": 1_484_916_736,
    "olmo2-7B": 7_298_617_344,
    "olmo2-13B": 13_716_198_400,
    "olmo2-32B": 32_234_279_936,
}
# The size the paper gives a ladder model: everything but the embedding.
LADDER_SIZES = {
    "datadecide-4M": 3_744_832,
    "datadecide-6M": 6_010_464,
    "datadecide-8M": 8_538_240,
    "datadecide-10M": 9_900_432,
    "datadecide-14M": 14_380_224,
    "datadecide-16M": 16_004_560,
    "datadecide-20M": 19_101_888,
    "datadecide-60M": 57_078_144,
    "datadecide-90M": 97_946_640,
    "datadecide-150M": 151_898_880,
    "datadecide-300M": 319_980_544,
    "datadecide-530M": 530_074_944,
    "datadecide-750M": 681_297_408,
    "datadecide-1B": 1_176_832_000,
}
TINY = ("datadecide-tiny", "olmo1-tiny", "olmo2-tiny", "olmo3-tiny")


def parameters_by_hand(config: OlmoConfig) -> int:
    """The count from the sizes alone."""
    hidden, keys = config.hidden_size, config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * config.intermediate_size
    final_norm = 0
    if config.norm == "rms_norm":
        layer += 2 * hidden + (hidden + keys if config.qk_norm else 0)
        final_norm = hidden
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * layer + final_norm + tables * config.vocab_size * hidden


def count_parameters(config: OlmoConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Olmo(config).parameters())


@pytest.mark.parametrize("name", names())
def test_every_preset_has_the_number_of_parameters_it_states(name: str) -> None:
    stated = PRESETS[name].parameters
    assert stated == parameters_by_hand(preset(name))
    assert stated == count_parameters(preset(name))
    assert stated == PUBLISHED.get(name, stated)


def test_the_ladder_has_its_fourteen_sizes_and_counts_the_head_but_not_the_embedding() -> None:
    assert [name for name in names() if name.startswith("datadecide-") and name != "datadecide-tiny"] == list(LADDER_SIZES)
    for name, size in LADDER_SIZES.items():
        config = preset(name)
        assert PRESETS[name].parameters - config.vocab_size * config.hidden_size == size


def test_the_ladder_is_pre_norm_rms_with_head_untied_and_intermediate_size_four_times_the_hidden_size() -> None:
    for name in LADDER_SIZES:
        config = preset(name)
        assert (config.norm, config.norm_position, config.norm_eps) == ("rms_norm", "pre", 1e-6)
        assert (config.vocab_size, config.tie_word_embeddings, config.rope_theta) == (50304, False, 10000.0)
        assert (config.qk_norm, config.clip_qkv, config.rope_scaling) == (False, None, None)
        assert config.intermediate_size == 4 * config.hidden_size


def test_olmo3_slides_in_three_of_four_layers_and_ends_with_full_attention() -> None:
    for name, layers in (("olmo3-7B", 32), ("olmo3-32B", 64)):
        config = preset(name)
        full = [index for index, kind in enumerate(config.layer_types) if kind == "full_attention"]
        assert full == list(range(3, layers, 4))
        assert config.sliding_window == 4096
        assert config.rope_scaling is not None
        assert config.rope_scaling.factor * config.rope_scaling.original_max_position_embeddings == 65536


@pytest.mark.parametrize("name", TINY)
def test_tiny_presets_run_and_their_sizes_tell_dimensions_apart(name: str) -> None:
    config = preset(name)
    output = Olmo(config)(torch.arange(22).view(2, 11), labels=torch.arange(22).view(2, 11))
    assert output.loss is not None
    assert output.loss.isfinite()
    dimensions = {
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.head_dim,
        *({config.num_key_value_heads, config.num_key_value_heads * config.head_dim} if "olmo3" in name else ()),
    }
    assert len(dimensions) == (7 if "olmo3" in name else 5)
    assert not dimensions & {1, 2, 3, 11, 13}  # the batch and sequence sizes of cases


def test_tiny_presets_cover_every_choice() -> None:
    configs = [preset(name) for name in TINY]
    assert {config.norm for config in configs} == {"layer_norm", "rms_norm"}
    assert {config.norm_position for config in configs} == {"pre", "post"}
    assert {config.tie_word_embeddings for config in configs} == {True, False}
    assert {config.qk_norm for config in configs} == {True, False}
    assert {config.norm_casts_before_weight for config in configs} == {True, False}
    assert any(config.clip_qkv for config in configs)
    assert any(config.rope_scaling for config in configs)
    assert any(config.num_key_value_heads < config.num_attention_heads for config in configs)
    assert {kind for config in configs for kind in config.layer_types} == {"full_attention", "sliding_attention"}


def test_an_unknown_preset_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"called 'olmo2-7b'; did you mean olmo2-7B, "):
        preset("olmo2-7b")
    with pytest.raises(ValueError, match=r"called 'xyz'; there are datadecide-4M, .*olmo3-tiny"):
        preset("xyz")


def test_every_preset_names_its_source() -> None:
    assert all(entry.source for entry in PRESETS.values())
