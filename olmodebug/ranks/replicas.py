"""What is known of many ranks from digests alone, one line of each record in memory at a time: a thousand ranks fit."""

from collections.abc import Iterable, Iterator
from itertools import zip_longest

from .record import Collective, RankRecord

WHOLE_TENSORS = ("allreduce", "broadcast")


def first_unlike_collectives(ranks: list[RankRecord]) -> tuple[int, list[Collective | None]] | None:
    """The first place where ranks call different collectives, with each rank's; None where all call the same. Streams.

    Shapes must be alike too where every rank gives a whole tensor; shards may be uneven.
    """
    for number, calls in enumerate(zip_longest(*(record.collectives() for record in ranks))):
        if len({(call.op, call.shape if call.op in WHOLE_TENSORS else ()) if call else None for call in calls}) > 1:
            return number, list(calls)
    return None


def unlike_replicas(ranks: list[RankRecord], *, stages: Iterable[str] = ("start", "step")) -> Iterator[tuple[str, str, list[int]]]:
    """(stage, name, ranks that differ from rank 0) for every tensor that each rank holds whole, by digest alone.

    Sharded tensors are passed over.
    """
    wanted = set(stages)
    for events in zip(*((e for e in record.events() if e.stage in wanted) for record in ranks), strict=False):
        first = events[0]
        if first.placements and set(first.placements) != {"replicate"}:
            continue
        other = [rank for rank, event in enumerate(events) if (event.name, event.digest) != (first.name, first.digest)]
        if other:
            yield first.stage, first.name, other
