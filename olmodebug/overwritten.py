"""A value that backward needs and that an op in place wrote over: which line had kept it, and which line wrote."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private

from .sources import Sources, Spot
from .tracing.tracer import argument_of, written_arguments


@dataclass(slots=True, kw_only=True)
class Overwritten:
    """The op that wrote, where, and where the op ran that had kept the tensor for its backward."""

    op: str
    written: Spot
    kept: Spot | None
    shape: tuple[int, ...]


def overwritten(model: nn.Module, run: Callable[[], Any]) -> Overwritten | None:
    """The first write into a tensor that an earlier op of a forward keeps for its backward; None where nothing is written so."""
    writes = _Writes(Sources(model))
    kept: list[tuple[Tensor, int, int, Spot | None]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append((tensor, tensor._version, len(writes.seen), writes.sources.spot(sys._getframe(1), _run.__code__)))
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), writes:
        _run(run)
    for tensor, version, before, spot in kept:
        if tensor._version == version:
            continue
        for op, storage, written in writes.seen[before:]:
            if storage == tensor.untyped_storage().data_ptr() and written is not None:
                return Overwritten(op=op, written=written, kept=spot, shape=tuple(tensor.shape))
    return None


def _run(run: Callable[[], Any]) -> Any:
    """The boundary that the search for the running line stops at."""
    return run()


class _Writes(TorchDispatchMode):
    """Notes every op that writes into arguments of its, an `out=` among them: its name, the storage and the line."""

    def __init__(self, sources: Sources) -> None:
        super().__init__()
        self.sources = sources
        self.seen: list[tuple[str, int, Spot | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for name in written_arguments(func):
            target = argument_of(func, name, args, kwargs)
            if isinstance(target, Tensor):
                place = target.untyped_storage().data_ptr()
                self.seen.append((func.__name__.partition(".")[0], place, self.sources.spot(sys._getframe(1), _run.__code__)))
        return func(*args, **kwargs)
