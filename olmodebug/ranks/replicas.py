"""What is known of many ranks from digests alone, one record open at a time: a thousand ranks fit."""

from collections.abc import Iterable, Iterator

from .calls import Unlike, first_unlike, lines_of
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
        (event["stage"], event["name"]): event["digest"]
        for event in lines_of(ranks[0].file, calls=False)
        if event["stage"] in wanted and set(event["placements"]) <= {"replicate"}
    }
    other: dict[tuple[str, str], list[int]] = {}
    for rank, record in enumerate(ranks[1:], start=1):
        for event in lines_of(record.file, calls=False):
            place = event["stage"], event.get("name", "")
            if place in whole and whole[place] != event["digest"]:
                other.setdefault(place, []).append(rank)
    yield from ((*place, other[place]) for place in whole if place in other)
