"""What torch's CUDA caching allocator would reserve for a sequence of allocations, without a GPU.

The native backend on one stream, with ordinary and with expandable segments, as c10/cuda/CUDACachingAllocator.cpp and
c10/core/AllocatorConfig.h state it. Not simulated: several streams, `record_stream`, private pools of CUDA graphs,
garbage collection (`garbage_collection_threshold`), and the backend `cudaMallocAsync`.
"""

import os
from bisect import bisect_left, insort
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from ..errors import UsageError

MIB = 1 << 20
SMALLEST_BLOCK_BYTES = 512  # kMinBlockSize: every size is rounded up to a multiple of it
SMALL_BYTES = MIB  # kSmallSize: up to here a request goes to the pool of small blocks
SMALL_SEGMENT_BYTES = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT_BYTES = 20 * MIB  # kLargeBuffer
OWN_SEGMENT_FROM_BYTES = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own size
SEGMENT_ROUND_BYTES = 2 * MIB  # kRoundLarge
NO_LIMIT = 1 << 62

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the new name goes first
IGNORED = ("backend", "garbage_collection_threshold", "pinned_use_cuda_host_register", "pinned_num_register_threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorSettings:
    """The options of PYTORCH_ALLOC_CONF that change how memory is reserved."""

    expandable_segments: bool = False
    max_split_bytes: int = NO_LIMIT
    roundup_power2_divisions: int = 0


class OutOfMemory(Exception):
    """A request that the capacity could not hold, after everything cached had been given back."""

    def __init__(self, *, requested_bytes: int, allocated_bytes: int, reserved_bytes: int, largest_free_bytes: int) -> None:
        super().__init__("the simulated device is out of memory")
        self.requested_bytes, self.allocated_bytes = requested_bytes, allocated_bytes
        self.reserved_bytes, self.largest_free_bytes = reserved_bytes, largest_free_bytes


def settings_from(text: str) -> AllocatorSettings:
    """The settings in the text of PYTORCH_ALLOC_CONF; UsageError for an option that is not understood."""
    settings = AllocatorSettings()
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (part.strip() for part in item.partition(":"))
        try:
            if name == "expandable_segments":
                settings = replace(settings, expandable_segments={"true": True, "false": False}[value.lower()])
            elif name == "max_split_size_mb":
                settings = replace(settings, max_split_bytes=int(value) * MIB)
            elif name == "roundup_power2_divisions":
                settings = replace(settings, roundup_power2_divisions=int(value))
            elif name not in IGNORED:
                raise UsageError(f"PYTORCH_ALLOC_CONF: {name!r} is not simulated")
        except (KeyError, ValueError):
            raise UsageError(f"PYTORCH_ALLOC_CONF: {item!r} has no value that can be meant") from None
    return settings


def settings_of(environ: Mapping[str, str] | None = None) -> AllocatorSettings:
    """The settings that the environment asks for."""
    values = os.environ if environ is None else environ
    return settings_from(next((values[name] for name in VARIABLES if values.get(name)), ""))


def rounded(size: int, divisions: int = 0) -> int:
    """The size of the block that a request takes."""
    if divisions > 1 and size > SMALLEST_BLOCK_BYTES * divisions:
        power = 1 << (size.bit_length() - 1)
        step = power // divisions
        return size if size == power else -(-(size - power) // step) * step + power
    return max(SMALLEST_BLOCK_BYTES, -(-size // SMALLEST_BLOCK_BYTES) * SMALLEST_BLOCK_BYTES)


def segment_bytes(block: int) -> int:
    """The size of the segment that is asked of the driver for a block that fits nowhere."""
    if block <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if block < OWN_SEGMENT_FROM_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-block // SEGMENT_ROUND_BYTES) * SEGMENT_ROUND_BYTES


class _Block:
    __slots__ = ("size", "address", "small", "before", "after", "used", "requested")

    def __init__(self, size: int, address: int, small: bool) -> None:
        self.size, self.address, self.small = size, address, small
        self.before: _Block | None = None
        self.after: _Block | None = None
        self.used, self.requested = False, 0


class CachingAllocator:
    """`malloc` and `free` by key; `allocated`, `requested` and `reserved` bytes and their peaks follow.

    With `capacity_bytes` a request beyond it first gives back cached segments (`retries`), then raises OutOfMemory.
    """

    def __init__(self, settings: AllocatorSettings | None = None, *, capacity_bytes: int | None = None) -> None:
        self.settings = settings or AllocatorSettings()
        self.capacity = capacity_bytes
        self.allocated = self.requested = self.reserved = 0
        self.peak_allocated = self.peak_requested = self.peak_reserved = 0
        self.retries = self.segments = 0
        self._live: dict[Hashable, _Block] = {}
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}  # by small: (size, address, block)
        self._tail: dict[bool, _Block] = {}  # with expandable segments: the last mapped block of each pool
        self._next_address = 0

    def malloc(self, key: Hashable, size: int) -> int:
        """Take a block for `size` bytes under a key of the caller's, none for an empty tensor; the bytes of the block, which
        count as allocated: a cached one that is less than 1 MiB too large is not split."""
        if size <= 0:
            return 0
        need = rounded(size, self.settings.roundup_power2_divisions)
        small = need <= SMALL_BYTES
        block = self._best_fit(need, small) or self._new_segment(need, small)
        self._split(block, need)
        block.used, block.requested = True, size
        self._live[key] = block
        self.allocated += block.size
        self.requested += size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_requested = max(self.peak_requested, self.requested)
        return block.size

    def free(self, key: Hashable) -> None:
        """Give the block of a key back to its pool, merged with free neighbours of its segment."""
        block = self._live.pop(key, None)
        if block is None:
            return
        self.allocated -= block.size
        self.requested -= block.requested
        block.used = False
        before, after = block.before, block.after
        if before is not None and not before.used:
            self._take(before)
            before.size += block.size
            before.after = after
            if after is not None:
                after.before = before
            block = before
        if after is not None and not after.used:
            self._take(after)
            block.size += after.size
            block.after = after.after
            if after.after is not None:
                after.after.before = block
        if self.settings.expandable_segments and block.after is None:
            self._tail[block.small] = block
        self._put(block)

    def empty_cache(self) -> None:
        """Give segments without a block in use back to the driver; with expandable segments, the free end of each."""
        for small, pool in self._free.items():
            for item in list(pool):
                block = item[2]
                if self.settings.expandable_segments:
                    page = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
                    if block is self._tail.get(small) and (whole := block.size // page * page):
                        self._take(block)
                        self.reserved -= whole
                        self._shrink_tail(block, whole)
                elif block.before is None and block.after is None:
                    pool.remove(item)
                    self.reserved -= block.size
                    self.segments -= 1

    @property
    def largest_free(self) -> int:
        """The largest block that is cached, in bytes."""
        return max((pool[-1][0] for pool in self._free.values() if pool), default=0)

    @property
    def cached(self) -> int:
        """All bytes in cached blocks; with those allocated they make up what is reserved."""
        return sum(item[0] for pool in self._free.values() for item in pool)

    def _best_fit(self, need: int, small: bool) -> _Block | None:
        pool = self._free[small]
        at = bisect_left(pool, (need, -1), key=lambda item: (item[0], item[1]))
        if at == len(pool):
            return None
        if self.settings.expandable_segments and pool[at][2] is self._tail.get(small) and at + 1 < len(pool):
            at += 1  # the end of an expandable segment counts as large as it can grow
        block, limit = pool[at][2], self.settings.max_split_bytes
        if (need < limit <= block.size) or (need >= limit and block.size >= need + LARGE_SEGMENT_BYTES):
            return None
        pool.pop(at)
        return block

    def _new_segment(self, need: int, small: bool) -> _Block:
        if self.settings.expandable_segments:
            return self._grown(need, small)
        size = segment_bytes(need)
        self._make_room(size, need)
        block = _Block(size, self._next_address, small)
        self._next_address += size + (1 << 30)  # segments never touch
        self.segments += 1
        self._reserve(size)
        return block

    def _grown(self, need: int, small: bool) -> _Block:
        page = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
        tail = self._tail.get(small)
        usable = tail.size if tail is not None and not tail.used else 0
        grow = -(-(need - usable) // page) * page
        if self.capacity is not None and self.reserved + grow > self.capacity:
            self._make_room(grow, need)
            tail = self._tail.get(small)
            usable = tail.size if tail is not None and not tail.used else 0
            grow = -(-(need - usable) // page) * page
        self._reserve(grow)
        if tail is not None and usable:
            self._take(tail)
            tail.size += grow
            return tail
        if tail is None:
            self.segments += 1
        start = (tail.address + tail.size) if tail is not None else (1 << 60 if small else 0)
        block = _Block(grow, start, small)
        block.before = tail
        if tail is not None:
            tail.after = block
        self._tail[small] = block
        return block

    def _make_room(self, size: int, need: int) -> None:
        if self.capacity is None or self.reserved + size <= self.capacity:
            return
        self.retries += 1
        self.empty_cache()
        if self.reserved + size > self.capacity:
            raise OutOfMemory(
                requested_bytes=need,
                allocated_bytes=self.allocated,
                reserved_bytes=self.reserved,
                largest_free_bytes=self.largest_free,
            )

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _split(self, block: _Block, need: int) -> None:
        rest = block.size - need
        if block.small or self.settings.expandable_segments:
            splits = rest >= SMALLEST_BLOCK_BYTES
        else:
            splits = need < self.settings.max_split_bytes and rest > SMALL_BYTES
        if not splits:
            return
        left = _Block(rest, block.address + need, block.small)
        left.before, left.after = block, block.after
        if block.after is not None:
            block.after.before = left
        block.after, block.size = left, need
        if self._tail.get(block.small) is block:
            self._tail[block.small] = left
        self._put(left)

    def _shrink_tail(self, block: _Block, whole: int) -> None:
        block.size -= whole
        if block.size:
            self._put(block)
            return
        if block.before is None:
            del self._tail[block.small]
            self.segments -= 1
        else:
            block.before.after = None
            self._tail[block.small] = block.before

    def _put(self, block: _Block) -> None:
        insort(self._free[block.small], (block.size, block.address, block), key=lambda item: (item[0], item[1]))

    def _take(self, block: _Block) -> None:
        pool = self._free[block.small]
        pool.pop(bisect_left(pool, (block.size, block.address), key=lambda item: (item[0], item[1])))
