"""Which position depends on which later token, as a grid of characters, and the modules that let it through."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group

from .layout import Line, line, row

MOST_POSITIONS = 40  # a wider grid than a terminal would be no picture
MOST_MODULES = 6


def leaks_view(section: Mapping[str, Any]) -> Group:
    """The section `leaks` as text."""
    return Group(*_lines(section))


def _lines(section: Mapping[str, Any]) -> Iterator[Line]:
    matrix, limit = section["matrix"], section["limit"]
    size = len(matrix)
    future = size * (size - 1) // 2
    leaking = sum(float(matrix[t][p]) > limit for t in range(size) for p in range(t))
    yield line(
        (f"{leaking} of {future} earlier positions change with a later token", "bold"), ("  (x changes, o and . as they may)", "dim")
    )
    if size <= MOST_POSITIONS:
        yield row("changed", "".join(str(p % 10) for p in range(size)) + "  observed position")
        for t in range(size):  # float(): a number that JSON cannot hold is a word
            marks = "".join("." if float(matrix[t][p]) <= limit else "x" if p < t else "o" for p in range(size))
            yield row(f"token {t}", marks)
    shown = [module for module in section["modules"] if module["first"]]
    for module in shown[:MOST_MODULES]:
        yield row(
            "let in by", f"{module['module'] or 'the model itself'} ({module['kind']}): earlier positions change by {module['change']:.3g}"
        )
    if len(shown) > MOST_MODULES:
        yield row("", f"and {len(shown) - MOST_MODULES} more modules")
