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

WHOLE_TENSORS = ("allreduce", "broadcast")  # of these every rank must give the same shape; shards may be uneven
MOST_NAMED = 6  # ranks in a sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One call of a collective: its op, the shape it was given, and the line of the user's own code, where there is one."""

    op: str
    shape: tuple[int, ...] = ()
    where: Where = field(default_factory=Where)

    @property
    def text(self) -> str:
        line = f" at {self.where.file}:{self.where.line}" if self.where.line else ""
        return f"{self.op} of {list(self.shape)}{line}"


Unlike = tuple[int, list[Collective | None]]  # the number of a call, and what each rank calls there


def ranks_in(folder: Path) -> int:
    """How many ranks have a record in a folder; 0 where it is none."""
    return sum(1 for _ in files_in(folder))


def files_in(folder: Path) -> list[Path]:
    """The records' files in the order of ranks."""
    return sorted(folder.glob("rank-*.jsonl")) if folder.is_dir() else []


def lines_of(file: Path) -> Iterator[dict[str, Any]]:
    """What a record notes, without its first line. ReportError where it is damaged before its last line."""
    with file.open(encoding="utf-8") as lines:
        next(lines, None)
        for number, line in enumerate(lines, start=2):
            try:
                yield json.loads(line)
            except ValueError:  # a process that was killed leaves half a line, always the last
                if next(lines, None) is not None:
                    raise ReportError(f"{file.name} is damaged at line {number}") from None
                return


def collectives_of(file: Path) -> Iterator[Collective]:
    """The collectives of one record in the order they were started."""
    for body in lines_of(file):
        if body["stage"] == "collective":
            yield Collective(op=body["op"], shape=tuple(body["shape"]), where=Where(**body["where"]))


def has_ended(file: Path) -> bool:
    """Whether the step of a record came to its end."""
    return any(body["stage"] == "end" for body in lines_of(file))


def first_unlike(files: Sequence[Path]) -> Unlike | None:
    """The first place where ranks call different collectives, with each rank's; None where all call the same. One record is
    open at a time, so that the files of a thousand ranks need no thousand descriptors."""
    first = [_key(call) for call in collectives_of(files[0])]
    number = len(first)
    parts = False
    for file in files[1:]:
        keys = [_key(call) for call in islice(collectives_of(file), number + 1)]
        mine = next((n for n, (a, b) in enumerate(zip(first, keys, strict=False)) if a != b), min(len(keys), number))
        if mine < number or len(keys) > number:
            number, parts = mine, True
    return (number, [next(islice(collectives_of(file), number, None), None) for file in files]) if parts else None


def _key(call: Collective) -> tuple[str, tuple[int, ...]]:
    return call.op, call.shape if call.op in WHOLE_TENSORS else ()


def parted(unlike: Unlike) -> tuple[str, Where]:
    """Where ranks part, in words, and the line of a collective there: some do not come to it, or they call others."""
    number, calls = unlike
    called = [(rank, call) for rank, call in enumerate(calls) if call is not None]
    absent = [rank for rank, call in enumerate(calls) if call is None]
    where = next((call.where for _, call in called if call.where.line), Where(op=called[0][1].op))
    if absent:
        rank, call = called[0]
        come = "does not come" if len(absent) == 1 else "do not come"
        return f"{of_ranks(absent)} {come} to the collective that rank {rank} is in: number {number}, {call.text}", where
    words = ", ".join(f"rank {rank} {call.text}" for rank, call in called[:MOST_NAMED])
    return f"the ranks do not call the same collectives: at number {number} {words}", where


def of_ranks(numbers: Sequence[int]) -> str:
    """`rank 3`, `ranks 3, 5`, the first of many."""
    some = ", ".join(map(str, numbers[:MOST_NAMED])) + (f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {some}"
