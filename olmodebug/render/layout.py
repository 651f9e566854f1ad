"""The right console, and text that wraps with a hanging indent and loses nothing at any width.

Strings from outside never pass through rich's markup, which would eat `[batch, seq_len]` and `weight[bold]`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.text import Text

NARROWEST_BODY = 20  # columns; with less room the head stands on a line of its own
BODY_UNDER_HEAD = 4  # columns; the body's indent in that case

LABEL = 13  # columns: two of margin, the longest label ("reproduce"), two between label and text

ASCII = str.maketrans(
    {"✓": "+", "✗": "x", "–": "-", "—": "-", "…": "...", "→": "->", "×": "x", "≤": "<=", "≥": ">=", "·": "."}
    | dict(zip("▁▂▃▄▅▆▇█", ".:-=+*%#", strict=True))  # bars and timelines
)

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline: a terminal would obey them

Part = tuple[str, str]


def console(stream: IO[str], *, width: int | None = None) -> Console:
    """The console that every command draws on: no markup, no highlighting, NO_COLOR honoured.

    Without `width`, a terminal gives its own, and a file or a pipe gets one unbroken line per record.
    """
    pipe = width is None and not stream.isatty()
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False, soft_wrap=pipe)


@dataclass(frozen=True, slots=True)
class Line:
    """Styled parts of text after a head; what does not fit continues below the body, `indent` columns in."""

    parts: tuple[Part, ...]
    head: Part = ("", "")
    indent: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        head = Text(printable(self.head[0], options.encoding), style=self.head[1])
        body = Text.assemble(*((printable(text, options.encoding), style) for text, style in self.parts))
        indent = self.indent
        if options.no_wrap:
            lines = list(body.split(allow_blank=True))
        else:
            if cell_len(head.plain) > indent or (head and options.max_width - indent < NARROWEST_BODY):
                for piece in head.wrap(console, options.max_width, overflow="fold"):
                    yield from _row(piece, console)
                head, indent = Text(), min(BODY_UNDER_HEAD, indent)
            lines = list(body.wrap(console, max(2, options.max_width - indent), overflow="fold"))
        for i, line in enumerate(lines):
            start = head if i == 0 else Text()
            yield from _row(Text.assemble(start, " " * max(0, indent - cell_len(start.plain)), line), console)


def line(*parts: str | Part, head: str | Part = "", indent: int = 0) -> Line:
    """A Line of which every part is text or (text, style)."""
    return Line(tuple(map(_part, parts)), _part(head), indent)


def row(label: str, text: str) -> Line:
    """A label in the margin and its text beside it."""
    return line(text, head=(f"  {label}", "dim"), indent=LABEL)


def printable(text: str, encoding: str) -> str:
    """The text with nothing in it that a terminal would obey or the encoding refuse."""
    text = CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text.replace("\r\n", "\n"))
    if not encoding.startswith("utf"):
        text = text.translate(ASCII)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _part(part: str | Part) -> Part:
    return (part, "") if isinstance(part, str) else part


def _row(text: Text, console: Console) -> Iterator[Segment]:
    text.rstrip()
    yield from text.render(console, end="\n")
