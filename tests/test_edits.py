"""Edits of one expression, as source: a softmax by any of its names, as a method and as a function."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from olmodebug.relations.edits import mask_scores, set_dimension, set_keyword
from olmodebug.relations.repair import Edit, Expressions


def edited(folder: Path, source: str, make: Callable[[Expressions, ast.Call], tuple[Edit, ...]]) -> str:
    """A line of source after the edits of the call in it."""
    file = folder / "line.py"
    file.write_text(source)
    tree = Expressions(str(file))
    call = next(node for node in ast.walk(tree.tree) if isinstance(node, ast.Call))
    for edit in make(tree, call):
        source = edit.apply(source)
    return source


@pytest.mark.parametrize(
    "name", ["torch.softmax", "F.softmax", "functional.softmax", "nn.functional.softmax", "torch.nn.functional.softmax"]
)
def test_the_dimension_of_a_function_comes_after_its_tensor(tmp_path: Path, name: str) -> None:
    assert edited(tmp_path, f"y = {name}(x, -2)", set_dimension) == f"y = {name}(x, -1)"
    assert edited(tmp_path, f"y = {name}(x, dim=1)", set_dimension) == f"y = {name}(x, dim=-1)"


def test_the_dimension_of_a_method_comes_first(tmp_path: Path) -> None:
    assert edited(tmp_path, "y = self.scores.softmax(-2)", set_dimension) == "y = self.scores.softmax(-1)"


@pytest.mark.parametrize("call", ["torch.nn.functional.softmax(x, -1)", "softmax(x, -1)", "x.softmax(-1)"])
def test_scores_are_masked_wherever_they_stand(tmp_path: Path, call: str) -> None:
    source = edited(tmp_path, f"y = {call}", mask_scores)
    assert source.replace(source[source.index(".masked_fill") : source.index(".min)") + len(".min)")], "") == f"y = {call}"


def test_a_keyword_is_added_or_replaced(tmp_path: Path) -> None:
    assert edited(tmp_path, "y = f(q, k)", lambda tree, call: set_keyword(tree, call, "is_causal", "True")) == "y = f(q, k, is_causal=True)"
    assert edited(tmp_path, "y = f(a=0)", lambda tree, call: set_keyword(tree, call, "a", "1")) == "y = f(a=1)"
