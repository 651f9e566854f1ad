"""What a model did: every aten op with its module, function and line, and every module call, in order.

`record` runs a callable under module hooks and a dispatch mode and gives back a `Recording`. By default only shapes,
dtypes and places are kept; `keep` also keeps copies of the tensors, of every op or of those that it picks, for the
relations that compare them. `on_event` sees the live tensors of every op as it runs and nothing is kept, so that a run
of thousands of ops and gigabytes of activations can be looked at as it goes by; `digests` tell two runs apart bit for
bit without any tensor. Tracing changes no bit of the result, forward or backward, and leaves no hook behind, also after
an exception.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private
from torch.utils._pytree import tree_flatten, tree_map_only

from ..composites import in_parts
from ..records import Event, ModuleCall, TensorInfo
from ..sources import Sources, Spot
from .copies import Copies, info, on_host
from .places import Places
from .recording import Kept, KeptCall, Moment, Recording

__all__ = ["Kept", "KeptCall", "Moment", "Recording", "record"]

Keep = bool | Callable[[Event], bool]
Before = Callable[[Event, Any, Any, Mapping[str, Any]], None]


def record(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    keep: Keep = False,
    statistics: bool = False,
    digests: bool = False,
    on_event: Callable[[Moment], None] | None = None,
    on_call: Callable[[ModuleCall, list[Tensor]], None] | None = None,
    before: Before | None = None,
    log: bool = True,
    sources: Sources | None = None,
    replace: Callable[[int, list[Tensor]], None] | None = None,
    catch: bool = False,
) -> Recording:
    """Run `run()` with every op and module call of `model` recorded.

    `keep` keeps copies of the tensors of every op, or of those for which `keep(event)` holds; it is asked before the op
    runs, when the event has no outputs yet, and copies at module boundaries are made with `keep=True` only. `statistics`
    adds finiteness and the largest magnitude of every output, `digests` a checksum of its bits. `on_event` is called
    after every op with its live tensors, `on_call` after every module call with its outputs, `before(event, func, args, kwargs)` before every op; with `log=False` they are
    all that sees the events, and the recording stays empty. `replace(index, outputs)` may write into the outputs of an
    op before anything reads them. With `catch`, an exception is kept in the recording, not raised.
    """
    tracer = _Tracer(model, sources or Sources(model), keep, statistics, digests, on_event, on_call, before, log, replace)
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
    supports_higher_order_operators = True  # flex_attention and its like come as one event

    def __init__(
        self,
        model: nn.Module,
        sources: Sources,
        keep: Keep,
        statistics: bool,
        digests: bool,
        on_event: Callable[[Moment], None] | None,
        on_call: Callable[[ModuleCall, list[Tensor]], None] | None,
        before: Before | None,
        log: bool,
        replace: Callable[[int, list[Tensor]], None] | None,
    ) -> None:
        super().__init__()
        self.model, self.replace = model, replace
        self.statistics, self.digests, self.log = statistics, digests, log
        self.on_event, self.on_call, self.before = on_event, on_call, before
        self.keep_all, self.picks = keep is True, keep if callable(keep) else None
        self.recording = Recording()
        self.storages = self.recording.storages
        self.copies = Copies(self.storages, model.parameters())
        self.names: dict[int, list[str]] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.names.setdefault(self.storages.number(tensor), []).append(name)
        self.by_identity = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self.count = 0
        self.stack: list[str] = [""]
        self.open: list[tuple[int, list[TensorInfo], list[Tensor], Spot | None]] = []
        self.places = Places(model, sources, _run_traced.__code__)
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
            spot = self.places.spot(sys._getframe(1)) if self.keep_all else None
            copies = self._copies(tensors) if self.keep_all else []
            self.open.append((self.count, [info(t, self.storages) for t in tensors], copies, spot))

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if len(self.stack) < 2 or self.stack[-1] != name:
                return  # a hook of the subject raised before ours could enter
            self.stack.pop()
            first, inputs, copies, spot = self.open.pop()
            tensors = _tensors(output)
            call = ModuleCall(
                module=name,
                kind=type(module).__name__,
                inputs=tuple(inputs),
                outputs=tuple(info(t, self.storages) for t in tensors),
                first_event=first,
                last_event=self.count - 1,
                depth=len(self.stack) - 1,
            )
            if self.log:
                self.recording.calls.append(call)
            if self.keep_all:
                kept = KeptCall(name, call.kind, spot, copies, self._copies(tensors), first, self.count - 1)
                self.recording.kept_calls.append(kept)
            if self.on_call is not None:
                with self._unseen():
                    self.on_call(call, tensors)

        return hook

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """What runs inside is no op of the subject."""
        self.copying = True
        try:
            yield
        finally:
            self.copying = False

    def _copies(self, tensors: list[Tensor]) -> list[Tensor]:
        with self._unseen():
            return [self.copies.of(t) for t in tensors]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.copying:
            return func(*args, **kwargs)
        if (parts := in_parts(self, func, args, kwargs)) is not NotImplemented:
            return parts
        recording, storages = self.recording, self.storages
        tensors = _operands(args, kwargs)
        op = func.__name__.partition(".")[0] if hasattr(func, "__name__") else str(func)
        where, spot, phase = self.places.of(op, self.stack[-1])
        inputs = tuple([info(t, storages) for t in tensors])
        event = Event(index=self.count, op=op, where=where, phase=phase, inputs=inputs, parameters=self._parameters(tensors, inputs))
        keep = self.keep_all or (self.picks is not None and self.picks(event))
        writes = written_arguments(func)
        written = [t for name in writes for t in _tensors(argument_of(func, name, args, kwargs))] if writes else []
        arguments: dict[str, Any] = {}
        if keep:
            arguments = _bind(func, args, kwargs, self.copies.of)
        elif self.on_event is not None:
            before = {id(t): t.detach().clone() for t in written}
            arguments = _bind(func, args, kwargs, lambda t: before.get(id(t), t))
        for tensor in written:
            self.copies.before_write(tensor)
        recording.failed, recording.failed_arguments = event, arguments if keep else None
        if self.before is not None:
            self.before(event, func, args, kwargs)
        try:
            output = func(*args, **kwargs)
        except Exception:
            if not keep:
                recording.failed_arguments = _bind(func, args, kwargs, on_host)
            raise
        recording.failed = recording.failed_arguments = None
        for tensor in written:
            storages.note_write(tensor)
        results = [output] if isinstance(output, Tensor) else _tensors(output)
        if self.replace is not None:
            self.replace(self.count, results)
        outputs = tuple([info(t, storages, statistics=self.statistics, digests=self.digests) for t in results])
        event = Event(index=self.count, op=op, where=where, phase=phase, inputs=inputs, outputs=outputs, parameters=event.parameters)
        self.count += 1
        if self.log:
            recording.events.append(event)
            recording.spots.append(spot)
            if keep:
                recording.kept.append(Kept(arguments, _tensors(arguments), [self.copies.of(t) for t in results]))
            elif self.picks is not None:
                recording.kept.append(Kept({}, [], []))
        if self.on_event is not None:
            self.on_event(Moment(event, spot, arguments, _tensors(arguments), results))
        return output

    def _parameters(self, tensors: list[Tensor], inputs: tuple[TensorInfo, ...]) -> tuple[str, ...]:
        """Names of what is read: by identity, and through views where one parameter alone owns the storage."""
        found = []
        for tensor, known in zip(tensors, inputs, strict=True):
            names = self.names.get(known.storage)
            if names is not None:
                name = self.by_identity.get(id(tensor)) or (names[0] if len(names) == 1 else None)
                if name is not None and name not in found:
                    found.append(name)
        return tuple(found)


@cache
def written_arguments(func: Any) -> tuple[str, ...]:
    """The arguments that an op writes into, by its schema."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    return tuple(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)


def argument_of(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    if name in kwargs:
        return kwargs[name]
    for spec, value in zip(func._schema.arguments, args, strict=False):
        if spec.name == name:
            return value
    return None


def _bind(func: Any, args: Any, kwargs: Any, copy: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The arguments by their schema's names, each tensor as `copy` gives it."""
    schema = getattr(func, "_schema", None)
    names = [spec.name for spec in schema.arguments] if schema is not None else [str(i) for i in range(len(args))]
    bound = dict(zip(names, args, strict=False)) | dict(kwargs)
    return {name: _copied(value, copy) for name, value in bound.items()}


def _copied(value: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return copy(value)
    if type(value) in (list, tuple):
        return type(value)(_copied(item, copy) for item in value)
    return tree_map_only(Tensor, copy, value) if isinstance(value, list | tuple | dict) else value


def _operands(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among an op's arguments: an aten op takes them bare or in lists, a higher-order one in anything."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple | dict):
            found += [item for item in tree_flatten(value)[0] if isinstance(item, Tensor)]
    return found


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
