"""Which tensor or weight an op of the subject takes where the reference takes another: established on captured values."""

import inspect
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..sources import Spot, code_of
from .aligned import traced
from .anchors import Graph, same
from .captured import Parting
from .hypotheses import Cause
from .mapping import Layout
from .repaired import repeated

ADDS = ("add", "add_")


def weights_read(graph: Graph, layout: Layout) -> list[tuple[int, str]]:
    """Every use of a weight on the way to the logits, in order: the node and the slot (the first of a fused one). A weight
    that is cast or viewed first is used where the tokens' numbers meet it."""
    slot_of: dict[str, str] = {}
    for slot, piece in layout.slots.items():
        slot_of.setdefault(piece.parameter, slot)
    of: list[tuple[str, ...]] = []  # by node, the parameters that it is made of as long as no token is
    found = []
    for index, node in enumerate(graph.nodes):
        earlier = [name for source in node.inputs if not graph.nodes[source].data for name in of[source]]
        names = tuple(dict.fromkeys([*graph.event(index).parameters, *earlier]))
        of.append(() if node.data else names)
        if node.data and node.leads and node.output == 0:
            found += [(index, slot_of[name]) for name in names if name in slot_of]
    return found


def other_weight(parting: Parting) -> Cause | None:
    """The same input, another weight: a norm used twice, a projection in another's place."""
    aligned = parting.aligned
    mine = [(i, s) for i, s in weights_read(parting.left, aligned.left.layout) if i >= parting.node][:1]
    theirs = [(i, s) for i, s in weights_read(parting.right, aligned.right.layout) if parting.other is not None and i >= parting.other][:1]
    if not mine or not theirs:
        return None
    (index, slot), (other, wanted) = mine[0], theirs[0]
    a, b = aligned.weights.get(slot), aligned.weights.get(wanted)
    if slot == wanted or a is None or b is None or a.shape != b.shape or a.ndim != 1:
        return None
    left, right = parting.left.nodes[index].tensor.double(), parting.right.nodes[other].tensor.double()
    if left.shape[-1] != a.shape[0] or right.shape[-1] != b.shape[0]:
        return None
    bias_a, bias_b = _bias(parting, slot), _bias(parting, wanted)
    one, two = parting.left.columns_of((left - bias_a) / a), parting.right.columns_of((right - bias_b) / b)
    if one is None or two is None or not same(one, two, 100 * parting.limit / float(min(a.abs().min(), b.abs().min()))):
        return None
    if not _agrees_with_weight(parting, index, slot, wanted):
        return None
    never = wanted not in {slot for _, slot in weights_read(parting.left, aligned.left.layout)}
    name, used = aligned.left.layout.slots[wanted].parameter, aligned.left.layout.slots[slot].parameter
    tail = f"; {name} is used for no logit" if never else ""
    spot, module = _user(parting, index, used)
    return Cause(
        name="weight used twice" if never else "another weight",
        text=f"{used} is applied where the reference applies {name}, to the same tensor{tail}; with its weight there, the logits agree",
        fix=f"use {name} here",
        spot=spot,
        module=module,
    )


def _agrees_with_weight(parting: Parting, node: int, slot: str, wanted: str) -> bool:
    """Whether the logits agree when this use, in every layer, takes the weight that the reference takes there."""
    graph, weights = parting.left, parting.aligned.weights
    keys = repeated(graph)
    inside = slot.partition(".")[0] == wanted.partition(".")[0]
    exchanged: dict[int, tuple[Tensor, Tensor | float, Tensor, Tensor | float]] = {}
    for index, read in weights_read(graph, parting.aligned.left.layout):
        other = f"{read.partition('.')[0]}.{wanted.partition('.')[2]}" if inside else wanted
        alike = read == slot or (inside and read.partition(".")[2] == slot.partition(".")[2])
        if alike and keys[graph.nodes[index].event] == keys[graph.nodes[node].event] and other in weights:
            exchanged[graph.nodes[index].event] = (weights[read], _bias(parting, read), weights[other], _bias(parting, other))

    def change(index: int, outputs: list[Tensor]) -> None:
        if index in exchanged:
            a, bias_a, b, bias_b = exchanged[index]
            outputs[0].copy_((outputs[0] - bias_a) / a * b + bias_b)

    changed = traced(parting.aligned.left.subject, parting.aligned.case, change=change)
    return parting.aligned.gap(changed.recording.result) is None


def _user(parting: Parting, node: int, parameter: str) -> tuple[Spot | None, str]:
    """The line that uses a parameter: that calls the module which holds it, or that hands it to a plain function."""
    graph, model = parting.left, parting.aligned.left.subject.model
    module = graph.event(node).where.module
    owner = model.get_submodule(module)
    if not any(True for _ in owner.children()):
        return caller(graph, graph.nodes[node].event)
    spot = line_naming(owner, parameter.removeprefix(f"{module}.").split(".")[0])
    return spot or graph.recording.spots[graph.nodes[node].event], module


def line_naming(owner: nn.Module, name: str) -> Spot | None:
    """The last line of a module's forward that names one of its attributes, its first line where none does."""
    code = code_of(type(owner).forward)
    if code is None:
        return None
    named = [number for number, text in enumerate(inspect.getsourcelines(code)[0]) if re.search(rf"\b{re.escape(name)}\b", text)]
    return Spot(code, 0, code.co_firstlineno + (named[-1] if named else 0))


def _bias(parting: Parting, slot: str) -> Tensor | float:
    bias = parting.aligned.weights.get(slot.removesuffix("weight") + "bias")
    return 0.0 if bias is None or bias.ndim != 1 else bias


def missing_norm(parting: Parting) -> Cause | None:
    """A norm whose weight no logit is made with: its consumer takes the tensor before it."""
    aligned = parting.aligned
    read = {slot for _, slot in weights_read(parting.left, aligned.left.layout)}
    wanted = weights_read(parting.right, aligned.right.layout)
    if any(aligned.weights[slot].ndim > 1 for _, slot in wanted if slot not in read):
        return None  # more is left out than a norm
    skipped = [(i, s) for i, s in wanted if s not in read and aligned.weights[s].ndim == 1 and "norm" in s]
    for node, slot in skipped:
        source = _source_of_norm(parting, node)
        if source is None:
            continue
        name = aligned.left.layout.slots[slot].parameter
        what = "the final norm" if slot.startswith("norm.") else f"the norm of {name}"
        return Cause(
            name="final norm missing" if slot.startswith("norm.") else "norm missing",
            text=f"{what} is left out: {name} is used for no logit, and what the reference normalises goes on as it is",
            fix=f"apply the norm of {name} before the next projection",
            spot=_call_inside(parting, parting.node, name) or between(parting.left, source, parting.node)[0],
            module=parting.left.event(parting.node).where.module,
        )
    return None


def _source_of_norm(parting: Parting, norm: int) -> int | None:
    """The tensor that the reference's norm starts from, where the subject's parting node takes it as it is."""
    right = parting.right
    origins: set[int] = set()
    seen: set[int] = set()
    queue = [norm]
    while queue:
        index = queue.pop()
        if index in seen:
            continue
        seen.add(index)
        if right.nodes[index].anchor is not None and index != norm:
            if right.nodes[index].data:
                origins.add(index)
            continue
        queue += right.nodes[index].inputs
    for source in parting.left.nodes[parting.node].inputs:
        anchor = parting.left.nodes[source].anchor
        # Where an earlier fault changed what the norm starts from, its origins are many tensors, and nothing is said of the norm.
        if anchor is not None and origins and all(_equal(right, anchor, o, parting.limit) for o in origins):
            return source
    return None


def _equal(graph: Graph, one: int, other: int, limit: float) -> bool:
    a, b = graph.nodes[one].columns, graph.nodes[other].columns
    return one == other or (a is not None and b is not None and same(a, b, limit))


def _call_inside(parting: Parting, node: int, norm: str) -> Spot | None:
    """The line that calls the child in which an op runs, in the forward of the module that holds a norm: where the norm belongs."""
    model = parting.aligned.left.subject.model
    holder = norm.rpartition(".")[0]
    if not any(True for _ in model.get_submodule(holder).children()):  # a module of its own, not a parameter of the block
        holder = holder.rpartition(".")[0]
    module = parting.left.event(node).where.module
    if not holder or not module.startswith(f"{holder}."):
        return None
    return line_naming(model.get_submodule(holder), module.removeprefix(f"{holder}.").partition(".")[0])


def between(graph: Graph, made: int, taken: int) -> tuple[Spot | None, str]:
    """The line between the making of a tensor and its use, and its module: in the innermost module around both, where a step on
    that tensor belongs."""
    spot, module = function_that_made(graph, made), graph.event(made).where.module.rpartition(".")[0]
    user = graph.event(taken).where.module
    if not module.startswith(f"{user}."):
        return spot, module
    return graph.recording.spots[graph.nodes[taken].event], user


def function_that_made(graph: Graph, node: int) -> Spot | None:
    """The line that made a tensor, before it was viewed: that called the module which did."""
    while (
        graph.event(node).op in ("view", "_unsafe_view", "t", "expand", "clone", "transpose", "slice", "index") and graph.nodes[node].inputs
    ):
        node = graph.nodes[node].inputs[0]
    return caller(graph, graph.nodes[node].event)[0]


def caller(graph: Graph, event: int) -> tuple[Spot | None, str]:
    """The line that called the innermost module around an op, and the module that the line is in."""
    calls = [c for c in graph.recording.kept_calls if c.first_event <= event <= c.last_event]
    calls.sort(key=lambda c: c.last_event - c.first_event)
    inner = next((c for c in calls if c.spot is not None), None)
    if inner is None:
        return graph.recording.spots[event], graph.recording.events[event].where.module
    return inner.spot, inner.module.rpartition(".")[0]


def other_sum(parting: Parting) -> Cause | None:
    """A residual: one operand of a sum is another tensor than in the reference."""
    left, right = parting.left, parting.right
    if left.event(parting.node).op not in ADDS:
        return None
    mine = [left.nodes[i].anchor for i in left.nodes[parting.node].inputs]
    for other in parting.near(right, parting.other):
        if right.event(other).op not in ADDS or len(right.nodes[other].inputs) != 2 or len(mine) != 2 or None in mine:
            continue
        theirs = right.nodes[other].inputs
        for place in (0, 1):
            for at in (0, 1):
                shared = mine[place]
                assert shared is not None
                if not _equal(right, shared, theirs[at], parting.limit):
                    continue
                held = right.nodes[theirs[1 - at]]
                taken = right.event(mine[1 - place])  # type: ignore[arg-type]
                wanted = right.event(theirs[1 - at])
                value = right.nodes[theirs[at]].tensor.double() + held.tensor.double()
                if value.shape != right.nodes[other].tensor.shape or not torch.isfinite(value).all():
                    continue
                return Cause(
                    name="residual",
                    text=(
                        f"the sum takes what `{taken.where.module or 'the model'}` made ({taken.op}) where the reference takes what "
                        f"`{wanted.where.module or 'the model'}` made ({wanted.op}); the other operand is the same"
                    ),
                    fix="keep the residual as it was before the norm, and add to that",
                    spot=parting.spot(parting.node),
                    module=left.event(parting.node).where.module,
                )
    return None


ON_WIRING: dict[str, Callable[[Parting], Cause | None]] = {
    "another weight in its place": other_weight,
    "a norm left out": missing_norm,
}
ON_SUMS: dict[str, Callable[[Parting], Cause | None]] = {"another tensor in a sum (residual)": other_sum}
