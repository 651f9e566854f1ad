"""What the gradient guards share: the parameters of an optimizer, and which of them have a gradient of the plain kind."""

import gc
from typing import Any

import torch
from torch import Tensor

SAMPLED = 1024  # elements of a parameter that are compared before and after


def optimizers() -> list[Any]:
    """Every optimizer that is alive."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.optim.Optimizer)]


def parameters(optimizer: Any) -> list[Tensor]:
    """The parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def has_plain_gradient(parameter: Tensor) -> bool:
    """Whether there is a dense gradient that is no subclass (of a sharded parameter)."""
    grad = parameter.grad
    return grad is not None and grad.layout == torch.strided and type(grad) is Tensor


def sample(tensor: Tensor) -> Tensor:
    """At most about `SAMPLED` elements, spread over the tensor."""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLED)]
