"""Charts by hand: tags that escape what they hold, scales, and ticks. Colours are classes, so that one style sheet rules them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Scale = Callable[[float], float]


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """`tag("text", "a < b", x=3, class_="label")`: children are escaped unless they are Markup; None attributes are left out.

    Underscores in a name become hyphens, and a trailing one goes (`class_`).
    """
    named = (
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _number(value))
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(child if isinstance(child, Markup) else escape(str(child)) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(named), inside)


def chart(*children: object, width: float, height: float, title: str, class_: str = "chart") -> Markup:
    """An `svg` that scales with the page and says to a screen reader what it shows."""
    picture = tag("svg", tag("title", title), *children, viewBox=f"0 0 {_number(width)} {_number(height)}", role="img", class_=class_)
    return tag(
        "div", picture, class_="scroll", tabindex="0", role="region", aria_label=title
    )  # a phone scrolls it; its letters stay legible


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Maps low..high onto start..end; one value alone lands in the middle."""
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """Maps low..high, both positive, onto start..end by their logarithms; what is below low lands on start."""
    inner = linear(math.log10(low), math.log10(high), start, end)
    return lambda value: inner(math.log10(max(value, low)))


def decades(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten from at or below low to at or above high, at most about `most` of them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / most))
    return [10.0**power for power in range(first, last + 1, step)]


def round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within low..high, at most about `most` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def points(pairs: Sequence[tuple[float, float]]) -> str:
    """Coordinates for a polyline, with a tenth of a pixel."""
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The plotting area of a chart and its two scales; draws its own axes."""

    left: float
    top: float
    right: float
    bottom: float
    x: Scale
    y: Scale

    def horizontal(self, ticks: Sequence[tuple[float, str]]) -> Markup:
        """Grid lines across, with their labels at the left."""
        return tag(
            "g",
            *(
                Markup("").join(
                    [
                        tag("line", x1=self.left, x2=self.right, y1=self.y(value), y2=self.y(value), class_="grid"),
                        tag("text", label, x=self.left - 6, y=self.y(value) + 4, class_="tick", text_anchor="end"),
                    ]
                )
                for value, label in ticks
            ),
        )

    def vertical(self, ticks: Sequence[tuple[float, str]]) -> Markup:
        """Labels along the bottom."""
        return tag(
            "g", *(tag("text", label, x=self.x(value), y=self.bottom + 16, class_="tick", text_anchor="middle") for value, label in ticks)
        )


def thinned(series: Sequence[float], columns: int) -> list[tuple[int, float]]:
    """At most `2 * columns` points (index, value) of a long series: the lowest and the highest of every stretch, in order."""
    if len(series) <= 2 * columns:
        return list(enumerate(series))
    kept: list[tuple[int, float]] = []
    for column in range(columns):
        start, end = column * len(series) // columns, (column + 1) * len(series) // columns
        stretch = range(start, end)
        low, high = min(stretch, key=series.__getitem__), max(stretch, key=series.__getitem__)
        kept += [(index, series[index]) for index in sorted({low, high})]
    return kept


def _number(value: object) -> object:
    """A coordinate with a tenth of a pixel: more only makes the page larger."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
