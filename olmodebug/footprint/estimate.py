"""From a trace of storages to figures: what is allocated, what the allocator reserves, what the process takes, and whose it is."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..sources import short_path
from .allocator import AllocatorSettings, CachingAllocator, rounded
from .gpus import MIB, Gpu
from .peak_owner import owner
from .records import Holder, Mark, MemoryEstimate, Peak, Phase, Point, Range, Segments, Share, Timeline
from .storage_trace import CATEGORIES, WORKSPACE, Allocation, StorageTrace

MOST_POINTS = 240  # the schema allows 400; a terminal shows 70, a page some more
MOST_HOLDERS = 12
MOST_MODULES = 40

# What a CUDA context takes beside the allocator depends on the card, the driver and the kernels that were loaded. Reports
# give 287 to 667 MB (https://github.com/pytorch/pytorch/issues/86509 and others), an H100 with CUDA 13 took 676 MiB after its
# first product; a run on the card measures it.
CONTEXT = Range(low=300 * MIB, expected=550 * MIB, safe=800 * MIB)
LARGE_SEGMENT = 20 * MIB
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
# The safe figure's allowance for an order of events that differs from the traced one. Of 24 training runs on an H100 reserved
# memory is predicted to within 0.8 %; float32 weights that a script casts to bfloat16 on the card took 6.5 % more (reports/gpu.md).
SAFE_MARGIN = 0.07


def estimate(trace: StorageTrace, gpu: Gpu | None, settings: AllocatorSettings | None = None) -> MemoryEstimate:
    """The figures of a trace on a card; without one the tensors alone, as on the CPU."""
    allocations, events = on_device(trace, gpu)
    replayed = _Replay(allocations, events, gpu, settings)
    peak_live = [replace(allocations[number], bytes=replayed.taken[number]) for number in replayed.live_at_peak]
    at = allocations[events[replayed.peak_event] if events[replayed.peak_event] >= 0 else ~events[replayed.peak_event]]
    scratch = max((a.bytes for a in allocations if a.category == WORKSPACE), default=0)
    certain = peak_of(allocations, events, without=WORKSPACE)
    tensors = Range(low=certain, expected=replayed.peak, safe=replayed.peak + (scratch if gpu else 0))
    reserved = process = segments = None
    if gpu is not None and replayed.allocator is not None:
        simulated = replayed.allocator.peak_reserved
        margin = LARGE_SEGMENT + round(SAFE_MARGIN * simulated)
        reserved = Range(low=min(certain, simulated), expected=simulated, safe=max(simulated, tensors.safe) + margin)
        process = Range(low=reserved.low + CONTEXT.low, expected=reserved.expected + CONTEXT.expected, safe=reserved.safe + CONTEXT.safe)
        segments = Segments(
            expandable=replayed.allocator.settings.expandable_segments,
            segments=replayed.allocator.segments,
            largest_free_bytes=replayed.allocator.largest_free,
            stranded_bytes=simulated - replayed.allocator.peak_allocated,
            retries=replayed.allocator.retries,
        )
    spot = at.spot
    return MemoryEstimate(
        tensors=tensors,
        reserved=reserved,
        process=process,
        peak=Peak(
            event=replayed.peak_event,
            step=replayed.place(replayed.peak_event)[0],
            phase=replayed.place(replayed.peak_event)[1],
            module=at.module,
            op=at.op,
            file=short_path(spot.file) if spot else None,
            line=spot.line if spot else None,
            owner=owner(peak_live, *replayed.place(replayed.peak_event)),
        ),
        categories=by_category(peak_live),
        modules=by_module(peak_live),
        holders=holders(peak_live),
        phases=replayed.phases(),
        timeline=replayed.timeline(),
        segments=segments,
        events=len(events),
        opaque=tuple(sorted(trace.opaque)),
    )


def on_device(trace: StorageTrace, gpu: Gpu | None) -> tuple[list[Allocation], list[int]]:
    """The allocations and events that concern the device: no step counters of the CPU; with cuBLAS's workspaces, which nobody
    gives back: one is taken by the first product of the forward pass, behind its output, another by that of the backward pass,
    since autograd runs it on a thread of its own and each thread has its own handle. Where it falls decides which cached
    block is cut for it, and so what is reserved later."""
    if gpu is None:
        return trace.allocations, trace.events
    allocations = list(trace.allocations)
    events = [e for e in trace.events if not allocations[e if e >= 0 else ~e].host]
    for phases in (("forward", "prefill"), ("backward",)):
        made = [i for i, e in enumerate(events) if e >= 0 and allocations[e].phase in phases]
        first = next((i for i in made if allocations[events[i]].op in PRODUCTS), made[0] if made else None)
        if first is not None:
            phase = allocations[events[first]].phase
            allocations.append(Allocation(gpu.cublas_workspace_bytes, "cublas workspace", "", phase, 1, WORKSPACE))
            events.insert(first + 1, len(allocations) - 1)
    return allocations, events


def peak_of(allocations: Sequence[Allocation], events: Sequence[int], *, without: str = "") -> int:
    """The most bytes at once, in blocks of 512, leaving out one category."""
    now = most = 0
    for event in events:
        allocation = allocations[event if event >= 0 else ~event]
        if allocation.category == without:
            continue
        now += rounded(allocation.bytes) if event >= 0 else -rounded(allocation.bytes)
        most = max(most, now)
    return most


def by_category(live: Sequence[Allocation]) -> tuple[Share, ...]:
    """Bytes of each category, in the categories' own order, none left out that holds any."""
    sums = Counter[str]()
    for allocation in live:
        sums[allocation.category] += rounded(allocation.bytes)
    return tuple(Share(name=name, bytes=sums[name]) for name in CATEGORIES if sums[name])


def by_module(live: Sequence[Allocation]) -> tuple[Share, ...]:
    """Bytes of each module, the largest first; equal places of numbered layers are one: `model.layers.*.mlp`."""
    sums = Counter[str]()
    for allocation in live:
        sums[folded(allocation.module)] += rounded(allocation.bytes)
    rows = sums.most_common()
    rest = sum(size for _, size in rows[MOST_MODULES:])
    shown = [Share(name=name, bytes=size) for name, size in rows[:MOST_MODULES]]
    return (*shown, Share(name="(others)", bytes=rest)) if rest else tuple(shown)


def folded(module: str) -> str:
    """`model.layers.3.mlp.up_proj` as `model.layers.*.mlp`; an empty path is the model itself."""
    parts: list[str] = []
    numbered = False
    for part in module.split("."):
        parts.append("*" if part.isdigit() else part)
        if numbered:
            break
        numbered = numbered or part.isdigit()
    return ".".join(parts) or "(model)"


def holders(live: Sequence[Allocation]) -> tuple[Holder, ...]:
    """What is alive at the peak, alike storages together, the largest first."""
    groups: dict[tuple[object, ...], list[Allocation]] = defaultdict(list)
    for a in live:
        line = (a.spot.file, a.spot.line) if a.spot else None
        groups[(a.category, a.shape, a.dtype, a.op, folded(a.module), line, a.step, a.phase)].append(a)
    made = []
    for same in groups.values():
        first = same[0]
        made.append(
            Holder(
                category=first.category,
                count=len(same),
                bytes=sum(rounded(a.bytes) for a in same),
                op=first.op,
                module=folded(first.module),
                shape=first.shape,
                dtype=first.dtype,
                born=f"step {first.step}, {first.phase}" if first.step else "before",
                file=short_path(first.spot.file) if first.spot else None,
                line=first.spot.line if first.spot else None,
            )
        )
    return tuple(sorted(made, key=lambda h: -h.bytes)[:MOST_HOLDERS])


class _Replay:
    """One pass over the events: the peak, what lives at it, and the fullest instant of each stretch."""

    def __init__(self, allocations: list[Allocation], events: list[int], gpu: Gpu | None, settings: AllocatorSettings | None) -> None:
        self.allocations, self.events = allocations, events
        self.allocator = CachingAllocator(settings) if gpu is not None else None
        self.peak = self.peak_event = 0
        self.taken: dict[int, int] = {}  # what each allocation takes: the allocator's block, without one its bytes rounded
        self.parts = list(_parts(allocations, events))
        self._starts = [start for start, _, _ in self.parts]
        self._points: list[Point] = []
        self._run()

    def _run(self) -> None:
        now = Counter[str]()
        total, stretch, allocator = 0, max(1, -(-len(self.events) // (MOST_POINTS - 10))), self.allocator
        best: tuple[int, int, dict[str, int], int | None] | None = None
        part = 0
        for at, event in enumerate(self.events):
            number = event if event >= 0 else ~event
            allocation = self.allocations[number]
            if event >= 0:
                self.taken[number] = rounded(allocation.bytes) if allocator is None else allocator.malloc(number, allocation.bytes)
            elif allocator is not None:
                allocator.free(number)
            change = self.taken[number] if event >= 0 else -self.taken[number]
            total += change
            now[allocation.category] += change
            if total > self.peak:
                self.peak, self.peak_event = total, at
            if best is None or total > best[0]:
                best = (total, at, dict(now), allocator.reserved if allocator is not None else None)
            changes_part = part + 1 < len(self._starts) and at + 1 == self._starts[part + 1]
            if changes_part or at % stretch == stretch - 1 or at == len(self.events) - 1:
                self._keep(best)
                best = None
                part += changes_part

    def _keep(self, best: tuple[int, int, dict[str, int], int | None]) -> None:
        total, at, sums, reserved = best
        step, phase = self.place(at)
        values = tuple(sums.get(name, 0) for name in CATEGORIES)
        self._points.append(Point(event=at, step=step, phase=phase, allocated_bytes=total, reserved_bytes=reserved, categories=values))

    def place(self, event: int) -> tuple[int, str]:
        """(step, phase) of an event."""
        _, step, phase = self.parts[max(0, bisect_right(self._starts, event) - 1)]
        return step, phase

    @property
    def live_at_peak(self) -> list[int]:
        live: dict[int, None] = {}
        for event in self.events[: self.peak_event + 1]:
            if event >= 0:
                live[event] = None
            else:
                live.pop(~event, None)
        return list(live)

    def phases(self) -> tuple[Phase, ...]:
        most: dict[tuple[int, str], int] = {}
        for point in self._points:
            key = (point.step, point.phase)
            most[key] = max(most.get(key, 0), point.allocated_bytes)
        return tuple(Phase(step=step, phase=phase, peak_bytes=size) for (step, phase), size in most.items())

    def timeline(self) -> Timeline:
        used = [i for i, _ in enumerate(CATEGORIES) if any(point.categories[i] for point in self._points)]
        points = tuple(
            Point(
                event=p.event,
                step=p.step,
                phase=p.phase,
                allocated_bytes=p.allocated_bytes,
                reserved_bytes=p.reserved_bytes,
                categories=tuple(p.categories[i] for i in used),
            )
            for p in self._points
        )
        marks, last = [], None
        for i, point in enumerate(points):
            if (point.step, point.phase) != last:
                last = (point.step, point.phase)
                marks.append(Mark(point=i, step=point.step, phase=point.phase))
        fullest = max(range(len(points)), key=lambda i: points[i].allocated_bytes)
        return Timeline(names=tuple(CATEGORIES[i] for i in used), points=points, marks=tuple(marks), peak=fullest)


def _parts(allocations: Sequence[Allocation], events: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """(first event, step, phase) of each part, as the allocations tell it: a part that allocates nothing is none."""
    last = None
    for at, event in enumerate(events):
        if event < 0:
            continue
        here = (allocations[event].step, allocations[event].phase)
        if here != last:
            last = here
            yield at, *here
