"""Which memory a run takes and gives back, storage by storage: when, how much, by which operator, for which module and line.

Allocations are followed as storages, so views and in-place operators cost nothing, and a storage ends when its last owner
lets it go. On fake tensors and on real ones the sequence is the same; a test holds that.
"""

import sys
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # the documented FakeTensor; its module has no public name
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private

from ..group import COLLECTIVE_NAMESPACES
from ..sources import Sources, Spot
from .kernels import MENDED
from .scratch import scratch_blocks

LOSS = "(loss)"  # what runs behind the output head, in the module column
OPTIMIZER = "(optimizer)"
DEVICE = torch.ops.prim.device.default
ADDED = torch.ops.aten.add.Tensor
TRANSPARENT = ("aten", "prims", "prim", "profiler", *COLLECTIVE_NAMESPACES)  # nothing is allocated within an operator of theirs
NO_SEQUENCE = 1 << 62  # nodes that accumulate gradients have the largest number there is

# What a storage is for. `working`, until something says more.
PARAMETERS, BUFFERS, INPUTS = "parameters", "buffers", "inputs"
GRADIENTS, OPTIMIZER_STATE, KV_CACHE = "gradients", "optimizer", "kv cache"
AUTOCAST, ACTIVATIONS, LOGITS = "autocast copies", "saved activations", "logits and loss"
TEMPORARIES, WORKSPACE, UNATTRIBUTED = "temporaries", "workspace", "unattributed"
CATEGORIES = (
    PARAMETERS,
    BUFFERS,
    GRADIENTS,
    OPTIMIZER_STATE,
    AUTOCAST,
    ACTIVATIONS,
    LOGITS,
    KV_CACHE,
    TEMPORARIES,
    WORKSPACE,
    INPUTS,
    UNATTRIBUTED,
)


@dataclass(slots=True)
class Allocation:
    """One storage: its bytes, what made it, and what it turned out to be for. `host`: it stays on the CPU beside a GPU."""

    bytes: int
    op: str
    module: str
    phase: str
    step: int
    category: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    spot: Spot | None = None
    host: bool = False


@dataclass(slots=True)
class StorageTrace:
    """The allocations in order, and the events: `i` where allocation i begins, `~i` where it ends.

    `marks` are (event index, step, phase) where each part of a step begins.
    """

    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[tuple[int, int, str]] = field(default_factory=list)
    opaque: dict[str, int] = field(default_factory=dict)
    ops: int = 0

    def sequence(self) -> list[tuple[str, int, str, str, str]]:
        """The events as comparable values: begin or end, bytes, operator, module, phase.

        Ends with no beginning between them are sorted: autocast drops its copies in the order of their addresses, and the
        allocator is in the same state after them in any order.
        """
        rows: list[tuple[str, int, str, str, str]] = []
        ended: list[tuple[str, int, str, str, str]] = []
        for event in self.events:
            a = self.allocations[event if event >= 0 else ~event]
            row = ("begin" if event >= 0 else "end", a.bytes, a.op, a.module, a.phase)
            if event < 0:
                ended.append(row)
                continue
            rows += sorted(ended)
            ended.clear()
            rows.append(row)
        return rows + sorted(ended)


class StorageTracer(TorchDispatchMode):
    """Records while it is active; `phase(name)` and `step` say where in the training loop it is.

    `scratch`: also what CUDA kernels take inside one operator, from the table in `scratch`.
    """

    def __init__(self, model: nn.Module, *, vocab_rows: Iterable[int] = (), scratch: bool = False, lines: bool = True) -> None:
        super().__init__()
        self.trace = StorageTrace()
        self.step = 0
        self._phase = "setup"
        self._live: dict[int, tuple[int, Any]] = {}  # address of the C++ storage -> (allocation, weak reference)
        self._names = {module: name for name, module in model.named_modules()}
        self._owners = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
        self._stack: list[str] = []
        self._rows = frozenset(vocab_rows)
        self._behind_head = False
        self._scratch = scratch
        self._sources = Sources(model) if lines else None
        # sequence number of each forward operator -> where it ran: the node of the backward pass has the same number
        self._sequence: list[int] = []
        self._places: list[tuple[str, Spot | None]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "StorageTracer":
        self._handles = [
            hooks.register_module_forward_pre_hook(self._enter_module),
            hooks.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def phase(self, name: str) -> None:
        """A part of the step begins: what still lives at the end of a forward pass is saved for the backward pass."""
        if self._phase == "forward":
            self._classify_saved()
        self._phase = name
        if name == "forward":
            self._behind_head = False
        self.trace.marks.append((len(self.trace.events), self.step, name))

    def track(self, tensors: Iterable[Tensor | None], category: str) -> None:
        """These tensors are of this category, whether they are known already or begin to be followed now."""
        for tensor in tensors:
            if tensor is not None:
                self._claim(tensor, category, None)

    def track_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            self._claim(parameter, PARAMETERS, parameter)

    def track_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                self._claim(parameter.grad, GRADIENTS, parameter)

    def track_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Optimizer state; step counters of optimizers that are neither fused nor capturable stay on the CPU."""
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    allocation = self._claim(value, OPTIMIZER_STATE, parameter)
                    if name == "step" and allocation is not None:
                        allocation.host = not on_device

    def _claim(self, tensor: Tensor, category: str, parameter: Tensor | None) -> Allocation | None:
        storage = tensor.untyped_storage()
        module = self._owners.get(id(parameter), "") if parameter is not None else ""
        known = self._live.get(storage._cdata)
        if known is None:
            self._begin(storage, tensor, category, module, None, category)
            return None
        allocation = self.trace.allocations[known[0]]
        allocation.category = category
        allocation.module = module or allocation.module
        return allocation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked as often as anything is computed; the mode below would say the same
        self.trace.ops += 1
        inside = self._phase == "forward" or bool(self._stack)
        if inside:
            place = self._place()
            number = sequence_number()
            if not self._sequence or self._sequence[-1] != number:
                self._sequence.append(number)
                self._places.append(place)
        mended = MENDED.get(func) if isinstance(args[0] if args else None, FakeTensor) else None
        out = (mended or func)(*args, **(kwargs or {}))
        # With gradients on it is a checkpoint that runs its forward pass again.
        adds_gradients = self._phase == "backward" and not inside and func is ADDED and kwargs in ({}, None) and not torch.is_grad_enabled()
        if self._scratch and adds_gradients:
            self._hand_over(args[0], args[1], out)
        fresh = [t for t in _tensors(out) if t.untyped_storage()._cdata not in self._live]
        if not fresh and not self._scratch:
            return out
        if not inside:
            place = self._backward_place()
        name = func._overloadpacket.__name__ if hasattr(func, "_overloadpacket") else str(func)
        for tensor in fresh:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live:
                category = AUTOCAST if name == "_to_copy" and self._is_parameter(args[0]) else ""
                if not category and self._phase == "backward" and self._stack:
                    category = LOGITS if self._is_logits(tensor.shape) else ACTIVATIONS  # recomputed by a checkpoint
                self._begin(storage, tensor, name, place[0], place[1], category)
        if self._scratch:
            for group in scratch_blocks(name, args):
                self._momentary(group, name, place)
        if getattr(func, "namespace", "aten") not in TRANSPARENT:
            self.trace.opaque[f"{func.namespace}.{name}"] = self.trace.opaque.get(f"{func.namespace}.{name}", 0) + 1
        return out

    def _begin(self, storage: Any, tensor: Tensor, op: str, module: str, spot: Spot | None, category: str) -> None:
        size = storage.nbytes()
        if not size:
            return
        trace, address = self.trace, storage._cdata
        number = len(trace.allocations)
        trace.allocations.append(
            Allocation(
                size, op, module, self._phase, self.step, category, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), spot
            )
        )
        trace.events.append(number)
        self._live[address] = (number, weakref.ref(storage, lambda _: self._end(address, number)))

    def _hand_over(self, gradient: Any, other: Any, total: Tensor) -> None:
        """Gradients of one tensor are added up in place on CUDA, where nobody else holds the first's memory, as a view's base
        does (input_buffer.cpp); of fake tensors autograd makes a new one. The sum then lives on in the first one's memory."""
        if not isinstance(other, Tensor) or gradient.shape != other.shape or gradient.dtype != total.dtype or gradient._is_view():
            return
        known = self._live.pop(gradient.untyped_storage()._cdata, None)
        if known is None:
            return
        number, storage, address = known[0], total.untyped_storage(), total.untyped_storage()._cdata
        self._live[address] = (number, weakref.ref(storage, lambda _: self._end(address, number)))

    def _end(self, address: int, number: int) -> None:
        known = self._live.get(address)
        if known is not None and known[0] == number:
            del self._live[address]
            self.trace.events.append(~number)

    def _momentary(self, sizes: tuple[int, ...], op: str, place: tuple[str, Spot | None]) -> None:
        first = len(self.trace.allocations)
        self.trace.allocations += [Allocation(size, op, place[0], self._phase, self.step, WORKSPACE, (), "", place[1]) for size in sizes]
        numbers = range(first, first + len(sizes))
        self.trace.events += [*numbers, *(~number for number in numbers)]

    def _classify_saved(self) -> None:
        for number, _ in self._live.values():
            allocation = self.trace.allocations[number]
            if not allocation.category and allocation.phase == "forward":
                allocation.category = LOGITS if self._is_loss(allocation) else ACTIVATIONS

    def finish(self) -> StorageTrace:
        """The trace, every allocation with its category: what nothing has claimed was temporary."""
        for allocation in self.trace.allocations:
            if not allocation.category:
                allocation.category = self._category(allocation)
        return self.trace

    def _category(self, allocation: Allocation) -> str:
        if self._is_loss(allocation):
            return LOGITS
        if allocation.phase == "optimizer":
            return TEMPORARIES
        if allocation.module or allocation.phase == "forward":
            return TEMPORARIES
        return UNATTRIBUTED

    def _is_loss(self, allocation: Allocation) -> bool:
        if allocation.module == LOSS:
            return True
        return self._is_logits(allocation.shape)

    def _is_logits(self, shape: tuple[int, ...]) -> bool:
        """[.., rows of the vocabulary]; a weight of the head is [rows, hidden]."""
        return len(shape) > 1 and shape[-1] in self._rows

    def _is_parameter(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        known = self._live.get(value.untyped_storage()._cdata)
        return known is not None and self.trace.allocations[known[0]].category == PARAMETERS

    def _place(self) -> tuple[str, Spot | None]:
        if self._phase == "optimizer":
            return OPTIMIZER, None
        module = self._stack[-1] if self._stack else ""
        if self._behind_head and not module:
            module = LOSS
        spot = None
        if self._sources is not None:
            spot = self._sources.spot(sys._getframe(2))
        return module, spot

    def _backward_place(self) -> tuple[str, Spot | None]:
        if self._phase == "optimizer":
            return OPTIMIZER, None
        node = torch._C._current_autograd_node()  # private: without it the backward pass has no module names
        if node is None or not self._sequence:
            return "", None
        number = node._sequence_nr()
        if number >= NO_SEQUENCE:  # a leaf's gradient is taken over: nothing is allocated for a module
            return "", None
        at = bisect_right(self._sequence, number + 1) - 1
        return self._places[max(at, 0)]

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self._stack.append(self._names.get(module, ""))

    def _leave_module(self, module: nn.Module, _: Any, output: Any) -> None:
        self._stack.pop()
        shape = getattr(output, "shape", ())
        if self._phase == "forward" and self._is_logits(shape):
            self._behind_head = True


def sequence_number() -> int:
    """The number that the next node of the autograd graph gets. Private: without it the backward pass has no module names."""
    return torch.autograd._get_sequence_nr()  # type: ignore[attr-defined,no-any-return]


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, tuple | list):
        for item in out:
            yield from _tensors(item)
