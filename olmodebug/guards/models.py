"""The models that are alive in a process, found when somebody asks, and the names of their modules and tensors."""

import gc
import itertools

import torch
from torch import Tensor, nn


class Models:
    """Outermost modules by what the garbage collector knows; kept until one is asked for that is not among them."""

    def __init__(self) -> None:
        self._roots: list[nn.Module] = []

    def roots(self, *, again: bool = False) -> list[nn.Module]:
        """Every module that is no child of another, largest first."""
        if again or not self._roots:
            alive = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]  # isinstance would ask lazy objects
            children = {id(child) for module in alive for child in module.children()}
            self._roots = sorted((m for m in alive if id(m) not in children), key=_size, reverse=True)
        return self._roots

    def forget(self) -> None:
        """Hold no model alive longer than the script does."""
        self._roots = []

    def module(self, module: nn.Module | None) -> str:
        """`model.layers.0.mlp`, or the class's name for an outermost module."""
        if module is None:
            return ""
        for again in (False, True):
            for root in self.roots(again=again):
                if root is module:
                    return type(module).__name__
                name = next((name for name, child in root.named_modules() if child is module), None)
                if name is not None:
                    return name
        return type(module).__name__

    def tensor(self, tensor: Tensor) -> str | None:
        """The path of a parameter or buffer, by its memory; None for any other tensor."""
        pointer = _pointer(tensor)
        for again in (False, True):
            for root in self.roots(again=again):
                for name, held in itertools.chain(root.named_parameters(), root.named_buffers()):
                    if held is tensor or (pointer and _pointer(held) == pointer):
                        return name
        return None

    def at(self, pointer: int) -> str | None:
        """The path of the parameter or buffer whose memory begins at an address; None where none does."""
        for root in self.roots(again=True) if pointer else ():
            for name, held in itertools.chain(root.named_parameters(), root.named_buffers()):
                if _pointer(held) == pointer:
                    return name
        return None


def _size(module: nn.Module) -> int:
    return sum(1 for _ in module.parameters())


def _pointer(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
    except (RuntimeError, NotImplementedError):  # a tensor without a storage of its own
        return 0
