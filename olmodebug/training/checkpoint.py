"""Trained weights as a folder that transformers loads, and the state from which a run goes on.

The reference model becomes Olmo, Llama (DataDecide), Olmo2 or Olmo3 of transformers; its names are theirs already. A class of
transformers saves itself. Any other model gives its weights only, and the folder says so.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..model import Olmo, OlmoConfig
from .tokenization import Encoder

WEIGHTS = "model.safetensors"
STATE = "resume.pt"


def save_checkpoint(model: nn.Module, folder: Path, encoder: Encoder | None = None) -> bool:
    """Write the folder; whether `AutoModelForCausalLM.from_pretrained` can load it."""
    folder.mkdir(parents=True, exist_ok=True)
    if encoder is not None:
        encoder.tokenizer.save(str(folder / "tokenizer.json"))
        end = encoder.tokenizer.id_to_token(encoder.eos_id)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    if isinstance(model, Olmo):
        config = hugging_face_config(model.config)
        _save_weights(model, folder / WEIGHTS, tied=model.config.tie_word_embeddings)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        return True
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)  # type: ignore[operator]
        from transformers import CONFIG_MAPPING

        return getattr(model.config, "model_type", None) in CONFIG_MAPPING
    _save_weights(model, folder / WEIGHTS, tied=True)
    return False


def hugging_face_config(config: OlmoConfig) -> dict[str, Any]:
    """The `config.json` of the transformers class that computes what the reference model does."""
    if config.norm == "layer_norm":
        kind, name = "olmo", "OlmoForCausalLM"
    elif config.norm_position == "pre":
        kind, name = "llama", "LlamaForCausalLM"
    elif config.sliding_window is None:
        kind, name = "olmo2", "Olmo2ForCausalLM"
    else:
        kind, name = "olmo3", "Olmo3ForCausalLM"
    values: dict[str, Any] = {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": config.eos_token_id,
        "use_cache": True,
        "dtype": "float32",
    }
    if kind == "olmo":
        values["clip_qkv"] = config.clip_qkv
    else:
        values["rms_norm_eps"] = config.norm_eps
    if kind == "llama":
        values |= {"mlp_bias": False, "head_dim": config.head_dim}
    if kind == "olmo3":
        values |= {"sliding_window": config.sliding_window, "layer_types": list(config.layer_types)}
        # transformers 5 passes over a flat form in silence; it wants one entry a kind of layer.
        default = {"rope_type": "default", "rope_theta": config.rope_theta}
        full = default
        if config.rope_scaling is not None:
            given = {key: value for key, value in asdict(config.rope_scaling).items() if value is not None}
            full = {"rope_type": "yarn", "rope_theta": config.rope_theta, **given}
        values["rope_parameters"] = {"full_attention": full, "sliding_attention": default}
        del values["rope_theta"]
    return values


def _save_weights(model: nn.Module, file: Path, *, tied: bool) -> None:
    from safetensors.torch import save_file

    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tied and place in seen:  # safetensors takes no shared memory; loading ties it again
            continue
        seen.add(place)
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    save_file(tensors, str(file), metadata={"format": "pt"})


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a run's state whole or not at all: a run killed while it writes keeps the state before."""
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    """The state that `save_state` wrote."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
