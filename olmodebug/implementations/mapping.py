"""Which numbers of one model are which numbers of another: weights matched by names, shapes and, where these leave a choice, by value.

Every parameter is read as one or more *slots*, `3.q.weight` or `head.weight`, each oriented `[out, in]`: a fused projection
holds several slots in some of its rows, a Conv1D holds its slot transposed, a tied head holds two slots at once. Two models
fit where they fill the same slots with the same shapes. What names and shapes do not settle, the order of a fused
projection with an unknown name, the order of the rotated pairs, is a *choice*, for the caller to try by value.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SubjectError, UsageError
from ..settings import HEAD_NAMES
from ..subject import Subject
from ..units import listed
from .roles import GATE_UP_ORDERS, is_named, leaf_of, residual_width, role_of, settle_feed_forward, settle_norms, settle_outside

KEY_VALUE_HEAD_NAMES = ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_kv_head", "n_query_groups", "kv_n_heads", "n_head_kv")

# The order of the rows of fused projections under names whose checkpoints are known, the first being the usual one.
QKV_ORDERS = ("q;k;v", "per head q,k,v")
KV_ORDERS = ("k;v", "per head k,v")
ORDERS = {"qkv": QKV_ORDERS, "kv": KV_ORDERS, "gate_up": GATE_UP_ORDERS}
PARTS = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "gate_up": ("gate", "up")}
KNOWN_ORDERS = {"c_attn": "q;k;v", "att_proj": "q;k;v", "qkv_proj": "q;k;v", "query_key_value": "per head q,k,v", "ff_proj": "up;gate", "gate_up_proj": "gate;up"}  # fmt: skip
# Whose rows of q and k are known to be in the order of rotate-half; Meta's own keys come in interleaved order.
HALF_ROTATED = ("q_proj", "w_q", "att_proj", "query_key_value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Where a slot lies: rows of a parameter (None: all of it), read transposed or not; of a parameter that stacks the
    matrices of experts, those of one."""

    parameter: str
    rows: tuple[int, ...] | None = None
    transposed: bool = False
    order: str | None = None  # of the fused projection that it is a part of
    expert: int | None = None

    def _matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        whole = tensors[self.parameter]
        whole = whole if self.expert is None else whole[self.expert]
        return whole.T if self.transposed else whole

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        whole = self._matrix(tensors)
        return whole if self.rows is None else whole[torch.tensor(self.rows)]

    def write(self, tensors: Mapping[str, Tensor], value: Tensor) -> None:
        whole = self._matrix(tensors)
        if self.rows is None:
            whole.copy_(value)
        else:
            whole[torch.tensor(self.rows)] = value.to(whole.dtype)

    def __str__(self) -> str:
        text = self.parameter + ("" if self.expert is None else f"[{self.expert}]") + ("ᵀ" if self.transposed else "")
        if self.rows is None:
            return text
        first, last = self.rows[0], self.rows[-1]
        even = self.rows == tuple(range(first, last + 1))
        return f"{text}[{first}:{last + 1}]" if even else f"{text}[{len(self.rows)} rows from {first}, {self.order}]"


@dataclass(slots=True, kw_only=True)
class Layout:
    """The slots of one model. `choices` are fused parameters whose order of rows the name does not settle."""

    subject: Subject
    slots: dict[str, Piece]
    tied: dict[str, str] = field(default_factory=dict)  # slot -> the slot whose parameter it shares
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    leaves: dict[str, str] = field(default_factory=dict)  # slot -> last name of its module
    by_use: list[str] = field(default_factory=list)  # parameters whose names say nothing, matched in the order of their use
    heads: int | None = None
    key_value_heads: int | None = None

    def shape(self, slot: str) -> tuple[int, ...]:
        return tuple(self.slots[slot].read(parameters_of(self.subject.model)).shape)

    def read(self) -> dict[str, Tensor]:
        """The model's weights by slot."""
        tensors = parameters_of(self.subject.model)
        return {slot: piece.read(tensors).detach().clone() for slot, piece in self.slots.items()}

    def gradients(self) -> dict[str, Tensor | None]:
        """The gradients by slot, None where a parameter got none."""
        tensors = {name: p.grad for name, p in self.subject.model.named_parameters() if p.grad is not None}
        return {slot: piece.read(tensors) if piece.parameter in tensors else None for slot, piece in self.slots.items()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Write weights by slot into the model."""
        tensors = parameters_of(self.subject.model)
        with torch.no_grad():
            for slot, piece in self.slots.items():
                if slot in weights:
                    piece.write(tensors, weights[slot])


Used = Callable[[Layout], Mapping[str, int]]  # by parameter, where a run uses it first


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def heads_of(subject: Subject) -> tuple[int | None, int | None]:
    """(heads, key/value heads) that the config states, or all modules of the model that state one; None where nothing does."""
    found = []
    for names in (HEAD_NAMES, KEY_VALUE_HEAD_NAMES):
        stated = subject.setting(*names)
        if not _is_count(stated):
            counts = {
                getattr(module, name) for module in subject.model.modules() for name in names if _is_count(getattr(module, name, None))
            }
            stated = counts.pop() if len(counts) == 1 else None
        found.append(stated)
    heads, key_value = found
    return heads, key_value or heads


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def layout_of(subject: Subject, *, orders: Mapping[str, str] | None = None, other: Subject | None = None) -> Layout:
    """The slots that a model's parameters fill; SubjectError where a fused projection cannot be divided.

    `other` has the same sizes, and is asked for the number of heads where the subject does not state it.
    """
    model = subject.model
    heads, key_value = heads_of(subject)
    if heads is None and other is not None:
        heads, key_value = heads_of(other)
    layout = Layout(subject=subject, slots={}, heads=heads, key_value_heads=key_value)
    roles = {name: role_of(name) for name, _ in model.named_parameters()}
    settle_norms(roles)
    settle_outside(roles, subject)
    width = residual_width(roles, parameters_of(model))
    unfused = settle_feed_forward(roles, parameters_of(model), width, orders or {})
    conv1d = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    widths = _output_widths(model, roles, conv1d)
    fused: dict[str, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters():
        role = roles[name]
        layer, kind, suffix = role
        prefix = "" if layer is None else f"{layer}."
        leaf = leaf_of(name)
        stacked = parameter.ndim == 3 and layer is not None and kind in ("gate_up", "gate", "up", "down")
        turned = stacked and _is_turned(parameter, kind, width)
        transposed = turned or name.rpartition(".")[0] in conv1d and parameter.ndim == 2
        parts = PARTS.get(kind)
        experts = range(parameter.shape[0]) if stacked else (None,)
        if parts is None:
            for expert in experts:
                piece = Piece(parameter=name, transposed=transposed, expert=expert)
                _add(layout, f"{prefix}{_of_expert(expert)}{kind}.{suffix}", piece, leaf)
            continue
        size = parameter.shape[-1] if transposed else parameter.shape[1 if stacked else 0]
        known = None if turned else KNOWN_ORDERS.get(leaf)  # whoever turns its experts' matrices has an order of its own
        options = tuple(dict.fromkeys((*((known,) if known else ()), *ORDERS[kind])))
        if known is None and leaf not in fused:
            fused[leaf] = options
        order = (orders or {}).get(leaf, options[0])
        rows = fused_rows(kind, size, order, heads=heads, key_value=key_value, query_rows=widths.get(layer))
        if rows is None:
            raise SubjectError(
                f"{subject.spec}: {name} has {size} rows, which cannot be divided into {', '.join(parts)}; state it with --map"
            )
        for expert, (part, chosen) in itertools.product(experts, zip(parts, rows, strict=True)):
            piece = Piece(parameter=name, rows=tuple(chosen), transposed=transposed, order=order, expert=expert)
            _add(layout, f"{prefix}{_of_expert(expert)}{part}.{suffix}", piece, leaf)
    layout.choices = fused | unfused
    _tied_slots(layout)
    return layout


def _is_turned(stacked: Tensor, kind: str, width: int | None) -> bool:
    """Whether experts' stacked matrices lie as `[experts, in, out]`, told by which side has the residual's width."""
    entering, leaving = (1, 2) if kind != "down" else (2, 1)
    return stacked.shape[entering] == width != stacked.shape[leaving]


def _of_expert(number: int | None) -> str:
    return "" if number is None else f"expert{number}."


def fused_rows(
    kind: str, size: int, order: str, *, heads: int | None, key_value: int | None, query_rows: int | None
) -> list[list[int]] | None:
    """The rows of q, k, v or of gate, up in a fused projection of this order; None where it cannot be divided."""
    half, odd = divmod(size, 2)
    if kind == "kv":
        if order == "k;v":
            return None if odd else [list(range(half)), list(range(half, size))]
        groups = key_value or heads
        if not groups or size % (2 * groups):
            return None
        width = size // (2 * groups)
        return [[row for row in range(size) if row // width % 2 == place] for place in (0, 1)]
    if kind == "gate_up":
        if odd:
            return None
        if order.endswith("interleaved"):
            return [list(range(0, size, 2)), list(range(1, size, 2))]
        first, second = list(range(half)), list(range(half, size))
        return [first, second] if order == "gate;up" else [second, first]
    if heads is None:
        queries = size // 3 if query_rows is None else query_rows
    else:
        groups = key_value or heads
        if size % (heads + 2 * groups):
            return None
        queries = size // (heads + 2 * groups) * heads
    keys, rest = divmod(size - queries, 2)
    if rest or keys <= 0:
        return None
    if order.startswith("per head"):
        if heads is None or heads != (key_value or heads):
            return None if heads is None else _per_group(size, heads, key_value or heads)
        return _per_group(size, heads, heads)
    starts = {"q": queries, "k": keys, "v": keys}
    found, at = {}, 0
    for part in order.split(";"):
        found[part] = list(range(at, at + starts[part]))
        at += starts[part]
    return [found["q"], found["k"], found["v"]]


def _per_group(size: int, heads: int, groups: int) -> list[list[int]] | None:
    """Each key/value head's rows stand together: its queries, its key, its value."""
    width, rest = divmod(size, heads + 2 * groups)
    if rest:
        return None
    each = heads // groups
    q, k, v = [], [], []
    for group in range(groups):
        start = group * (each + 2) * width
        q += list(range(start, start + each * width))
        k += list(range(start + each * width, start + (each + 1) * width))
        v += list(range(start + (each + 1) * width, start + (each + 2) * width))
    return [q, k, v]


def _output_widths(model: nn.Module, roles: Mapping[str, tuple[str | None, str, str]], conv1d: set[str]) -> dict[str | None, int]:
    """By layer, how many numbers its attention's output projection reads: as many as there are rows of q."""
    widths = {}
    for name, parameter in model.named_parameters():
        layer, kind, suffix = roles[name]
        if kind == "o" and suffix == "weight":
            widths[layer] = parameter.shape[0] if name.rpartition(".")[0] in conv1d else parameter.shape[-1]
    return widths


def _add(layout: Layout, slot: str, piece: Piece, leaf: str) -> None:
    base, count = slot, 2
    while slot in layout.slots:
        slot, count = f"{base}#{count}", count + 1
    layout.slots[slot] = piece
    layout.leaves[slot] = leaf


def _tied_slots(layout: Layout) -> None:
    """A head that shares the embedding's parameter fills its own slot too."""
    model = layout.subject.model
    owner = {id(p): name for name, p in model.named_parameters()}
    by_name = {piece.parameter: slot for slot, piece in layout.slots.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owner[id(parameter)]
        if first == name or first not in by_name:
            continue
        layer, kind, suffix = role_of(name)
        slot = kind + "." + suffix if layer is None else f"{layer}.{kind}.{suffix}"
        held = by_name[first]
        if slot == held or slot in layout.slots:
            continue
        layout.slots[slot] = layout.slots[held]
        layout.leaves[slot] = leaf_of(name)
        layout.tied[slot] = held
    # ai2-olmo has no parameter for a tied head at all: it multiplies with the embedding.
    if "head.weight" not in layout.slots and "embed.weight" in layout.slots:
        layout.slots["head.weight"] = layout.slots["embed.weight"]
        layout.tied["head.weight"] = "embed.weight"
    if layout.tied.get("embed.weight") == "head.weight":  # registered in the other order
        del layout.tied["embed.weight"]
        layout.tied["head.weight"] = "embed.weight"


def fit(left: Layout, right: Layout, *, stated: Mapping[str, str] | None = None, used: Used | None = None) -> tuple[Layout, Layout]:
    """Both layouts over the slots that they share, unknown names matched by shape; SubjectError says what does not fit.

    `stated` maps parameters of the left to parameters of the right, or to `name[start:stop]`. `used` tells the order in which
    a run uses parameters.
    """
    left, right = _with_stated(left, right, stated or {})
    same = {piece.parameter for piece in left.slots.values()} & {piece.parameter for piece in right.slots.values()}
    whole = {p for p in same if tuple(parameters_of(left.subject.model)[p].shape) == tuple(parameters_of(right.subject.model)[p].shape)}
    if not stated and whole == set(parameters_of(left.subject.model)) == set(parameters_of(right.subject.model)):
        right = _same_slots(left, right)
    _fit_unnamed(left, right, used)
    missing = [s for s in left.slots if s not in right.slots], [s for s in right.slots if s not in left.slots]
    for mine, other, lacking in ((left, right, missing[0]), (right, left, missing[1])):
        if lacking:
            names = listed(dict.fromkeys(mine.slots[s].parameter for s in lacking), 4)
            raise SubjectError(f"no counterpart in {other.subject.spec} for {names} of {mine.subject.spec}; state it with --map FILE")
    for slot in left.slots:
        a, b = left.shape(slot), right.shape(slot)
        if a != b and not _square_transposed(a, b):
            raise SubjectError(
                f"the sizes differ: {left.slots[slot]} of {left.subject.spec} is {list(a)}, "
                f"{right.slots[slot]} of {right.subject.spec} is {list(b)}; build both from the same sizes (--config, --reference-config)"
            )
        if a != b:
            right.slots[slot] = replace(right.slots[slot], transposed=not right.slots[slot].transposed)
    return left, right


def _fit_unnamed(left: Layout, right: Layout, used: Used | None) -> None:
    """Slots of unknown names that have one shape in one layer: a single one on both sides is the other's; several norms, and
    what is outside of the layers, are one another's in the order in which they are used."""
    groups: dict[tuple[str, str, tuple[int, ...]], tuple[list[str], list[str]]] = {}
    for place, (mine, other) in enumerate(((left, right), (right, left))):
        for slot in mine.slots:
            if slot not in other.slots:
                layer = slot.partition(".")[0] if slot.partition(".")[0].isdigit() else ""
                groups.setdefault((layer, slot.rpartition(".")[2], mine.shape(slot)), ([], []))[place].append(slot)
    for (layer, suffix, shape), (ours, theirs) in groups.items():
        ordered = suffix == "weight" and (len(shape) == 1 or not layer)
        if len(ours) != len(theirs) or (len(ours) > 1 and (used is None or not ordered)):
            continue
        if len(ours) > 1:
            assert used is not None
            ours, theirs = (
                sorted(slots, key=lambda s: used(layout).get(layout.slots[s].parameter, math.inf))
                for layout, slots in ((left, ours), (right, theirs))
            )
            left.by_use += [left.slots[slot].parameter for slot in ours]
        for ours_slot, theirs_slot in zip(ours, theirs, strict=True):
            if is_named(ours_slot):
                _rename(right, theirs_slot, ours_slot)
            else:
                _rename(left, ours_slot, theirs_slot)


def _rename(layout: Layout, old: str, new: str) -> None:
    layout.slots = {new if slot == old else slot: piece for slot, piece in layout.slots.items()}
    layout.leaves = {new if slot == old else slot: leaf for slot, leaf in layout.leaves.items()}
    layout.tied = {new if slot == old else slot: new if held == old else held for slot, held in layout.tied.items()}


def _same_slots(left: Layout, right: Layout) -> Layout:
    """The same names and shapes on both sides need no reading of names: the right side gets the left side's slots."""
    return replace(right, slots=dict(left.slots), leaves=dict(left.leaves), choices={})


def _with_stated(left: Layout, right: Layout, stated: Mapping[str, str]) -> tuple[Layout, Layout]:
    if not stated:
        return left, right
    slots_left, slots_right = dict(left.slots), dict(right.slots)
    mine, theirs = parameters_of(left.subject.model), parameters_of(right.subject.model)
    given_left, given_right = set(), set()
    for number, (name, target) in enumerate(stated.items()):
        piece_left, piece_right = _stated_piece(name, mine, left), _stated_piece(target, theirs, right)
        given_left.add(piece_left.parameter)
        given_right.add(piece_right.parameter)
        slots_left[f"stated{number}"], slots_right[f"stated{number}"] = piece_left, piece_right
    drop_left = [s for s, p in slots_left.items() if p.parameter in given_left and not s.startswith("stated")]
    drop_right = [s for s, p in slots_right.items() if p.parameter in given_right and not s.startswith("stated")]
    for slot in drop_left:
        del slots_left[slot]
    for slot in drop_right:
        del slots_right[slot]
    return replace(left, slots=slots_left), replace(right, slots=slots_right)


def _stated_piece(text: str, known: Mapping[str, Tensor], layout: Layout) -> Piece:
    match = re.fullmatch(r"(?P<name>[^\[\]]+?)(?P<turned>\.T)?(?:\[(?P<start>\d*):(?P<stop>\d*)(?::(?P<step>\d+))?\])?", text.strip())
    if match is None or match["name"] not in known:
        raise UsageError(f"--map: {layout.subject.spec} has no parameter {text!r}; write its name, name[start:stop] or name.T")
    turned = match["turned"] is not None
    size = known[match["name"]].shape[1 if turned else 0]
    rows = None
    if match["start"] is not None:
        rows = tuple(range(int(match["start"] or 0), min(int(match["stop"] or size), size), int(match["step"] or 1)))
    return Piece(parameter=match["name"], rows=rows, transposed=turned)


def read_map(path: Path) -> dict[str, str]:
    """The file of --map: a JSON object, name of the subject's parameter -> name or `name[start:stop]` of the reference's."""
    try:
        body: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--map {path}: {error}") from None
    if not isinstance(body, dict) or not all(isinstance(v, str) for v in body.values()):
        raise UsageError(f"--map {path}: expected a JSON object of names")
    return body


def _square_transposed(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == 2 and a == b[::-1]


def choices(left: Layout, right: Layout) -> Iterator[tuple[dict[str, str], dict[str, str], str | None]]:
    """What names and shapes leave open, the usual first: (orders of the left, orders of the right, whose q and k are in pairs)."""
    ways_left = [dict(zip(left.choices, way, strict=True)) for way in itertools.product(*left.choices.values())]
    ways_right = [dict(zip(right.choices, way, strict=True)) for way in itertools.product(*right.choices.values())]
    for pairs_on in rotated_choices(left, right):
        for a in ways_left:
            for b in ways_right:
                yield a, b, pairs_on


def rotated_choices(left: Layout, right: Layout) -> tuple[str | None, ...]:
    """Whether q and k may need their rows reordered: Meta's and unknown names say nothing about the order of their pairs."""
    slot = next((s for s in left.slots if s.endswith("q.weight")), None)
    if slot is None or slot not in right.leaves or left.heads is None:
        return (None,)
    mine, theirs = left.leaves.get(slot, ""), right.leaves[slot]
    if mine == theirs:
        return (None,)
    free = [side for side, leaf in (("left", mine), ("right", theirs)) if leaf not in HALF_ROTATED]
    return (None, *free)


def in_pairs(weights: Mapping[str, Tensor], layout: Layout, *, back: bool = False, turned: int | None = None) -> dict[str, Tensor]:
    """Weights with the rows of every q and k (and their biases and norms) taken from two halves to interleaved pairs: all of a
    head, or the first `turned`."""
    changed = dict(weights)
    for slot, tensor in weights.items():
        kind = slot.split(".")[-2] if "." in slot else ""
        heads = {"q": layout.heads, "k": layout.key_value_heads, "q_norm": layout.heads, "k_norm": layout.key_value_heads}.get(kind)
        if heads is None:
            continue
        width = _head_width(weights, slot, layout)
        if width is None or width % 2 or tensor.shape[0] % width:
            continue
        size = min(turned or width, width)
        order = torch.arange(size).view(2, size // 2).T.reshape(-1)
        order = torch.cat([order.argsort() if back else order, torch.arange(size, width)])
        rows = torch.cat([order + width * i for i in range(tensor.shape[0] // width)])
        changed[slot] = tensor[rows]
    return changed


def _head_width(weights: Mapping[str, Tensor], slot: str, layout: Layout) -> int | None:
    layer = slot.partition(".")[0]
    query = weights.get(f"{layer}.q.weight")
    if query is None or not layout.heads or query.shape[0] % layout.heads:
        return None
    return query.shape[0] // layout.heads
