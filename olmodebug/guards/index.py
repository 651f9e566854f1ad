"""Whether every index lies in its table, asked before the op runs, so that a CUDA context survives a bad one.

One comparison of the smallest and largest index with the bound; only when that fails is anything else looked at. On the CPU
the op then raises its own error; on other devices `IndexError` is raised here, before the kernel is launched.
"""

import ast
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..records import TensorInfo
from ..relations.repair import expressions
from ..report import Finding, Scalar
from ..settings import VOCAB_NAMES
from ..sources import short_path
from ..tracing.dims import WIDTH_NAMES
from .excerpts import lines_at
from .place import Place

IN_BOUNDS = "index.in-bounds"
NO_WRAP = "index.no-negative-wrap"
PROBABILITIES = "index.probabilities"

MOSTLY = 0.5  # of the steps of positions go up by one
SHORT_RAMP = 2  # indices; a single 0 is no sequence of positions

Use = tuple[Tensor, Tensor, int, int, int]  # table, index, dimension, bound, lowest legal index
Read = Callable[[tuple[Any, ...], dict[str, Any]], Iterator[Use]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """An index beyond its table: both tensors, the dimension, and the legal range."""

    op: str
    table: Tensor
    index: Tensor
    dim: int
    bound: int
    low: int
    ignored: int = -100  # the label that the loss leaves out


def _advanced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Use]:
    table = args[0]
    for dim, index in enumerate(args[1]):
        if index is not None and index.dtype in (torch.int64, torch.int32) and dim < table.ndim:
            yield table, index, dim, table.shape[dim], -table.shape[dim]


def _embedding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Use]:
    yield args[0], args[1], 0, args[0].shape[0], 0


def _along(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Use]:
    table, dim, index = args[0], args[1], args[2]
    if table.ndim:
        yield table, index, dim % table.ndim, table.shape[dim], 0


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Use]:
    yield args[0], args[1], 0, args[0].numel(), -args[0].numel()


def _classes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Use]:
    scores, target, ignore = args[0], args[1], args[4]
    classes = scores.shape[-1] if scores.ndim <= 2 else scores.shape[1]
    if target.numel():
        low, high = _range(target)
        if low < 0 or high >= classes:
            target = target[target != ignore]
    yield scores, target, min(1, scores.ndim - 1), classes, 0


def _table() -> dict[Any, tuple[str, Read]]:
    aten = torch.ops.aten
    names: dict[str, tuple[tuple[str, ...], Read]] = {
        "tensor indexing": (("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"), _advanced),
        "embedding": (("embedding", "_embedding_bag", "_embedding_bag_forward_only"), _embedding),
        "index_select": (("index_select", "index_add", "index_add_", "index_copy", "index_copy_", "index_reduce"), _along),
        "gather": (("gather",), _along),
        "scatter": (("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"), _along),
        "take": (("take", "put", "put_"), _flat),
        "cross_entropy target": (("nll_loss_forward", "nll_loss2d_forward"), _classes),
    }
    found: dict[Any, tuple[str, Read]] = {}
    for words, (ops, read) in names.items():
        for op in ops:
            packet = getattr(aten, op, None)
            for overload in packet.overloads() if packet is not None else ():
                if overload not in ("str", "list_int", "list_float", "list_bool", "list_Tensor", "list_str"):
                    found[getattr(packet, overload)] = (words, read)
    return found


READS = _table()
SAMPLERS = (torch.ops.aten.multinomial.default,)


def bad_index(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bad | None:
    """The first index of an op that is out of its table; None when all are in it."""
    words, read = READS[func]
    for table, index, dim, bound, low in read(args, kwargs):
        if not index.numel() or type(index) is not Tensor or index.device.type == "meta":
            continue
        smallest, largest = _range(index)
        if largest >= bound or smallest < low:
            ignored = args[4] if read is _classes else -100
            return Bad(op=words, table=table, index=index, dim=dim, bound=bound, low=low, ignored=ignored)
    return None


def wraps(func: Any, args: tuple[Any, ...]) -> Bad | None:
    """A table of numbers read with some negative indices among others: they count from its end without a word."""
    if READS[func][1] is not _advanced or func._schema.name != "aten::index":
        return None
    tensors = [index for index in args[1] if index is not None]
    table = args[0]
    for dim, index in enumerate(args[1]):
        if index is None or index.dtype not in (torch.int64, torch.int32) or index.numel() < 2 or type(index) is not Tensor:
            continue
        smallest, largest = _range(index)
        if not (smallest < 0 <= largest and table.is_floating_point() and (len(tensors) == 1 or index.ndim == 1)):
            continue
        if not _is_roll(index, table.shape[dim]):
            return Bad(op="tensor indexing", table=table, index=index, dim=dim, bound=table.shape[dim], low=0)
    return None


def _is_roll(index: Tensor, bound: int) -> bool:
    """Every row once, counted round the end: a roll, which is meant."""
    return index.ndim == 1 and index.numel() == bound and index.remainder(bound).unique().numel() == bound


def _range(index: Tensor) -> tuple[int, int]:
    low, high = torch.aminmax(index)
    return int(low), int(high)


def improper_probabilities(probabilities: Tensor) -> str | None:
    """What makes a tensor no probabilities for multinomial, which asserts on a device; None when it is proper."""
    if not probabilities.numel() or type(probabilities) is not Tensor or probabilities.device.type == "meta":
        return None
    low, high = (float(value) for value in torch.aminmax(probabilities))
    if low != low or high in (float("inf"), float("nan")):
        return "inf or nan"
    return "a negative number" if low < 0 else None


def explain_index(bad: Bad, spot: Place, built: str | None = None) -> Finding:
    """The finding on a bad index: value, position, bound, table, and the cause where the values establish it."""
    flat = bad.index.detach().reshape(-1).cpu()
    wrong = (flat >= bad.bound) | (flat < bad.low)
    value = int(flat[wrong][0])
    first = tuple(int(i) for i in torch.unravel_index(wrong.nonzero()[0, 0], bad.index.shape))
    name = table_name(bad, spot)
    what = f"`{name}`" if name else "the table"
    classes = bad.op == "cross_entropy target"
    bound_words = f"{bad.bound} classes" if classes else f"{bad.bound} rows" if bad.dim == 0 else f"size {bad.bound} at dimension {bad.dim}"
    evidence: dict[str, Scalar] = {
        "smallest_index": int(flat.min()),
        "largest_index": int(flat.max()),
        "bound": bad.bound,
        "index_shape": str(tuple(bad.index.shape)),
        "table_shape": str(tuple(bad.table.shape)),
        "device": str(bad.index.device),
    }
    if built:
        evidence["table_built_at"] = built
    if spot.inside_text:
        evidence["inside"] = spot.inside_text
    cause, fix, ruled_out = _cause(bad, flat, value, name, spot)
    where = spot.at(bad.op)
    return Finding(
        probe=IN_BOUNDS,
        severity="error",
        message=f"{'label' if classes else 'index'} {value} is out of range: {what if not classes else 'the logits'} "
        f"{'have' if classes else 'has'} {bound_words}",
        cause=cause,
        fix=fix,
        where=where,
        source=lines_at(where),
        expected=f"0 .. {bad.bound - 1} ({_info(bad.table)}, dimension {bad.dim})",
        observed=f"{value} at {first}; {int(wrong.sum())} of {flat.numel()} values out of range",
        evidence=evidence,
        ruled_out=ruled_out,
    )


def explain_wrap(bad: Bad, spot: Place) -> Finding:
    """The finding on negative indices that wrap."""
    flat = bad.index.detach().reshape(-1).cpu()
    name = table_name(bad, spot)
    where = spot.at(bad.op)
    value = int(flat[flat < 0][0])
    return Finding(
        probe=NO_WRAP,
        severity="warning",
        message=f"index {value} counts from the end of {f'`{name}`' if name else 'the table'}: it reads row {value + bad.bound} of {bad.bound}",
        fix="clamp or mask these positions first, unless counting from the end is meant; an embedding or gather would refuse them",
        where=where,
        source=lines_at(where),
        observed=f"{int((flat < 0).sum())} of {flat.numel()} indices are negative",
        evidence={"smallest_index": int(flat.min()), "largest_index": int(flat.max()), "bound": bad.bound},
    )


def table_name(bad: Bad, spot: Place) -> str | None:
    """What the table is called: a parameter or buffer of the open modules, else the expression that is indexed."""
    if spot.modules:
        for path, tensor in itertools.chain(spot.modules[0].named_parameters(), spot.modules[0].named_buffers()):
            if _same_memory(tensor, bad.table):
                return path
    innermost = spot.inside or spot.spot
    tree = expressions(innermost)
    if tree is None or innermost is None or bad.op != "tensor indexing":
        return None
    node = next((node for node in tree.at(innermost) if isinstance(node, ast.Subscript)), None)
    return tree.source(node.value) if node is not None else None


def _cause(bad: Bad, flat: Tensor, value: int, name: str | None, spot: Place) -> tuple[str | None, str | None, tuple[str, ...]]:
    model = spot.modules[0] if spot.modules else None
    config = getattr(model, "config", None)
    largest = int(flat.max())
    if bad.op == "cross_entropy target":
        return _label_cause(bad, value, config)
    if bad.op == "embedding" and _is_ramp(flat, bad.index):
        length = bad.index.shape[-1]
        cause = f"a sequence of {length} tokens is longer than the position table of {bad.bound} rows"
        return cause, f"cut the batch to {bad.bound} tokens, or build the table for at least {largest + 1} positions", ()
    if (
        bad.op in ("embedding", "tensor indexing")
        and are_positions(bad.index)
        and bool((bad.index[..., 0] == bad.index[..., 0].min()).all())
    ):
        cause = f"position {largest} is asked of a table of {bad.bound} rows"
        return cause, f"build the table for at least {largest + 1} positions, or count no further than {bad.bound - 1}", ()
    if bad.op == "embedding" and value < 0:
        if value == -100:
            return (
                "-100 is the label of a masked position, and it is among the token ids",
                "labels = input_ids.clone() before masking: `labels = input_ids` is the same memory",
                (),
            )
        return f"{value} is no token id", "look at what filled the batch: ids are 0 .. vocab - 1", ()
    if bad.op == "embedding":
        words = [f"token id {value} has no row in the embedding table of {bad.bound} rows"]
        pad = getattr(config, "pad_token_id", None)
        if pad is not None and value == pad:
            words.append(f"it is config.pad_token_id, {pad}")
        elif _fills_the_ends(bad.index, value, bad.bound):
            words.append("it alone is out of range, and it fills the ends of rows, as padding does")
        declared = next((v for v in (getattr(config, n, None) for n in VOCAB_NAMES) if isinstance(v, int)), None)
        if isinstance(declared, int) and declared != bad.bound:
            words.append(f"the config declares a vocabulary of {declared}")
        fix = (
            f"where tokens were added, a table of at least {largest + 1} rows (transformers: model.resize_token_embeddings({largest + 1})); "
            "else the tokenizer that the model was made for"
        )
        return ": ".join([words[0], " and ".join(words[1:])]) if words[1:] else words[0], fix, ()
    return None, None, ()


def _label_cause(bad: Bad, value: int, config: object) -> tuple[str | None, str | None, tuple[str, ...]]:
    pad, ignored = getattr(config, "pad_token_id", None), bad.ignored
    if value == -100:
        return "-100 marks masked labels, and this loss ignores another number", "ignore_index=-100, the default", ()
    if value < 0:
        return f"{value} is no class and not the ignored number", f"labels are 0 .. vocab - 1, and {ignored} where nothing is asked", ()
    if pad is not None and value == pad:
        return f"the label is config.pad_token_id, {pad}, which has no class", f"give {ignored} at padded positions", ()
    vocab = next((v for v in (getattr(config, name, None) for name in VOCAB_NAMES) if isinstance(v, int)), None)
    if vocab is not None and value < vocab:
        return f"the config declares {vocab} tokens, and the logits have {bad.bound}", f"make the head {vocab} wide", ()
    width = next((v for v in (getattr(config, name, None) for name in WIDTH_NAMES) if isinstance(v, int)), None)
    if width is not None and bad.bound == width:
        return "the loss got hidden states: as many classes as hidden_size", "give the loss the output of the language-model head", ()
    return (
        f"a label is {value}, and there are {bad.bound} classes",
        f"labels lie in 0 .. vocab - 1; give {ignored} where nothing is asked",
        (),
    )


def _fills_the_ends(ids: Tensor, value: int, bound: int) -> bool:
    """Whether one number is all that is beyond a table, more than once, and only at the ends of rows."""
    wrong = (ids == value).cpu()
    if ids.ndim != 2 or bool(wrong[:, 0].any()) or int((ids >= bound).sum()) != int(wrong.sum()) or int(wrong.sum(1).max()) < 2:
        return False
    return bool((wrong.long().diff(dim=1) >= 0).all())


def _is_ramp(flat: Tensor, index: Tensor) -> bool:
    """Whether the index is 0, 1, 2, ... along its last dimension, in every row: positions, not tokens."""
    length = index.shape[-1] if index.ndim else 1
    if length < SHORT_RAMP:
        return False
    rows = flat.reshape(-1, length)
    return bool(((rows[:, 1:] - rows[:, :-1]) == 1).all())


def are_positions(index: Tensor) -> bool:
    """Whether an index counts up by one along its last dimension, and else begins anew or stands still: positions, also of several
    documents in a row and of padding."""
    if index.ndim == 0 or index.shape[-1] < 2:
        return False
    before, after = index[..., :-1], index[..., 1:]
    counted = after - before == 1
    return bool((counted | (after == 0) | (after == before)).all()) and float(counted.float().mean()) > MOSTLY


def _same_memory(left: Tensor, right: Tensor) -> bool:
    try:
        return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr() and left.shape == right.shape
    except (RuntimeError, NotImplementedError):  # tensors without a storage of their own
        return False


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(shape=tuple(tensor.shape), dtype=str(tensor.dtype)[6:])


def built_at(table: Tensor, origin: Any) -> str | None:
    """`model.py:7` where the table's memory was first written; None where that was not seen."""
    spot = origin(table) if origin is not None else None
    return f"{short_path(spot.file)}:{spot.line}" if spot is not None else None
