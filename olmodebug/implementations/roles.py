"""What a parameter is in its model, `3.q` or `head`: by its name, and where that says nothing by its shape and its neighbours."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from ..subject import Subject

Role = tuple[str | None, str, str]  # layer, role, `weight` or `bias`
# The last names of parameters' modules, by what they do: Hugging Face, Meta, ai2-olmo, OLMo-core, GPT-NeoX, nanoGPT, litgpt.
EMBED = (
    "embed_tokens wte tok_embeddings embeddings embed_in embedding token_embedding token_embedding_table word_embeddings tok_emb emb embed"
)
POSITION = "wpe embed_positions position_embedding position_embedding_table pos_emb position_embeddings pos_embedding"
HEAD = "lm_head output embed_out head unembed out_head"
FINAL_NORM = "norm ln_f final_layer_norm final_layernorm final_norm norm_f ln_final"
Q = "q_proj wq w_q query to_q W_q W_query q"
K = "k_proj wk w_k key to_k W_k W_key k"
V = "v_proj wv w_v value to_v W_v W_value v"
KV = "kv_proj wkv w_kv to_kv c_kv kv"
QKV = "c_attn qkv qkv_proj Wqkv wqkv query_key_value att_proj in_proj W_pack"
O = "o_proj wo out_proj attn_out to_out W_o o"  # noqa: E741
GATE = "gate_proj w1 w_gate fc_1"
UP = "up_proj w3 c_fc dense_h_to_4h fc1 fc_in w_up fc_2 fc up"
GATE_UP = "gate_up_proj ff_proj w12 gate_up w13 wi"
DOWN = "down_proj w2 dense_4h_to_h fc2 fc_out w_down down"
NORM1 = "ln_1 input_layernorm attention_norm attn_norm norm1 norm_1 ln1 ln_attn"
NORM2 = "ln_2 post_attention_layernorm ffn_norm ff_norm feed_forward_norm norm2 norm_2 ln2 ln_mlp"
Q_NORM, K_NORM = "q_norm query_norm q_layernorm norm_q qn", "k_norm key_norm k_layernorm norm_k kn"
SUFFIXES = {
    **dict.fromkeys("weight scale gamma gain g".split(), "weight"),
    **dict.fromkeys("bias shift beta".split(), "bias"),
}
EXPERT = r"expert\d+\."  # before the role of what belongs to one expert
INSIDE = "w_out c_proj proj dense out"  # after attention or after the feed-forward: the module around it says which

ROLES: dict[str, str] = {
    name: role
    for role, names in {
        "embed": EMBED, "position": POSITION, "q": Q, "k": K, "v": V, "kv": KV, "qkv": QKV, "o": O, "gate": GATE, "up": UP, "gate_up": GATE_UP,
        "down": DOWN, "norm1": NORM1, "norm2": NORM2, "q_norm": Q_NORM, "k_norm": K_NORM, "inside": INSIDE,
        "post_norm2": "post_feedforward_layernorm", "pre_norm2": "pre_feedforward_layernorm", "router": "router",
    }.items()
    for name in names.split()
}  # fmt: skip
OUTSIDE = {**dict.fromkeys(EMBED.split(), "embed"), **dict.fromkeys(POSITION.split(), "position"), **dict.fromkeys(HEAD.split(), "head"),
           **dict.fromkeys(FINAL_NORM.split(), "norm"), "ff_out": "head", "w_out": "head"}  # fmt: skip

# Words in the names of norms.
BEFORE, BEHIND = {"pre", "before", "input", "in"}, {"post", "after", "output", "out"}
ATTENTION, FEED = {"attn", "attention", "att"}, {"ffn", "mlp", "ff", "feedforward", "feed"}

# The order of the rows where gate and up are one matrix.
GATE_UP_ORDERS = ("gate;up", "up;gate", "gate,up interleaved")


def role_of(name: str) -> Role:
    """(layer, role, `weight` or `bias`) of a parameter's name; the role of an unknown name is the name itself, without the layer."""
    parts = name.split(".")
    suffix = SUFFIXES.get(parts[-1], "weight")
    path = parts[:-1] if parts[-1] in SUFFIXES else parts
    index = next((i for i, part in enumerate(path) if part.isdigit()), None)
    if index is None:
        known = next((OUTSIDE[part] for part in reversed(path) if part in OUTSIDE), None)
        if "lm_head" in path[:-1] and path[-1] == "norm":
            known = "norm"
        return None, known or ".".join(path), suffix
    layer, inner = path[index], path[index + 1 :]
    if len(inner) > 1 and inner[-1].isdigit() and (inner[-2] in ROLES or re.fullmatch(r"(fc|w|lin|linear)_?\w", inner[-2])):
        # a list for each matrix instead of one for all experts
        inner = [*inner[:-2], inner[-1], inner[-2]]
    leaf = inner[-1] if inner else ""
    if leaf in ("in_proj_weight", "in_proj_bias"):
        return layer, "qkv", leaf.removeprefix("in_proj_")
    around = ".".join(inner[:-1]).lower()
    attention, feed = "att" in around, any(word in around for word in ("mlp", "ff", "feed", "ffn"))
    role = ROLES.get(leaf)
    expert = "".join(f"expert{part}." for part in inner[:-1] if part.isdigit())
    if leaf == "ff_out" or (role == "inside" and feed):
        role = "down"
    elif role == "inside" and attention:
        role = "o"
    elif role == "gate" and leaf == "gate" and not expert:
        role = None
    if role is None or role == "inside":
        return layer, expert + ".".join(inner), suffix
    return layer, expert + role, suffix


def settle_norms(roles: dict[str, Role]) -> None:
    """Names of norms mean different things in Llama and in OLMo 2: with one before the attention or without."""
    _settle_four(roles)
    kinds = {role[1] for role in roles.values()}
    renamed: dict[str, str] = {}
    if "post_norm2" in kinds and "norm1" not in kinds:  # OLMo 2: after the attention, after the feed-forward
        renamed = {"norm2": "norm1", "post_norm2": "norm2"}
    elif "pre_norm2" in kinds:  # Gemma 2: around both
        renamed = {"norm2": "post_norm1", "pre_norm2": "norm2"}
    gated = any(kind.endswith("gate") for kind in kinds) or "gate_up" in kinds
    if not gated and "up" not in kinds:
        renamed["gate"] = "up"
    for name, (layer, kind, suffix) in roles.items():
        roles[name] = (layer, renamed.get(kind, kind), suffix)


def _settle_four(roles: dict[str, Role]) -> None:
    """The four norms of a layer whose names, in whatever words, say before or behind, attention or feed-forward."""
    told: dict[str | None, dict[str, list[str]]] = {}
    for name, (layer, kind, _) in roles.items():
        words = set(re.split(r"[_.]", kind.lower()))
        place = "post_" if words & BEHIND and not words & BEFORE else "" if words & BEFORE and not words & BEHIND else None
        part = "norm1" if words & ATTENTION and not words & FEED else "norm2" if words & FEED and not words & ATTENTION else None
        if layer is not None and kind not in ROLES.values() and place is not None and part is not None:
            told.setdefault(layer, {}).setdefault(place + part, []).append(name)
    for layer, found in told.items():
        if len(found) == 4:
            for kind, names in found.items():
                for name in names:
                    roles[name] = (layer, kind, roles[name][2])


def settle_outside(roles: dict[str, Role], subject: Subject) -> None:
    """A table of an unknown name with a row for every token, outside of the layers, is the embedding where no other is; an
    unknown matrix of its shape is the head where no other is."""
    model, shapes = subject.model, {name: tuple(p.shape) for name, p in subject.model.named_parameters()}
    tables = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding) and m.num_embeddings == subject.vocab_size
    }

    def unknown() -> list[str]:
        return [
            name for name, (layer, kind, suffix) in roles.items() if layer is None and suffix == "weight" and kind not in OUTSIDE.values()
        ]

    kinds = {kind: name for name, (_, kind, suffix) in roles.items() if suffix == "weight"}
    found = [name for name in unknown() if name in tables]
    if len(found) == 1 and "embed" not in kinds:
        kinds["embed"] = found[0]
        roles[found[0]] = (None, "embed", "weight")
    found = [name for name in unknown() if "embed" in kinds and shapes[name] == shapes[kinds["embed"]]]
    if len(found) == 1 and "head" not in kinds:
        roles[found[0]] = (None, "head", "weight")


def settle_feed_forward(
    roles: dict[str, Role], parameters: Mapping[str, Tensor], width: int | None, orders: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """The three matrices of a gated feed-forward whose names do not say which is which: the one that leads back to the
    residual's width is `down`, and the order of the other two is a choice, which is given back under the two names."""
    holders: dict[tuple[str, ...], list[str]] = {}
    for name, (layer, kind, suffix) in roles.items():
        if layer is not None and suffix == "weight" and parameters[name].ndim == 2:
            path = [part for part in name.split(".")[:-1] if part.isdigit() or part != leaf_of(name)]
            holders.setdefault((*path, *re.findall(EXPERT, kind)), []).append(name)
    found: dict[str, tuple[str, ...]] = {}
    for names in holders.values():
        kinds = [roles[name][1].rpartition(".")[2] for name in names]
        down = [name for name in names if parameters[name].shape[0] == width != parameters[name].shape[1]]
        if {"q", "k", "v", "kv", "o", "qkv"} & set(kinds) or len(down) != 1:
            continue
        plain = [re.sub(EXPERT, "", roles[name][1]) for name in names]
        said = kinds if sorted(kinds) == ["down", "gate", "up"] else _of_two(names, down[0], plain, parameters)
        if said is not None:  # `gate` alone may be a router, beside `up` and `down` it is none
            for name, kind in zip(names, said, strict=True):
                layer, old, suffix = roles[name]
                roles[name] = (layer, "".join(re.findall(EXPERT, old)) + kind, suffix)
        if said is not None or len(names) != 3:
            continue
        entering = [name for name in names if name not in down]
        if any(parameters[name].shape != parameters[down[0]].shape[::-1] for name in entering):
            continue
        pair = f"the pair {leaf_of(entering[0])}, {leaf_of(entering[1])}"
        found[pair] = GATE_UP_ORDERS[:2]
        for name, kind in zip([*entering, *down], [*orders.get(pair, GATE_UP_ORDERS[0]).split(";"), "down"], strict=True):
            layer, old, suffix = roles[name]
            roles[name] = (layer, "".join(re.findall(EXPERT, old)) + kind, suffix)
    return found


def _of_two(names: list[str], down: str, kinds: list[str], parameters: Mapping[str, Tensor]) -> list[str] | None:
    """The roles of the two matrices of a feed-forward whose names say nothing: the one that enters is as high as `down` is
    wide, or, gate and up in one, twice as high."""
    if len(names) != 2 or all(kind in ROLES.values() for kind in kinds):
        return None
    (width, inner), entering = parameters[down].shape, next(parameters[name].shape for name in names if name != down)
    if entering[1] != width or entering[0] not in (inner, 2 * inner):
        return None
    return ["down" if name == down else "up" if entering[0] == inner else "gate_up" for name in names]


def residual_width(roles: Mapping[str, Role], parameters: Mapping[str, Tensor]) -> int | None:
    """How many numbers the residual stream has a position: those of an embedding."""
    return next((parameters[name].shape[1] for name, role in roles.items() if role[1] == "embed" and parameters[name].ndim == 2), None)


def leaf_of(name: str) -> str:
    parts = name.split(".")
    parts = parts[:-1] if parts[-1] in SUFFIXES and len(parts) > 1 else parts
    parts = parts[:-1] if parts[-1].isdigit() and len(parts) > 1 else parts
    return parts[-1].removesuffix("_weight").removesuffix("_bias")


def is_named(slot: str) -> bool:
    """Whether a slot has one of the roles that names are known for."""
    kind = re.sub(EXPERT, "", slot.rpartition(".")[0].partition(".")[2] or slot.rpartition(".")[0])
    return kind in ROLES.values() or kind in OUTSIDE.values() or kind in ("post_norm1", "post_norm2")
