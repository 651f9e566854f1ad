"""Tensors on the wrong device, found without a second device: the model is moved to `meta`, and what is not there was put elsewhere.

To the model its parameters and inputs lie on meta, and so does whatever it makes on the device of its inputs; the values
are computed beside it on the CPU, so that `.item()` and branches on a mask have their answer. An op that is given a meta
tensor and one from the CPU is the op that raises on a GPU.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private
from torch.utils._pytree import tree_flatten, tree_map_only

from .composites import in_parts
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
    """The first op of a run that mixes devices when the model is on meta; None when the run ends without one.

    `model` is moved for good: give a copy. Raises what else the run raises.
    """
    watch = _Watch(model)
    watch.move(model)
    with suppress(Exception), torch.no_grad(), watch:  # a to() that does not work on meta is no op that mixes devices
        model.to("meta")  # its tensors are there; a to() or an _apply of its own moves what else it keeps
    watch.stray = None
    handles = [
        handle
        for name, module in model.named_modules()
        for handle in (module.register_forward_pre_hook(watch.enter(name)), module.register_forward_hook(watch.leave, always_call=True))
    ]
    try:
        with torch.no_grad(), _autocast_on_meta(), watch, _Literals(watch):
            _run_watched(run)
    except Mixed:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return watch.stray


@contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """`torch.autocast(x.device.type, enabled=False)`, as it stands around many a rotary embedding, knows no meta device: there
    it is the CPU's."""
    made: Any = torch.autocast.__init__

    def init(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        made(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    torch.autocast.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = made  # type: ignore[method-assign]


def _run_watched(run: Callable[[], Any]) -> Any:
    """The boundary that the search for the running line stops at."""
    return run()


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sources = Sources(model)
        self.made: dict[int, tuple[Spot | None, str]] = {}
        self.values: dict[int, Tensor] = {}  # id of a meta tensor -> what it stands for
        self.alive: list[Tensor] = []  # an id may not be given twice while it is a key
        self.stack: list[str] = [""]
        self.stray: Stray | None = None
        self.attributes = plain_tensors(model)

    def move(self, model: nn.Module) -> None:
        """Put every parameter and buffer of a model on meta, tied ones once."""
        moved: dict[int, Tensor] = {}
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in list(table.items()):
                    if tensor is None:
                        continue
                    if id(tensor) not in moved:
                        meta = self.stand_in(tensor)
                        if isinstance(tensor, nn.Parameter):
                            meta = nn.Parameter(meta, requires_grad=False)
                            self.values[id(meta)] = tensor.detach()
                        self.alive += [tensor, meta]
                        moved[id(tensor)] = meta
                    table[name] = moved[id(tensor)]  # type: ignore[assignment]

    def enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.stack.append(name)

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (parts := in_parts(self, func, args, kwargs)) is not NotImplemented:
            return parts
        op = func.__name__.partition(".")[0]
        flat = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
        there, elsewhere = [t for t in flat if t.is_meta], [t for t in flat if not t.is_meta]
        if there and elsewhere and op not in MOVES:
            # Indices may come from the CPU; the table that they index may not.
            read = flat[:1] if op in INDEXING else elsewhere
            wrong = [t for t in read if not t.is_meta and t.ndim]
            if wrong:
                self._report(op, wrong[0])
                raise Mixed
        asked = kwargs.get("device")
        on_meta = bool(there) if asked is None else torch.device(asked).type == "meta"
        if asked is not None and on_meta:
            kwargs["device"] = "cpu"
        output = on_the_cpu(func, *tree_map_only(Tensor, self._value, (args, kwargs)))
        if on_meta:
            known = {id(self._value(t)): t for t in there}
            return tree_map_only(Tensor, lambda t: known.get(id(t)) if id(t) in known else self.stand_in(t), output)
        self._remember(op, elsewhere, output)
        return output

    def stand_in(self, tensor: Tensor) -> Tensor:
        """A meta tensor that stands for this one; ops on it are computed on the values, so that `.item()` has an answer."""
        with torch.no_grad():
            value = tensor.detach()
            meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        self.values[id(meta)] = value
        self.alive.append(meta)
        return meta

    def _value(self, tensor: Tensor) -> Tensor:
        return self.values[id(tensor)] if tensor.is_meta else tensor

    def _remember(self, op: str, inputs: list[Tensor], output: Any) -> None:
        """Where a tensor on the CPU was first made: by a factory here, or from others that were, or out of an attribute."""
        kept = next((name for t in inputs if (name := self.attributes.get(t.untyped_storage().data_ptr())) is not None), None)
        origin = next((self.made[id(t)] for t in inputs if id(t) in self.made), None)
        if origin is None and (not inputs or op.startswith("lift_fresh")):  # torch.tensor(...) arrives as lift_fresh
            origin = (self.sources.spot(sys._getframe(2), _run_watched.__code__), op)
        for tensor in [item for item in tree_flatten(output)[0] if isinstance(item, Tensor)]:
            if kept is not None and tensor.numel():
                self.attributes.setdefault(tensor.untyped_storage().data_ptr(), kept)
                self.alive.append(tensor)
            if origin is not None and id(tensor) not in self.made:
                self.made[id(tensor)] = origin
                self.alive.append(tensor)

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


def on_the_cpu(func: Any, args: Any, kwargs: Any) -> Any:
    """An op on the values; where the CPU has no kernel for integers that a GPU has (histc, in routers), in float64."""
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        whole = next((t for t in tree_flatten(args)[0] if isinstance(t, Tensor) and not t.is_floating_point()), None)
        if whole is None:
            raise  # no kernel for another reason: what the probe cannot ask it must not answer
        output = func(*tree_map_only(Tensor, Tensor.double, args), **kwargs)
        return tree_map_only(Tensor, lambda t: t.to(whole.dtype), output)


class _Literals(TorchFunctionMode):
    """`torch.tensor(data, device=meta)` drops its data before any op runs: keep it."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and device is not None and torch.device(device).type == "meta":
            if args and isinstance(args[0], Tensor):
                return args[0].to(device=device, dtype=kwargs.get("dtype"))
            return self.watch.stand_in(func(*args, **(kwargs | {"device": "cpu"})))
        return func(*args, **kwargs)


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
