"""Named causes that are tried where two implementations part: on the weights, by running again with the change.

A hypothesis says what the subject does with its weights that the reference does not: it rotates pairs where the reference
rotates halves, takes gate for up, reads key/value heads in another order. Each can be undone by handing the subject the
same weights in another order. Where the logits then agree, the difference is explained, and nothing else differs; where
they do not, the hypothesis is ruled out. What no order of weights can undo is tried on captured tensors (`captured`).
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import SubjectError
from ..report import Scalar
from ..sources import Spot
from ..tracing.rotation import angle_tables
from .aligned import Aligned, Side
from .mapping import ORDERS, in_pairs, layout_of
from .roles import GATE_UP_ORDERS

Weights = dict[str, Tensor]
MANY = 6  # experts, of which every pair is still exchanged


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why two implementations part: established, because with the change undone the difference is gone."""

    name: str
    text: str
    fix: str
    spot: Spot | None = None
    module: str | None = None
    op: str | None = None
    severity: str = "error"
    evidence: Mapping[str, Scalar] = field(default_factory=dict)


Hypothesis = Callable[[Aligned], Cause | None]


def rope_style(aligned: Aligned) -> Cause | None:
    """Rotate-half against interleaved pairs."""
    right = aligned.graphs()[1]
    widths = dict.fromkeys([None, *(2 * table.cos.shape[1] for table in angle_tables(right.recording, right.seq))])
    for (back, mine, theirs), turned in itertools.product(
        (
            (False, "interleaved pairs (0, 1), (2, 3), ...", "two halves"),
            (True, "two halves", "interleaved pairs (0, 1), (2, 3), ..."),
        ),
        widths,
    ):
        # The subject rotates pairs: rows in interleaved order make its rotation the reference's.
        if _agrees(aligned, in_pairs(aligned.weights, aligned.left.layout, back=back, turned=turned)):
            return Cause(
                name="RoPE style",
                text=f"RoPE rotates {mine} where the reference rotates {theirs}; with the rows of q and k reordered to match, the logits agree",
                fix="rotate as the reference does, or reorder the rows of the q and k projections when loading its weights",
            )
    return None


def gate_and_up(aligned: Aligned) -> Cause | None:
    """Gate and up taken for one another."""
    changed = _swapped(aligned.weights, ("gate", "up"))
    if changed is None or not _agrees(aligned, changed):
        return None
    return Cause(
        name="gate and up swapped",
        text="the activation is applied to the up projection where the reference applies it to the gate projection; with the two swapped, the logits agree",
        fix="apply the activation to the gate projection: act(gate(x)) * up(x)",
    )


def qkv_order(aligned: Aligned) -> Cause | None:
    """q, k and v taken for one another."""
    names = ("q", "k", "v")
    side = aligned.left
    held = in_pairs(aligned.weights, side.layout) if side.pairs else aligned.weights
    as_they_are = replace(side, pairs=False)  # the rows follow the use, so they are reordered before the exchange
    for order in itertools.permutations(names):
        changed = _renamed(held, dict(zip(names, order, strict=True)))
        if order == names or changed is None or not _agrees(aligned, changed, side=as_they_are):
            continue
        taken = {source: name for name, source in zip(names, order, strict=True)}
        reads = ", ".join(f"{name} for {taken[name]}" for name in names if taken[name] != name)
        return Cause(
            name="qkv order",
            text=f"the attention takes {reads} compared with the reference; with the projections exchanged, the logits agree",
            fix="divide the projection, or hand on q, k and v, in the order of the reference",
        )
    return None


def fused_order(aligned: Aligned) -> Cause | None:
    """The rows of a fused projection divided in another order than its checkpoints hold."""
    layout = aligned.left.layout
    fused = {p.parameter.split(".")[-2]: p.order for p in layout.slots.values() if p.order}
    for leaf, order in fused.items():
        options = next(orders for orders in ORDERS.values() if order in orders)
        for other in options:
            if other == order:
                continue
            try:
                side = replace(
                    aligned.left,
                    layout=replace(layout_of(layout.subject, orders={leaf: other}, other=aligned.right.subject), tied=layout.tied),
                )
            except SubjectError:
                continue
            if set(side.layout.slots) == set(layout.slots) and _agrees(aligned, aligned.weights, side=side):
                return Cause(
                    name="fused gate and up order" if options is GATE_UP_ORDERS else "fused projection order",
                    text=f"{leaf} is divided as {other} where its weights are laid out as {order}; with the rows in that order, the logits agree",
                    fix=f"divide {leaf} as {order}",
                )
    return None


def grouped_heads(aligned: Aligned) -> Cause | None:
    """Key/value heads tiled where the reference repeats each, or the reverse."""
    layout = aligned.left.layout
    heads, groups = layout.heads, layout.key_value_heads
    if not heads or not groups or heads == groups or groups == 1:
        return None
    each = heads // groups
    tile = torch.tensor([(h % each) * groups + h // each for h in range(heads)])
    repeat = torch.tensor([(h % groups) * each + h // groups for h in range(heads)])
    for places, mine, theirs in ((tile, f"head h % {groups}", f"head h // {each}"), (repeat, f"head h // {each}", f"head h % {groups}")):
        if _agrees(aligned, _heads_moved(aligned.weights, places, heads)):
            return Cause(
                name="GQA order",
                text=f"query head h reads key/value {mine} where the reference reads {theirs}; with the query heads reordered to match, the logits agree",
                fix="repeat each key/value head for its own group: repeat_interleave(n, dim=heads), not repeat or tile",
                evidence={"heads": heads, "key_value_heads": groups},
            )
        if _agrees(aligned, _heads_moved(aligned.weights, places, heads, merged=False)):
            return Cause(
                name="GQA order",
                text=f"where q is divided, query head h goes to key/value {mine} and comes back in another place, where the reference's reads {theirs}; with the rows of q reordered to match, the logits agree",
                fix="divide the rows of q into [key/value heads, heads of each group], in this order",
                evidence={"heads": heads, "key_value_heads": groups},
            )
    return None


def expert_order(aligned: Aligned) -> Cause | None:
    """Experts that stand for others than the router means: from the last to the first, shifted, two of them exchanged."""
    count = len({part for slot in aligned.weights for part in slot.split(".") if re.fullmatch(r"expert\d+", part)})
    places = list(range(count))
    orders = [places[::-1], *(places[n:] + places[:n] for n in ({1, count - 1} if count > MANY else range(1, count)))]
    if count <= MANY:
        orders += [[b if p == a else a if p == b else p for p in places] for a, b in itertools.combinations(places, 2)]
    for order in orders if count > 1 else []:
        moved = {}
        for slot, tensor in aligned.weights.items():
            expert = re.search(r"\.expert(\d+)\.", slot)
            source = slot.replace(expert[0], f".expert{order[int(expert[1])]}.") if expert else slot
            moved[slot] = aligned.weights.get(source, tensor)
        if _agrees(aligned, moved):
            return Cause(
                name="expert order",
                text=f"what the router gives to expert 0, 1, 2, ... goes to other experts than in the reference; with the experts in the order {' '.join(map(str, order))} the logits agree",
                fix="run expert i on the weights of the router's column i",
            )
    return None


def tied_head(aligned: Aligned) -> Cause | None:
    """A head that multiplies with the embedding although it has weights of its own, or the reverse."""
    if "head.weight" not in aligned.weights or "head.weight" in aligned.left.layout.tied:
        return None
    changed = {**aligned.weights, "head.weight": aligned.weights["embed.weight"]}
    if changed["head.weight"].shape != aligned.weights["head.weight"].shape:
        return None
    if aligned.gap(aligned.left_logits, aligned.run_right(changed)) is not None:
        return None
    return Cause(
        name="tied head",
        text="the logits are made with the embedding's weights, the head's own are not used; with the embedding as its head, the reference gives the same logits",
        fix="multiply with the head's own weights, or tie them in both models",
    )


def transposed_square(aligned: Aligned) -> Cause | None:
    """A square projection used transposed."""
    for kind in ("o", "q", "k", "v", "up", "gate", "down"):
        slots = [s for s, t in aligned.weights.items() if s.endswith(f".{kind}.weight") and t.ndim == 2 and t.shape[0] == t.shape[1]]
        if slots and _agrees(aligned, {**aligned.weights, **{s: aligned.weights[s].T for s in slots}}):
            return Cause(
                name="transposed weight",
                text=f"the {kind} projection multiplies with the transpose of its weight; transposed, the logits agree",
                fix="multiply with weight.T as nn.Linear does (Conv1D keeps its weight transposed)",
            )
    return None


def norms_exchanged(aligned: Aligned) -> Cause | None:
    """Two norms of a layer taken for one another."""
    for pair, words in ((("norm1", "norm2"), "the norms of attention and feed-forward"), (("q_norm", "k_norm"), "the norms of q and k")):
        changed = _swapped(aligned.weights, pair)
        if changed is not None and _agrees(aligned, changed):
            return Cause(
                name="norms exchanged",
                text=f"{words} are taken for one another; with their weights exchanged, the logits agree",
                fix="use each norm in its own place",
            )
    return None


ON_WEIGHTS: dict[str, Hypothesis] = {
    "rotate-half against interleaved RoPE": rope_style,
    "gate and up swapped": gate_and_up,
    "order of q, k and v": qkv_order,
    "order inside a fused projection": fused_order,
    "order of key/value heads (repeat or tile)": grouped_heads,
    "head tied to the embedding": tied_head,
    "a square weight transposed": transposed_square,
    "two norms exchanged": norms_exchanged,
    "order of the experts": expert_order,
}


def _agrees(aligned: Aligned, weights: Mapping[str, Tensor], side: Side | None = None) -> bool:
    """Whether the subject with these weights gives the reference's logits; its own weights are put back."""
    left = side or aligned.left
    left.load(weights)
    try:
        return aligned.gap(aligned.run_left()) is None
    finally:
        aligned.left.load(aligned.weights)


def _swapped(weights: Mapping[str, Tensor], pair: tuple[str, str]) -> Weights | None:
    return _renamed(weights, {pair[0]: pair[1], pair[1]: pair[0]})


def _renamed(weights: Mapping[str, Tensor], sources: Mapping[str, str]) -> Weights | None:
    """Weights in which each slot of these kinds holds another kind's numbers; None where the shapes do not allow it."""
    changed = dict(weights)
    for slot, source in _slots(weights, sources):
        other = weights.get(source)
        if other is None or other.shape != weights[slot].shape:
            return None
        changed[slot] = other
    return changed if any(changed[s] is not weights[s] for s in weights) else None


def _slots(weights: Mapping[str, Tensor], sources: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for slot in weights:
        parts = slot.split(".")
        if len(parts) >= 3 and parts[-2] in sources:
            yield slot, ".".join([*parts[:-2], sources[parts[-2]], parts[-1]])


def _heads_moved(weights: Mapping[str, Tensor], places: Tensor, heads: int, *, merged: bool = True) -> Weights:
    """Weights whose query head h stands at `places[h]`, in q, its bias and norm, and, where `merged`, in the columns of o."""
    order = places.argsort()  # the head that stands at each place
    changed = dict(weights)
    for slot, tensor in weights.items():
        kind = slot.split(".")[-2] if "." in slot else ""
        wide = tensor.shape[0] % heads == 0 and tensor.shape[0] >= 2 * heads
        if kind in ("q", "q_norm") and wide and not (kind == "q_norm" and tensor.shape[0] != _rows_of_q(weights, slot)):
            changed[slot] = tensor.unflatten(0, (heads, -1))[order].flatten(0, 1)
        elif merged and kind == "o" and tensor.ndim == 2 and tensor.shape[1] % heads == 0:
            changed[slot] = tensor.unflatten(1, (heads, -1))[:, order].flatten(1, 2)
    return changed


def _rows_of_q(weights: Mapping[str, Tensor], slot: str) -> int:
    query = weights.get(f"{slot.partition('.')[0]}.q.weight")
    return -1 if query is None else query.shape[0]
