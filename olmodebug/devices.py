"""Tensors on the wrong device, found without a second device: the model runs on `meta`, and what is not there was put elsewhere.

Meta tensors have shapes and no values, so whatever a forward makes on the device of its inputs is on meta too. An op that
is given a meta tensor and one from the CPU is the op that raises on a GPU.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private
from torch.utils._pytree import tree_flatten

from .sources import Sources, Spot

# Ops that move values between devices, or that torch lets read indices from the CPU.
MOVES = ("copy_", "_to_copy", "to", "set_", "_copy_from", "detach", "detach_", "alias")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class Mixed(Exception):
    """An op was given tensors of two devices."""


@dataclass(slots=True, kw_only=True)
class Stray:
    """An op that mixes devices: where it runs, the tensor that is elsewhere, where that was made, and its attribute if it is one."""

    op: str
    used: Spot | None
    made: Spot | None
    maker: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    module: str
    attribute: str | None = None


def first_stray(model: nn.Module, run: Callable[[], Any]) -> Stray | None:
    """The first op of a run on meta that mixes devices; None when the run ends without one. Raises what else the run raises."""
    watch = _Watch(model)
    handles = [
        handle
        for name, module in model.named_modules()
        for handle in (module.register_forward_pre_hook(watch.enter(name)), module.register_forward_hook(watch.leave, always_call=True))
    ]
    try:
        with torch.no_grad(), watch:
            _run_watched(run)
    except Mixed:
        pass
    except Exception:
        if watch.stray is None:
            raise
    finally:
        for handle in handles:
            handle.remove()
    return watch.stray


def _run_watched(run: Callable[[], Any]) -> Any:
    """The boundary that the search for the running line stops at."""
    return run()


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sources = Sources(model)
        self.made: dict[int, tuple[Spot | None, str]] = {}
        self.alive: list[Tensor] = []  # an id may not be given twice while it is a key
        self.stack: list[str] = [""]
        self.stray: Stray | None = None
        self.attributes = plain_tensors(model)

    def enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.stack.append(name)

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = func.__name__.partition(".")[0]
        flat = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
        elsewhere = [t for t in flat if t.device.type != "meta"]
        if elsewhere and len(elsewhere) < len(flat) and op not in MOVES:
            # Indices may come from the CPU; the table that they index may not.
            read = flat[:1] if op in INDEXING else elsewhere
            wrong = [t for t in read if t.device.type != "meta" and t.ndim]
            if wrong:
                self._report(op, wrong[0])
                raise Mixed
        output = func(*args, **kwargs)
        spot = None
        for tensor in [item for item in tree_flatten(output)[0] if isinstance(item, Tensor)]:
            if tensor.device.type == "meta" or id(tensor) in self.made:
                continue
            origin = next((self.made[id(t)] for t in elsewhere if id(t) in self.made), None)
            if origin is None and not elsewhere:
                spot = spot or self.sources.spot(sys._getframe(1), _run_watched.__code__)
                origin = (spot, op)
            if origin is not None:
                self.made[id(tensor)] = origin
                self.alive.append(tensor)
        return output

    def _report(self, op: str, tensor: Tensor) -> None:
        made, maker = self.made.get(id(tensor), (None, ""))
        used = self.sources.spot(sys._getframe(2), _run_watched.__code__)
        self.stray = Stray(
            op=op,
            used=used,
            made=made,
            maker=maker,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            device=tensor.device.type,
            module=self.stack[-1],
            attribute=self.attributes.get(tensor.untyped_storage().data_ptr()),
        )


def plain_tensors(model: nn.Module) -> dict[int, str]:
    """storage -> path of every tensor that a module holds as a plain attribute, also one level deep in a dict or list."""
    found = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            inner = list(value.values()) if isinstance(value, Mapping) else list(value) if isinstance(value, list | tuple) else [value]
            for item in inner:
                if isinstance(item, Tensor) and item.device.type != "meta":
                    found[item.untyped_storage().data_ptr()] = f"{path}.{key}" if path else key
    return found
