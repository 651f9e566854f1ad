"""Tiny, randomly initialised models of the causal language-model classes that transformers ships, without the network.

A class name is enough: `build_tiny("OlmoForCausalLM")` shrinks the defaults of the class's own config. What they switch
on stays on and what they leave off stays off; only sizes change, and the layer pattern is cut down to one layer of each
kind. The sizes are unlike each other and unlike the probes' batch sizes (2, 3, 5) and lengths (7, 11, 13) where the
architecture allows it, so that a dimension is known by its size.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 131

# Token ids that mean nothing special to any of these models: the special ones are put below and above.
PLAIN_TOKEN_IDS = range(10, 110)

# Small value -> the config fields that take it, where the class has the field and gives it a default: with None the
# class says that it derives the value or leaves the feature out.
_FIELDS: list[tuple[Any, str]] = [
    # vocabulary; position tables and windows, the windows shorter than the probes' sequences
    (VOCAB_SIZE, "vocab_size vocab_size_per_layer_input decoder_vocab_size pronunciation_vocab_size shape_vocab_size"),
    (128, "max_position_embeddings n_positions n_ctx context_length max_seq_len max_target_positions"),
    (128, "max_source_positions original_max_position_embeddings rel_extent"),
    (6, "sliding_window sliding_window_size attention_chunk_size attention_window_size window_size"),
    (6, "local_attention local_attention_window_len"),
    (40, "index_topk"),  # longer than the sequences: the choice breaks ties by place, so padding alone would change it
    (1, "pad_token_id"),
    (2, "bos_token_id decoder_start_token_id"),
    (3, "eos_token_id"),
    # width and depth
    (64, "hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim hidden_size_global"),
    (40, "embedding_size input_embedding_size output_embedding_size hidden_size_per_layer_input"),
    (2, "num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers decoder_layers depth"),
    (2, "num_encoder_layers num_decoder_layers num_layers_per_stack"),
    # attention
    (4, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads"),
    (4, "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads index_n_heads"),
    (2, "num_key_value_heads swa_num_key_value_heads num_kv_heads kv_n_heads"),
    (16, "head_dim swa_head_dim kv_channels dim_head d_head d_kv attention_head_size index_head_dim"),
    (8, "rotary_dim"),
    # latent attention
    (24, "q_lora_rank"),
    (20, "kv_lora_rank o_lora_rank"),
    (8, "qk_rope_head_dim"),
    (12, "qk_nope_head_dim"),
    (18, "v_head_dim"),
    # feed-forward and mixture of experts
    (80, "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim dff dim_ff d_ff d_inner ffn_hidden_size"),
    (80, "feed_forward_size intermediate_size_mlp dense_intermediate_size"),
    (40, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size"),
    (40, "moe_shared_expert_intermediate_size shared_experts_intermediate_size prefix_dense_intermediate_size"),
    (6, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts moe_top_k n_group num_expert_group"),
    (1, "topk_group first_k_dense_replace num_dense_layers moe_layer_start_index"),
    # state space and linear attention; the heads make up twice the width, as `expand` says
    (10, "state_size ssm_state_size mamba_d_state"),
    (8, "mamba_n_heads mamba_num_heads n_mamba_heads"),
    (16, "mamba_d_head mamba_head_dim linear_value_head_dim linear_head_dim"),
    (12, "linear_key_head_dim"),
    (4, "linear_num_value_heads linear_num_heads"),
    (2, "linear_num_key_heads n_groups"),
    (6, "chunk_size mamba_chunk_size"),
    # side branches
    (20, "laurel_rank router_hidden_size gated_norm_rank hc_lowrank adapter_rank shape_embed_dim"),
    (24, "pronunciation_embed_dim"),
]
SMALL: dict[str, Any] = {name: value for value, names in _FIELDS for name in names.split()}

# Model type -> what its class needs besides the table, with the reason.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # language models only when told so
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    # layers of every kind: the pattern is not a list of layer types, or the defaults leave a kind out
    "bamba": {"attn_layer_indices": [1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"no_rope_layer_interval": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "smollm3": {"no_rope_layer_interval": 2},
    "zamba": {"num_hidden_layers": 4},  # one attention block, shared by two layers
    "zamba2": {"num_hidden_layers": 4},
    # the class does not run with its own defaults
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    # sizes that hang together in the class's own way
    "blt": {"encoder_hash_byte_group_vocab": 150},
    "deepseek_v4": {  # one shared key-value head; blocks that a short sequence fills
        "num_key_value_heads": 1,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots3_note_text": {  # the sliding layers have heads of their own
        "head_dim": 20,
        "sliding_window": 6,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 20,
        "swa_head_dim": 20,
        "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 18,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2},
    "gemma4_text": {"global_head_dim": 24},
    "gemma4_unified_text": {"global_head_dim": 24},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},  # the heads make up twice the width
    "minimax": {"block_size": 6},
    "musicgen_decoder": {"num_codebooks": 1},  # otherwise a row of the batch is a codebook, not a sequence
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 16}},
    "qwen4_exp_text": {  # its layer types choose by an index that the defaults leave out
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 40,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": (8, 16),  # their product and sum: positions, width
        "axial_pos_embds_dim": (24, 40),
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,  # otherwise each forward draws its hashes anew
    },
    "zaya": {"num_experts_per_tok": 1},
}

# The fields that name the kind of each layer, one entry a layer.
LAYER_PATTERNS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")


def tiny_config(config_class: type[PretrainedConfig], **overrides: Any) -> PretrainedConfig:
    """A small config of this class, in which the overrides win.

    ValueError: an override that the class has no field for; the message names the near ones.
    """
    default = config_class()
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    subs = {name: sub for name in config_class.sub_configs if (sub := getattr(default, name, None)) is not None}
    overrides = _checked(config_class, fields, subs.get("text_config"), overrides)

    values = {name: value for name, value in SMALL.items() if fields.get(name) is not None}
    if "num_key_value_heads" in fields:
        # None would mean no sharing, the easier case; latent attention shares the latent instead of the heads
        values["num_key_value_heads"] = 4 if "kv_lora_rank" in values else 2
    if "is_decoder" in fields:  # the encoders of this list are language models only as decoders
        values["is_decoder"] = True
    values |= _special_tokens(fields)
    values |= EXCEPTIONS.get(config_class.model_type, {})
    values |= overrides
    values |= _layer_patterns(default, fields, values, overrides)
    for name, sub in subs.items():
        given = values.get(name) or {}
        values[name] = tiny_config(type(sub), **given) if isinstance(given, dict) else given
    return config_class(**values)


def _checked(
    config_class: type[PretrainedConfig],
    fields: dict[str, Any],
    text: PretrainedConfig | None,
    overrides: dict[str, Any],
) -> dict[str, Any]:
    """The overrides under the config's own field names; those of its language model are moved into `text_config`."""
    text_fields = {field.name for field in dataclasses.fields(text)} if text else set()
    known = {*fields, *config_class.attribute_map, *text_fields, "attn_implementation", "rope_theta"}
    checked: dict[str, Any] = {}
    moved: dict[str, Any] = {}
    for name, value in overrides.items():
        own = config_class.attribute_map.get(name, name)
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3) or ["nothing near it"]
            raise ValueError(f"{config_class.__name__} has no field {name!r}; it has {', '.join(near)}")
        if name in text_fields and own not in fields:
            moved[name] = value
        else:
            checked[own] = value
    return checked | ({"text_config": {**checked.get("text_config", {}), **moved}} if moved else {})


def _special_tokens(fields: dict[str, Any]) -> dict[str, Any]:
    """Ids from the top of the vocabulary for the special tokens that lie outside of it (image, audio, ...)."""
    outside = [
        name
        for name, default in fields.items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(default, int) and default >= VOCAB_SIZE
    ]
    return {name: VOCAB_SIZE - 1 - place for place, name in enumerate(n for n in outside if n not in SMALL)}


def _layer_patterns(default: PretrainedConfig, fields: dict[str, Any], values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The number of layers and the kind of each: one of each kind, or the kinds repeated over the layers asked for."""
    kinds = {}
    for name in LAYER_PATTERNS:
        if name in fields:
            kinds[name] = values.get(name) or list(dict.fromkeys(getattr(default, name) or ()))
    kinds = {name: each for name, each in kinds.items() if each}
    if not kinds:
        return {}
    asked = [len(kinds[name]) for name in kinds if name in overrides]
    needed = [values.get("num_hidden_layers", 2), *map(len, kinds.values())]
    layers = overrides.get("num_hidden_layers") or max(asked or needed)
    patterns: dict[str, Any] = {n: [each[i % len(each)] for i in range(layers)] for n, each in kinds.items()}
    return patterns | ({"num_hidden_layers": layers} if "num_hidden_layers" in fields else {})


def causal_lm_class(name: str) -> tuple[type[PreTrainedModel], type[PretrainedConfig]]:
    """The model class of that name in transformers, and its config class.

    ValueError: there is none; the message names the near ones.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_class = getattr(transformers, name, None)
    config_class = getattr(model_class, "config_class", None)
    if model_class is None or config_class is None:
        known = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or ["nothing near it"]
        version = transformers.__version__
        raise ValueError(f"transformers {version} has no model class {name!r}; it has {', '.join(near)}")
    return model_class, config_class


def build_tiny(name: str, *, seed: int = 0, **overrides: Any) -> tuple[PreTrainedModel, PretrainedConfig]:
    """A tiny model of the class of that name in transformers and its config: float32, in eval mode, on the CPU.

    The overrides are fields of the config. The global random state is left as it was.
    """
    model_class, config_class = causal_lm_class(name)
    config = tiny_config(config_class, **overrides)
    return build_from_config(model_class, config, seed=seed), config


def build_from_config(model_class: type[PreTrainedModel], config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """The model of this config, initialised from the seed; the global random state is left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config)
    return model.float().eval()
