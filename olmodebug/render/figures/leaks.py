"""Which position depends on which later token, as a heat map, and the modules that let it through."""

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from ...report import NON_FINITE
from ...units import number_text
from ..svg import chart, tag
from .parts import legend, paragraph, table

MOST_CELLS = 48  # a side; a longer row is drawn in squares of several positions, each by its largest change
FAINTEST = 1e-3  # of the largest change: what is smaller is drawn no fainter
SIDE = 420.0
LEFT, TOP = 52.0, 22.0


def draw(section: Mapping[str, Any]) -> Markup:
    """The matrix with the future above the diagonal, what it says in a sentence, and the modules in order."""
    matrix = [[_finite(value) for value in row] for row in section["matrix"]]
    limit, length = section["limit"], len(matrix)
    future = [(t, p) for t in range(length) for p in range(t)]
    leaks = [(t, p) for t, p in future if matrix[t][p] > limit]
    setting = f" In {section['setting']}." if section["setting"] else ""
    worst = max((matrix[t][p] for t, p in leaks), default=0.0)
    words = (
        f"{len(leaks)} of {len(future)} pairs leak: a logit moves by up to {number_text(worst)} when only a later token is another one."
        if leaks
        else f"None of {len(future)} pairs leaks."
    )
    parts = [
        paragraph(f"{words}{setting} Rounding alone can make {number_text(limit)}."),
        _heat_map(matrix, limit),
        legend([("bad", "depends on a later token: may not be"), ("c1", "depends on itself or an earlier token: may be")]),
    ]
    if section["modules"]:
        parts.append(_modules(section))
    return Markup("").join(parts)


def _heat_map(matrix: list[list[float]], limit: float) -> Markup:
    """Down: the position whose logits are read. Across: the token that was changed."""
    length = len(matrix)
    step = max(1, math.ceil(length / MOST_CELLS))
    blocks = range(0, length, step)
    size = SIDE / len(blocks)
    highest = max((value for row in matrix for value in row), default=0.0)
    drawn: list[object] = [tag("rect", x=LEFT, y=TOP, width=SIDE, height=SIDE, class_="ground")]
    for p in blocks:
        for t in blocks:
            cells = [(matrix[i][j], i > j) for i in range(t, min(t + step, length)) for j in range(p, min(p + step, length))]
            leaking = [value for value, is_future in cells if is_future and value > limit]
            allowed = [value for value, is_future in cells if not is_future]
            value = max(leaking or allowed, default=0.0)
            if not value > limit:
                continue
            title = tag("title", f"token {t} changed: logits at position {p} move by {number_text(value)}")
            drawn.append(
                tag(
                    "rect",
                    title,
                    x=LEFT + t // step * size,
                    y=TOP + p // step * size,
                    width=max(size - 1, 1.0),
                    height=max(size - 1, 1.0),
                    class_="cell" if leaking else "allowed",
                    fill_opacity=_strength(value, limit, highest),
                )
            )
    drawn.append(tag("line", x1=LEFT, y1=TOP, x2=LEFT + SIDE, y2=TOP + SIDE, class_="axis"))
    every = max(1, math.ceil(length / 14))
    for index in range(0, length, every):
        middle = (index // step + 0.5) * size
        drawn.append(tag("text", index, x=LEFT + middle, y=TOP - 6, class_="tick", text_anchor="middle"))
        drawn.append(tag("text", index, x=LEFT - 6, y=TOP + middle + 4, class_="tick", text_anchor="end"))
    drawn.append(tag("text", "token changed", x=LEFT + SIDE + 8, y=TOP - 6, class_="label"))
    drawn.append(tag("text", "logits at", x=0, y=TOP - 6, class_="label"))
    return chart(
        *drawn, width=LEFT + SIDE + 100, height=TOP + SIDE + 4, title="which position depends on which token", class_="chart square"
    )


def _strength(value: float, limit: float, highest: float) -> str:
    """By the logarithm, so that a small leak is seen beside a large one; never fainter than a third."""
    low, high = math.log10(max(limit, highest * FAINTEST, 1e-300)), math.log10(max(highest, limit * 10, 1e-299))
    share = (math.log10(max(value, 1e-300)) - low) / (high - low) if high > low else 1.0
    return f"{0.35 + 0.65 * min(max(share, 0.0), 1.0):.2f}"


def _modules(section: Mapping[str, Any]) -> Markup:
    rows = [
        [item["module"] or "the model", item["kind"], number_text(_finite(item["change"])), "← the first to blame" if item["first"] else ""]
        for item in section["modules"]
    ]
    head = f"Modules whose output before token {section['cut']} changes, in the order they end"
    return Markup("<details open><summary>{}</summary>{}</details>").format(
        head, table(["module", "class", "change", ""], rows, numbers=frozenset({2}))
    )


def _finite(value: float | str) -> float:
    """NaN and infinities, which JSON holds as words, count as the largest change there is."""
    number = float(NON_FINITE.get(value, math.nan)) if isinstance(value, str) else float(value)
    return number if math.isfinite(number) else 1e308
