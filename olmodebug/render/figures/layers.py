"""An error a layer against its bound, on a logarithmic scale, with the first offender marked."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from ..svg import Frame, chart, decades, linear, logarithmic, points, tag
from .parts import WIDTH

LEFT, RIGHT, TOP, HEIGHT = 70.0, 700.0, 16.0, 180.0


def by_layer(
    layers: Sequence[tuple[str, float | None]], *, bound: float | None, bound_text: str, title: str, first: int | None = None
) -> Markup:
    """One dot a layer, in the order of the run; red above the bound, at the bottom where the error is zero, at the top where it is
    not finite. `first` is the index of the first offender."""
    known = [value for _, value in layers if value is not None and math.isfinite(value) and value > 0]
    low, high = min([*known, *([bound] if bound else [])], default=1e-3), max([*known, *([bound] if bound else [])], default=1.0)
    low, high = 10.0 ** math.floor(math.log10(low) - 0.3), 10.0 ** math.ceil(math.log10(high) + 0.1)
    frame = Frame(
        left=LEFT,
        right=RIGHT,
        top=TOP,
        bottom=TOP + HEIGHT,
        x=linear(0, max(len(layers) - 1, 1), LEFT + 14, RIGHT - 14),
        y=logarithmic(low, high, TOP + HEIGHT, TOP),
    )
    drawn: list[object] = [frame.horizontal([(tick, f"{tick:g}".replace("e-0", "e-")) for tick in decades(low, high)])]
    if bound is not None:
        drawn.append(tag("line", x1=LEFT, x2=RIGHT, y1=frame.y(bound), y2=frame.y(bound), class_="bound"))
        drawn.append(tag("text", bound_text, x=RIGHT, y=frame.y(bound) - 5, class_="label", text_anchor="end"))
    line = [(frame.x(index), _height(value, frame)) for index, (_, value) in enumerate(layers) if value is not None]
    drawn.append(tag("polyline", points=points(line), class_="line thin"))
    for index, (name, value) in enumerate(layers):
        if value is None:
            continue
        bad = bound is not None and not value <= bound
        words = f"{name}: {value:.3g}"
        drawn.append(
            tag(
                "circle",
                tag("title", words),
                cx=frame.x(index),
                cy=_height(value, frame),
                r=5 if bad else 4,
                class_="bad" if bad else "dot",
            )
        )
    drawn.append(_names([name for name, _ in layers], frame))
    if first is not None and 0 <= first < len(layers):
        x = frame.x(first)
        side = "end" if x > WIDTH / 2 else "start"
        drawn.append(tag("line", x1=x, x2=x, y1=TOP, y2=frame.bottom, class_="bad-line"))
        drawn.append(
            tag("text", f"first: {layers[first][0]}", x=x + (6 if side == "start" else -6), y=TOP + 11, class_="bad-text", text_anchor=side)
        )
    return chart(*drawn, width=WIDTH, height=frame.bottom + 26, title=title)


def _height(value: float, frame: Frame) -> float:
    if not math.isfinite(value):
        return frame.top
    return frame.y(value) if value > 0 else frame.bottom


def _names(names: Sequence[str], frame: Frame) -> Markup:
    """Short names where they fit: `layers.3` is `3`; the full one is in each dot's title and in the table."""
    room = (frame.right - frame.left) / max(len(names), 1)
    drawn, free = [], -1.0
    for index, name in enumerate(names):
        short = name.rpartition(".")[2]
        x, width = frame.x(index), 6.5 * len(short) + 8
        if x - width / 2 >= free or room > width:
            drawn.append(tag("text", short, x=x, y=frame.bottom + 17, class_="tick", text_anchor="middle"))
            free = x + width / 2
    return tag("g", *drawn)
