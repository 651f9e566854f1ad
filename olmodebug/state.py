"""What a model holds beside its parameters and buffers, and the line that put it there."""

import ast
import inspect
from typing import Any

from torch import Tensor, nn

from .records import Where
from .sources import Spot, short_path


def keeper(model: nn.Module) -> tuple[Where, str | None]:
    """The attribute that holds a tensor outside parameters and buffers, and the line of the class that sets it."""
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules") or key.startswith(("_forward", "_backward", "_state", "_load", "_non")):
                continue
            holds = (
                isinstance(value, Tensor) or isinstance(value, dict | list | tuple) and any(isinstance(v, Tensor) for v in _values(value))
            )
            if holds and (spot := _assignment(type(module), key)) is not None:
                line = Where(module=path, function=spot[0], file=spot[1], line=spot[2])
                return line, f"self.{key}"
    return Where(), None


def _values(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


def _assignment(cls: type, name: str) -> tuple[str, str, int] | None:
    """(function, file, line) of the method outside __init__ that sets `self.name` or writes into it."""
    for function in vars(cls).values():
        code = getattr(function, "__code__", None)
        if code is None or function.__name__ == "__init__":
            continue
        try:
            lines, start = inspect.getsourcelines(function)
            tree = ast.parse(inspect.cleandoc("\n" + "".join(lines)) if lines[0][:1].isspace() else "".join(lines))
        except (OSError, SyntaxError, TypeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
                continue
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                base = target.value if isinstance(target, ast.Subscript) else target
                if isinstance(base, ast.Attribute) and base.attr == name:
                    spot = Spot(code, 0, start + node.lineno - 1)
                    return spot.function, short_path(spot.file), spot.line
    return None
