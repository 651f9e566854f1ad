"""Where queries meet keys in a recording: the products that give attention scores, one head a matrix or several in one.

An einsum over grouped heads, `btkgh,bskh->bkgts`, multiplies the rows of all queries of a group in one matrix; what the
result is viewed as next says how those rows are laid out.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from ..records import TensorInfo
from .tracer import Recording

VIEWS = ("view", "_unsafe_view", "unflatten", "reshape", "_reshape_alias", "alias")
# Ops behind which the scores are still the bare products, in another layout or dtype.
LAYOUTS = (*VIEWS, "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "clone", "contiguous", "_to_copy", "select", "slice")
LOOK_AHEAD = 4  # ops between a product and the view that names its dimensions


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Queries `[heads, seq_len, head_dim]` and keys `[key heads, seq_len, head_dim]` as they meet in the op `index`."""

    index: int
    query: Tensor
    key: Tensor


def product_at(recording: Recording, index: int, seq: int) -> Product | None:
    """The product of queries and keys that the op `index` makes; None where it makes none over `seq` tokens."""
    event, kept = recording.events[index], recording.kept[index]
    if event.op not in ("bmm", "matmul") or len(kept.inputs) < 2 or kept.inputs[0].ndim != 3 or not kept.outputs:
        return None
    query, key = kept.inputs[0], kept.inputs[1].transpose(-1, -2)
    if query.shape[-1] == seq:
        return None  # weights meeting values
    turned = key.shape[-2] != seq and query.shape[-2] == seq
    if turned:
        query, key = key, query
    if key.shape[-2] != seq or query.shape[-2] % seq:
        return None
    if query.shape[-2] != seq:
        groups = query.shape[-2] // seq
        order = _row_order(recording, index, rows=query.shape[-2], columns=seq, seq=seq, turned=turned)
        if order is None:
            return None
        parted = query.unflatten(-2, (seq, groups)).transpose(-2, -3) if order == "tokens first" else query.unflatten(-2, (groups, seq))
        query = parted.flatten(0, 1)
    return Product(index=index, query=query, key=key)


def met_states(recording: Recording, seq: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(op, keys, values) of each attention over one sequence, both `[heads, seq_len, head_dim]`, as many heads as queries have;
    the op is the fused one, or the product of weights and values."""
    keys: Tensor | None = None
    for index, (event, kept) in enumerate(zip(recording.events, recording.kept, strict=True)):
        if event.op.startswith("_scaled_dot_product"):
            query, key, value = (kept.arguments.get(name) for name in ("query", "key", "value"))
            if isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor) and query.ndim == 4:
                if query.shape[:2] == key.shape[:2] == value.shape[:2]:
                    yield index, key[0], value[0]
            continue
        if (made := product_at(recording, index, seq)) is not None:
            keys = made.key if made.key.shape[0] == made.query.shape[0] else None
        elif keys is not None and event.op == "bmm" and kept.inputs[0].shape == (len(keys), seq, seq) and kept.inputs[1].ndim == 3:
            if kept.inputs[1].shape[:2] == (len(keys), seq):
                yield index, keys, kept.inputs[1]
            keys = None


def score_parameters(recording: Recording, seq: int, names: Container[str]) -> set[str]:
    """The parameters, of these names, that queries and keys are projected or scaled with last, before they meet."""
    found: set[str] = set()
    for index, event in enumerate(recording.events):
        if event.op.startswith("_scaled_dot_product"):
            operands: Sequence[TensorInfo] = event.inputs[:2]
        elif product_at(recording, index, seq) is not None:
            operands = event.inputs
        else:
            continue
        found |= _behind(recording, index, {info.storage for info in operands}, names)
    return found


def _behind(recording: Recording, index: int, storages: set[int], names: Container[str]) -> set[str]:
    """The first parameters on every way back from these storages."""
    found: set[str] = set()
    for event in reversed(recording.events[:index]):
        if not storages & {info.storage for info in event.outputs}:
            continue
        storages = storages - {info.storage for info in event.outputs}
        read = [name for name in event.parameters if name in names]
        found |= set(read)
        if not read:
            storages |= {info.storage for info in event.inputs if info.dtype.startswith(("float", "bfloat", "complex"))}
    return found


def _row_order(recording: Recording, index: int, *, rows: int, columns: int, seq: int, turned: bool) -> str | None:
    """How several heads and the tokens share the rows of a product, by the shape it is viewed as next; `turned`: they are its
    columns, and the keys its rows."""
    written = {info.storage for info in recording.events[index].outputs}
    for event in recording.events[index + 1 : index + 1 + LOOK_AHEAD]:
        if event.op not in VIEWS or not event.inputs or event.inputs[0].storage not in written or not event.outputs:
            continue
        sizes = [size for size in event.outputs[0].shape if size > 1]
        for end in range(len(sizes), 0, -1):
            for start in range(end):
                part = sizes[start:end]
                others = sizes[:start] if turned else sizes[end:]
                if prod(part) == rows and seq in part and len(part) > 1 and columns in others:
                    return "tokens first" if part[0] == seq else "heads first" if part[-1] == seq else None
    return None
