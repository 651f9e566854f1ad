"""What several figures are made of: tables, lists, legends, and one bar that is shared out."""

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from ...units import bytes_text
from ..svg import chart, tag

WIDTH = 720.0  # of every chart, in the units of its viewBox; the page scales it

# One colour a kind of memory, the same in every figure.
COLOURS = {
    "parameter": "c1",
    "gradient": "c2",
    "optimizer state": "c3",
    "activation": "c4",
    "logits": "c5",
    "buffer": "c6",
    "input": "c7",
    "workspace": "c8",
}


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: frozenset[int] = frozenset()) -> Markup:
    """A table that scrolls by itself on a narrow screen; `numbers` are the columns that stand at the right."""

    def cell(name: str, column: int, value: object) -> Markup:
        return tag(name, "" if value is None else value, class_="number" if column in numbers else None)

    head = tag("tr", *(cell("th", column, text) for column, text in enumerate(heads)))
    body = [tag("tr", *(cell("td", column, value) for column, value in enumerate(row))) for row in rows]
    inner = tag("table", tag("thead", head), tag("tbody", *body), class_="data")
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=heads[0])


def listed(texts: Iterable[str]) -> Markup:
    """A list; empty for no texts."""
    items = [tag("li", text) for text in texts]
    return tag("ul", *items) if items else Markup("")


def paragraph(*parts: object, class_: str | None = None) -> Markup:
    return tag("p", *parts, class_=class_)


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """(colour class, words) in a row under a chart."""
    return tag("p", *(tag("span", tag("i", class_=f"swatch {colour}"), words) for colour, words in entries), class_="legend")


def shares(parts: Sequence[tuple[str, str, int]], *, total: int, title: str, mark: tuple[int, str] | None = None) -> Markup:
    """One bar of (colour class, words, bytes) out of `total` bytes, and a line at `mark` bytes."""
    end = max(total, sum(size for _, _, size in parts), mark[0] if mark else 0, 1)
    drawn, start = [tag("rect", x=0, y=18, width=WIDTH, height=34, class_="ground")], 0.0
    for colour, words, size in parts:
        width = WIDTH * size / end
        drawn.append(
            tag("rect", tag("title", f"{words}: {bytes_text(size)}"), x=start, y=18, width=max(width - 1, 0.5), height=34, class_=colour)
        )
        if width > 7 * len(words) + 8:  # about seven units a letter
            drawn.append(tag("text", words, x=start + 6, y=40, class_="on-colour"))
        start += width
    if mark:
        x = WIDTH * mark[0] / end
        drawn.append(tag("line", x1=x, x2=x, y1=10, y2=60, class_="bad-line"))
        side = "end" if x > WIDTH / 2 else "start"
        drawn.append(tag("text", mark[1], x=x, y=9, class_="tick", text_anchor=side))
    return chart(*drawn, width=WIDTH, height=64, title=title)
