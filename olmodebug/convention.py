"""How a model wants to be called and what it gives back, read from its signature and from one run."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SubjectError
from .records import Case

IDS_NAMES = ("input_ids", "idx", "tokens", "token_ids", "ids", "x", "input", "inputs", "src")
MASK_NAMES = ("attention_mask", "padding_mask", "pad_mask", "attn_mask", "mask")
HIDING_NAMES = ("src_key_padding_mask", "key_padding_mask")  # torch.nn's: True hides
POSITION_NAMES = ("position_ids", "positions", "pos_ids", "position", "segment_pos")
CACHE_NAMES = ("past_key_values", "past_key_value", "past", "kv_cache", "cache_params", "cache")  # the last from transformers 5.24 on
# Where the model keeps the cache itself, the caller says where the new tokens stand: their positions as a tensor
# (lit-gpt, gpt-fast), or the first of them as a number (Meta's llama).
PLACES_NAMES, START_NAMES = ("input_pos",), ("start_pos",)
SETUP_NAMES = ("set_kv_cache", "setup_caches", "setup_cache", "setup_kv_cache")
# A cache that the caller makes, with one of these methods or as an empty dict, and every forward fills.
HANDED_NAMES = ("cache", "kv_cache", "caches", "kv_caches", *CACHE_NAMES)
# What every call gives back and the next one takes, with no use_cache to ask for it, as in GPT-2.
RETURNED_NAMES = (*HANDED_NAMES, "past_kv", "past_kvs", "layer_past", "past_caches", "presents", "new_cache", "new_caches", "new_kv_cache")
MAKER_NAMES = ("make_cache", "init_cache", "new_cache", "create_cache", "empty_cache", "make_kv_cache", "init_kv_cache", "allocate_cache")
# The state of a recurrent model that the caller must hand over, as the model's own method makes it for so many rows.
STATE_NAMES, STATE_MAKERS = ("hidden", "hidden_state", "hx", "h", "state", "states"), ("init_hidden", "init_state", "begin_state")
RESET_NAMES = ("reset_kv_cache", "reset_cache", "clear_kv_cache", "clear_cache", "reset_caches", "clear_caches")  # before a new sequence
LOSS_METHODS = ("loss", "compute_loss", "loss_fn")  # where forward gives logits only: method(ids, labels)
LOSS_ATTRIBUTES = ("last_loss",)  # llama2.c gives bare logits and leaves the loss here
SHIFTED_LABELS = ("labels",)
ALIGNED_LABELS = ("targets", "target", "target_ids", "target_seq", "y")
WHOLE_MASKS = ("seen", "hidden", "added")  # what True says of a place; a mask that is added to the scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Convention:
    """The argument names of a model's forward; None where it has no such argument. `by_name`: the ids are a keyword too.

    `labels_aligned` says that label t belongs to logit t (nanoGPT's `targets`); otherwise the model shifts inside
    (`labels`). `mask_hides`: the mask is True where it hides, as torch.nn's are. `hands_cache`: the caller makes the
    cache and hands it to every forward. `loss_method` takes the labels where forward takes none.
    `logits_need_labels`: without labels the model returns only the last position. `places` and `start` take the
    positions of the new tokens, or the first of them, where the model keeps its cache itself. `state`: what the model's
    own method makes for so many rows, given to every call. `required` have no
    default: what no case states is given as counted positions, a mask of ones, the ids themselves as labels, a start of 0.
    `whole_mask`: an argument for a mask `[batch, 1, seq_len, seq_len]` with causality in it, and what True says in
    it. `in_dict`: one argument holds all by their names. `sequence_first`: ids are `[seq_len, batch]`, and so are the
    logits. `multiple`: the model takes sequences of such lengths only, and others are padded on the right. `sets_up`:
    nothing runs before the model has made its cache, so one is made for every call.
    `last_only`: it gives the logits of the last position and has no labels that would ask for more.
    """

    ids: str
    by_name: bool = False
    attention_mask: str | None = None
    mask_hides: bool = False
    position_ids: str | None = None
    cache: str | None = None
    use_cache: str | None = None
    hands_cache: bool = False
    places: str | None = None
    start: str | None = None
    state: str | None = None
    labels: str | None = None
    loss_method: str | None = None
    labels_aligned: bool = False
    logits_need_labels: bool = False
    required: tuple[str, ...] = ()
    whole_mask: tuple[str, str] | None = None
    in_dict: bool = False
    sequence_first: bool = False
    multiple: int = 1
    flags: tuple[str, ...] = ()
    sets_up: bool = False
    last_only: bool = False

    def __str__(self) -> str:
        labels = None if self.loss_method else self.labels
        names = [self.ids, self.attention_mask, self.position_ids, self.cache, self.places, self.start, self.state, labels]
        text = ", ".join([*(name for name in names if name), *(f"{name}=True" for name in self.flags)])
        text = f"forward({{{text}}})" if self.in_dict else f"forward({text})"
        if self.sequence_first:
            text += f"; {self.ids} as [seq_len, batch]"
        if self.loss_method:
            text += f"; {self.loss_method}({self.ids}, {self.labels})"
        if self.labels:
            text += f"; {self.labels} " + ("already aligned with the logits" if self.labels_aligned else "shifted inside")
        if self.sets_up:
            text += "; its cache is made first"
        if self.last_only:
            text += "; the last position only"
        if self.logits_need_labels:
            text += f"; only the last position without {self.labels}"
        return text


@dataclass(slots=True, kw_only=True)
class Output:
    """What one call gave: logits `[batch, seq_len, vocab]`, the scalar loss and the cache where there is one."""

    logits: Tensor
    loss: Tensor | None = None
    cache: Any = None


class NoLogits(Exception):
    """The model ran and returned nothing that can be logits; the text says what it did return. `loss`: it can be a loss."""

    loss = False


def read_signature(forward: Callable[..., object]) -> Convention:
    """The convention that the names in a signature say; SubjectError when there is no forward, or a required argument
    cannot be guessed."""
    if getattr(forward, "__func__", forward) is nn.Module.forward:
        raise SubjectError("the model has no forward(); state the call with --adapter")
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):  # a scripted or compiled forward
        raise SubjectError("forward() has no readable signature; state the call with --adapter") from None
    parameters = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = [p.name for p in parameters]
    if not names and any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        return Convention(ids=IDS_NAMES[0])
    if not names:
        raise SubjectError("forward() takes no argument that token ids could go into; state it with --adapter")

    def first(wanted: tuple[str, ...]) -> str | None:
        return next((name for name in wanted if name in names), None)

    without_default = {p.name for p in parameters if p.default is p.empty}
    ids = next((name for name in IDS_NAMES if name in without_default), None) or first(IDS_NAMES) or names[0]
    labels = first(SHIFTED_LABELS) or first(ALIGNED_LABELS)
    hiding = first(HIDING_NAMES)
    convention = Convention(
        ids=ids,
        by_name=signature.parameters[ids].kind is inspect.Parameter.KEYWORD_ONLY,
        attention_mask=first(MASK_NAMES[:1]) or first(MASK_NAMES[1:3]) or hiding,
        mask_hides=hiding is not None and not first(MASK_NAMES[:3]),
        position_ids=first(POSITION_NAMES),
        cache=first(CACHE_NAMES) if "use_cache" in names else None,
        use_cache="use_cache" if "use_cache" in names else None,
        places=first(PLACES_NAMES),
        start=first(START_NAMES),
        labels=labels,
        labels_aligned=labels in ALIGNED_LABELS,
        logits_need_labels=labels in without_default,
    )
    stated = {convention.attention_mask, convention.position_ids, convention.labels, convention.start}
    convention = replace(convention, required=tuple(name for name in names if name in without_default & stated))
    if any(hasattr(getattr(forward, "__self__", None), name) for name in STATE_MAKERS):
        convention = replace(convention, state=next((name for name in STATE_NAMES if name in without_default), None))
    unknown = [name for name in names if name in without_default - stated - {ids, convention.state}]
    if unknown:
        raise SubjectError(
            f"forward() requires {', '.join(unknown)}, which cannot be guessed; give it a default or state the call with --adapter"
        )
    return convention


def find_logits(result: object, *, batch_size: int, seq_len: int) -> Output:
    """Logits, loss and cache in an output object, dict, tuple or bare tensor; NoLogits says what came instead."""
    if isinstance(result, Tensor):
        result = _apart(result, batch_size, seq_len)
        _must_be_logits(result, batch_size, seq_len)
        return Output(logits=result)
    if isinstance(result, Mapping) or hasattr(result, "logits"):
        read = result.get if isinstance(result, Mapping) else lambda name: getattr(result, name, None)
        logits, loss, cache = read("logits"), read("loss"), None
        for name in CACHE_NAMES:
            found = read(name)
            cache = found if cache is None else cache
        if not isinstance(logits, Tensor):
            raise NoLogits(f"an output of type {type(result).__name__} without a `logits` tensor")
        logits = _apart(logits, batch_size, seq_len)
        _must_be_logits(logits, batch_size, seq_len)
        return Output(logits=logits, loss=loss if isinstance(loss, Tensor) else None, cache=cache)
    if isinstance(result, tuple | list):
        tensors = [_apart(item, batch_size, seq_len) for item in result if isinstance(item, Tensor)]
        logits = next((t for t in tensors if t.ndim == 3), None)
        loss = next((t for t in tensors if t.ndim == 0), None)
        if logits is not None:
            _must_be_logits(logits, batch_size, seq_len)
            return Output(logits=logits, loss=loss)
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors) or "no tensor"
        raise NoLogits(f"a {type(result).__name__} with {shapes}")
    raise NoLogits(f"{type(result).__name__}")


def returned_cache(result: object) -> Any:
    """What one call gives back for the next: of a tuple, keys and values of each layer, or an object called a cache; None where
    nothing is seen. Hidden states and attention weights come one tensor a layer, and are none."""
    if isinstance(result, Mapping):
        named: list[object] = [result.get(name) for name in RETURNED_NAMES]
    elif isinstance(result, tuple | list):
        named = list(result)
    else:
        named = [getattr(result, name, None) for name in RETURNED_NAMES]
    return next((item for item in named if _holds_a_cache(item)), None)


def _holds_a_cache(item: object) -> bool:
    if isinstance(item, Mapping):
        return bool(item) and all(isinstance(value, Tensor | tuple | list | Mapping) for value in item.values())
    if isinstance(item, tuple | list):
        pairs = [
            isinstance(layer, tuple | list | Mapping) and len(layer) >= 2 or isinstance(layer, Tensor) and layer.ndim >= 5 for layer in item
        ]
        return bool(pairs) and all(pairs)
    return isinstance(item, Tensor) and item.ndim >= 6 or "cache" in type(item).__name__.lower()


def first_embedding(model: nn.Module) -> nn.Embedding | None:
    """The first embedding table of the model, in the order its modules were registered."""
    return next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)


def is_scalar_loss(value: object) -> bool:
    """Whether a value can be a loss."""
    return isinstance(value, Tensor) and value.numel() == 1 and value.dtype.is_floating_point


def find_loss(result: object) -> Tensor | None:
    """The scalar loss in an output object, dict, tuple or bare tensor; None where there is none."""
    if isinstance(result, Tensor):
        return result if is_scalar_loss(result) else None
    if isinstance(result, Mapping) or hasattr(result, "loss"):
        loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
        return loss if is_scalar_loss(loss) else None
    items = result if isinstance(result, tuple | list) else ()
    return next((item for item in items if is_scalar_loss(item)), None)


def _apart(tensor: Tensor, batch_size: int, seq_len: int) -> Tensor:
    """Logits `[batch * seq_len, vocab]`, flattened for the loss as courses teach it, as `[batch, seq_len, vocab]`, and those of
    the last position alone, `[batch, vocab]`, as `[batch, 1, vocab]`."""
    if tensor.ndim == 2 and tensor.dtype.is_floating_point:
        if tensor.shape[0] == batch_size * seq_len and seq_len > 1:
            return tensor.unflatten(0, (batch_size, seq_len))
        if tensor.shape[0] == batch_size and tensor.shape[1] not in (1, seq_len):  # a loss for each token is none
            return tensor.unsqueeze(1)
    return tensor


def _must_be_logits(tensor: Tensor, batch_size: int, seq_len: int) -> None:
    if tensor.ndim != 3 or not tensor.dtype.is_floating_point or tensor.shape[0] != batch_size or tensor.shape[1] not in (seq_len, 1):
        shape = tuple(tensor.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        error = NoLogits(f"a {dtype} tensor of shape {shape}; expected float logits (batch {batch_size}, seq_len {seq_len}, vocabulary)")
        error.loss = is_scalar_loss(tensor)
        raise error


def ids_tensor(rows: tuple[tuple[int, ...], ...] | None, device: torch.device | str = "cpu") -> Tensor | None:
    """Rows of integers as an int64 tensor `[batch, seq_len]`."""
    return None if rows is None else torch.tensor(rows, dtype=torch.long, device=device)


def whole_mask(kind: str, seq: int, *, hide: bool = True, device: torch.device | str = "cpu") -> Tensor:
    """A mask `[1, 1, seq_len, seq_len]` of one of WHOLE_MASKS: causal, or with nothing hidden."""
    later = torch.ones(1, 1, seq, seq, dtype=torch.bool, device=device).triu(1) & hide
    if kind == "added":
        return torch.zeros(later.shape, device=device).masked_fill(later, float("-inf"))
    return later if kind == "hidden" else ~later


def is_loss_per_token(result: object, case: Case) -> bool:
    """Whether a result can be a loss for each token, as `reduction="none"` leaves it."""
    sizes = {(case.batch_size, n) for n in (case.seq_len, case.seq_len - 1)} | {
        (case.batch_size * n,) for n in (case.seq_len, case.seq_len - 1)
    }
    return isinstance(result, Tensor) and result.is_floating_point() and tuple(result.shape) in sizes
