"""What the gradient guards share: the parameters of an optimizer, and which of them have a gradient of the plain kind."""

import heapq
import math
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED = 1024  # elements of a parameter that are compared before and after
NEAREST = 2000  # graph nodes searched for the parameter next to a loss
FOLLOWED = 3  # parameters of an optimizer whose gradients are followed


@dataclass(frozen=True, slots=True, eq=False)
class Followed:
    """A parameter's gradient as it was at one time."""

    parameter: "weakref.ref[Tensor]"
    gradient: "weakref.ref[Tensor]"
    version: int
    values: Tensor | None = None  # under a dispatch mode, ops on lists of tensors leave their versions as they are

    def is_unchanged(self) -> bool:
        """Whether the very tensor is still the gradient, as it was; the values count where they were kept."""
        p = self.parameter()
        if p is None or p.grad is None or p.grad is not self.gradient() or version_of(p.grad) != self.version:
            return False
        return self.values is None or torch.equal(sample(local(p.grad)), self.values)

    def is_same(self, other: "Followed") -> bool:
        """Whether both are one tensor, and nothing was written to it in between."""
        return self.gradient() is other.gradient() and self.version == other.version


def parameters(optimizer: Any) -> list[Tensor]:
    """The parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def has_plain_gradient(parameter: Tensor) -> bool:
    """Whether there is a dense gradient that is no subclass (of a sharded parameter), of a parameter that has its memory:
    FSDP takes that of a gathered one back, and keeps a gradient that is not reduced yet."""
    grad = parameter.grad
    if grad is None or grad.layout != torch.strided or type(grad) is not Tensor:
        return False
    return type(parameter) is not nn.Parameter or parameter.numel() == 0 or parameter.untyped_storage().nbytes() > 0


def local(tensor: Tensor) -> Tensor:
    """The memory of a tensor on this rank: its own part where it is sharded over ranks; asking for more would be a collective."""
    held = getattr(tensor, "_local_tensor", None)  # private: DTensor.to_local() would be recorded by autograd
    return held if isinstance(held, Tensor) else tensor


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; of a sharded one also its part on this rank, to which FSDP adds directly."""
    part = local(tensor)
    return tensor._version if part is tensor else tensor._version + part._version


def has_dense_gradient(parameter: Tensor) -> bool:
    """Whether there is a dense gradient, whole or this rank's part of it."""
    grad = parameter.grad
    return grad is not None and grad.layout == torch.strided and type(local(grad)) is Tensor


def clip_limit(args: Any, kwargs: Any) -> Any:
    """The limit that a clipping was given; None where it is not finite: with inf it only measures."""
    limit = args[1] if len(args) > 1 else kwargs.get("max_norm", kwargs.get("clip_value"))
    return None if isinstance(limit, (int, float)) and not math.isfinite(limit) else limit


def follow(optimizer: Any, *, values: bool = False) -> list[Followed]:
    """The gradients of the smallest parameters of an optimizer that have one."""
    smallest = heapq.nsmallest(FOLLOWED, (p for p in parameters(optimizer) if has_dense_gradient(p)), key=Tensor.numel)
    pairs = [(p, p.grad) for p in smallest if p.grad is not None]
    return [Followed(weakref.ref(p), weakref.ref(g), version_of(g), sample(local(g)).clone() if values else None) for p, g in pairs]


def written_since(optimizer: Any, before: list[Followed], *, values: bool = False) -> list[Followed]:
    """The followed gradients that are others than before, or have changed."""
    return [now for now in follow(optimizer, values=values) if not any(now.is_same(old) for old in before)]


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
