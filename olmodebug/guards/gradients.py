"""What the gradient guards share: the parameters of an optimizer, and which of them have a gradient of the plain kind."""

import gc
from collections import deque
from typing import Any

import torch
from torch import Tensor

SAMPLED = 1024  # elements of a parameter that are compared before and after
NEAREST = 2000  # graph nodes searched for the parameter next to a loss


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


def nearest_leaf(roots: list[Tensor]) -> Tensor | None:
    """The parameter with the fewest nodes of the graph between it and the loss."""
    queue = deque(root.grad_fn for root in roots)
    seen: set[Any] = set()
    while queue and len(seen) < NEAREST:
        node = queue.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            return variable
        queue.extend(following for following, _ in node.next_functions)
    return None
