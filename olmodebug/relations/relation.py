"""Two runs that must agree in part, and the first op where they stop agreeing.

A relation restricts every recognised dimension to the part that must agree: causality the positions before the cut,
batch independence one row, padding the real tokens of one row. Sizes are chosen so that a dimension is known by its
size, also inside merged dimensions. The culprit is the first op whose restricted inputs agree and whose restricted
output does not. A tensor without such a dimension that differs is pending: it becomes the culprit where it enters a
tensor that has one. A culprit is confirmed by putting the agreeing values back at its line and seeing the violation
vanish; where it does not vanish, the next culprit is looked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..compare import difference
from ..records import Event, Where
from ..sources import Sources, Spot, short_path
from ..tracing.tracer import Kept, Recording, record

MOST_CULPRITS = 4
PADS = ("constant_pad_nd",)
WRITES = ("index_put_", "_index_put_impl_", "index_copy_", "copy_", "scatter_")
SCATTERS = (*WRITES, "index_put", "index_add", "index_add_", "index_copy", "scatter", "scatter_add", "scatter_add_", "scatter_reduce")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What must agree: `rows` of every batch dimension and `columns` of every sequence dimension (None: all of it).

    `fixed` are the model's own sizes, which are never taken for merged dimensions.
    """

    batch: int
    seq: int
    rows: slice | None = None
    columns: slice | None = None
    fixed: frozenset[int] = frozenset()

    def views(self, tensor: Tensor) -> list[Tensor]:
        """The plausible restrictions of a tensor; empty when it has no recognised dimension."""
        found = [(tensor, False)]
        for dim in range(tensor.ndim - 1, -1, -1):  # from the last, so that unflattening does not move the others
            grown = []
            for view, touched in found:
                choices = self._choices(view, dim, tensor)
                grown += [(choice, True) for choice in choices] or [(view, touched)]
            found = grown
        return [view for view, touched in found if touched]

    def _choices(self, view: Tensor, dim: int, whole: Tensor) -> list[Tensor]:
        size, batch, seq = whole.shape[dim], self.batch, self.seq
        is_batch = size == batch and (batch != seq or dim == 0)
        if is_batch:  # where no rows are asked for, a batch alone says nothing: one later position taken out differs rightly
            return [_cut(view, dim, self.rows)] if batch > 1 and self.rows is not None else []
        if size == seq:
            return [_cut(view, dim, self.columns)] if seq > 1 and self.columns is not None else []
        if size in self.fixed or size < 2:
            return []
        if size == batch * seq and batch > 1 and seq > 1:
            rows_first = _cut(_cut(view.unflatten(dim, (batch, seq)), dim + 1, self.columns), dim, self.rows)
            columns_first = _cut(_cut(view.unflatten(dim, (seq, batch)), dim + 1, self.rows), dim, self.columns)
            return [rows_first, columns_first]
        if seq > 4 and size % seq == 0 and self.columns is not None:
            times = size // seq
            return [
                _cut(view.unflatten(dim, (times, seq)), dim + 1, self.columns),
                _cut(view.unflatten(dim, (seq, times)), dim, self.columns),
            ]
        if batch > 2 and size % batch == 0 and dim == 0 and self.rows is not None:
            return [_cut(view.unflatten(dim, (batch, size // batch)), dim, self.rows)]
        return []


@dataclass(slots=True, kw_only=True)
class Culprit:
    """The op where two runs part. `source` is the op that made the pending tensor, where there was one.

    `confirmed`: with the agreeing values put back at this line (and at those of the culprits before it) the violation
    is gone. `module_only`: the op is not known, `where` names the smallest module. `run`: the recording of the left run.
    """

    where: Where
    spot: Spot | None
    event: Event | None = None
    left: Kept | None = None
    right: Kept | None = None
    source: Event | None = None
    run: Recording | None = None
    confirmed: bool = False
    module_only: bool = False


def model_sizes(model: nn.Module) -> frozenset[int]:
    """Every dimension of every parameter and buffer."""
    return frozenset(size for t in [*model.parameters(), *model.buffers()] for size in t.shape)


def localise(
    model: nn.Module,
    run_left: Callable[[], Any],
    run_right: Callable[[], Any],
    *,
    part: Part,
    limit: float,
    violated: Callable[[Any, Any], bool],
) -> list[Culprit]:
    """The ops of the right run that break the relation, in the order they run; the good values come from the left run.

    The list is empty when the two runs cannot be aligned and no module parts them either.
    """
    sources = Sources(model)
    left = record(model, run_left, keep=True, sources=sources)
    culprits: list[Culprit] = []
    spreading: list[Culprit] = []  # what only carries on an earlier culprit
    grafted: set[tuple[Any, ...]] = set()
    for _ in range(2 * MOST_CULPRITS):
        right = record(model, run_right, keep=True, sources=sources, replace=_graft(left, grafted, part), catch=True)
        if right.error is not None:
            break
        if culprits and not violated(left.result, right.result):
            for culprit in culprits:
                culprit.confirmed = True
            break
        found = first_break(left, right, part=part, limit=limit)
        if found is None or found.module_only or found.event is None or _line(found.event) in grafted:
            if found is not None and not culprits:
                culprits.append(found)
            break
        if _carries_on(found, culprits, right) or _in_line(found, spreading):
            spreading.append(found)
        else:
            culprits.append(found)
        grafted.add(_line(found.event))
    return culprits[:MOST_CULPRITS]


def _carries_on(found: Culprit, culprits: list[Culprit], right: Recording) -> bool:
    """Whether this op only spreads what an earlier culprit of the same function let in: weights on the future, say,
    that the product with the values then uses."""
    assert found.event is not None
    read = {info.storage for info in right.events[found.event.index].inputs}
    for earlier in culprits:
        assert earlier.event is not None
        same = (earlier.where.module, earlier.where.function) == (found.where.module, found.where.function)
        if same and (earlier.event.index == found.event.index or read & _carried(right.events, earlier.event.index, found.event.index)):
            return True
    return False


def _in_line(found: Culprit, spreading: Sequence[Culprit]) -> bool:
    """Whether an op stands in a line that is known to spread an earlier culprit: an einsum is several ops."""
    place = (found.where.module, found.where.file, found.where.line)
    return found.where.line is not None and any(place == (s.where.module, s.where.file, s.where.line) for s in spreading)


def _carried(events: Sequence[Event], start: int, stop: int) -> set[int]:
    """The storages that hold what the op `start` gave when the op `stop` runs: as it was, or cast, copied, dropped out,
    laid out anew; an op that keeps the number of elements hands it on."""
    carried = {info.storage for info in events[start].outputs}
    for event in events[start + 1 : stop]:
        sizes = {prod(info.shape) for info in event.inputs if info.storage in carried}
        carried |= {info.storage for info in event.outputs if prod(info.shape) in sizes}
    return carried


def first_break(left: Recording, right: Recording, *, part: Part, limit: float) -> Culprit | None:
    """The first op whose restricted inputs agree and whose restricted outputs do not, else the smallest such module."""
    pending: dict[int, int] = {}  # storage -> the event that wrote a differing tensor without a recognised dimension
    picked: set[int] = set()  # storages of what is picked by the tokens themselves, as an expert's are: its sizes say nothing
    for index, (event, other) in enumerate(zip(left.events, right.events, strict=False)):
        if event.key != other.key:
            break
        if "empty" in event.op:
            continue  # memory that nothing has written yet
        mine, theirs = left.kept[index], right.kept[index]
        source = None
        inputs_agree = True
        for a, b, info in zip(mine.inputs, theirs.inputs, other.inputs, strict=False):
            state = "pending" if info.storage in picked else _state(a, b, part, limit)
            if state == "pending":
                source = pending.get(info.storage, source)
            elif state == "differs":
                inputs_agree = False
        outputs = [_state(a, b, part, limit) for a, b in zip(mine.outputs, theirs.outputs, strict=True)]
        if event.op == "nonzero" or event.op not in SCATTERS and picked & {info.storage for info in other.inputs}:
            for state, info in zip(outputs, other.outputs, strict=True):
                (picked.discard if state == "agrees" else picked.add)(info.storage)
            continue
        for state, info in zip(outputs, other.outputs, strict=True):
            if state == "pending" and inputs_agree:
                pending[info.storage] = pending.get(info.storage, index) if source is None else source
            elif state != "pending":
                pending.pop(info.storage, None)
        if inputs_agree and "differs" in outputs:
            if source is not None and left.events[source].op in WRITES and _sees_later(event, mine, part):
                source = None  # to write into a cache is right; who reads it must not see all of it
            if source is not None and left.events[source].op in PADS:
                break  # padding mixes nothing, and behind it the sequence is not known by its size until it is cut again
            blamed = left.events[source] if source is not None else None
            return Culprit(
                where=blamed.where if blamed else event.where,
                spot=left.spots[source] if source is not None else left.spots[index],
                event=event,
                left=mine,
                right=theirs,
                source=blamed,
                run=left,
            )
    return _smallest_module(left, right, part, limit)


def _sees_later(event: Event, kept: Kept, part: Part) -> bool:
    """Whether a fused attention over a cache is given a mask that lets queries see later keys."""
    mask = kept.arguments.get("attn_mask")
    if part.columns is None or not event.op.startswith("_scaled_dot_product") or not isinstance(mask, Tensor):
        return False
    if mask.ndim < 2 or mask.shape[-2] != part.seq or mask.shape[-1] < part.seq:
        return False
    visible = (mask if mask.dtype == torch.bool else mask > -1e30)[..., : part.seq]
    return bool(visible.triu(1).any())


def _smallest_module(left: Recording, right: Recording, part: Part, limit: float) -> Culprit | None:
    """The first module call to end whose inputs agree and whose outputs do not: inner modules end before outer ones."""
    for mine, theirs in zip(left.kept_calls, right.kept_calls, strict=False):
        if mine.module != theirs.module or not mine.module:
            continue
        inputs = [_state(a, b, part, limit) for a, b in zip(mine.inputs, theirs.inputs, strict=False)]
        outputs = [_state(a, b, part, limit) for a, b in zip(mine.outputs, theirs.outputs, strict=False)]
        if "differs" in outputs and not {"differs", "pending"} & set(inputs):
            where = Where(module=mine.module)
            if mine.spot is not None:
                where = Where(module=mine.module, function=mine.spot.function, file=short_path(mine.spot.file), line=mine.spot.line)
            return Culprit(where=where, spot=mine.spot, module_only=True)
    return None


def _state(left: Tensor, right: Tensor, part: Part, limit: float) -> str:
    """`agrees`, `differs`, or `pending`: it differs and has no dimension that the relation restricts."""
    if left.shape != right.shape:
        return "pending"
    if difference(left, right, relative_limit=limit) is None:
        return "agrees"
    views = list(zip(part.views(left), part.views(right), strict=True))
    if not views:
        return "pending"
    return "agrees" if any(difference(a, b, relative_limit=limit) is None for a, b in views) else "differs"


def _graft(left: Recording, lines: set[tuple[Any, ...]], part: Part) -> Callable[[int, list[Tensor]], None] | None:
    """A writer that puts the left run's values into the outputs of every op at these lines, where they must agree."""
    if not lines:
        return None

    def replace(index: int, outputs: list[Tensor]) -> None:
        if index >= len(left.events) or _line(left.events[index]) not in lines:
            return
        for good, out in zip(left.kept[index].outputs, outputs, strict=False):
            if good.shape != out.shape or not out.dtype.is_floating_point:
                continue
            targets, values = part.views(out), part.views(good)
            pairs = list(zip(targets, values, strict=True))[:1] or [(out, good)]
            with torch.no_grad():
                for target, value in pairs:
                    target.copy_(value)

    return replace


def _line(event: Event) -> tuple[Any, ...]:
    return (event.op, event.where.function, event.where.file, event.where.line)


def _cut(tensor: Tensor, dim: int, part: slice | None) -> Tensor:
    if part is None:
        return tensor
    start, stop, _ = part.indices(tensor.shape[dim])
    return tensor.narrow(dim, start, max(0, stop - start))
