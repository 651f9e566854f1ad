"""The models that are alive in a process, found when somebody asks, and the names of their modules and tensors."""

import gc
import itertools
from typing import Any

import torch
from torch import Tensor, nn


class Models:
    """Outermost modules by what the garbage collector knows; kept until one is asked for that is not among them."""

    def __init__(self) -> None:
        self._roots: list[nn.Module] = []

    def roots(self, *, again: bool = False) -> list[nn.Module]:
        """Every module that is no child of another, largest first."""
        if again or not self._roots:
            self.search()
        return self._roots

    def search(self) -> list[torch.optim.Optimizer]:
        """Look for models anew; the optimizers that are alive, which the same look has met."""
        found = alive((nn.Module, torch.optim.Optimizer))
        modules = [thing for thing in found if isinstance(thing, nn.Module)]
        children = {id(child) for module in modules for child in module.children()}
        self._roots = sorted((m for m in modules if id(m) not in children), key=_size, reverse=True)
        return [thing for thing in found if isinstance(thing, torch.optim.Optimizer)]

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


def alive(kinds: tuple[type, ...]) -> list[Any]:
    """Every object of some kinds that the garbage collector knows. Types are asked, each once: isinstance would wake lazy objects."""
    things = gc.get_objects()  # half a million once transformers is imported: no Python frame for each
    keys = list(map(id, map(type, things)))
    wanted = {key for key, of in dict(zip(keys, map(type, things), strict=True)).items() if issubclass(of, kinds)}
    return list(itertools.compress(things, map(wanted.__contains__, keys)))


def _size(module: nn.Module) -> int:
    return sum(1 for _ in module.parameters())


def _pointer(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
    except (RuntimeError, NotImplementedError):  # a tensor without a storage of its own
        return 0
