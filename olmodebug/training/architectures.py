"""The architectures that stand beside `olmo1-4M` in a comparison: GPT-NeoX, and GPT-NeoX with OLMo's feed-forward.

Both have the sizes of `olmo1-4M` (hidden 64, 8 layers, 8 heads, intermediate 256); transformers' GPT-NeoX does not tie its
head, so that most of its 6,835,456 parameters are two tables of 50,277 rows.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ..presets import preset

COMPARED = ("olmo1-4M", "olmodebug.training.architectures:gpt_neox", "olmodebug.training.architectures:hybrid")


class SwiGLU(nn.Module):
    """OLMo's feed-forward, without biases, in the place of GPT-NeoX's."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class HybridConfig(GPTNeoXConfig):
    model_type = "gpt_neox_swiglu"


class HybridForCausalLM(GPTNeoXForCausalLM):
    """GPT-NeoX with SwiGLU: a `PreTrainedModel` that takes `labels`, so transformers' Trainer trains it as it is."""

    config_class = HybridConfig

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        for layer in self.gpt_neox.layers:
            layer.mlp = SwiGLU(config)
        self.post_init()


def gpt_neox(vocab_size: int = 50277, eos_token_id: int = 0, initializer_range: float = 0.02) -> GPTNeoXForCausalLM:
    """transformers' GPT-NeoX at the sizes of `olmo1-4M`."""
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_sizes(vocab_size, eos_token_id, initializer_range)))


def hybrid(vocab_size: int = 50277, eos_token_id: int = 0, initializer_range: float = 0.02) -> HybridForCausalLM:
    """GPT-NeoX with SwiGLU at the sizes of `olmo1-4M`."""
    return HybridForCausalLM(HybridConfig(**_sizes(vocab_size, eos_token_id, initializer_range)))


def _sizes(vocab_size: int, eos_token_id: int, initializer_range: float) -> dict[str, Any]:
    like = preset("olmo1-4M")
    return {
        "vocab_size": vocab_size,
        "hidden_size": like.hidden_size,
        "num_hidden_layers": like.num_hidden_layers,
        "num_attention_heads": like.num_attention_heads,
        "intermediate_size": like.intermediate_size,
        "max_position_embeddings": like.max_position_embeddings,
        # The class's own default is 2, an exclamation mark in the GPT-NeoX tokenizer.
        "eos_token_id": eos_token_id,
        "bos_token_id": eos_token_id,
        "initializer_range": initializer_range,
    }
