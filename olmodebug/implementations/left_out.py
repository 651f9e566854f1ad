"""Weights that one implementation never uses, and layers that run in another order: shown on the reference's own run."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..units import listed
from .aligned import Aligned
from .anchors import Graph, first_bad, last_leading
from .hypotheses import Cause
from .mapping import Layout
from .wiring import caller, weights_read


def unused_weights(aligned: Aligned) -> Cause | None:
    """Weights that the reference uses and the subject does not: the reference without them gives the subject's logits."""
    left, right = aligned.graphs()
    mine, theirs = aligned.left.layout, aligned.right.layout
    unread = _unread(left, mine) - _unread(right, theirs) - set(mine.tied)
    if not unread:
        return None
    changed = {slot: _neutral(slot, tensor) if slot in unread else tensor for slot, tensor in aligned.weights.items()}
    if aligned.gap(aligned.left_logits, aligned.run_right(changed)) is not None:
        return None
    names = list(dict.fromkeys(piece.parameter for slot, piece in mine.slots.items() if slot in unread))
    return Cause(
        name="unused weights",
        text=f"{listed(names, 3)} {'is' if len(names) == 1 else 'are'} used for no logit; without {'it' if len(names) == 1 else 'them'} (at zero, the weight of a norm at one) the reference gives the same logits",
        fix=f"use {names[0]} where the reference uses it",
        evidence={"unused": len(names)},
    )


def _unread(graph: Graph, layout: Layout) -> set[str]:
    read = {layout.slots[slot].parameter for _, slot in weights_read(graph, layout)}
    return {slot for slot, piece in layout.slots.items() if piece.parameter not in read}


def _neutral(slot: str, tensor: Tensor) -> Tensor:
    """What a weight is that changes nothing: a norm's one, everything else's zero."""
    return torch.ones_like(tensor) if tensor.ndim == 1 and slot.endswith("weight") else torch.zeros_like(tensor)


def layer_order(aligned: Aligned) -> Cause | None:
    """Layers that run in another order: the reference with its layers' weights in that order gives the subject's logits."""
    left, right = aligned.graphs()
    mine, theirs = _layers(left, aligned.left.layout), _layers(right, aligned.right.layout)
    if mine == theirs or len(mine) != len(theirs) or len(set(theirs)) != len(theirs):
        return None
    taken = dict(zip(theirs, mine, strict=True))
    changed = dict(aligned.weights)
    for slot, tensor in aligned.weights.items():
        layer, _, rest = slot.partition(".")
        other = aligned.weights.get(f"{taken.get(layer, layer)}.{rest}")
        if layer in taken and (other is None or other.shape != tensor.shape):
            return None
        changed[slot] = other if layer in taken and other is not None else tensor
    if aligned.gap(aligned.left_logits, aligned.run_right(changed)) is not None:
        return None
    place = first_bad(left)
    spot, module = caller(left, left.nodes[last_leading(left) if place is None else place].event)
    return Cause(
        name="layer order",
        text=f"the layers run in the order {' '.join(mine)} where the reference runs {' '.join(theirs)}; with its layers' weights in that order the reference gives the same logits",
        fix="run every layer once, in the order of the reference",
        spot=spot,
        module=module,
    )


def _layers(graph: Graph, layout: Layout) -> list[str]:
    """The numbers of the layers, in the order they run: a layer runs again where the weight that it reads first is read again."""
    found: list[str] = []
    first = ""
    for _, slot in weights_read(graph, layout):
        layer = slot.partition(".")[0]
        if layer.isdigit() and (found[-1:] != [layer] or slot == first):
            found.append(layer)
            first = slot
    return found


ON_USES: dict[str, Callable[[Aligned], Cause | None]] = {
    "weights that are not used": unused_weights,
    "order of the layers": layer_order,
}
