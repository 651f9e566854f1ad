"""The tree of named shapes as text: one line a module, identical layers folded, sizes beside it."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group

from ..records import ModuleShape, ShapeTree
from ..units import bytes_text, count_text, dtype_text
from .layout import Line, line

NAME_COLUMN = 40  # columns for the indented module name; a longer one pushes the shapes to the right
UNALLOCATED = {"meta": "meta device", "fake": "fake tensors"}


def shapes_view(section: Mapping[str, Any]) -> Group:
    """The section `shapes` as text."""
    rows = tuple(ModuleShape(**{**row, "inputs": tuple(row["inputs"]), "outputs": tuple(row["outputs"])}) for row in section["rows"])
    return tree_view(ShapeTree(**{**section, "rows": rows}))


def tree_view(tree: ShapeTree) -> Group:
    """The whole tree under a legend of its names."""
    return Group(*_lines(tree))


def _lines(tree: ShapeTree) -> Iterator[Line]:
    legend = "B batch, T sequence length" + "".join(
        f", {name} {number}" for name, number in sorted(tree.names.items(), key=lambda n: -n[1])
    )
    yield line((legend, "dim"))
    if tree.device in UNALLOCATED:
        yield line((f"nothing was allocated ({UNALLOCATED[tree.device]})", "dim"))
    yield line("")
    for row in tree.rows:
        yield _row(row)


def _row(row: ModuleShape) -> Line:
    name = row.path.rpartition(".")[2] or row.kind
    last = f"..{int(name) + row.repeat - 1}  x {row.repeat}" if row.repeat > 1 else ""
    head = f"{'  ' * row.depth}{name}{last}"
    kind = "" if name == row.kind else f"{row.kind}  "
    if not row.called:
        shapes = "not called" if row.parameters and not kind.startswith(("ModuleList", "ModuleDict")) else ""
    else:
        shapes = f"{_joined(row.inputs)} -> {_joined(row.outputs)}"
    size = f"  {count_text(row.parameters)} {bytes_text(row.parameter_bytes)}" if row.parameters else ""
    dtype = f" {dtype_text(row.dtype)}" if row.dtype else ""
    padded = f"{head:{NAME_COLUMN}s} "
    return line(
        (f"{kind}", "dim"), (shapes, "cyan"), (size + dtype, ""), head=(padded, "bold" if row.depth < 2 else ""), indent=NAME_COLUMN + 1
    )


def _joined(shapes: tuple[str, ...]) -> str:
    shown = ", ".join(shapes[:3])
    return f"{shown}, ..." if len(shapes) > 3 else shown or "()"
