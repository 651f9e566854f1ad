"""A forward that stays in float64 where its code casts to float32: norms, softmax, rotary tables, the loss.

Finite differences and cancellations show only above the rounding of the coarsest step; with every step in float64 that
is 1e-13 instead of 1e-7. The model computes the same function, with more digits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private
from torch.utils._pytree import tree_map_only

from .composites import in_parts

SINGLE, DOUBLE = torch.float32, torch.float64
# Ops that read float32 memory as it lies, or say so in their names.
AS_STORED = ("view", "bitwise", "_local_scalar_dense", "set_", "copy_")


class KeepDouble(TorchDispatchMode):
    """Inside it every cast to float32 and every new float32 tensor is float64 instead."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (parts := in_parts(self, func, args, kwargs)) is not NotImplemented:
            return parts
        if kwargs.get("dtype") is SINGLE:
            kwargs["dtype"] = DOUBLE
        args = tree_map_only(torch.dtype, lambda dtype: DOUBLE if dtype is SINGLE else dtype, args)
        name = func.__name__.partition(".")[0] if hasattr(func, "__name__") else ""
        if name not in AS_STORED and any(_is(t, DOUBLE) for t in _tensors(args)):
            args = tree_map_only(Tensor, lambda t: t.to(DOUBLE) if _is(t, SINGLE) else t, args)
        return func(*args, **kwargs)


def _tensors(args: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, args)
    return found


def _is(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype
