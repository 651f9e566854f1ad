"""What was live when memory ran out: every tensor that the ops of this run made and that still stands, by category and line.

Each result's storage is kept as a weak reference with the line that made it, so nothing lives longer than it would. Memory
that no op made here (of a compiled region, of a library) is not known and shows as the difference to the allocator's number.
"""

import gc
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..report import Finding, Scalar
from ..sources import Spot, short_path
from ..units import bytes_text
from . import place
from .excerpts import lines_at
from .part import Part

FITS = "memory.fits"

CPU_TEXT = re.compile(r"you tried to allocate (\d+) bytes")
CUDA_TEXT = re.compile(r"Tried to allocate ([\d.]+) (KiB|MiB|GiB|TiB)")
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

SMALLEST_BYTES = 4096  # of a storage that is followed: masks and scalars do not fill a memory
PRUNED_EVERY = 4096  # storages of a script that takes no optimizer steps; the dead ones among them are forgotten


@dataclass(slots=True)
class _Made:
    """A storage that an op made: a weak reference, its size, and the running code."""

    reference: StorageWeakRef
    size: int
    code: Any
    instruction: int
    module: nn.Module | None
    device: str


class Memory(Part):
    """Follows the storages of one process."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.made: dict[int, _Made] = {}
        self.limit = PRUNED_EVERY
        self.failed: dict[str, Any] | None = None

    def listen(self) -> None:
        self.watch.observers.append(self.observe)
        # a weak reference keeps the small header of a dead storage on the heap: left there from step to step, headers lie between
        # the blocks of the allocator, which then takes its memory anew from the system (measured: twice the time of a step)
        self.watch.events.on("stepped", lambda optimizer, spot: self._forget_dead())

    def _forget_dead(self) -> None:
        self.made = {k: m for k, m in self.made.items() if not m.reference.expired()}
        self.limit = 2 * len(self.made) + PRUNED_EVERY

    def observe(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Remember who made a storage; a view or an in-place op makes none."""
        if type(output) is Tensor:
            if not args or output is not args[0]:
                self._follow(output)
        elif type(output) in (tuple, list):
            for item in output:
                if type(item) is Tensor:
                    self._follow(item)

    def _follow(self, tensor: Tensor) -> None:
        if tensor.numel() * tensor.itemsize < SMALLEST_BYTES or tensor.device.type == "meta" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata  # private: the storage's identity; without it views would be counted as memory of their own
        known = self.made.get(key)
        if known is not None and not known.reference.expired():
            return
        code, instruction, module = _running(sys._getframe(3))
        self.made[key] = _Made(StorageWeakRef(storage), storage.nbytes(), code, instruction, module, str(tensor.device))
        if len(self.made) > self.limit:
            self._forget_dead()

    def origin(self, tensor: Tensor) -> Spot | None:
        """The line that made a tensor's memory."""
        if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
            return None
        made = self.made.get(tensor.untyped_storage()._cdata)
        return None if made is None or made.code is None else _spot(made)

    def ran_out(self, error: BaseException) -> Finding | None:
        """The finding on an allocation that failed, made while everything that was live still stands; None for another error."""
        requested = requested_bytes(error)
        if requested is None:
            return None
        at = place.here(sys._getframe(3))
        live, device = self._live(error)
        numbers = device_numbers(device)
        holders = _grouped(live, self.watch)
        total = sum(size for _, size, _ in live)
        fits = _fits(requested, holders, numbers, at)
        body: dict[str, Any] = {
            "device": device,
            "requested_bytes": requested,
            "live_bytes": total,
            **numbers,
            "holders": holders,
            "fits": fits,
        }
        self.failed = body
        self.watch.journal.tell("memory", memory=body)
        finding = _explain(at, requested, total, holders, numbers, fits, error)
        self.watch.find(finding)
        return finding

    def _live(self, error: BaseException) -> tuple[list[tuple[str, int, Any]], str]:
        """(category, bytes, who made it) of every storage that is alive on the device that ran out."""
        device = "cpu" if CPU_TEXT.search(str(error)) else _cuda_device()
        known = _categories()
        found: list[tuple[str, int, Any]] = [(k.category, k.size, (k.name, None)) for k in known.values() if k.device == device]
        for key, made in self.made.items():
            if not made.reference.expired() and made.device == device and key not in known:
                found.append(("activation", made.size, ("", made)))
        return found, device

    def finish(self) -> None:
        self.made.clear()


def _explain(at: Any, requested: int, total: int, holders: Any, numbers: Any, fits: list[str], error: BaseException) -> Finding:
    """What ran out, who holds the most, and whether it was need or fragmentation."""
    where = at.at()
    evidence: dict[str, Scalar] = {"requested_bytes": requested, "live_bytes": total}
    evidence |= {name: value for name, value in numbers.items() if value is not None}
    if at.inside_text:
        evidence["inside"] = at.inside_text
    largest = holders[0] if holders else None
    cause = None
    free = numbers.get("largest_free_bytes")
    reserved, allocated = numbers.get("reserved_bytes"), numbers.get("allocated_bytes")
    if reserved is not None and allocated is not None and reserved - allocated >= requested:
        cause = f"fragmentation: {bytes_text(reserved - allocated)} are reserved and free, but in pieces of at most {bytes_text(free or 0)}"
    elif largest is not None:
        cause = (
            f"the largest holder is {largest['category']} made at {largest['place'] or 'an unknown line'}: {bytes_text(largest['bytes'])}"
        )
    return Finding(
        probe=FITS,
        severity="error",
        message=f"memory ran out: {bytes_text(requested)} were asked for while {bytes_text(total)} of tensors were live",
        cause=cause,
        fix="; ".join(fits) or None,
        where=where,
        source=lines_at(where),
        evidence=evidence,
        raised=str(error).strip().partition("\n")[0][:300],
    )


def requested_bytes(error: BaseException) -> int | None:
    """The size that an allocator refused, from its own words; None for another error."""
    text = str(error)
    if (found := CPU_TEXT.search(text)) is not None:
        return int(found[1])
    if (found := CUDA_TEXT.search(text)) is not None:
        return int(float(found[1]) * UNITS[found[2]])
    return None


def device_numbers(device: str) -> dict[str, int | None]:
    """What the allocator and the device say of themselves; of the CPU, the limit of this process."""
    if device == "cpu":
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        total = None if soft == resource.RLIM_INFINITY else soft
        return {"allocated_bytes": None, "reserved_bytes": None, "total_bytes": total, "largest_free_bytes": None}
    free, total = torch.cuda.mem_get_info(device)
    blocks = [
        block["size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == torch.device(device).index
        for block in segment["blocks"]
        if block["state"] == "inactive"
    ]
    return {
        "allocated_bytes": torch.cuda.memory_allocated(device),
        "reserved_bytes": torch.cuda.memory_reserved(device),
        "total_bytes": total,
        "largest_free_bytes": max([free, *blocks]),
    }


def _cuda_device() -> str:
    return f"cuda:{torch.cuda.current_device()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """A storage that belongs to a model or an optimizer."""

    category: str
    name: str
    size: int
    device: str


def _categories() -> dict[int, _Known]:
    """The storages of weights, their gradients, buffers and optimizer state."""
    found: dict[int, _Known] = {}

    def add(tensor: Any, category: str, name: str = "", *, stronger: bool = False) -> None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if stronger or storage._cdata not in found:
            found[storage._cdata] = _Known(category=category, name=name, size=storage.nbytes(), device=str(tensor.device))

    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, torch.optim.Optimizer):
            for state in thing.state.values():
                for value in state.values() if isinstance(state, dict) else ():
                    add(value, "optimizer state", kind.__name__, stronger=True)
        elif kind is nn.Parameter:
            add(thing, "parameter")
            add(thing.grad, "gradient", stronger=True)
        elif issubclass(kind, nn.Module):
            for buffer in thing._buffers.values():
                add(buffer, "buffer")
    return found


def _grouped(live: list[tuple[str, int, Any]], watch: Any) -> list[dict[str, Any]]:
    """By category and place, largest first."""
    groups: dict[tuple[str, str], list[int]] = {}
    for category, size, (name, made) in live:
        at = name
        if category == "activation" and made is not None and made.code is not None:
            spot = _spot(made)
            module = watch.name_of_module(made.module) if made.module is not None else ""
            at = f"{short_path(spot.file)}:{spot.line} in {spot.function}" + (f" ({_folded(module)})" if module else "")
        groups.setdefault((category, at), []).append(size)
    rows = [{"category": c, "place": p, "bytes": sum(sizes), "count": len(sizes)} for (c, p), sizes in groups.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def _folded(module: str) -> str:
    """`layers.3.mlp` as `layers.N.mlp`: the same line in every layer is one holder."""
    return re.sub(r"\.\d+(?=\.|$)", ".N", module)


def _fits(requested: int, holders: list[dict[str, Any]], numbers: dict[str, int | None], at: Any) -> list[str]:
    """What would have made it fit, computed from the sizes; nothing where the sizes do not say."""
    by_category: dict[str, int] = {}
    for holder in holders:
        by_category[holder["category"]] = by_category.get(holder["category"], 0) + holder["bytes"]
    activations = by_category.get("activation", 0)
    fixed = sum(by_category.values()) - activations
    total = numbers.get("total_bytes")
    said = []
    if total is not None and activations + requested > 0 and fixed < total:
        share = (total - fixed) / (activations + requested)
        if share < 1:
            said.append(f"a batch of at most {share:.0%} of this one: {bytes_text(activations + requested)} grow with it")
    largest = holders[0] if holders else None
    if largest is not None and largest["category"] == "activation" and largest["bytes"] >= requested:
        said.append(f"not keeping what {largest['place'] or 'an unknown line'} makes frees {bytes_text(largest['bytes'])}")
    state = by_category.get("optimizer state", 0)
    if state >= requested:
        said.append(f"an optimizer that keeps less state (8-bit, or no second moment): its state holds {bytes_text(state)}")
    return said


def _running(frame: Any) -> tuple[Any, int, nn.Module | None]:
    """(code, instruction, innermost module) of the user's running line."""
    module = near = None
    ranks = place._RANKS
    while frame is not None:
        code = frame.f_code
        known = ranks.get(code.co_filename)
        if known is None:
            known = place.rank(code.co_filename)
        if code.co_name == place.CALL and module is None:
            module = frame.f_locals.get("self")
        if known == place.OWN:
            return code, frame.f_lasti, module
        if known == place.NEAR and near is None:
            near = (code, frame.f_lasti)
        frame = frame.f_back
    return (*near, module) if near is not None else (None, 0, module)


def _spot(made: _Made) -> Spot:
    positions = list(made.code.co_positions())
    line = positions[made.instruction // 2][0] or made.code.co_firstlineno
    return Spot(made.code, made.instruction, line)
