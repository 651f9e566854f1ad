"""The values of a memory prediction: figures as ranges, the peak and who holds it, a bounded timeline. JSON-able."""

import json
from dataclasses import dataclass

from ..units import bytes_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Three figures of one quantity in bytes: `low` counts only what is certain, `safe` what should not be exceeded."""

    low: int
    expected: int
    safe: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one category, or one module with its equal siblings, holds at the peak."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Storages at the peak that are alike: same category, shape, dtype, operator and place, in `count` pieces."""

    category: str
    count: int
    bytes: int
    op: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    born: str
    file: str | None
    line: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The fullest instant of one stretch of events; `categories` in the order of the timeline's names."""

    event: int
    step: int
    phase: str
    allocated_bytes: int
    reserved_bytes: int | None
    categories: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Where a part of a step begins: the index of its first point."""

    point: int
    step: int
    phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Allocated bytes over the events of a run, at most a few hundred points; `peak` is the index of the fullest."""

    names: tuple[str, ...]
    points: tuple[Point, ...]
    marks: tuple[Mark, ...]
    peak: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The fullest instant of one part of one step."""

    step: int
    phase: str
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The instant with the most bytes allocated, what was being allocated then, and in one sentence who holds them."""

    event: int
    step: int
    phase: str
    module: str
    op: str
    file: str | None
    line: int | None
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """The simulated allocator at its end: segments, the largest free block, and what is reserved but was never needed at
    once (`stranded_bytes`)."""

    expandable: bool
    segments: int
    largest_free_bytes: int
    stranded_bytes: int
    retries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What one plan takes. On a GPU `reserved` is what its allocator holds and `process` adds the CUDA context."""

    tensors: Range
    reserved: Range | None
    process: Range | None
    peak: Peak
    categories: tuple[Share, ...]
    modules: tuple[Share, ...]
    holders: tuple[Holder, ...]
    phases: tuple[Phase, ...]
    timeline: Timeline
    segments: Segments | None
    events: int
    opaque: tuple[str, ...] = ()

    @property
    def needed(self) -> Range:
        """The figure that a card's memory is compared with."""
        return self.process or self.tensors

    def __repr__(self) -> str:
        low, expected, safe = (bytes_text(getattr(self.needed, name)) for name in ("low", "expected", "safe"))
        return f"<MemoryEstimate: {expected} ({low} to {safe}); {self.peak.owner}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from ..render.notebook import memory_fragment  # a notebook's hook; the records stay without rich
        from .section import section

        return memory_fragment(section(self))

    def to_json(self) -> str:
        """The `memory` section of a report, as `olmodebug memory --json` writes it; what an estimate does not know is null."""
        from .section import section

        return json.dumps(section(self), indent=1, allow_nan=False) + "\n"
