"""What a trace remembers of tensors: which of them share memory, and copies that cost no more than they must.

A tensor that nobody wrote since its last copy is not copied again, and a parameter is not copied at all until an op is
about to write into it, so that keeping every tensor of a run costs about its activations, once.
"""

import zlib
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import torch
from torch import Tensor, nn

from ..process import HOST
from ..records import TensorInfo


class Storages:
    """Numbers for storages, from 1: two tensors of a run have one number exactly where they share memory.

    A number is never given twice, also where the allocator hands the same address out again. Meta and fake tensors
    have storages too; a tensor without one (sparse, some wrapper subclasses) has the number 0.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[torch.UntypedStorage, list[int]] = WeakKeyDictionary()
        self._count = 0

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage."""
        return self._entry(tensor)[0]

    def writes(self, tensor: Tensor) -> tuple[int, int]:
        """(number, how many ops have written into it): equal for equal contents."""
        number, count = self._entry(tensor)
        return number, count

    def note_write(self, tensor: Tensor) -> None:
        """An op has written, or is about to write, into this tensor."""
        self._entry(tensor)[1] += 1

    def _entry(self, tensor: Tensor) -> list[int]:
        storage = storage_of(tensor)
        if storage is None:
            return [0, 0]
        entry = self._known.get(storage)
        if entry is None:
            self._count += 1
            entry = self._known[storage] = [self._count, 0]
        return entry


class Copies:
    """Copies of the tensors of one run."""

    def __init__(self, storages: Storages, parameters: Iterable[nn.Parameter]) -> None:
        self.storages = storages
        self._lent: dict[int, list[ref[Tensor]]] = {storages.number(p): [] for p in parameters}
        self._lent.pop(0, None)
        self._made: WeakValueDictionary[tuple[int, int, int], Tensor] = WeakValueDictionary()
        self._owners: dict[int, ref[Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor as it is now, without its history; parameters are lent until somebody writes."""
        number, writes = self.storages.writes(tensor)
        if number in self._lent and tensor.device.type in HOST:
            alias = tensor.detach()
            self._lent[number].append(ref(alias))
            return alias
        key = (id(tensor), number, writes)
        owner = self._owners.get(id(tensor))
        if number and owner is not None and owner() is tensor and (known := self._made.get(key)) is not None:
            return known
        copy = on_host(tensor)
        if number:
            self._made[key], self._owners[id(tensor)] = copy, ref(tensor)
        return copy

    def before_write(self, tensor: Tensor) -> None:
        """Turn what was lent of this tensor's storage into copies, since an op will write there."""
        for alias in self._lent.get(self.storages.number(tensor), ()):
            if (lent := alias()) is not None:
                lent.data = lent.clone()
        if self.storages.number(tensor) in self._lent:
            self._lent[self.storages.number(tensor)] = []


def on_host(tensor: Tensor) -> Tensor:
    """A copy without history, on the CPU: what is compared is compared there, and a device keeps its memory."""
    return tensor.detach().clone() if tensor.device.type in HOST else tensor.detach().cpu()


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The storage of a tensor; None where it has none of its own."""
    if tensor.layout != torch.strided:
        return None
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # wrapper subclasses that say so
        return None


def info(tensor: Tensor, storages: Storages, *, statistics: bool = False, digests: bool = False) -> TensorInfo:
    """What is known of a tensor; `statistics` and `digests` read its values and are None where it has none (meta)."""
    finite: bool | None = None
    absmax: float | None = None
    readable = tensor.device.type != "meta" and tensor.layout == torch.strided and type(tensor) in (Tensor, nn.Parameter)
    if statistics and readable and tensor.is_floating_point() and tensor.numel():
        absmax = largest_magnitude(tensor)
        finite = absmax == absmax and absmax != float("inf")
    return TensorInfo(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype)[6:],
        device=str(tensor.device),
        strides=tensor.stride() if tensor.layout == torch.strided else (),
        storage=storages.number(tensor),
        finite=finite,
        absmax=absmax,
        digest=digest(tensor) if digests and readable else None,
    )


def largest_magnitude(tensor: Tensor) -> float:
    """The largest absolute value; NaN where there is one."""
    values = tensor.detach()
    if values.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        values = values.float()  # torch has no minimum of its float8 dtypes
    low, high = torch.aminmax(values)
    least, most = float(low), float(high)
    return max(-least, most) if least == least else least


def digest(tensor: Tensor) -> int:
    """A checksum (CRC-32) of the bits of a tensor in the order of its elements: equal tensors of one dtype have equal
    ones on every device, whatever their strides. Zero and minus zero differ. One that is not on the CPU is copied there."""
    return zlib.crc32(bytes_of(tensor).data) if tensor.numel() else 0


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a dense tensor in the order of its elements, as a numpy array of uint8; a copy where it is not so laid out."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    # a single element counts as contiguous with any stride, and another dtype can be seen only at stride 1
    return values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy()
