"""Named configurations of the OLMo family, with where each comes from and how many parameters it has.

- `datadecide-4M` ... `datadecide-1B`: the DataDecide ladder. The size in a name leaves out the embedding and keeps
  the untied head of the same 50304 rows: `datadecide-4M` has 3.7 million by that count and 6,964,288 in all.
- `olmo1-*`, `olmo2-*`, `olmo3-*`: published models, with the number of embedding rows of their checkpoints.
- `olmo1-4M`: OLMo 1 at the sizes of `datadecide-4M`, tied, on the GPT-NeoX tokenizer; olmodebug's default subject.
- `*-tiny`: one of each generation for tests, whose sizes are pairwise different, so that a dimension is known by its
  size.
"""

import difflib
from dataclasses import dataclass

from olmodebug.model import OlmoConfig, YarnScaling


@dataclass(frozen=True, slots=True)
class Preset:
    config: OlmoConfig
    parameters: int  # in all, shared ones counted once
    source: str


def names() -> tuple[str, ...]:
    """The names that `preset` knows."""
    return tuple(PRESETS)


def preset(name: str) -> OlmoConfig:
    """The configuration of that name; a ValueError with the nearest names where there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3)
        told = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(PRESETS)}"
        raise ValueError(f"no preset is called {name!r}; {told}")
    return PRESETS[name].config


def _datadecide(hidden_size: int, layers: int, heads: int) -> OlmoConfig:
    return OlmoConfig(
        vocab_size=50304,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        norm_casts_before_weight=True,
        pad_token_id=1,
        eos_token_id=50279,
    )


def _olmo1(
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    *,
    tied: bool = False,
    positions: int = 2048,
    clip_qkv: float | None = None,
    vocab_size: int = 50304,
    eos_token_id: int = 50279,
) -> OlmoConfig:
    return OlmoConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        norm="layer_norm",
        norm_eps=1e-5,
        clip_qkv=clip_qkv,
        tie_word_embeddings=tied,
        pad_token_id=1,
        eos_token_id=eos_token_id,
    )


def _olmo2(hidden_size: int, intermediate_size: int, layers: int, heads: int, key_value_heads: int) -> OlmoConfig:
    return OlmoConfig(
        vocab_size=100352,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=4096,
        rope_theta=500000.0,
        norm_position="post",
        qk_norm=True,
        pad_token_id=100277,
        eos_token_id=100257,
    )


def _olmo3(hidden_size: int, intermediate_size: int, layers: int, heads: int, key_value_heads: int) -> OlmoConfig:
    return OlmoConfig(
        vocab_size=100278,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=65536,
        rope_theta=500000.0,
        rope_scaling=YarnScaling(factor=8.0, original_max_position_embeddings=8192),
        norm_position="post",
        qk_norm=True,
        sliding_window=4096,
        layer_types=("sliding_attention", "sliding_attention", "sliding_attention", "full_attention") * (layers // 4),
        pad_token_id=100277,
        eos_token_id=100257,
    )


_DATADECIDE_TINY = OlmoConfig(
    vocab_size=59,
    hidden_size=40,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=5,
    max_position_embeddings=64,
    norm_casts_before_weight=True,
    pad_token_id=1,
    eos_token_id=0,
)
_OLMO1_TINY = OlmoConfig(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=6,
    max_position_embeddings=64,
    norm="layer_norm",
    norm_eps=1e-5,
    clip_qkv=8.0,
    tie_word_embeddings=True,
    pad_token_id=1,
    eos_token_id=0,
)
_OLMO2_TINY = OlmoConfig(
    vocab_size=67,
    hidden_size=40,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    rope_theta=500000.0,
    norm_position="post",
    qk_norm=True,
    pad_token_id=66,
    eos_token_id=65,
)
# A window of 5 makes a prompt of 11 slide. Over 64 positions with theta 100 YaRN keeps the first of the five pairs,
# stretches the last two and mixes the others.
_OLMO3_TINY = OlmoConfig(
    vocab_size=71,
    hidden_size=80,
    intermediate_size=56,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=256,
    rope_theta=100.0,
    rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=64),
    norm_position="post",
    qk_norm=True,
    sliding_window=5,
    layer_types=("sliding_attention", "sliding_attention", "sliding_attention", "full_attention"),
    pad_token_id=70,
    eos_token_id=69,
)

_LADDER = "arXiv:2504.11393, table 2; allenai/OLMo scripts/ladder.py @ 55d4871d"
_OURS = "olmodebug"

PRESETS: dict[str, Preset] = {
    "datadecide-4M": Preset(_datadecide(64, 8, 8), 6_964_288, _LADDER),
    "datadecide-6M": Preset(_datadecide(96, 8, 8), 10_839_648, _LADDER),
    "datadecide-8M": Preset(_datadecide(128, 8, 8), 14_977_152, _LADDER),
    "datadecide-10M": Preset(_datadecide(144, 8, 8), 17_144_208, _LADDER),
    "datadecide-14M": Preset(_datadecide(192, 8, 8), 24_038_592, _LADDER),
    "datadecide-16M": Preset(_datadecide(208, 8, 8), 26_467_792, _LADDER),
    "datadecide-20M": Preset(_datadecide(192, 16, 8), 28_760_256, _LADDER),
    "datadecide-60M": Preset(_datadecide(384, 16, 12), 76_394_880, _LADDER),
    "datadecide-90M": Preset(_datadecide(528, 16, 12), 124_507_152, _LADDER),
    "datadecide-150M": Preset(_datadecide(768, 12, 12), 190_532_352, _LADDER),
    "datadecide-300M": Preset(_datadecide(1024, 16, 16), 371_491_840, _LADDER),
    "datadecide-530M": Preset(_datadecide(1344, 16, 16), 597_683_520, _LADDER),
    "datadecide-750M": Preset(_datadecide(1536, 16, 16), 758_564_352, _LADDER),
    "datadecide-1B": Preset(_datadecide(2048, 16, 16), 1_279_854_592, _LADDER),
    "olmo1-4M": Preset(_olmo1(64, 256, 8, 8, tied=True, vocab_size=50277, eos_token_id=0), 3_742_016, _OURS),
    "olmo1-1B": Preset(_olmo1(2048, 8192, 16, 16, tied=True), 1_176_764_416, "hf:allenai/OLMo-1B-hf"),
    "olmo1-7B": Preset(_olmo1(4096, 11008, 32, 32), 6_888_095_744, "hf:allenai/OLMo-7B-hf"),
    # clip_qkv of the 0724 models as they were trained (configs/official-0724); the copy of the converted 7B
    # checkpoint that we saw has null.
    "olmo1-1B-0724": Preset(_olmo1(2048, 8192, 16, 16, positions=4096, clip_qkv=8.0), 1_279_787_008, "hf:allenai/OLMo-1B-0724-hf"),
    "olmo1-7B-0724": Preset(_olmo1(4096, 11008, 32, 32, positions=4096, clip_qkv=8.0), 6_888_095_744, "hf:allenai/OLMo-7B-0724-hf"),
    "olmo2-1B": Preset(_olmo2(2048, 8192, 16, 16, 16), 1_484_916_736, "hf:allenai/OLMo-2-0425-1B"),
    "olmo2-7B": Preset(_olmo2(4096, 11008, 32, 32, 32), 7_298_617_344, "hf:allenai/OLMo-2-1124-7B"),
    "olmo2-13B": Preset(_olmo2(5120, 13824, 40, 40, 40), 13_716_198_400, "hf:allenai/OLMo-2-1124-13B"),
    "olmo2-32B": Preset(_olmo2(5120, 27648, 64, 40, 8), 32_234_279_936, "hf:allenai/OLMo-2-0325-32B"),
    "olmo3-7B": Preset(_olmo3(4096, 11008, 32, 32, 32), 7_298_011_136, "hf:allenai/Olmo-3-1025-7B"),
    "olmo3-32B": Preset(_olmo3(5120, 27648, 64, 40, 8), 32_233_522_176, "hf:allenai/Olmo-3-1125-32B"),
    "datadecide-tiny": Preset(_DATADECIDE_TINY, 30_200, _OURS),
    "olmo1-tiny": Preset(_OLMO1_TINY, 37_488, _OURS),
    "olmo2-tiny": Preset(_OLMO2_TINY, 31_000, _OURS),
    "olmo3-tiny": Preset(_OLMO3_TINY, 143_120, _OURS),
}
