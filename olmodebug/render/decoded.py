"""A decoded log: what the text means, the causes in order, how to tell them apart, and the command that finds it."""

from collections.abc import Iterator, Sequence

from rich.console import Group

from ..guards.decode import Decoded
from ..units import plural
from .layout import Line, line, row


def decoded_view(found: Sequence[Decoded]) -> Group:
    """Every decoded text, roots first."""
    return Group(*(part for i, item in enumerate(found) for part in (*([line()] if i else []), *_one(item))))


def _one(item: Decoded) -> Iterator[Line]:
    yield line((item.meaning, "bold"))
    yield row("text", item.text)
    if item.folded:
        yield row("folded", f"{plural(item.folded, 'assertion line')}, one a thread: they are one fault")
    if item.facts:
        yield row("says", ", ".join(f"{name} {value}" for name, value in item.facts.items()))
    if item.place:
        late = "; the device reports late: the fault may lie in an earlier line" if item.asynchronous else ""
        yield row("traceback", f"{item.place}{late}")
    if item.verdict:
        yield row("verdict", item.verdict)
    for number, ranked in enumerate(item.causes, start=1):
        because = f"   [the log mentions {', '.join(ranked.because)}]" if ranked.because else ""
        yield row(f"cause {number}", f"{ranked.cause.text}{because}\nto tell: {ranked.cause.tell}")
    yield row("next", item.command)
