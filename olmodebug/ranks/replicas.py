"""What is known of many ranks from digests alone, one record open at a time: a thousand ranks fit."""

from collections.abc import Iterable, Iterator

from .calls import Unlike, first_unlike
from .record import RankRecord


def first_unlike_collectives(ranks: list[RankRecord]) -> Unlike | None:
    """The first place where ranks call different collectives, with each rank's; None where all call the same."""
    return first_unlike([record.file for record in ranks])


def unlike_replicas(ranks: list[RankRecord], *, stages: Iterable[str] = ("start", "step")) -> Iterator[tuple[str, str, list[int]]]:
    """(stage, name, ranks that differ from rank 0) for every tensor that each rank holds whole, by digest alone.

    Sharded tensors are passed over, and names that a rank has not.
    """
    wanted = set(stages)
    whole = {
        (event.stage, event.name): event.digest
        for event in ranks[0].events()
        if event.stage in wanted and set(event.placements) <= {"replicate"}
    }
    other: dict[tuple[str, str], list[int]] = {}
    for rank, record in enumerate(ranks[1:], start=1):
        for event in record.events():
            digest = whole.get((event.stage, event.name))
            if digest is not None and digest != event.digest:
                other.setdefault((event.stage, event.name), []).append(rank)
    yield from ((*place, other[place]) for place in whole if place in other)
