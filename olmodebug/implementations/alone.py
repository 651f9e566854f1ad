"""Where two implementations part, as a script without olmodebug: one op of each side on the inputs that it had."""

from pathlib import Path

import torch
from torch import Tensor

from ..compare import difference
from ..executions.alone import HEAD, arguments_code, op_code, write_script
from .aligned import Aligned
from .anchors import Graph

NEAR = 60  # how many ops behind the parting the reference's counterpart is looked for
PRODUCTS = ("mm", "addmm", "bmm", "linear", "matmul")
SCRIPT = """subject = as_list({op}(**{arguments}))[{output}]
reference = as_list({other}(**{others}))[{other_output}]
gap = (subject.double() - reference.double()).abs()
print("subject: {op} at {place}; reference: {other} at {other_place}")
print("inputs that are equal:", {equal}, "of", {total})
print("largest difference", float(gap.max()), "of", float(reference.abs().max()))
"""


def script_of(aligned: Aligned, node: int, other: int | None, folder: Path) -> str | None:
    """Write the script for the subject's first wrong op and the reference's op of that shape; its path, None without one."""
    left, right = aligned.graphs()
    for mine, theirs in _pairs(left, right, node, other):
        if difference(left.value(mine), right.value(theirs), relative_limit=aligned.limit) is None:
            continue
        script = script_of_ops(aligned, mine, theirs, folder)
        if script is not None:
            return script
    return None


def script_of_ops(aligned: Aligned, mine: int, theirs: int, folder: Path) -> str | None:
    """Write the script for one op of each side; its path.

    Both ops are run here as the script runs them: what does not give the recorded tensors again is not written.
    """
    left, right = aligned.graphs()
    tensors: dict[str, Tensor] = {}
    parts = [
        _part(graph, index, name, tensors, aligned.limit) for graph, index, name in ((left, mine, "subject"), (right, theirs, "reference"))
    ]
    if None in parts:
        return None
    (code, place), (other_code, other_place) = (part for part in parts if part is not None)
    ours = {k.partition("/")[2]: t for k, t in tensors.items() if k.startswith("subject/")}
    held = [t for k, t in tensors.items() if k.startswith("reference/")]
    equal = sum(any(t.shape == o.shape and difference(t, o, relative_limit=aligned.limit) is None for o in held) for t in ours.values())
    title = (
        f"{aligned.left.subject.spec} against {aligned.right.subject.spec}, with the same weights and tokens, in float64: where they part"
    )
    text = HEAD.format(title=title) + SCRIPT.format(
        op=op_code(left.event(mine).op),
        arguments=code,
        output=left.nodes[mine].output,
        other=op_code(right.event(theirs).op),
        others=other_code,
        other_output=right.nodes[theirs].output,
        place=place,
        other_place=other_place,
        equal=equal,
        total=len(ours),
    )
    return write_script(folder, f"part-{left.event(mine).op.strip('_')}", text, tensors)


def _pairs(left: Graph, right: Graph, node: int, other: int | None) -> list[tuple[int, int]]:
    """Nodes that may be each other's counterpart: of the first wrong ones those of one op and shape, then of one shape; at
    last the products that make the logits, whose inputs carry the difference."""
    found: list[tuple[int, int]] = []
    if other is not None:
        near = [i for i in range(other, min(other + NEAR, len(right.nodes))) if right.nodes[i].data and not right.nodes[i].good]
        near = [i for i in near if right.value(i).shape == left.value(node).shape]
        found = [(node, i) for i in sorted(near, key=lambda i: (right.event(i).op != left.event(node).op, i))]
    heads = [
        next((i for i in reversed(range(len(g.nodes))) if g.nodes[i].leads and g.event(i).op in PRODUCTS), None) for g in (left, right)
    ]
    if heads[0] is not None and heads[1] is not None and left.value(heads[0]).shape == right.value(heads[1]).shape:
        found.append((heads[0], heads[1]))
    return found


def _part(graph: Graph, index: int, prefix: str, tensors: dict[str, Tensor], limit: float) -> tuple[str, str] | None:
    """(arguments as code, place) of a node's op, when it gives its recorded result again."""
    held = graph.nodes[index]
    event, kept = graph.recording.events[held.event], graph.recording.kept[held.event]
    own: dict[str, Tensor] = {}
    try:
        code = arguments_code(kept.arguments, f"{prefix}/", own)
        again = eval(f"{op_code(event.op)}(**{code})", {"torch": torch, "tensors": {k: t.clone() for k, t in own.items()}})  # noqa: S307
        outputs = [again] if isinstance(again, Tensor) else list(again)
        if difference(outputs[held.output], held.tensor, relative_limit=limit) is not None:  # other strides, another order of sums
            return None
    except Exception:  # an op of another library, or one that takes no such arguments by name
        return None
    tensors.update(own)
    where = event.where
    return code, f"{where.file}:{where.line}" if where.file else where.module
