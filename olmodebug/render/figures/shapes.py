"""The tree of modules with named dimensions, folded and unfolded by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ...units import bytes_text, count_text, dtype_text
from ..svg import tag
from .parts import paragraph

MOST_OPEN = 80  # rows: a longer tree begins with only its first three levels open
DEPTH_OPEN = 3


def draw(section: Mapping[str, Any]) -> Markup:
    """A legend of the names, and the tree."""
    rows = section["rows"]
    size = f"{count_text(section['parameters'])} parameters, {bytes_text(section['parameter_bytes'])}"
    nothing = "; nothing was allocated" if section["device"] == "meta" else ""
    names = sorted(section["names"].items(), key=lambda item: -item[1])
    tree, _ = _level(rows, 0, rows[0]["depth"] if rows else 0, DEPTH_OPEN if len(rows) > MOST_OPEN else 99)
    return Markup("").join(
        [
            paragraph(f"{section['subject']}: {size}{nothing}."),
            paragraph("B batch, T sequence length", *(f", {name} {number}" for name, number in names), class_="quiet"),
            tag("div", tree, class_="tree"),
        ]
    )


def _level(rows: Sequence[Mapping[str, Any]], start: int, depth: int, opened: int) -> tuple[Markup, int]:
    """The rows of one depth from `start` on, each with those below it, and the index behind them."""
    items: list[Markup] = []
    index = start
    while index < len(rows) and rows[index]["depth"] >= depth:
        row = rows[index]
        index += 1
        if index < len(rows) and rows[index]["depth"] > row["depth"]:
            below, index = _level(rows, index, rows[index]["depth"], opened)
            summary = tag("summary", *_row(row))
            items.append(tag("li", tag("details", summary, below, open="" if row["depth"] < opened else None)))
        else:
            items.append(tag("li", *_row(row), class_="leaf"))
    return tag("ul", *items), index


def _row(row: Mapping[str, Any]) -> list[object]:
    name = row["path"].rpartition(".")[2] or row["kind"]
    last = f"..{int(name) + row['repeat'] - 1}" if row["repeat"] > 1 and name.isdigit() else ""
    parts: list[object] = [tag("b", name + last)]
    if row["repeat"] > 1:
        parts.append(tag("span", f" × {row['repeat']}", class_="times"))
    if row["kind"] != name:
        parts.append(tag("span", f" {row['kind']}", class_="quiet"))
    if row["called"]:
        parts.append(tag("span", f" {_joined(row['inputs'])} → {_joined(row['outputs'])}", class_="shape"))
    elif row["parameters"] and row["kind"] not in ("ModuleList", "ModuleDict"):
        parts.append(" not called")
    if row["parameters"]:
        dtype = f" {dtype_text(row['dtype'])}" if row["dtype"] else ""
        parts.append(tag("span", f" {count_text(row['parameters'])}, {bytes_text(row['parameter_bytes'])}{dtype}", class_="quiet"))
    return parts


def _joined(shapes: Sequence[str]) -> str:
    return ", ".join(shapes[:3]) + (", ..." if len(shapes) > 3 else "") or "()"
