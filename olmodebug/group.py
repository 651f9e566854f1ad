"""The processes of one parallel run, each a child of its own: they are followed together, and none is waited for in vain.

It loads no torch. A rank that raises, dies or waits in a collective that the others never call ends the run for all.
"""

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .process import Child, Death, Event, run_child

COLLECTIVE_NAMESPACES = ("c10d", "_c10d_functional")  # of the ops by which ranks speak to each other
GRACE_SECONDS = 15.0  # what the other ranks are given to tell why they stop, once one has

# What gloo and NCCL say where another rank is gone or late: what comes of somebody else's end.
LOST_A_PEER = (
    "Connection closed by peer",
    "Timed out waiting",
    "Connection reset by peer",
    "Application timeout",
    "Broken pipe",
    "watchdog",
)


@dataclass(slots=True)
class Rank:
    """What one rank told, and how it ended. `raised` is the event in which it told an exception of the subject's."""

    number: int
    step: str = "starting"
    raised: Event | None = None
    death: Death | None = None
    unusable: str | None = None
    fault: str | None = None
    abandoned: bool = False
    ended_at: float = field(default=0.0)

    @property
    def ended_well(self) -> bool:
        return self.death is None and self.raised is None and self.unusable is None and self.fault is None


class _Abandoned(Exception):
    """Another rank has ended the run; there is nothing to wait for."""


def run_group(
    children: Sequence[tuple[Child, Mapping[str, Any]]], note: Callable[[Rank, Event], None], tick: Callable[[Rank], None]
) -> list[Rank]:
    """Run a child for each rank to its end. `note` gets every event and `tick` is called often, each with its rank and from
    that rank's own thread; KeyboardInterrupt ends all of them."""
    ranks = [Rank(number=number) for number in range(len(children))]
    stop = threading.Event()

    def follow(rank: Rank, child: Child, message: Mapping[str, Any]) -> None:
        def noted(event: Event) -> None:
            kind = event["event"]
            if kind == "start":
                rank.step = event["step"]
            elif kind == "raised":
                rank.raised = event
            elif kind == "unusable":
                rank.unusable = event["text"]
            elif kind == "fault":
                rank.fault = event["traceback"]
            note(rank, event)

        def ticked() -> None:
            tick(rank)
            gone = [other.ended_at for other in ranks if other.ended_at and not other.ended_well]
            if stop.is_set() or (gone and time.monotonic() - min(gone) > GRACE_SECONDS):
                raise _Abandoned

        try:
            rank.death = run_child(child, message, noted, ticked)
        except _Abandoned:
            rank.death, rank.abandoned = Death(text="was still running when another rank had given up"), True
        rank.ended_at = time.monotonic()

    threads = [threading.Thread(target=follow, args=(rank, *started), daemon=True) for rank, started in zip(ranks, children, strict=True)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        stop.set()
        for thread in threads:
            thread.join()
        raise
    return ranks


def first_to_fail(ranks: Sequence[Rank]) -> Rank | None:
    """The rank that began a bad end, not those that lost their peer by it; None where all ended well.

    Before all others comes one that raised something of its own, then one that died, then one that never came.
    """
    bad = [rank for rank in ranks if not rank.ended_well]
    own = [rank for rank in bad if rank.raised is not None and not rank.raised["lost_a_peer"]]
    dead = [rank for rank in bad if rank.death is not None and not rank.death.hung and not rank.abandoned]
    late = [rank for rank in bad if rank.abandoned or (rank.death is not None and rank.death.hung)]
    return min(own or dead or late or bad, key=lambda rank: rank.ended_at, default=None)


def peer_words(text: str) -> str:
    """What gloo says of a lost rank, without the file of its own source and the advice behind it; cut to 160 characters."""
    return re.sub(r"\[[^\]\s]*\.\w+:\d+\]\s*", "", text).partition(". This is typically")[0][:160]


def lost_a_peer(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone or late."""
    return any(words in str(error) for words in LOST_A_PEER)
