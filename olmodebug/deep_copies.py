"""Deep copies that are models of their own, also where a function that a module holds points back into the first model."""

import copy
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy whose functions use the copy. copy.deepcopy hands functions on as they are, and one that is made in
    __init__, a lambda or a hook, goes on using the modules of the model that it was made in."""
    memo = {} if memo is None else memo
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for name, value in list(vars(module).items()):
            vars(module)[name] = _bound_anew(value, memo)
    return copied


def functions_left_behind(model: nn.Module) -> Iterator[tuple[str, str, FunctionType]]:
    """(path, variable, function) of each function that a module holds and that uses a module or a tensor of this model by a
    variable of its own: a plain deep copy goes on using the first model there."""
    own = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            for function in _functions(value):
                for variable, content in _closed_over(function):
                    if id(content) in own or (isinstance(content, MethodType) and id(content.__self__) in own):
                        yield f"{path}.{name}" if path else name, variable, function


def _functions(value: Any) -> Iterator[FunctionType]:
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, FunctionType):
                yield item


def _closed_over(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        content = _content(cell)
        if isinstance(content, FunctionType):
            if content is not function:
                yield from ((f"{name}'s {inner}", value) for inner, value in _closed_over(content))
        else:
            yield name, content
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    yield from zip(positional[len(positional) - len(defaults) :], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()


def _bound_anew(value: Any, memo: dict[int, Any]) -> Any:
    """What the copy holds in place of a value: functions are made anew where they use what was copied."""
    if isinstance(value, dict):
        value.update({key: _of_the_copy(item, memo) for key, item in value.items() if isinstance(item, FunctionType)})
        return value
    if type(value) in (list, tuple) and any(isinstance(item, FunctionType) for item in value):
        return type(value)(_of_the_copy(item, memo) if isinstance(item, FunctionType) else item for item in value)
    return _of_the_copy(value, memo) if isinstance(value, FunctionType) else value


def _of_the_copy(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType) and id(value.__self__) in memo:
        return MethodType(value.__func__, memo[id(value.__self__)])
    if not isinstance(value, FunctionType) or not _uses(value, memo, set()):
        return value
    cells = [CellType() for _ in value.__closure__ or ()]
    function = FunctionType(value.__code__, value.__globals__, value.__name__, closure=tuple(cells))
    memo[id(value)] = function  # before its cells are filled: it may call itself
    for cell, old in zip(cells, value.__closure__ or (), strict=True):
        if (content := _content(old)) is not _EMPTY:
            cell.cell_contents = _of_the_copy(content, memo)
    function.__defaults__ = tuple(_of_the_copy(item, memo) for item in value.__defaults__ or ())
    function.__kwdefaults__ = {name: _of_the_copy(item, memo) for name, item in (value.__kwdefaults__ or {}).items()}
    function.__qualname__ = value.__qualname__
    function.__dict__.update(value.__dict__)
    return function


def _uses(value: Any, memo: dict[int, Any], seen: set[int]) -> bool:
    """Whether a function reaches something that was copied."""
    if id(value) in memo:
        return True
    if isinstance(value, MethodType):
        return id(value.__self__) in memo
    if not isinstance(value, FunctionType) or id(value) in seen:
        return False
    seen.add(id(value))
    held = [*map(_content, value.__closure__ or ()), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return any(_uses(item, memo, seen) for item in held)


_EMPTY = object()


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that was never set
        return _EMPTY
