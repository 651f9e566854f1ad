"""What a model holds under which name, and the line of its class that put it there."""

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import Tensor, nn

from .compare import difference
from .explain import place_of
from .records import Where
from .sources import Spot, code_of


def attribute_place(model: nn.Module, path: str) -> Where:
    """Where a module's class sets this buffer or attribute, else its __init__."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    for kind in type(module).__mro__:
        for method in vars(kind).values():
            code = code_of(method)
            if code is None or kind.__module__.startswith("torch."):
                continue
            line = line_that_sets(code, name)
            if line is not None:
                return place_of(Spot(code, 0, line), module=owner)
    code = code_of(type(module).__init__)
    return place_of(Spot(code, 0, code.co_firstlineno) if code else None, module=owner)


def tie_place(model: nn.Module) -> Where:
    """The line that makes two parameters one, `a.weight = b.weight`, else the function that is for this, or __init__."""
    code = code_of(getattr(type(model), "tie_weights", None) or type(model).__init__)
    return place_of(Spot(code, 0, _line_that_ties(code) or code.co_firstlineno) if code else None)


def _line_that_ties(code: object) -> int | None:
    try:
        lines, first = inspect.getsourcelines(code)  # type: ignore[arg-type]
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and node.value.attr == "weight":
            if any(isinstance(target, ast.Attribute) and target.attr == "weight" for target in node.targets):
                return first + node.lineno - 1
    return None


def shared(model: nn.Module) -> list[tuple[str, ...]]:
    """Names of parameters that lie in one storage, at the same place and with the same shape."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta and parameter.numel():
            groups.setdefault((parameter.data_ptr(), tuple(parameter.shape)), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def parameter(model: nn.Module, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last)  # type: ignore[no-any-return]


def not_saved(first: nn.Module, second: nn.Module, saved: dict[str, Tensor]) -> list[str]:
    """Buffers outside the state dict that differ between two builds, and modules in plain containers."""
    other = dict(second.named_buffers())
    names = [n for n, b in first.named_buffers() if n not in saved and n in other and not equal(b, other[n])]
    for name, inside in _held(first):
        if any(isinstance(item, nn.Module) and list(item.parameters()) or isinstance(item, Tensor) for item in inside):
            names.append(name)
    return names


def unregistered(model: nn.Module) -> list[str]:
    """Attributes with modules in a plain list, tuple or dict, which eval(), to() and the state dict do not reach."""
    return [name for name, inside in _held(model) if len(inside) and all(isinstance(item, nn.Module) for item in inside)]


def _held(model: nn.Module) -> Iterator[tuple[str, list[object]]]:
    """(path, what it holds) of each attribute of a module that is not torch's own."""
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            inside = list(value) if isinstance(value, list | tuple) else list(value.values()) if type(value) is dict else [value]
            if not key.startswith("_"):
                yield f"{path}.{key}" if path else key, inside


def why_not_saved(model: nn.Module, path: str) -> str:
    owner, _, name = path.rpartition(".")
    value = getattr(model.get_submodule(owner), name)
    if isinstance(value, list | tuple | dict):
        return f"{path} is a plain {type(value).__name__}: its modules are not registered, and so not in the state dict"
    return f"{path} differs between builds and is not in the state dict"


def equal(left: Tensor, right: Tensor) -> bool:
    return difference(left, right) is None


def line_that_sets(code: object, name: str) -> int | None:
    try:
        lines, first = inspect.getsourcelines(code)  # type: ignore[arg-type]
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        registers = (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("register_buffer", "register_parameter")
        )
        if registers and node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == name:  # type: ignore[attr-defined]
            return first + node.lineno - 1  # type: ignore[attr-defined,no-any-return]
    return None
