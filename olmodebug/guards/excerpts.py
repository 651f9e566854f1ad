"""The lines of source around a place, without torch."""

import linecache

from ..records import Where
from ..report import SourceLine


def lines_at(where: Where, around: int = 1) -> tuple[SourceLine, ...]:
    """The line of a place, marked, between its neighbours; empty where the file cannot be read."""
    if not where.file or not where.line:
        return ()
    numbers = range(max(1, where.line - around), where.line + around + 1)
    texts = ((number, linecache.getline(where.file, number)) for number in numbers)
    return tuple(SourceLine(number=n, text=text.rstrip("\n"), marked=n == where.line) for n, text in texts if text)
