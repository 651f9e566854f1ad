"""The collectives in the records of ranks, read without torch: where ranks part, and who does not come.

A record is `rank-NNNNN.jsonl`: a first line about the rank, then one line a tensor or a collective, in their order.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import ReportError
from ..records import Where
from ..units import listed

WHOLE_TENSORS = ("allreduce", "broadcast")  # of these every rank must give the same shape; shards may be uneven
TWO_RANKS = ("send", "recv", "recv_any_source")  # from one rank to another: no other rank has to call them
CALL = '{"stage": "collective",'  # how the line of a collective begins, as the writer writes it
MOST_NAMED = 6  # ranks in a sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One call of a collective, or of one rank to another: its op, the shape it was given, the ranks of its group (none where
    that is not known), and the line of the user's own code, where there is one."""

    op: str
    shape: tuple[int, ...] = ()
    group: tuple[int, ...] = ()
    where: Where = field(default_factory=Where)

    @property
    def text(self) -> str:
        line = f" at {self.where.file}:{self.where.line}" if self.where.line else ""
        return f"{self.op} of {list(self.shape)}{line}"


Unlike = tuple[int, dict[int, Collective | None]]  # the number of a call in a group, and what each of its ranks calls there

Key = tuple[str, tuple[int, ...]]  # what must be alike of a call


def ranks_in(folder: Path) -> int:
    """How many ranks have a record in a folder; 0 where it is none."""
    return sum(1 for _ in files_in(folder))


def files_in(folder: Path) -> list[Path]:
    """The records' files in the order of ranks."""
    return sorted(folder.glob("rank-*.jsonl")) if folder.is_dir() else []


def lines_of(file: Path, *, calls: bool | None = None) -> Iterator[dict[str, Any]]:
    """What a record notes, without its first line; with `calls` the collectives alone, or all else alone, and the other lines are
    not parsed. ReportError where it is damaged before its last line."""
    with file.open(encoding="utf-8") as lines:
        next(lines, None)
        for number, line in enumerate(lines, start=2):
            if calls is not None and line.startswith(CALL) != calls:
                continue
            try:
                yield json.loads(line)
            except ValueError:  # a process that was killed leaves half a line, always the last
                if next(lines, None) is not None:
                    raise ReportError(f"{file.name} is damaged at line {number}") from None
                return


def collectives_of(file: Path) -> Iterator[Collective]:
    """The collectives of one record in the order they were started."""
    for body in lines_of(file, calls=True):
        yield Collective(op=body["op"], shape=tuple(body["shape"]), group=tuple(body.get("group", ())), where=Where(**body["where"]))


def has_ended(file: Path) -> bool:
    """Whether the step of a record came to its end."""
    return any(body["stage"] == "end" for body in lines_of(file, calls=False))


def first_unlike(files: Sequence[Path]) -> Unlike | None:
    """The first place where ranks of a group call different collectives, with each rank's; None where all call the same. One
    record is open at a time, so that the files of a thousand ranks need no thousand descriptors."""
    found: dict[tuple[int, ...], list[Key]] = {}  # of the first rank of each group
    numbers: dict[tuple[int, ...], int] = {}  # where a group parts
    for rank, file in enumerate(files):
        mine: dict[tuple[int, ...], list[Key]] = {group: [] for group in found if rank in group or not group}
        for call in _in_groups(file):
            mine.setdefault(call.group, []).append(_key(call))
        for group, keys in mine.items():
            first = found.setdefault(group, keys if rank == min(group, default=0) else [])
            if first != keys:
                number = next((n for n, (a, b) in enumerate(zip(first, keys, strict=False)) if a != b), min(len(first), len(keys)))
                numbers[group] = min(number, numbers.get(group, number))
    if not numbers:
        return None
    group, number = min(numbers.items(), key=lambda item: item[1])
    ranks = [rank for rank in group or range(len(files)) if rank < len(files)]
    return number, {rank: next(islice((c for c in _in_groups(files[rank]) if c.group == group), number, None), None) for rank in ranks}


def _in_groups(file: Path) -> Iterator[Collective]:
    return (call for call in collectives_of(file) if call.op not in TWO_RANKS)


def _key(call: Collective) -> Key:
    return call.op, call.shape if call.op in WHOLE_TENSORS else ()


def parted(unlike: Unlike) -> tuple[str, Where]:
    """Where ranks part, in words, and the line of a collective there: some do not come to it, or they call others."""
    number, calls = unlike
    called = [(rank, call) for rank, call in calls.items() if call is not None]
    absent = [rank for rank, call in calls.items() if call is None]
    where = next((call.where for _, call in called if call.where.line), Where(op=called[0][1].op))
    if absent:
        rank, call = called[0]
        come = "does not come" if len(absent) == 1 else "do not come"
        return f"{of_ranks(absent)} {come} to the collective that rank {rank} is in: number {number}, {call.text}", where
    words = ", ".join(f"rank {rank} {call.text}" for rank, call in called[:MOST_NAMED])
    return f"the ranks do not call the same collectives: at number {number} {words}", where


def of_ranks(numbers: Sequence[int]) -> str:
    """`rank 3`, `ranks 3, 5`, the first of many."""
    return f"rank{'s' if len(numbers) > 1 else ''} {listed(numbers, MOST_NAMED)}"
