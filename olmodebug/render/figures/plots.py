"""Curves and stacked areas over steps or events, in one frame with axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..svg import Frame, chart, linear, points, round_ticks, tag, thinned
from .parts import WIDTH

LEFT, RIGHT, TOP, HEIGHT = 64.0, 708.0, 14.0, 190.0  # the plotting area; the labels stand left of it and under it

COLUMNS = 300  # stretches of a long curve, each drawn by its lowest and highest value


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve: its values in order (None where there is none), its words, its colour class."""

    name: str
    values: Sequence[float | None]
    colour: str = "c1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A vertical line at an index, with a word: the first offender, the peak, an overflow."""

    index: float
    text: str
    class_: str = "bad"


def curves(
    series: Sequence[Series],
    *,
    title: str,
    start: int = 0,
    marks: Sequence[Mark] = (),
    floor: float | None = None,
    level: tuple[float, str] | None = None,
) -> Markup:
    """Lines over a common index that begins at `start`; values that are not finite leave a gap and a mark of their own.

    `floor` is where the vertical axis begins at the latest, `level` a dashed line across with a word.
    """
    finite = [value for one in series for value in one.values if value is not None and math.isfinite(value)]
    levels = [level[0]] if level else []
    low, high = min([*finite, *levels, *([floor] if floor is not None else [])], default=0.0), max([*finite, *levels], default=1.0)
    length = max((len(one.values) for one in series), default=1)
    frame = _frame(length, low, high if high > low else low + 1, start)
    drawn: list[object] = [frame.horizontal([(tick, f"{tick:g}") for tick in round_ticks(low, high if high > low else low + 1)])]
    drawn.append(
        frame.vertical([(tick, f"{tick:.0f}") for tick in round_ticks(start, start + max(length - 1, 1), 8) if tick == round(tick)])
    )
    if level:
        drawn.append(tag("line", x1=LEFT, x2=RIGHT, y1=frame.y(level[0]), y2=frame.y(level[0]), class_="bound"))
        drawn.append(tag("text", level[1], x=RIGHT, y=frame.y(level[0]) - 5, class_="label", text_anchor="end"))
    for one in series:
        drawn += _curve(one, frame, start)
    drawn += [_mark(mark, frame) for mark in marks]
    return chart(*drawn, width=WIDTH, height=frame.bottom + 24, title=title)


def stacked(
    bands: Sequence[tuple[str, str, Sequence[float]]],
    *,
    title: str,
    ticks: Sequence[tuple[float, str]],
    stretches: Sequence[tuple[int, str]],
    marks: Sequence[Mark] = (),
    level: tuple[float, str] | None = None,
) -> Markup:
    """Bands of (colour class, words, values) on top of each other; `stretches` are (first index, word) along the bottom."""
    length = len(bands[0][2]) if bands else 0
    totals = [sum(values[index] for _, _, values in bands) for index in range(length)]
    high = max([*totals, level[0] if level else 0, 1])
    frame = _frame(length, 0, high * (1.1 if marks else 1.02), 0)  # a mark's words stand above what it marks
    drawn: list[object] = [frame.horizontal(ticks)]
    base = [0.0] * length
    for colour, words, values in bands:
        top = [low + value for low, value in zip(base, values, strict=True)]
        outline = [(frame.x(i), frame.y(value)) for i, value in enumerate(top)]
        outline += [(frame.x(i), frame.y(value)) for i, value in reversed(list(enumerate(base)))]
        drawn.append(tag("polygon", tag("title", words), points=points(outline), class_=colour))
        base = top
    drawn.append(_stretches(stretches, length, frame))
    if level:
        drawn.append(tag("line", x1=LEFT, x2=RIGHT, y1=frame.y(level[0]), y2=frame.y(level[0]), class_="bad-line"))
        drawn.append(tag("text", level[1], x=RIGHT, y=frame.y(level[0]) - 5, class_="bad-text", text_anchor="end"))
    drawn += [_mark(mark, frame) for mark in marks]
    return chart(*drawn, width=WIDTH, height=frame.bottom + 24, title=title)


def _frame(length: int, low: float, high: float, start: int) -> Frame:
    x = linear(start, start + max(length - 1, 1), LEFT, RIGHT)
    return Frame(left=LEFT, right=RIGHT, top=TOP, bottom=TOP + HEIGHT, x=x, y=linear(low, high, TOP + HEIGHT, TOP))


def _curve(one: Series, frame: Frame, start: int) -> list[object]:
    """Each stretch of finite values as a line, each value that is not as a mark at the top."""
    drawn: list[object] = []
    stretch: list[tuple[int, float]] = []

    def close() -> None:
        kept = thinned([value for _, value in stretch], COLUMNS)
        pairs = [(frame.x(start + stretch[index][0]), frame.y(value)) for index, value in kept]
        if len(pairs) == 1:
            drawn.append(tag("circle", cx=pairs[0][0], cy=pairs[0][1], r=3, class_=one.colour))
        elif pairs:
            drawn.append(tag("polyline", tag("title", one.name), points=points(pairs), class_=f"line line-{one.colour}"))
        stretch.clear()

    for index, value in enumerate(one.values):
        if value is not None and math.isfinite(value):
            stretch.append((index, value))
            continue
        close()
        if value is not None:
            drawn.append(
                tag(
                    "text",
                    "×",
                    tag("title", f"{one.name}: {value} at {start + index}"),
                    x=frame.x(start + index),
                    y=TOP + 10,
                    class_="bad-text",
                    text_anchor="middle",
                )
            )
    close()
    return drawn


def _mark(mark: Mark, frame: Frame) -> Markup:
    x = frame.x(mark.index)
    side = "end" if x > (LEFT + RIGHT) / 2 else "start"
    shift = -5 if side == "end" else 5
    line = tag("line", x1=x, x2=x, y1=TOP, y2=frame.bottom, class_=f"{mark.class_}-line")
    return Markup("").join([line, tag("text", mark.text, x=x + shift, y=TOP + 11, class_=f"{mark.class_}-text", text_anchor=side)])


def _stretches(stretches: Sequence[tuple[int, str]], length: int, frame: Frame) -> Markup:
    """A tick where each part begins, and its word where there is room for it."""
    drawn: list[object] = []
    for (first, word), (after, _) in zip(stretches, [*stretches[1:], (max(length - 1, 1), "")], strict=True):
        x = frame.x(first)
        drawn.append(tag("line", x1=x, x2=x, y1=frame.bottom, y2=frame.bottom + 6, class_="axis"))
        if frame.x(after) - x > 6.5 * len(word) + 6:
            drawn.append(tag("text", word, x=(x + frame.x(after)) / 2, y=frame.bottom + 17, class_="tick", text_anchor="middle"))
    return tag("g", *drawn)
