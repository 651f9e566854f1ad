"""Indices that would stop a device, met before the kernel starts.

A kernel with an index beyond its table asserts on the device, and nothing runs there afterwards. On the CPU the same op
raises an error with a line and goes on. So indices are looked at first, and a bad one is given to the CPU, which says so.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private
from torch.utils._pytree import tree_map_only

from .composites import in_parts
from .process import HOST


def index_checked(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, an index beyond its table raises the CPU's own error on any device; on the CPU itself nothing changes."""
    return nullcontext() if device.type in HOST else _IndexChecked()


class _IndexChecked(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        from .guards.index import READS, SAMPLERS, bad_index, improper_probabilities

        self.reads, self.samplers = READS, SAMPLERS
        self.bad, self.improper = bad_index, improper_probabilities

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled regions are not looked into: without this, torch.compile would run eagerly under a mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (parts := in_parts(self, func, args, kwargs)) is not NotImplemented:
            return parts
        wrong: Any = None
        if func in self.reads:
            wrong = self.bad(func, args, kwargs)
        elif func in self.samplers:
            wrong = self.improper(args[0])
        if wrong:
            host_args, host_kwargs = tree_map_only(Tensor, lambda t: t.detach().cpu(), (args, kwargs))
            func(*host_args, **host_kwargs)
            raise IndexError(f"{func._schema.name.rpartition('::')[2]}: an index is out of range")  # an op that the CPU lets pass
        return func(*args, **kwargs)
