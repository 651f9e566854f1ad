"""Tensors of many ranks in their logical form: a DTensor's shards put together by its placements, a plain one as it lies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..records import Where
from .record import RankEvent, RankRecord

BY_ROWS = ("data", "input", "forward")  # stages whose tensors have a row for each row of the batch


@dataclass(slots=True, kw_only=True)
class Held:
    """One named tensor on every rank, or on those of `ranks` where stages have weights of their own: its events and local
    parts, in the order of ranks. `repeats` is how often each was noted, where that was the same bits every time."""

    events: list[RankEvent]
    parts: list[Tensor]
    ranks: list[int]
    repeats: int = 1

    def of(self, group: Sequence[int]) -> list[Tensor]:
        """The parts of a group's ranks."""
        return [part for rank, part in zip(self.ranks, self.parts, strict=True) if rank in group]

    @property
    def where(self) -> Where:
        return self.events[0].where


@dataclass(slots=True, kw_only=True)
class Stages:
    """Everything noted, by stage and name, in the order of notes; `missing` are on some ranks only, or of sizes that do not
    go together, and `unkept` too large to be kept. `staged` says that some weights are on some ranks only, as in a pipeline,
    and `micro_batches` how often a rank's step called the model."""

    by_stage: dict[str, dict[str, Held]] = field(default_factory=dict)
    missing: set[tuple[str, str]] = field(default_factory=set)
    unkept: set[tuple[str, str]] = field(default_factory=set)
    staged: bool = False
    micro_batches: int = 1

    def of(self, stage: str) -> dict[str, Held]:
        return self.by_stage.get(stage, {})


def gather(records: list[RankRecord]) -> Stages:
    """The tensors of some records by stage and name. What several ranks hold bit for bit is read once, by its digest; the
    rows of several forwards in one step are put together."""
    stages = Stages()
    found: dict[tuple[str, str], list[list[tuple[RankEvent, Tensor | None]]]] = {}
    known: dict[str, Tensor] = {}
    for place, record in enumerate(records):
        events = list(record.events())
        known |= record.load({event.digest: event.key for event in events if event.key is not None and event.digest not in known})
        for event in events:
            by_rank = found.setdefault((event.stage, event.name), [[] for _ in records])
            by_rank[place].append((event, known.get(event.digest)))
    stages.staged = any(stage == "start" and not all(by_rank) for (stage, _), by_rank in found.items())
    has = {name: [bool(mine) for mine in by_rank] for (stage, name), by_rank in found.items() if stage == "start"}
    calls = [len(mine) for (stage, _), by_rank in found.items() if stage == "data" for mine in by_rank]
    stages.micro_batches = max(calls, default=1)
    for (stage, name), by_rank in found.items():
        repeats = _repeats(stage, by_rank)
        parts = [_rows_together([part for _, part in (mine[:1] if repeats > 1 else mine)], stage) for mine in by_rank]
        ranks = _holders(stage, name, by_rank, has) if stages.staged else list(range(len(records)))
        if any(mine and any(part is None for _, part in mine) for mine in by_rank):
            stages.unkept.add((stage, name))
        elif not ranks or any(parts[rank] is None for rank in ranks):
            stages.missing.add((stage, name))
        else:
            held = [part for rank in ranks if (part := parts[rank]) is not None]
            stages.by_stage.setdefault(stage, {})[name] = Held(
                events=[by_rank[rank][0][0] for rank in ranks], parts=held, ranks=ranks, repeats=repeats
            )
    return stages


def _holders(stage: str, name: str, by_rank: Sequence[Sequence[object]], has: Mapping[str, list[bool]]) -> list[int]:
    """The ranks that a tensor of a pipeline should be on: those that have the weight, or for what no weight decides, those
    that noted it."""
    weight = name if name in has else name.rpartition(".")[0]  # what an optimizer keeps of it is called after it
    if stage in ("gradient", "step", "state") and weight in has:
        return [rank for rank, there in enumerate(has[weight]) if there]
    return [rank for rank, mine in enumerate(by_rank) if mine]


def as_one(stages: Stages, ranks: Sequence[RankRecord]) -> Stages:
    """What several ranks hold together, as one process would: whole tensors, joined shards, and rows in the order of ranks.
    What has no such form (plain shards, shares of a sum, each rank's own loss) is left out."""
    data = next(iter(stages.of("data").values()), None)
    apart = data is not None and len({event.digest for event in data.events}) == len(data.parts)
    one = Stages(micro_batches=stages.micro_batches)
    for stage, named in stages.by_stage.items():
        for name, held in named.items():
            whole = _as_one(stage, held, ranks, rows_apart=apart)
            if whole is not None:
                one.by_stage.setdefault(stage, {})[name] = Held(events=held.events[:1], parts=[whole], ranks=[0], repeats=held.repeats)
    return one


def _as_one(stage: str, held: Held, ranks: Sequence[RankRecord], *, rows_apart: bool) -> Tensor | None:
    joined = wholes(held, ranks)
    if joined is not None:
        return joined[0]
    if len({event.digest for event in held.events}) == 1:
        return held.parts[0]
    return _rows_together(held.parts, stage) if rows_apart else None


def _repeats(stage: str, by_rank: Sequence[Sequence[tuple[RankEvent, Tensor | None]]]) -> int:
    """How often each rank noted a tensor that is the same in all its micro-batches: a table of angles has no rows."""
    counts = {len(mine) for mine in by_rank if mine}
    alike = all(len({event.digest for event, _ in mine}) <= 1 for mine in by_rank)
    return counts.pop() if stage in ("input", "forward") and alike and len(counts) == 1 else 1


def _rows_together(parts: Sequence[Tensor | None], stage: str) -> Tensor | None:
    """The rows of all parts; one part is itself. None where the stage has no rows, or the parts do not go together."""
    there = [part for part in parts if part is not None]
    if len(there) != len(parts) or len(parts) <= 1:
        return there[0] if there and len(there) == len(parts) else None
    alike = len({part.shape[1:] for part in there}) == 1 and all(part.ndim for part in there)
    return torch.cat(there) if stage in BY_ROWS and alike else None


def wholes(held: Held, ranks: Sequence[RankRecord]) -> list[Tensor] | None:
    """A DTensor put together from its local parts; None for a plain tensor. There are as many wholes as ranks hold the
    same shard: the copies along replicated mesh dimensions, and along those that the tensor's own mesh lacks."""
    placements = held.events[0].placements
    if not placements:
        return None
    spread = [dim for dim, kind in enumerate(placements) if kind != "replicate"]
    copies: list[dict[tuple[int, ...], Tensor]] = []
    for rank, event, part in zip(held.ranks, held.events, held.parts, strict=True):
        coordinate = event.coordinate or ranks[rank].coordinate
        mine = tuple(coordinate[dim] for dim in spread)
        copy = next((copy for copy in copies if mine not in copy), None)
        if copy is None:
            copies.append(copy := {})
        copy[mine] = part
    kinds = [placements[dim] for dim in spread]
    return [_joined(copy, kinds) for copy in copies]


def _joined(parts: dict[tuple[int, ...], Tensor], kinds: list[str]) -> Tensor:
    """Mesh dimension by mesh dimension: those that split what another one had split already, then from the last."""
    order = sorted(range(len(kinds)), key=lambda dim: (not kinds[dim].startswith("strided"), -dim))
    for dim in order:
        groups: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for coordinate, part in parts.items():
            groups.setdefault((*coordinate[:dim], 0, *coordinate[dim + 1 :]), []).append((coordinate[dim], part))
        ordered = {key: [part for _, part in sorted(group, key=lambda item: item[0])] for key, group in groups.items()}
        parts = {key: _combined(kinds[dim], group) for key, group in ordered.items()}
    return next(iter(parts.values()))


def _combined(kind: str, parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0) if kind == "partial" else torch.cat(parts, int(kind.rpartition(":")[2]))


def is_whole(held: Held) -> bool:
    """Whether every rank holds a plain tensor of one shape."""
    return not held.events[0].placements and len({part.shape for part in held.parts}) == 1


def shards(parts: list[Tensor], expected: Tensor) -> list[Tensor]:
    """What plain parts give when they are put together along each dimension where the sizes fit, or as flat pieces."""
    found = [torch.cat(parts, dim) for dim in range(expected.ndim) if _fits(parts, dim, expected)]
    flat = expected.ndim > 1 and all(part.ndim == 1 for part in parts) and sum(map(len, parts)) == expected.numel()
    return [*found, torch.cat(parts).view(expected.shape)] if flat else found


def _fits(parts: list[Tensor], dim: int, expected: Tensor) -> bool:
    rest = [[size for d, size in enumerate(part.shape) if d != dim] for part in parts]
    others = [size for d, size in enumerate(expected.shape) if d != dim]
    same = all(part.ndim == expected.ndim for part in parts) and all(shape == others for shape in rest)
    return same and sum(part.shape[dim] for part in parts) == expected.shape[dim]


def distance(expected: Tensor, part: Tensor) -> float:
    """The largest difference; infinite between shapes that are unlike, and where one side alone is NaN."""
    if expected.shape != part.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    gap = (expected.double() - part.double()).abs().max()
    return float("inf") if torch.isnan(gap) else float(gap)


def ratio(expected: Tensor, part: Tensor, limit: float) -> float | None:
    """The number that the expected tensor times gives the part to rounding; None where there is none, or it is 1."""
    if expected.shape != part.shape or not expected.numel():
        return None
    flat, other = expected.double().flatten(), part.double().flatten()
    square = float(flat.dot(flat))
    if not square:
        return None
    factor = float(flat.dot(other)) / square
    near = float((other - factor * flat).abs().max()) <= limit * max(float(other.abs().max()), 1e-300)
    return factor if near and abs(factor - 1) > limit and factor else None
