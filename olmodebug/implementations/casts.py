"""Two implementations that agree in float64 and cast at another place: the first op that 16 bits show to be done in another dtype.

A norm that multiplies with its weight before or after it goes back to bfloat16, a RoPE in float32 or in the dtype of q: in
float64 all of them are one, and in bfloat16 each is another model. Ops of the two runs correspond by their values in
float64; their dtypes are those of a run in bfloat16.
"""

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..executions.alone import op_code
from ..executions.replay import ADDING, FUNCTIONS, PRODUCTS, SUMS
from ..load import SubjectCodeError
from ..records import Where
from .aligned import Aligned, traced
from .anchors import Graph, positions_first, same

ROUNDING = set(FUNCTIONS) | ADDING | PRODUCTS | SUMS | {"_softmax", "silu", "gelu", "native_layer_norm"}
LOW = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class CastOrder:
    """An op that one side does in a wider dtype: shown by casting its inputs first, which gives the other side's bits."""

    op: str
    where: Where
    parameter: str | None
    mine: torch.dtype
    theirs: torch.dtype


def cast_order(aligned: Aligned) -> CastOrder | None:
    """The first op of the subject that rounds in another dtype than the reference's op of the same value; None without one."""
    left, right = aligned.graphs()
    low = [_low(graph, aligned, side) for graph, side in ((left, "left"), (right, "right"))]
    if low[0] is None or low[1] is None:
        return None
    (low_left, events_left), (low_right, events_right) = low[0], low[1]
    theirs: dict[str, list[int]] = {}
    for index, node in enumerate(right.nodes):
        if _counts(right, index) and node.event in events_right:
            theirs.setdefault(right.event(index).op, []).append(index)
    for index, node in enumerate(left.nodes):
        if not _counts(left, index) or node.event not in events_left:
            continue
        held = node.columns
        equal = [i for i in theirs.get(left.event(index).op, ()) if (c := right.nodes[i].columns) and held and same(held, c, aligned.limit)]
        if not equal:
            continue
        mine = _made(low_left, events_left[node.event], node.output)
        others = [_made(low_right, events_right[right.nodes[i].event], right.nodes[i].output) for i in equal]
        if mine is None or any(o is None or o.dtype == mine.dtype for o in others):
            continue
        other = others[0]
        assert other is not None
        wide, narrow = (
            ((low_left, events_left[node.event]), other)
            if mine.dtype.itemsize > other.dtype.itemsize
            else ((low_right, events_right[right.nodes[equal[0]].event]), mine)
        )
        if _explains(*wide, node.output, narrow, left):
            event = left.event(index)
            name = event.parameters[0] if event.parameters else None
            return CastOrder(op=event.op, where=event.where, parameter=name, mine=mine.dtype, theirs=other.dtype)
    return None


def _counts(graph: Graph, index: int) -> bool:
    node = graph.nodes[index]
    return node.data and node.leads and node.columns is not None and graph.event(index).op in ROUNDING


def _low(graph: Graph, aligned: Aligned, name: str) -> tuple[Graph, dict[int, int]] | None:
    """A run of one side in bfloat16, and its event for each event of the float64 run that it has too."""
    subject = getattr(aligned, name).subject
    twin = subject.fresh_twin(dtype=LOW)
    if twin.dtype != LOW:
        return None
    try:
        low = traced(twin, aligned.case)
    except SubjectCodeError:  # what does not run in bfloat16 says nothing about its casts
        return None
    sides = [
        [(i, (e.op, e.where.module, e.where.line)) for i, e in enumerate(g.recording.events) if e.op != "_to_copy"] for g in (graph, low)
    ]
    keys = [[key for _, key in side] for side in sides]
    found: dict[int, int] = {}
    for block in difflib.SequenceMatcher(a=keys[0], b=keys[1], autojunk=False).get_matching_blocks():
        found |= {sides[0][block.a + i][0]: sides[1][block.b + i][0] for i in range(block.size)}
    return low, found


def _made(graph: Graph, event: int, output: int) -> Tensor | None:
    outputs = graph.recording.kept[event].outputs
    return outputs[output] if output < len(outputs) else None


def _explains(graph: Graph, event: int, output: int, narrow: Tensor, like: Graph) -> bool:
    """Whether the wider op, its inputs cast to the narrow dtype first, gives the other side's result bit for bit."""
    kept = graph.recording.kept[event]
    arguments = {n: v.to(narrow.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in kept.arguments.items()}
    call = getattr(torch.ops.aten, op_code(graph.recording.events[event].op).rpartition(".")[2])
    try:
        made = call(**arguments)
    except Exception:  # an op that takes no such arguments by name explains nothing
        return False
    again = made if isinstance(made, Tensor) else made[output]
    a, b = (positions_first(t, batch=like.batch, seq=like.seq) for t in (again, narrow))
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)
