"""The tensors of a key-value cache, whatever object holds it."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

DEEPEST = 6  # transformers keeps them at cache.layers[i].keys


def cache_tensors(cache: Any) -> list[Tensor]:
    """Every tensor that a cache holds in lists, tuples, dicts or attributes."""
    return list(_inside(cache, DEEPEST, set()))


def _inside(value: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if depth == 0 or value is None or isinstance(value, str | int | float | bool | type | nn.Module) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, list | tuple):
        items = list(value)
    else:
        names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if isinstance(name, str)]
        items = [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in names)]
    for item in items:
        yield from _inside(item, depth - 1, seen)
