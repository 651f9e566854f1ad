"""The edits of a culprit's expression that a diagnosis suggests."""

import ast
from typing import Any

from ..sources import Spot
from .relation import Culprit
from .repair import Edit, Expressions


def call_of(tree: Expressions | None, culprit: Culprit, names: tuple[str, ...]) -> ast.Call | None:
    """The call of one of these functions or methods that was running at the culprit's place."""
    if tree is None or culprit.spot is None:
        return None
    for node in tree.at(culprit.spot):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in names:
                return node
    return None


def mask_scores(tree: Expressions, call: ast.Call) -> tuple[Edit, ...]:
    """softmax(X) -> softmax(X with later keys at finfo.min), for an X that is a plain name."""
    target = call.func.value if isinstance(call.func, ast.Attribute) and _is_method(call) else call.args[0] if call.args else None
    if not isinstance(target, ast.Name | ast.Attribute):
        return ()
    x = tree.source(target)
    later = f"torch.ones({x}.shape[-2:], dtype=torch.bool, device={x}.device).triu({x}.shape[-1] - {x}.shape[-2] + 1)"
    return (tree.replace(target, f"{x}.masked_fill({later}, torch.finfo({x}.dtype).min)"),)


def set_dimension(tree: Expressions, call: ast.Call) -> tuple[Edit, ...]:
    """softmax(X, dim) -> softmax(X, -1)."""
    for keyword in call.keywords:
        if keyword.arg == "dim":
            return (tree.replace(keyword.value, "-1"),)
    position = 0 if _is_method(call) else 1
    if len(call.args) > position:
        return (tree.replace(call.args[position], "-1"),)
    return ()


def _is_method(call: ast.Call) -> bool:
    """Whether what is called belongs to a value, and is no function of a module such as F, torch or torch.nn.functional."""
    if not isinstance(call.func, ast.Attribute):
        return False
    holder = call.func.value
    return (holder.id if isinstance(holder, ast.Name) else getattr(holder, "attr", "")) not in ("F", "torch", "functional")


def set_keyword(tree: Expressions, call: ast.Call, name: str, value: str) -> tuple[Edit, ...]:
    """f(X) -> f(X, name=value); the value of a keyword that is there already is replaced."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return (tree.replace(keyword.value, value),)
    if any(keyword.arg is None for keyword in call.keywords) or not (call.args or call.keywords):
        return ()
    last: Any = ([*call.args, *[k.value for k in call.keywords]])[-1]
    return (tree.replace(last, f"{tree.source(last)}, {name}={value}"),)


def insert_before_method(tree: Expressions, call: ast.Call, text: str) -> tuple[Edit, ...]:
    """E.reshape(...) -> E.transpose(1, 2).reshape(...); `view` becomes `reshape`, since the transpose breaks its stride."""
    node: ast.expr = call
    while (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("reshape", "view", "contiguous", "flatten")
    ):
        inner = node.func.value
        if not (isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and inner.func.attr == "contiguous"):
            receiver = tree.source(inner)
            wrapped = receiver if isinstance(inner, ast.Name | ast.Attribute | ast.Call | ast.Subscript) else f"({receiver})"
            rest = tree.source(node)[len(receiver) :]
            if rest.startswith(".view("):
                rest = ".reshape(" + rest[len(".view(") :]
            return (tree.replace(node, f"{wrapped}{text}{rest}"),)
        node = inner
    return ()


def mask_operand(tree: Expressions, culprit: Culprit) -> tuple[Edit, ...]:
    """The smaller operand of the culprit's sum, a mask of 0 and 1, as one that is added."""
    assert culprit.left is not None and culprit.spot is not None
    sizes = [t.numel() for t in culprit.left.inputs[:2]]
    small = 0 if sizes[0] < sizes[1] else 1
    return additive_mask(tree, culprit.spot, small, flat=culprit.left.inputs[small].ndim == 2)


def additive_mask(tree: Expressions, spot: Spot, operand: int, *, flat: bool) -> tuple[Edit, ...]:
    """`scores + mask` -> `scores + (1 - mask) * finfo.min`, the mask being the first or the second operand; a flat one, [batch,
    seq_len], is spread to [batch, 1, 1, seq_len]."""
    for node in tree.at(spot):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            pair: tuple[ast.expr, ast.expr] = (node.left, node.right)
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
            pair = (node.target, node.value)
        else:
            continue
        mask, scores = tree.source(pair[operand]), tree.source(pair[1 - operand])
        if not isinstance(pair[1 - operand], ast.Name | ast.Attribute):
            return ()
        spread = f"({mask})[:, None, None, :]" if flat else f"({mask})"
        return (tree.replace(pair[operand], f"(1.0 - {spread}.to({scores}.dtype)) * torch.finfo({scores}.dtype).min"),)
    return ()
