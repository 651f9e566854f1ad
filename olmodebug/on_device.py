"""What a device does to a process that asks for the wrong thing, met before it happens: bad indices, and a context that is lost.

A kernel with an index beyond its table asserts on the device, and nothing runs there afterwards. On the CPU the same op
raises an error with a line and goes on. So indices are looked at first, and a bad one is given to the CPU, which says so.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private
from torch.utils._pytree import tree_map_only

from .process import HOST

LOST = ("CUDA error", "HIP error", "device-side assert", "illegal memory access", "AcceleratorError")


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


def is_lost(error: BaseException) -> bool:
    """Whether an error says that the device's context is gone, so that nothing more can run there in this process."""
    if is_out_of_memory(error):
        return False
    text = f"{type(error).__name__}: {error}"
    return any(word in text for word in LOST) or (error.__cause__ is not None and is_lost(error.__cause__))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or ("CUDA error" in str(error) and "out of memory" in str(error))


def memory_left(device: torch.device) -> str:
    """`1.2 GiB of 79.2 GiB are free`; empty where the device does not say."""
    from .units import bytes_text

    try:
        free, total = torch.cuda.mem_get_info(device)
    except (RuntimeError, ValueError, AssertionError):  # AssertionError: torch was built without CUDA
        return ""
    return f"{bytes_text(free)} of {bytes_text(total)} are free"
