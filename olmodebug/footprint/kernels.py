"""What some kernels of the CPU allocate, where torch's rules for fake tensors say something else."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _layer_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation of 16-bit inputs are kept in float32 where weight or bias is float32; torch's rule keeps them in 16 bits."""
    mixed = x.device.type != "cpu" or any(p is not None and p.dtype != x.dtype for p in (weight, bias))
    kept = [*x.shape[: x.ndim - len(normalized_shape)], *(1 for _ in normalized_shape)]
    mean = x.new_empty(kept, dtype=torch.float32 if mixed else x.dtype)
    return torch.empty_like(x, memory_format=torch.contiguous_format), mean, torch.empty_like(mean)


def _of_two(gradient: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Laid out as the result of any op on two tensors, by the gradient first; torch's rule lays it out as the input."""
    return gradient * x


def _elu_backward(gradient: Tensor, alpha: Any, scale: Any, input_scale: Any, is_result: bool, x: Tensor) -> Tensor:
    return _of_two(gradient, x)


aten = torch.ops.aten

# By operator, what to call on fake tensors in its place; the name of the operator is told all the same.
MENDED: dict[Any, Callable[..., Any]] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.elu_backward.default: _elu_backward,
} | dict.fromkeys(
    (
        aten.softplus_backward.default,
        aten.hardswish_backward.default,
        aten.hardsigmoid_backward.default,
        aten.hardtanh_backward.default,
    ),
    _of_two,
)
