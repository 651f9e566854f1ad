"""The plain values that instruments hand on: no live tensor, every one JSON-able.

Shapes are tuples of ints, dtypes are names without `torch.`, sizes are bytes.
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace

from .units import count_text, dtype_text, plural

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """What is known of a tensor without keeping it; prints `f32[2,8,16]`.

    `storage` is a number that tensors of one run share exactly where they share memory (0: unknown), `digest` a checksum
    of the bits; `finite`, `absmax` and `digest` are None where they were not asked for.
    """

    shape: tuple[int, ...]
    dtype: str
    device: str = "cpu"
    strides: tuple[int, ...] = ()
    storage: int = 0
    finite: bool | None = None
    absmax: float | None = None
    digest: int | None = None

    def __str__(self) -> str:
        return f"{dtype_text(self.dtype)}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """A place in the subject: module path, qualified function name, file and line of the subject's own source, op."""

    module: str = ""
    function: str | None = None
    file: str | None = None
    line: int | None = None
    op: str | None = None

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file and self.line else self.file or ""
        parts = [self.function or "", place, f"module {self.module}" if self.module else "", self.op or ""]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One aten op of a traced run: where it was called, what went in, what came out.

    `phase` is `forward`, `backward`, or `recompute` for what activation checkpointing runs again during backward.
    `parameters` are the names of the parameters and buffers that it reads, directly or through a view.
    """

    index: int
    op: str
    where: Where
    phase: str = "forward"
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    parameters: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str | None, int | None, str]:
        """What makes this event the same event in another run."""
        return (self.op, self.where.module, self.where.file, self.where.line, self.phase)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCall:
    """One call of a module: its path and class, the tensors that went in and came out, and which events lie inside."""

    module: str
    kind: str
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    first_event: int = 0
    last_event: int = 0
    depth: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The inputs of one run, small enough to print: `[batch, seq_len]` integers as tuples."""

    name: str
    input_ids: Rows
    attention_mask: Rows | None = None
    position_ids: Rows | None = None
    labels: Rows | None = None
    seed: int = 0

    @property
    def batch_size(self) -> int:
        return len(self.input_ids)

    @property
    def seq_len(self) -> int:
        return len(self.input_ids[0]) if self.input_ids else 0

    def without_last(self, missing: int) -> "Case":
        """The case without so many of the last tokens."""
        if not missing:
            return self
        ids, mask, positions, labels = (
            None if rows is None else tuple(row[:-missing] for row in rows)
            for rows in (self.input_ids, self.attention_mask, self.position_ids, self.labels)
        )
        return replace(self, input_ids=ids or (), attention_mask=mask, position_ids=positions, labels=labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two tensors that should agree: how far apart, in how many elements, and where first."""

    max_abs: float
    scale: float
    mismatched: int
    total: int
    index: tuple[int, ...] = ()
    limit: float = 0.0
    notes: tuple[str, ...] = field(default=())

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest magnitude."""
        return self.max_abs / self.scale if self.scale else self.max_abs

    @property
    def apart(self) -> str:
        """How they differ, as the end of a sentence."""
        return f"differ by {self.max_abs:.3g}" if math.isfinite(self.max_abs) else "are not finite in both alike"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleShape:
    """One module of the tree. `repeat` counts identical siblings that are folded into it; sizes are in bytes.

    `inputs` and `outputs` are named shapes; empty for a module that forward never calls.
    """

    path: str
    kind: str
    depth: int
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    parameters: int = 0
    parameter_bytes: int = 0
    dtype: str = ""
    repeat: int = 1
    called: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeTree:
    """The modules in the order of the model, what each name of a dimension stands for, and where it was run.

    `runs` are the (batch, seq_len) of the forwards that told the dimensions apart.
    """

    subject: str
    rows: tuple[ModuleShape, ...]
    names: dict[str, int]
    parameters: int
    parameter_bytes: int
    device: str
    dtype: str = ""
    runs: tuple[tuple[int, int], ...] = ()

    def __repr__(self) -> str:
        return f"<ShapeTree {self.subject}: {plural(len(self.rows), 'row')}, {count_text(self.parameters)} parameters>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from .render.notebook import shapes_fragment  # a notebook's hook; the records stay without rich

        return shapes_fragment(self)

    def to_json(self) -> str:
        """The `shapes` section of a report, as `olmodebug shapes --json` writes it."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"
