"""How a model's weights came to be: which op wrote each last, from which line, and which conditions on names never held.

Every build runs again under a dispatch mode; nothing of the subject is changed.
"""

import ast
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private
from torch.utils._pytree import tree_flatten

from ..sources import OWN, Sources, Spot


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """The last write into a parameter: the op (`normal_`, `uniform_`, `fill_`) and the subject's own line that led to it."""

    op: str
    spot: Spot | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NeverTrue:
    """A condition on a parameter's name inside a loop over named parameters whose body never ran: its place and its text."""

    spot: Spot
    condition: str


@dataclass(slots=True, kw_only=True)
class Build:
    """A model built under watch: who wrote each parameter last, and which functions of its own sources ran which lines."""

    model: nn.Module
    births: dict[str, Birth]
    lines: dict[CodeType, set[int]]
    sources: Sources

    def never_true(self) -> Iterator[NeverTrue]:
        """Conditions on names, in loops over named_parameters, that held for no parameter; their bodies call an init function.
        A part of a name, asked for beside one that is there, is left out: that of a part which only other configurations have."""
        for code, seen in self.lines.items():
            asked = [item for item in _name_conditions(code) if item[0].lineno in seen]
            held = [any(line in seen for line in body) for _, _, body in asked]
            for (condition, text, _), true in zip(asked, held, strict=True):
                whole = any(isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq) for node in ast.walk(condition))
                if not true and (whole or not any(held)):
                    yield NeverTrue(spot=Spot(code, 0, condition.lineno), condition=text)


def watch_build(make: Callable[[], nn.Module], sources: Sources) -> Build:
    """Build a model and learn where its weights come from."""
    watch = _Writes(sources)
    lines: dict[CodeType, set[int]] = {}
    before = sys.gettrace()

    def local(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            lines[frame.f_code].add(frame.f_lineno)
        return local

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code in lines:
            return local
        if sources.rank(code.co_filename) != OWN or code.co_name == "<module>":
            return None
        lines[code] = set()
        return local

    try:
        if before is None:  # a debugger or a coverage tool is not pushed aside
            sys.settrace(enter)
        with watch:
            model = _run_watched(make)
    finally:
        if before is None:
            sys.settrace(None)
    births = {}
    for name, parameter in model.named_parameters():
        birth = watch.last.get(parameter.untyped_storage().data_ptr())
        if birth is not None:
            births[name] = birth
    return Build(model=model, births=births, lines=lines, sources=sources)


def _run_watched(make: Callable[[], nn.Module]) -> nn.Module:
    """The boundary that the search for the running line stops at."""
    return make()


class _Writes(TorchDispatchMode):
    def __init__(self, sources: Sources) -> None:
        super().__init__()
        self.sources = sources
        self.last: dict[int, Birth] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        op = func.__name__.partition(".")[0]
        read = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, Tensor)}
        for tensor in [item for item in tree_flatten(output)[0] if isinstance(item, Tensor)]:
            if tensor.device.type == "meta" or tensor.layout != torch.strided:
                continue
            pointer = tensor.untyped_storage().data_ptr()
            if pointer in read and not op.endswith("_"):
                continue  # a view
            self.last[pointer] = Birth(op=op, spot=self.sources.spot(sys._getframe(1), _run_watched.__code__))
        return output


def _name_conditions(code: CodeType) -> Iterator[tuple[ast.expr, str, list[int]]]:
    """(condition, its text, lines of its body) of `if` statements on the name in a loop over named_parameters()."""
    tree = _tree(code)
    for loop in ast.walk(tree) if tree else ():
        if not isinstance(loop, ast.For) or "named_parameters" not in ast.unparse(loop.iter):
            continue
        names = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
        for node in ast.walk(loop):
            if not isinstance(node, ast.If):
                continue
            used = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)} & names
            strings = [n for n in ast.walk(node.test) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            writes = any(word in ast.unparse(child) for child in node.body for word in ("normal_", "uniform_", "init.", "mul_", "copy_"))
            if used and strings and writes:
                yield node.test, ast.unparse(node.test), [child.lineno for child in node.body]


def _tree(code: CodeType) -> ast.AST | None:
    """The syntax tree of the function of this code, with the file's own line numbers."""
    try:
        text = Path(code.co_filename).read_text(encoding="utf-8")
        tree = ast.parse(textwrap.dedent(text))
    except (OSError, SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if first == code.co_firstlineno:
                return node
    return None
