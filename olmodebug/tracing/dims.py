"""Sizes as the names of dimensions: `(B=3, heads=4, T=11, T=11)`."""

from ..settings import HEAD_NAMES, VOCAB_NAMES
from ..subject import Subject

WIDTH_NAMES = ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "n_embed", "embed", "model_dim")
KV_HEAD_NAMES = ("num_key_value_heads", "n_kv_heads", "n_kv_head", "num_kv_heads")
MLP_NAMES = ("intermediate_size", "mlp_hidden_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim")


def dimension_names(subject: Subject, *, batch: int, seq: int) -> dict[int, str]:
    """Size -> name for the sizes that mean one thing only; B and T win over the model's own sizes."""
    heads, width = subject.setting(*HEAD_NAMES), subject.setting(*WIDTH_NAMES)
    head_dim = subject.setting("head_dim")
    seq += -seq % subject.convention.multiple  # as the model sees it
    if not isinstance(head_dim, int) and isinstance(heads, int) and isinstance(width, int) and heads:
        head_dim = width // heads
    meanings: list[tuple[object, str]] = [
        (heads, "heads"),
        (subject.setting(*KV_HEAD_NAMES), "kv_heads"),
        (head_dim, "head_dim"),
        (head_dim // 2 if isinstance(head_dim, int) and head_dim % 2 == 0 else None, "head_dim/2"),
        (width, "hidden"),
        (subject.setting(*MLP_NAMES), "intermediate"),
        (subject.setting(*VOCAB_NAMES), "vocab"),
        (subject.max_positions, "max_positions"),
    ]
    names: dict[int, str] = {}
    for size, name in meanings:
        if isinstance(size, int) and size > 1:
            if name == "kv_heads" and names.get(size) == "heads":
                continue
            names[size] = name if size not in names else ""
    names |= {batch * seq: "B*T", seq: "T", batch: "B" if batch != seq else "B or T"}
    return {size: name for size, name in names.items() if name and size > 1}


def named_shape(shape: tuple[int, ...], names: dict[int, str]) -> str:
    """`(3, 4, 11, 11)` as `(B=3, heads=4, T=11, T=11)`; a size without a name stands alone, and so does a second batch."""
    batch = next((place for place, size in enumerate(shape) if names.get(size) == "B"), None)
    named = [size in names and (names[size] != "B" or place == batch) for place, size in enumerate(shape)]
    inner = ", ".join(f"{names[size]}={size}" if has else str(size) for size, has in zip(shape, named, strict=True))
    return f"({inner},)" if len(shape) == 1 else f"({inner})"
