"""One process's tensors beside those of all ranks: how far apart they are, under the layout that the ranks' tensors have."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..compare import ROUNDINGS
from .logical import Held, Stages, distance, is_whole, shards, wholes
from .record import RankRecord


class Pair:
    """Both sides of a comparison. `limit` is relative, as `roundings_limit` gives it; `floor` is one rounding of it.

    `rows` are the rows of the batch that each rank saw, by content; None where one is not in the batch. Ranks that saw the
    same rows are a group: in it a plain tensor may be whole, sharded, or a share of a sum. `clipped` says that gradients
    were noted after the step clipped them to the norm that it reports.
    """

    def __init__(self, truth: Stages, held: Stages, ranks: list[RankRecord], limit: float, *, clipped: bool = True) -> None:
        self.truth, self.held, self.ranks, self.limit = truth, held, ranks, limit
        self.world = len(ranks)
        self.floor = limit / ROUNDINGS
        self.clipped = clipped
        self.rows = self._rows()
        self.groups = self._groups()
        if self.rows is not None:
            self._repeat()
        self._scales: dict[str, float] = {}
        if clipped:
            self._undo_clipping()

    def scale(self, stage: str) -> float:
        """The largest magnitude in the single process's tensors of a stage."""
        if stage not in self._scales:
            parts = [held.parts[0] for held in self.truth.of(stage).values()]
            self._scales[stage] = max((float(p.abs().max()) for p in parts if p.numel() and p.is_floating_point()), default=0.0)
        return self._scales[stage]

    def unlike(self, stage: str) -> Iterator[tuple[str, Held, float]]:
        """Named tensors whose logical form is not the single process's, with the largest difference."""
        for name, held in self.held.of(stage).items():
            expected = self.truth.of(stage).get(name)
            if expected is None:
                continue
            gap = self.gap(expected.parts[0], held)
            if gap > self.bound(stage, expected.parts[0]):
                yield name, held, gap

    def bound(self, stage: str, expected: Tensor) -> float:
        """How far from the expected tensor rounding may take one of a stage."""
        own = float(expected.abs().max()) if expected.is_floating_point() and expected.numel() else 0.0
        return max(self.limit * own, self.floor * self.scale(stage))

    def joined(self, held: Held) -> list[Tensor]:
        """The wholes of a DTensor, or the parts of a plain one."""
        found = wholes(held, self.ranks)
        return held.parts if found is None else found

    def gap(self, expected: Tensor, held: Held) -> float:
        """How far the logical tensor is from the expected one, under the layout that comes nearest."""
        joined = wholes(held, self.ranks)
        if joined is not None:
            return max(distance(expected, whole) for whole in joined)
        if is_whole(held) and held.parts[0].shape == expected.shape:
            return max(distance(expected, part) for part in held.parts)
        inside = [shards(mine, expected) for group in self.groups if (mine := held.of(group))]
        together = shards(held.parts, expected)
        nearest = [min((distance(expected, whole) for whole in found), default=float("inf")) for found in inside]
        return min([distance(expected, whole) for whole in together] + [max(nearest)])

    def layout(self, expected: Tensor, held: Held) -> str | None:
        """How a module's tensor lies over the ranks: `whole`, `rows`, `shard`, `share`; None where nothing fits."""
        bound = self.bound("forward", expected)
        joined = wholes(held, self.ranks)
        if joined is not None:
            return "whole" if all(distance(expected, whole) <= bound for whole in joined) else None
        mine = self._expected_by_group(expected)
        for word, fits in (("whole", _is_equal), ("shard", _is_sharded), ("share", _is_share)):
            if fits(expected, held.parts, bound):
                return word
            parts = [(e, held.of(group)) for e, group in zip(mine, self.groups, strict=False)]
            if mine and all(fits(e, own, bound) for e, own in parts if own):
                return "rows" if word == "whole" else word
        return None

    def nearest(self, expected: Tensor, held: Held) -> float:
        """How far a module's output is from the expected one, under the layout that comes nearest: whole, by rows, a shard, a
        share of a sum."""
        if self.layout(expected, held) is not None and wholes(held, self.ranks) is None:
            parts = [(e, held.of(group)) for e, group in zip(self._expected_by_group(expected), self.groups, strict=False)]
            plain = [[distance(expected, part) for part in held.parts], [distance(e, part) for e, own in parts for part in own]]
            return min((max(each) for each in plain if each and max(each) < float("inf")), default=0.0)
        return self.gap(expected, held)

    def ids(self, stages: Stages) -> list[list[list[int]]]:
        """The token ids that each process saw, row by row; those that later stages of a pipeline saw are not known."""
        held = stages.of("data").get("input_ids")
        return [part.tolist() for part in held.parts] if held else [[]]

    def _expected_by_group(self, expected: Tensor) -> list[Tensor]:
        """What each group should hold of a tensor over the whole batch; empty where that cannot be told."""
        if self.rows is None or not expected.ndim:
            return []
        rows = [self.rows[group[0]] for group in self.groups]
        return [expected[mine] for mine in rows] if len(expected) > max((max(mine, default=0) for mine in rows), default=0) else []

    def _repeat(self) -> None:
        """What every micro-batch gave alike is as long as all of them together, where the other side has a row for each row
        of the batch; a table of angles has none."""
        batch, rows = len(self.ids(self.truth)[0]), self.rows or []
        for stage in ("input", "forward"):
            for name, held in self.held.of(stage).items():
                expected = self.truth.of(stage).get(name)
                if expected is None or not expected.parts[0].ndim or not all(part.ndim for part in held.parts):
                    continue
                if held.repeats > 1 and len(expected.parts[0]) == batch:
                    held.parts = [
                        torch.cat([part] * held.repeats) if len(part) * held.repeats == len(rows[rank]) else part
                        for rank, part in zip(held.ranks, held.parts, strict=True)
                    ]
                elif expected.repeats > 1 and expected.repeats * len(expected.parts[0]) == batch and len(held.parts[0]) > 1:
                    expected.parts = [torch.cat(expected.parts * expected.repeats)]

    def _rows(self) -> list[list[int]] | None:
        batch = [tuple(row) for row in self.ids(self.truth)[0]]
        found = []
        for rank in self.ids(self.held):
            if not all(tuple(row) in batch for row in rank):
                return None
            found.append([batch.index(tuple(row)) for row in rank])
        data = self.held.of("data").get("input_ids")
        if data is None or len(data.ranks) == self.world:
            return found
        known = dict(zip(data.ranks, found, strict=True))
        return [known.get(rank) or self._rows_of_the_pipeline(rank, known) for rank in range(self.world)]

    def _rows_of_the_pipeline(self, rank: int, known: dict[int, list[int]]) -> list[int]:
        """The rows that a later stage works on: those of the first stage whose hidden states in one process come nearest to what
        its modules are given. How the ranks are numbered does not tell: either dimension of a mesh may be the outer one."""
        given = {name: held.of([rank])[0] for name, held in self.held.of("input").items() if rank in held.ranks}
        pairs = [(held.parts[0], given[name]) for name, held in self.truth.of("input").items() if name in given]

        def apart(rows: list[int]) -> float:
            gaps = [distance(whole[rows], part) for whole, part in pairs if whole.ndim and len(whole) > max(rows, default=0)]
            return sum(gap for gap in gaps if gap < float("inf"))

        return min(known.values(), key=apart)

    def _groups(self) -> list[list[int]]:
        if self.rows is None or len(self.rows) != self.world:
            return [list(range(self.world))]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, rows in enumerate(self.rows):
            groups.setdefault(tuple(rows), []).append(rank)
        return list(groups.values())

    def _undo_clipping(self) -> None:
        """Scale each rank's gradients back to the norm that its step reports, which it had before it clipped them. In a
        pipeline a norm that all stages report is of all their gradients, and one that each has of its own is of those alone."""
        norms, gradients = self.held.of("norm").get("grad_norm"), self.held.of("gradient")
        if norms is None or not gradients or norms.events[0].placements == ("partial",):
            return
        together = self.held.staged and len({float(part) for part in norms.parts}) == 1
        joined = {name: wholes(held, self.ranks) for name, held in gradients.items()}
        factors = {}
        for rank, reported in zip(norms.ranks, norms.parts, strict=True):
            mine = [
                held.parts[_index(held, rank)] if (whole := joined[name]) is None else whole[0]
                for name, held in gradients.items()
                if (together and name in self.truth.of("gradient")) or (not together and rank in held.ranks)
            ]
            norm = sum(float(part.double().pow(2).sum()) for part in mine) ** 0.5
            factors[rank] = float(reported) / norm if norm else 1.0
        for held in gradients.values():
            held.parts = [part * factors.get(rank, 1.0) for rank, part in zip(held.ranks, held.parts, strict=True)]


def _index(held: Held, rank: int) -> int:
    """The part of a rank, or of the first that has the tensor."""
    return held.ranks.index(rank) if rank in held.ranks else 0


def _is_equal(expected: Tensor, parts: list[Tensor], bound: float) -> bool:
    return all(distance(expected, part) <= bound for part in parts)


def _is_sharded(expected: Tensor, parts: list[Tensor], bound: float) -> bool:
    return any(distance(expected, whole) <= bound for whole in shards(parts, expected))


def _is_share(expected: Tensor, parts: list[Tensor], bound: float) -> bool:
    same_shape = all(part.shape == expected.shape for part in parts)
    return same_shape and distance(expected, torch.stack(parts).sum(0)) <= bound
