"""What a model's own config says, under the names that people use, and the attention that is chosen through it."""

from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

VOCAB_NAMES = ("vocab_size", "n_vocab", "padded_vocab_size", "num_tokens", "vocabulary_size", "vocab", "num_vocab")
CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "block_size",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "context_length",
    "n_ctx",
    "seq_length",
)
BATCH_NAMES = ("max_batch_size", "max_gen_batch_size", "max_bsz", "max_batch")  # rows of a cache made in advance
HEAD_NAMES = ("num_attention_heads", "n_head", "n_heads", "num_heads")
LAYER_NAMES = ("n_layers", "n_layer", "num_layers", "num_hidden_layers", "layers", "depth")
CONFIG_NAMES = ("config", "cfg", "args", "params", "hparams")


def config_of(model: nn.Module) -> object:
    """The model's own config object, under the names people use; None without one."""
    for name in CONFIG_NAMES:
        value = getattr(model, name, None)
        if value is not None and not callable(value) and not isinstance(value, Tensor):
            return value  # type: ignore[no-any-return]
    return None


def setting(config: object, *names: str) -> Any:
    """The first of these names that a config has, with a nested `text_config` searched too, and the dataclasses that a
    dataclass is made of; None without one."""
    for holder in (config, getattr(config, "text_config", None), *_parts(config)):
        for name in names:
            value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            if value is not None:
                return value
    return None


def _parts(config: object) -> list[object]:
    """The dataclasses in the fields of a config that is a dataclass itself and nobody's published class."""
    if not is_dataclass(config) or hasattr(config, "to_dict"):
        return []
    return [value for field in fields(config) if is_dataclass(value := getattr(config, field.name)) and not isinstance(value, type)]


def attention_choices(model: nn.Module) -> list[str]:
    """The attention implementations that a model offers by name; empty when it has no such switch."""
    if hasattr(model, "set_attn_implementation"):  # transformers
        choices = ["eager"]
        if getattr(model, "_supports_sdpa", False):
            choices.append("sdpa")
        return choices
    if getattr(config_of(model), "attn_implementation", None) in ("eager", "sdpa"):
        return ["eager", "sdpa"]
    return []


def set_attention(model: nn.Module, name: str) -> None:
    """Switch every part of the model to one attention implementation."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(name)  # type: ignore[operator]
        return
    seen = set()
    for module in model.modules():
        for holder in (module, config_of(module)):
            if holder is None or id(holder) in seen or getattr(holder, "attn_implementation", None) not in ("eager", "sdpa"):
                continue
            seen.add(id(holder))
            object.__setattr__(holder, "attn_implementation", name)
