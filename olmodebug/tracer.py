"""What a model did: every aten op with its module, function and line, and every module call, in order.

`record` runs a callable under module hooks and a dispatch mode and gives back a `Recording`. By default only shapes,
dtypes and places are kept; `keep=True` also keeps copies of the tensors, for the relations that compare them.
Tracing changes no bit of the result, forward or backward, and leaves no hook behind, also after an exception.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private
from torch.utils._pytree import tree_flatten, tree_map_only

from .records import Event, ModuleCall, TensorInfo, Where
from .sources import Sources, Spot, short_path


@dataclass(slots=True)
class Kept:
    """Copies of what one op read and wrote: its arguments by name (tensors cloned before the op ran) and its outputs."""

    arguments: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass(slots=True)
class KeptCall:
    """Copies of the tensors that went into and came out of one module call."""

    module: str
    kind: str
    spot: Spot | None
    inputs: list[Tensor]
    outputs: list[Tensor]
    first_event: int
    last_event: int


@dataclass(slots=True)
class Recording:
    """One traced run. `kept` and `kept_calls` are empty unless tensors were asked for.

    `result` is what the run returned, `error` what it raised; `failed` is the event that was running then.
    """

    events: list[Event] = field(default_factory=list)
    spots: list[Spot | None] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    kept_calls: list[KeptCall] = field(default_factory=list)
    result: Any = None
    error: BaseException | None = None
    failed: Event | None = None
    failed_arguments: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def __repr__(self) -> str:
        return f"<Recording of {len(self.events)} ops in {len(self.calls)} module calls>"

    def dtypes(self) -> set[str]:
        """Every floating dtype that an op wrote."""
        return {info.dtype for event in self.events for info in event.outputs if "float" in info.dtype}


def record(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    keep: bool = False,
    statistics: bool = False,
    sources: Sources | None = None,
    replace: Mapping[int, list[Tensor]] | Callable[[int, list[Tensor]], None] | None = None,
    catch: bool = False,
) -> Recording:
    """Run `run()` with every op and module call of `model` recorded.

    `statistics` adds finiteness and the largest magnitude of every output. `replace(index, outputs)` may write into the
    outputs of an op before anything reads them. With `catch`, an exception is kept in the recording, not raised.
    """
    tracer = _Tracer(model, keep=keep, statistics=statistics, sources=sources or Sources(model), replace=replace)
    handles = tracer.attach()
    try:
        with tracer:
            tracer.recording.result = _run_traced(run)
    except Exception as error:
        if not catch:
            raise
        tracer.recording.error = error
    finally:
        for handle in handles:
            handle.remove()
    return tracer.recording


def _run_traced(run: Callable[[], Any]) -> Any:
    """The boundary that the search for the running line stops at."""
    return run()


class _Tracer(TorchDispatchMode):
    def __init__(self, model: nn.Module, *, keep: bool, statistics: bool, sources: Sources, replace: Any) -> None:
        super().__init__()
        self.model, self.keep, self.statistics, self.sources, self.replace = model, keep, statistics, sources, replace
        self.recording = Recording()
        self.parameters = {id(p): name for name, p in [*model.named_parameters(), *model.named_buffers()]}
        self.stack: list[str] = [""]
        self.open: list[tuple[int, list[TensorInfo], list[Tensor], Spot | None]] = []
        self.forward_place: dict[int, tuple[Where, Spot | None]] = {}
        self.copying = False  # our own copies pass through the mode too, and are no ops of the subject

    def attach(self) -> list[Any]:
        handles: list[Any] = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name), always_call=True))
        return handles

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append(name)
            tensors = _tensors((args, kwargs))
            spot = self.sources.spot(sys._getframe(1), _run_traced.__code__) if self.keep else None
            copies = self._copies(tensors) if self.keep else []
            self.open.append((len(self.recording.events), [_info(t) for t in tensors], copies, spot))

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()
            first, inputs, copies, spot = self.open.pop()
            tensors = _tensors(output)
            self.recording.calls.append(
                ModuleCall(
                    module=name,
                    kind=type(module).__name__,
                    inputs=tuple(inputs),
                    outputs=tuple(_info(t) for t in tensors),
                    first_event=first,
                    last_event=len(self.recording.events) - 1,
                    depth=len(self.stack) - 1,
                )
            )
            if self.keep:
                outputs = self._copies(tensors)
                last = len(self.recording.events) - 1
                self.recording.kept_calls.append(KeptCall(name, type(module).__name__, spot, copies, outputs, first, last))

        return hook

    def _copies(self, tensors: list[Tensor]) -> list[Tensor]:
        self.copying = True
        try:
            return [t.detach().clone() for t in tensors]
        finally:
            self.copying = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.copying:
            return func(*args, **kwargs)
        recording = self.recording
        index = len(recording.events)
        flat, _ = tree_flatten((args, kwargs))
        tensors = [item for item in flat if isinstance(item, Tensor)]
        where, spot, phase = self._place(func)
        inputs = tuple(_info(t) for t in tensors)
        names = tuple(self.parameters[id(t)] for t in tensors if id(t) in self.parameters)
        arguments: dict[str, Any] = {}
        copies: list[Tensor] = []
        if self.keep:
            arguments = _bind(func, args, kwargs)
            copies = _tensors(arguments)
        recording.failed = Event(index=index, op=where.op or "", where=where, phase=phase, inputs=inputs, parameters=names)
        recording.failed_arguments = arguments if self.keep else None
        try:
            output = func(*args, **kwargs)
        except Exception:
            if not self.keep:
                recording.failed_arguments = _bind(func, args, kwargs)
            raise
        recording.failed = recording.failed_arguments = None
        results = [output] if isinstance(output, Tensor) else _tensors(output)
        if self.replace is not None:
            self.replace(index, results)
        outputs = tuple(_info(t, self.statistics) for t in results)
        recording.events.append(
            Event(index=index, op=where.op or "", where=where, phase=phase, inputs=inputs, outputs=outputs, parameters=names)
        )
        recording.spots.append(spot)
        if self.keep:
            recording.kept.append(Kept(arguments, copies, [t.detach().clone() for t in results]))
        return output

    def _place(self, func: Any) -> tuple[Where, Spot | None, str]:
        op = func.__name__.partition(".")[0] if hasattr(func, "__name__") else str(func)
        # The node whose backward is running, and the counter that numbers nodes as they are made, have no public
        # accessor; without them backward ops would lose their module and line, nothing else.
        node = torch._C._current_autograd_node()
        if node is not None:
            place = self.forward_place.get(node._sequence_nr())
            module = place[0].module if place else ""
            spot = place[1] if place else None
            return _where(module, spot, op), spot, "backward"
        spot = self.sources.spot(sys._getframe(2), _run_traced.__code__)
        where = _where(self.stack[-1], spot, op)
        if torch.is_grad_enabled():
            self.forward_place.setdefault(torch.autograd._get_sequence_nr() - 1, (where, spot))
        return where, spot, "forward"


def _where(module: str, spot: Spot | None, op: str) -> Where:
    if spot is None:
        return Where(module=module, op=op)
    return Where(module=module, function=spot.function, file=short_path(spot.file), line=spot.line, op=op)


def _info(tensor: Tensor, statistics: bool = False) -> TensorInfo:
    finite: bool | None = None
    absmax: float | None = None
    if statistics and tensor.dtype.is_floating_point and tensor.numel():
        absmax = float(tensor.detach().abs().max())
        finite = absmax == absmax and absmax != float("inf")
    strided = tensor.layout == torch.strided
    return TensorInfo(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype)[6:],
        device=str(tensor.device),
        strides=tensor.stride() if strided else (),
        storage=_storage(tensor),
        finite=finite,
        absmax=absmax,
    )


def _storage(tensor: Tensor) -> int:
    """A number that two views of one storage share; 0 where a tensor has no memory of its own."""
    if tensor.device.type == "meta" or tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return 0
    return tensor.untyped_storage().data_ptr()


def _bind(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments by their schema's names, tensors copied: the op may write into them."""
    bound = {spec.name: value for spec, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    return tree_map_only(Tensor, lambda t: t.detach().clone(), bound)  # type: ignore[no-any-return]


def _tensors(tree: Any) -> list[Tensor]:
    """Every tensor in nested containers; output objects with a `__dict__` or mapping are searched one level deep."""
    if isinstance(tree, Tensor):
        return [tree]
    found = []
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += [item for item in leaf.values() if isinstance(item, Tensor)]
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module | type):
            found += [item for item in vars(leaf).values() if isinstance(item, Tensor)]
    return found
