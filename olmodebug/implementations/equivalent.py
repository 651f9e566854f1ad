"""The same sizes in another class: what a transformers config must say to be the equivalent of a subject."""

import dataclasses
from typing import Any

from ..settings import CONTEXT_NAMES
from ..subject import Subject
from .mapping import Layout, layout_of

# A field of transformers' configs -> the names that other code has for it; what is taken over is what both have.
NAMES: dict[str, tuple[str, ...]] = {
    "rms_norm_eps": ("rms_norm_eps", "norm_eps", "layer_norm_eps", "eps"),
    "layer_norm_eps": ("layer_norm_eps", "norm_eps", "layer_norm_epsilon", "rms_norm_eps"),
    "layer_norm_epsilon": ("layer_norm_epsilon", "norm_eps", "layer_norm_eps"),
    "hidden_act": ("hidden_act", "hidden_activation", "activation_function"),
    "activation_function": ("activation_function", "hidden_act"),
    "sliding_window": ("sliding_window",),
    "clip_qkv": ("clip_qkv",),
    "pad_token_id": ("pad_token_id",),
    "eos_token_id": ("eos_token_id",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "rotary_pct": ("rotary_pct", "partial_rotary_factor"),
    "num_experts_per_tok": (
        "num_experts_per_tok",
        "n_experts_per_token",
        "n_activated_experts",
        "n_expert_per_token",
        "moe_top_k",
        "top_k",
    ),
    "norm_topk_prob": ("norm_topk_prob",),
    "use_parallel_residual": ("use_parallel_residual", "parallel_residual"),
}


def config_for(kind: type, subject: Subject) -> dict[str, Any]:
    """Fields of a transformers class's config that make it the size of a subject, read from its weights and its config."""
    config_class = kind.config_class  # type: ignore[attr-defined]
    known = {item.name for item in dataclasses.fields(config_class)}
    aliases = dict(config_class.attribute_map)
    values = {**_from_weights(layout_of(subject)), **_from_config(subject)}
    found = {}
    for name, value in values.items():
        own = aliases.get(name, name)
        if own in known:
            found[own] = value
    if "n_inner" in known and "intermediate_size" in values:
        found["n_inner"] = values["intermediate_size"]
    if "rope_parameters" in known or "rope_theta" in known:
        found.update(_rope(subject, config_class))
    pads = [found.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    for name, value in zip(("pad_token_id", "bos_token_id", "eos_token_id"), pads, strict=True):
        if value is None and name in known:
            found[name] = None  # a class's own default may lie outside a small vocabulary, and a padding row gets no gradient
    return found


def _from_weights(layout: Layout) -> dict[str, Any]:
    slots = layout.slots
    layers = {slot.partition(".")[0] for slot in slots if slot.partition(".")[0].isdigit()}
    found: dict[str, Any] = {"num_hidden_layers": len(layers), "tie_word_embeddings": "head.weight" in layout.tied}
    if "embed.weight" in slots:
        found["vocab_size"], found["hidden_size"] = layout.shape("embed.weight")
    if "0.up.weight" in slots:
        found["intermediate_size"] = layout.shape("0.up.weight")[0]
    if "0.expert0.up.weight" in slots:
        inner = layout.shape("0.expert0.up.weight")[0]
        number = sum(slot.startswith("0.expert") and slot.endswith(".up.weight") for slot in slots)
        found |= {"num_experts": number, "num_local_experts": number, "moe_intermediate_size": inner}
        found.setdefault("intermediate_size", inner)
    if layout.heads:
        found["num_attention_heads"], found["num_key_value_heads"] = layout.heads, layout.key_value_heads
        if "0.q.weight" in slots:
            found["head_dim"] = layout.shape("0.q.weight")[0] // layout.heads
    if "0.q.weight" in slots:
        found["attention_bias"] = "0.q.bias" in slots
    return found


def _from_config(subject: Subject) -> dict[str, Any]:
    found: dict[str, Any] = {}
    positions = subject.setting(*CONTEXT_NAMES)
    if isinstance(positions, int):
        found["max_position_embeddings"] = positions
    for name, others in NAMES.items():
        value = subject.setting(*others)
        if value is not None:
            found[name] = value
    types = subject.setting("layer_types")
    if types is not None:
        found["layer_types"] = list(types)
    return found


def _rope(subject: Subject, config_class: type) -> dict[str, Any]:
    """RoPE of transformers 5: one dictionary, or one for each type of layer (Olmo3, where YaRN is for full attention)."""
    theta = subject.setting("rope_theta")
    scaling = subject.setting("rope_scaling")
    known = subject.setting("rope_parameters")
    if known is not None:
        return {"rope_parameters": dict(known)}
    if theta is None:
        return {}
    share = subject.setting("partial_rotary_factor", "rotary_pct", "rotary_percentage")
    part = {} if share is None else {"partial_rotary_factor": float(share)}
    if scaling is None:
        plain = {"rope_type": "default", "rope_theta": float(theta), **part}
        if "Olmo3" in config_class.__name__:
            return {"rope_parameters": {"full_attention": plain, "sliding_attention": plain}}
        return {"rope_parameters": plain}
    details = dataclasses.asdict(scaling) if dataclasses.is_dataclass(scaling) and not isinstance(scaling, type) else dict(scaling)
    stretched = {"rope_type": "yarn", **{k: v for k, v in details.items() if v is not None}, "rope_theta": float(theta)}
    if "Olmo3" in config_class.__name__:
        return {"rope_parameters": {"full_attention": stretched, "sliding_attention": {"rope_type": "default", "rope_theta": float(theta)}}}
    return {"rope_parameters": stretched}
