"""A recorded step that some rank never finished: who does not come to which collective, told as soon as the command has ended."""

from collections.abc import Sequence
from pathlib import Path

from ..ranks.calls import files_in, first_unlike, has_ended, parted
from ..report import Finding
from .journal import Event

COMPLETES = "ranks.step-completes"


def unfinished(folder: Path | None, journals: Sequence[list[Event]]) -> list[Finding]:
    """The finding on the records of a command that failed. None where a rank ended with an exception of its own, which torch
    has shown already and from which all the rest may come."""
    files = files_in(folder) if folder is not None else []
    if len(files) < 2 or all(has_ended(file) for file in files) or any(_raised(events) for events in journals):
        return []
    unlike = first_unlike(files)
    if unlike is None:
        return []
    message, where = parted(unlike)
    return [Finding(probe=COMPLETES, severity="error", message=message, where=where)]


def _raised(events: list[Event]) -> bool:
    start = next((e for e in events if e["event"] == "start"), {})
    end = next((e for e in events if e["event"] == "end"), {})
    trained = bool(end.get("ops"))  # what started the ranks runs no op
    return start.get("rank") is not None and trained and bool(end.get("exception")) and not end.get("lost_a_peer")
