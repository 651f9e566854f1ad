"""Rotary position embeddings as a recording shows them: queries and keys at the scores, and the angles they are turned by.

Nothing is taken from names of functions: queries and keys are read where scores are made, angles where a cosine is
taken or a table of cosines is read. A sequence of one and the same token makes the rotation visible: before it, every
position has the same query and the same key, so that whatever changes from position to position is the rotation.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..own_code import own_code, quiet
from ..records import Case, Where
from ..relations.diagnose import is_fused_attention
from ..settle import random_state_kept, set_seed
from ..sources import Spot
from ..subject import Subject
from .products import product_at
from .tracer import Recording, record

# Tables are known by the names that people give their buffers.
TABLE = re.compile(r"cos|sin|freqs|rope|rotary", re.IGNORECASE)
SEQ_LENS = (47, 43, 41, 37, 31, 29, 23, 19, 17, 13, 11, 7)
LOW = ("bfloat16", "float16")
OF_LENGTH_1 = 2e-2  # cosines and sines may have been rounded to 8 bits
# Ops that only move values: behind them stands the op that made the values.
MOVES = ("expand", "view", "_unsafe_view", "transpose", "permute", "clone", "unsqueeze", "squeeze", "alias", "slice", "reshape", "t", "_to_copy",
         "contiguous", "select", "index", "copy_", "cat", "stack", "unflatten", "split", "detach", "view_as_real", "as_strided", "repeat")  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Scores:
    """One attention: queries and keys `[heads, seq_len, head_dim]` and values where they are seen, as they meet.

    `values_at`: the op that the values go into, and which of its operands they are.
    """

    module: str
    index: int
    query: Tensor
    key: Tensor
    value: Tensor | None
    values_at: tuple[int, int] | None = None

    @property
    def scores(self) -> Tensor:
        """`[heads, seq_len, seq_len]` in float64, without scale and mask."""
        query, key = self.query.double(), self.key.double()
        if len(key) < len(query):
            key = key.repeat_interleave(len(query) // len(key), 0)
        return query @ key.transpose(-1, -2)


@dataclass(slots=True, kw_only=True)
class Angles:
    """The angles `[seq_len, pairs]` of one table, by their cosines and sines in float64, each pair once. `low`: the 16-bit dtype
    that the angles themselves stood in when their cosine was taken."""

    cos: Tensor
    sin: Tensor
    where: Where
    spot: Spot | None
    name: str | None = None
    low: str | None = None

    @property
    def frequencies(self) -> Tensor:
        """The angle from the first row to the second, `[pairs]`: where positions start at 0 or at 1 makes no difference."""
        turned = self.sin[1] * self.cos[0] - self.cos[1] * self.sin[0]
        return torch.atan2(turned, self.cos[1] * self.cos[0] + self.sin[1] * self.sin[0])


def constant_case(twin: Subject, *, start: int = 0) -> Case:
    """One row of one token, over and over, as long as tells dimensions apart."""
    sizes = {size for p in [*twin.model.parameters(), *twin.model.buffers()] for size in p.shape}
    longest = twin.usable_positions or 10**6
    seq = next((n for n in SEQ_LENS if n <= longest and n not in sizes), min(longest, 5))
    token = twin.token_ids(1, 1, seed=30)[0][0]
    positions = (tuple(range(start, start + seq)),) if start else None
    return Case(name=f"{seq} times one token", input_ids=((token,) * seq,), position_ids=positions)


def trace_case(twin: Subject, case: Case) -> Recording:
    """A recording of one run with its tensors."""
    with torch.no_grad(), quiet(), random_state_kept(), own_code(twin, case):
        set_seed(twin.seed)
        return record(twin.model, lambda: twin.at_once.call(case), keep=True)


def attentions(recording: Recording, seq: int) -> list[Scores]:
    """Every attention of a run on one row, in the order they run; ones whose layout is not understood are left out."""
    found: list[Scores] = []
    for index, (event, kept) in enumerate(zip(recording.events, recording.kept, strict=True)):
        value: Tensor | None = None
        place: tuple[int, int] | None = (index, 2)
        if is_fused_attention(event.op):
            query, key, value = (kept.arguments.get(name) for name in ("query", "key", "value"))
            if not isinstance(query, Tensor) or not isinstance(key, Tensor) or query.ndim != 4 or len(query) != 1:
                continue
            query, key, value = query[0], key[0], value[0] if isinstance(value, Tensor) else None
            if query.shape[-2] == seq < key.shape[-2]:  # a cache with room for more: the first places are these tokens'
                key, value = key[:, :seq], None if value is None else value[:, :seq]
        elif (product := product_at(recording, index, seq)) is not None:
            query, key = product.query, product.key
            place = _values(recording, index, seq)
            value = None if place is None else recording.kept[place[0]].inputs[place[1]]
        else:
            continue
        if (
            query.ndim == 3
            and query.shape[-2] == seq
            and key.shape[-2] == seq
            and query.shape[-1] == key.shape[-1]
            and len(query) % len(key) == 0
        ):
            found.append(Scores(module=event.where.module, index=index, query=query, key=key, value=value, values_at=place))
    return found


def varies(tensor: Tensor, limit: float) -> bool:
    """Whether any position of `[heads, seq_len, dim]` differs from the first."""
    scale = float(tensor.abs().max())
    return bool(((tensor - tensor[:, :1]).abs() > limit * scale).any()) if tensor.numel() else False


def maker(recording: Recording, index: int, operand: int) -> int | None:
    """The op that made an operand of an op: not the ones that moved, joined or copied its values."""
    current, place = index, operand
    for _ in range(64):
        info = recording.events[current].inputs[place]
        source = next(
            (i for i in range(current - 1, -1, -1) if any(o.storage == info.storage and o.storage for o in recording.events[i].outputs)),
            None,
        )
        if source is None:
            return None
        event = recording.events[source]
        if event.op in ("mul", "mul_", "div", "div_") and len(event.inputs) == 1:  # by a number: a scale on what was made before
            current, place = source, 0
            continue
        if event.op not in MOVES or not event.inputs:
            return source
        # Of joined parts the one that differs from position to position is the rotated one; it comes first or alone.
        inputs = recording.kept[source].inputs
        moving = [k for k, t in enumerate(inputs) if t.is_floating_point() and t.numel() and float((t - t.flatten()[0]).abs().max()) > 0]
        current, place = source, (moving or [0])[0]
    return None


def angle_tables(recording: Recording, seq: int) -> list[Angles]:
    """The distinct tables of angles that a run on one row uses: cosines that it takes, or tables that it reads."""
    found: list[Angles] = []
    tables: dict[str, tuple[int, Tensor]] = {}
    for index, (event, kept) in enumerate(zip(recording.events, recording.kept, strict=True)):
        if event.op == "cos":
            angles = _rows(kept.inputs[0], seq)
            if angles is not None:
                _add(found, angles.double().cos(), angles.double().sin(), recording, index, None)
        elif event.parameters and TABLE.search(event.parameters[0]) and kept.outputs:
            rows = _rows(kept.outputs[0], seq)
            if rows is not None:
                tables.setdefault(event.parameters[0], (index, rows))
    for name, (index, rows) in tables.items():
        if rows.is_complex():
            _add(found, rows.real.double(), rows.imag.double(), recording, index, name)
        elif "cos" in name and (partner := tables.get(name.replace("cos", "sin"))) is not None and partner[1].shape == rows.shape:
            _add(found, rows.double(), partner[1].double(), recording, index, name)
    if not found:
        _multiplied(found, recording, seq)
    return found


def _multiplied(found: list[Angles], recording: Recording, seq: int) -> None:
    """Adds the tables that states are multiplied with and whose values are what they are known by: complex numbers of length
    1, matrices that turn, or two tables whose squares add up to 1."""
    plain: list[tuple[int, Tensor]] = []
    for index, (event, kept) in enumerate(zip(recording.events, recording.kept, strict=True)):
        if event.op not in ("mul", "mul_") or len(kept.inputs) < 2:
            continue
        small, large = sorted(kept.inputs[:2], key=lambda t: t.numel())
        flat = small.squeeze()
        if small.numel() == large.numel() or large.ndim < 3 or flat.ndim < 2 or flat.shape[0] != seq:
            continue
        if flat.is_complex() and (rows := _rows(flat, seq)) is not None:
            _turning(found, rows.real, rows.imag, recording, index)
        elif flat.is_floating_point() and flat.ndim == 4 and flat.shape[2:] == (2, 2):
            _turning(found, flat[..., 0, 0], flat[..., 1, 0], recording, index)
        elif (rows := _rows(flat, seq)) is not None:
            for _, other in plain:
                if other.shape == rows.shape:
                    cos, sin = (other, rows) if float(other[0].abs().min()) > float(rows[0].abs().max()) else (rows, other)
                    _turning(found, cos, sin, recording, index)
            plain.append((index, rows))


def _turning(found: list[Angles], cos: Tensor, sin: Tensor, recording: Recording, index: int) -> None:
    cos, sin = cos.double(), sin.double()
    if float((cos.square() + sin.square() - 1).abs().max()) < OF_LENGTH_1 and float((cos - cos[:1]).abs().max()) > OF_LENGTH_1:
        _add(found, cos, sin, recording, index, None)


def table_factor(recording: Recording, table: Angles, seq: int) -> float | None:
    """What cosines are multiplied by on their way to the queries: 1, or an attention factor. Read from the very table
    that states are multiplied with, so that a scale on the queries alone does not count; None where it is not seen."""
    pairs = table.cos.shape[1]
    for event, kept in zip(recording.events, recording.kept, strict=True):
        if event.op not in ("mul", "mul_") or len(kept.inputs) < 2 or max(t.ndim for t in kept.inputs) < 3:
            continue
        for tensor, other in (kept.inputs[:2], kept.inputs[1::-1]):
            rows = _rows(tensor, seq)
            if rows is None or rows.is_complex() or rows.shape[1] not in (pairs, 2 * pairs) or other.numel() <= tensor.numel():
                continue
            factor = float(rows[0, 0])
            layouts = (rows, rows[:, :pairs], rows[:, ::2])
            if factor > 0 and any(
                t.shape == table.cos.shape and torch.allclose(t.double() / factor, table.cos, atol=1e-4) for t in layouts
            ):
                return factor
    return None


def rounded_table(recording: Recording, table: Angles, seq: int) -> str | None:
    """The 16-bit dtype that a run casts the cosines of a table to; None where it does not."""
    pairs = table.cos.shape[1]
    for event, kept in zip(recording.events, recording.kept, strict=True):
        if event.op == "_to_copy" and event.outputs[0].dtype in LOW and (rows := _rows(kept.outputs[0], seq)) is not None:
            layouts = (rows, rows[:, :pairs], rows[:, ::2])
            if any(t.shape == table.cos.shape and torch.allclose(t.double(), table.cos, atol=OF_LENGTH_1) for t in layouts):
                return event.outputs[0].dtype
    return None


def _add(found: list[Angles], cos: Tensor, sin: Tensor, recording: Recording, index: int, name: str | None) -> None:
    """One table more, unless it is there already; a pair that stands twice (two halves, or side by side) counts once."""
    both = torch.cat([cos, sin]).T
    kept: list[int] = []
    for column in range(both.shape[0]):
        if not any(torch.equal(both[column], both[other]) for other in kept):
            kept.append(column)
    cos, sin = cos[:, kept], sin[:, kept]
    if not any(other.cos.shape == cos.shape and torch.equal(other.cos, cos) for other in found):
        event = recording.events[index]
        dtype = event.inputs[0].dtype if event.op == "cos" else ""
        low = dtype if dtype in LOW else None
        found.append(Angles(cos=cos, sin=sin, where=event.where, spot=recording.spots[index], name=name, low=low))


def _rows(tensor: Tensor, seq: int) -> Tensor | None:
    """A table as `[seq_len, pairs]`; None for other shapes."""
    flat = tensor.squeeze()
    if flat.ndim != 2 or flat.shape[0] != seq or not (flat.is_floating_point() or flat.is_complex()) or flat.shape[1] > 512:
        return None
    return flat


def projected(recording: Recording, index: int, operand: int) -> Tensor | None:
    """What an operand of an op was projected from weights as, `[seq_len, width]` on one row; None where that is not seen."""
    wanted = {recording.events[index].inputs[operand].storage}
    for event, kept in zip(reversed(recording.events[:index]), reversed(recording.kept[:index]), strict=True):
        if not wanted & {info.storage for info in event.outputs}:
            continue
        if event.op in ("mm", "addmm", "bmm") and event.parameters:
            return kept.outputs[0].reshape(-1, kept.outputs[0].shape[-1])
        wanted = wanted | {info.storage for info in event.inputs}
    return None


def _values(recording: Recording, index: int, seq: int) -> tuple[int, int] | None:
    """The op in which the weights of eager attention meet the values next, and which operand these are."""
    for later in range(index + 1, min(index + 80, len(recording.events))):
        event, inputs = recording.events[later], recording.kept[later].inputs
        if event.op == "bmm" and inputs[0].shape[-1] == seq and inputs[0].shape[-2] % seq == 0 and inputs[1].shape[-2] == seq:
            return later, 1
    return None
