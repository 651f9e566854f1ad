"""Where a nan or inf is born, forward or backward, told once it has reached a loss, a gradient or a weight that counts.

Every floating result is asked for one sum. Only when that is not finite are values looked at: an op whose inputs had no nan
and whose output has one is a birth, and everything computed from it carries the birth along. Infinities of masks, overflows
that a loss scaler skips and values that are masked away later are no findings: nothing that counts ever reads them.

On a device the sums stay there and are read in one go at the next step, so no op waits; the births then have no ranges.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..records import TensorInfo
from ..report import Finding, Scalar
from ..sources import Spot
from . import place
from .excerpts import lines_at
from .undefined import cause_of

FINITE = "numerics.finite"
HEADROOM = "numerics.float16-headroom"

LARGEST_FLOAT16 = 65504.0
LITTLE_HEADROOM = 0.5  # of 65504: one doubling is left, which a few steps of training make
DEFERRED_OPS = 4096  # results on a device that wait for one read
MOST_PLACES = 200_000  # forward lines kept for backward; a graph of more ops forgets its oldest lines

NO_VALUES = ("empty", "new_empty", "_efficientzerotensor", "_resize", "resize", "set_", "_local_scalar", "item", "equal", "is_")
FILLS = ("masked_fill", "full", "fill", "where", "scalar_tensor", "new_full", "constant_pad", "_masked_softmax", "lift")


@dataclass(slots=True, kw_only=True)
class Origin:
    """Where a non-finite value came from. `kind` is birth, fill (written on purpose), weights or data."""

    kind: str
    what: str
    op: str
    spot: Spot | None
    module: nn.Module | None = None
    phase: str = "forward"
    node: str = ""
    inputs: tuple[str, ...] = ()
    output: str = ""
    name: str = ""
    cause: str | None = None
    fix: str | None = None
    parent: "Origin | None" = None
    facts: dict[str, Scalar] = field(default_factory=dict)


@dataclass(slots=True)
class _Pending:
    """A result on a device that has not been read: its smallest and largest value, and what is needed to place it."""

    extremes: Tensor
    op: str
    node: str
    spot: Spot | None
    module: nn.Module | None
    reads: tuple[int, ...]
    writes: int
    symptom: str | None = None


class NonFinite:
    """The observer of one watched process."""

    def __init__(self, watch: Any, *, deferred: bool = False) -> None:
        self.watch = watch
        self.deferred = deferred
        self.origins: dict[int, Origin] = {}
        self.places: dict[int, tuple[Any, int, nn.Module | None]] = {}
        self.kinds: dict[Any, int] = {}
        self.pending: list[_Pending] = []
        self.largest = (0.0, None, "")  # in float16, forward
        self.skipped = 0
        self.told: set[int] = set()

    def listen(self) -> None:
        events = self.watch.events
        self.watch.observers.append(self.observe)
        events.on("backward", self.backward)
        events.on("step", self.step)
        events.on("stepped", self.stepped)

    def observe(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Look at the result of one op."""
        if self.watch.events.stepping:
            return
        kind = self.kinds.get(func)
        if kind is None:
            kind = self.kinds[func] = _kind(func)
        if kind == 0:
            return
        node = torch._C._current_autograd_node()  # private: no public accessor; without it backward births have no line
        if node is None and torch.is_grad_enabled():
            self._remember_place()
        for tensor in _floats(args[0] if output is None else output):
            self._look(func, args, kwargs, tensor, node)

    def _look(self, func: Any, args: Any, kwargs: Any, tensor: Tensor, node: Any) -> None:
        if self.deferred or tensor.device.type != "cpu":
            self._defer(func, args, kwargs, tensor, node)
            return
        if tensor.dtype is torch.float16:
            low, high = (float(x) for x in torch.aminmax(tensor))
            top = max(-low, high)
            if node is None and top > self.largest[0] and math.isfinite(top):
                self.largest = (top, place.line_here(sys._getframe(3)), func.__name__)  # type: ignore[assignment]
            finite = math.isfinite(low) and math.isfinite(high)
        else:
            finite = math.isfinite(tensor.sum()) if tensor.dtype.is_floating_point else True
        if finite:
            if self.origins:
                self.origins.pop(_pointer(tensor), None)
            return
        self._not_finite(func, args, kwargs, tensor, node)

    def _not_finite(self, func: Any, args: Any, kwargs: Any, tensor: Tensor, node: Any) -> None:
        nan, inf = _has(tensor)
        pointer = _pointer(tensor)
        if not nan and not inf:  # only the sum overflowed
            self.origins.pop(pointer, None)
            return
        op = func.__name__.partition(".")[0]
        inputs = [t for t in _floats((args, kwargs)) if not _is(t, tensor)]
        overwritten = func._schema.is_mutable and self.origins.get(pointer)
        parents = [(t, _has(t)) for t in inputs]
        had_nan = any(n for _, (n, _) in parents) or bool(overwritten and overwritten.what == "nan")
        had_inf = any(i for _, (_, i) in parents) or bool(overwritten and overwritten.what == "inf")
        what = "nan" if nan else "inf"
        if (nan and had_nan) or (not nan and had_inf):
            self.origins[pointer] = self._inherited(parents, what) or (overwritten or self._unknown(parents, what, op))
            return
        spot, module = self._place_of(node)
        parent = next((o for t, flags in parents if any(flags) and (o := self.origins.get(_pointer(t)))), None)
        fill = not nan and op.strip("_").startswith(FILLS)
        cause, fix = cause_of(op, func, args, kwargs, tensor, what, node)
        self.origins[pointer] = Origin(
            kind="fill" if fill else "birth",
            what=what,
            op=op,
            spot=spot,
            module=module,
            phase="forward" if node is None else "backward",
            node=node.name() if node is not None else "",
            inputs=tuple(describe(t) for t in inputs),
            output=describe(tensor),
            cause=cause,
            fix=fix,
            parent=parent,
        )

    def _inherited(self, parents: list[tuple[Tensor, tuple[bool, bool]]], what: str) -> Origin | None:
        for tensor, (nan, inf) in parents:
            if (nan if what == "nan" else inf) and (origin := self.origins.get(_pointer(tensor))) is not None:
                return origin
        return None

    def _unknown(self, parents: list[tuple[Tensor, tuple[bool, bool]]], what: str, op: str) -> Origin:
        """A non-finite input that no op of this run made: a weight, a buffer or the data."""
        tensor = next(t for t, (nan, inf) in parents if (nan if what == "nan" else inf))
        name = self.watch.name_of_tensor(tensor)
        spot, module = self._place_of(None)
        return Origin(
            kind="weights" if name else "data", what=what, op=op, spot=spot, module=module, name=name or "", output=describe(tensor)
        )

    def _defer(self, func: Any, args: Any, kwargs: Any, tensor: Tensor, node: Any) -> None:
        """Keep the extremes on the device; a symptom or a full queue reads them all at once."""
        if not tensor.numel() or tensor.dtype.is_complex:
            return
        spot, module = self._place_of(node)
        reads = tuple(_pointer(t) for t in _floats((args, kwargs)) if not _is(t, tensor))
        if func._schema.is_mutable:
            reads = (*reads, _pointer(tensor))
        extremes = torch.stack(torch.aminmax(tensor.detach())).float()
        op = func.__name__.partition(".")[0]
        self.pending.append(_Pending(extremes, op, node.name() if node is not None else "", spot, module, reads, _pointer(tensor)))
        if len(self.pending) >= DEFERRED_OPS:
            self.flush()

    def flush(self) -> None:
        """Read what waits on the device, in the order of the ops, and tell the symptoms among it."""
        waiting, self.pending = self.pending, []
        if not waiting:
            return
        values = torch.stack([item.extremes for item in waiting]).tolist()
        for item, (low, high) in zip(waiting, values, strict=True):
            nan = low != low or high != high
            if not nan and math.isfinite(low) and math.isfinite(high):
                if item.symptom is None:
                    self.origins.pop(item.writes, None)
                continue
            if item.symptom is not None:
                if (origin := self.origins.get(item.writes)) is not None:
                    self._tell(origin, item.symptom)
                continue
            what = "nan" if nan else "inf"
            found = [o for pointer in item.reads if (o := self.origins.get(pointer)) is not None]
            origin = next((o for o in found if o.what == what), None)
            fill = not nan and item.op.strip("_").startswith(FILLS)
            self.origins[item.writes] = origin or Origin(
                kind="fill" if fill else "birth",
                what=what,
                op=item.op,
                spot=item.spot,
                module=item.module,
                phase="backward" if item.node else "forward",
                node=item.node,
                parent=next(iter(found), None),
            )

    def _remember_place(self) -> None:
        """The line of a forward op under the number of the autograd node that it made, for the same op's backward."""
        frame, module, own, near = sys._getframe(3), None, None, None
        ranks, walked = place._RANKS, 0
        walker: Any = frame
        while walker is not None and walked < 40:
            code = walker.f_code
            known = ranks.get(code.co_filename)
            if known is None:
                known = place.rank(code.co_filename)
            if code.co_name == place.CALL and module is None:
                module = walker.f_locals.get("self")
            if known == place.OWN:
                own = (code, walker.f_lasti)
                break
            if known == place.NEAR and near is None:
                near = (code, walker.f_lasti)
            walker, walked = walker.f_back, walked + 1
        found = own or near
        if found is not None:
            if len(self.places) > MOST_PLACES:
                self.places.clear()
            # private: the counter that numbers autograd nodes; without it backward births would have no line
            self.places.setdefault(torch.autograd._get_sequence_nr() - 1, (*found, module))

    def _place_of(self, node: Any) -> tuple[Spot | None, nn.Module | None]:
        if node is None:
            here = place.here(sys._getframe(3))
            return here.spot or here.inside, here.modules[-1] if here.modules else None
        found = self.places.get(node._sequence_nr())
        if found is None:
            return None, None
        code, instruction, module = found
        return Spot(code, instruction, _line(code, instruction)), module

    # What counts: a loss that is differentiated, a gradient that is applied, a weight that is written

    def backward(self, roots: list[Tensor], spot: Spot | None) -> None:
        for root in roots:
            if not root.dtype.is_floating_point:
                continue
            if root.device.type != "cpu" or self.deferred:
                extremes = torch.stack(torch.aminmax(root.detach())).float()
                pointer = _pointer(root)
                self.pending.append(_Pending(extremes, "", "", spot, None, (), pointer, symptom="the loss"))
                continue
            nan, inf = _has(root)
            if nan or inf:
                origin = self.origins.get(_pointer(root))
                if origin is not None and not self._scaled(origin):
                    self._tell(origin, "the loss")

    def _scaled(self, origin: Origin) -> bool:
        """Born when the loss scaler multiplied a finite loss: the scaler sees it, skips the step and lowers the scale."""
        code = origin.spot.code.co_name if origin.spot else ""
        return self.watch.scalers_alive() and origin.op in ("mul", "mul_") and origin.what == "inf" and code != "forward"

    def step(self, optimizer: Any, spot: Spot | None) -> None:
        """A gradient that is not finite is about to be applied; a loss scaler would not have come here."""
        self.flush()
        if self.origins:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    grad = parameter.grad
                    origin = None if grad is None or grad.layout != torch.strided else self.origins.get(_pointer(grad))
                    if origin is not None and any(_has(grad)):
                        self._tell(origin, f"the gradient of {self.watch.name_of_tensor(parameter) or 'a parameter'}")
                        break
        self.places.clear()

    def stepped(self, optimizer: Any, spot: Spot | None) -> None:
        self.origins.clear()

    def skip(self, scaler: Any) -> None:
        """The loss scaler skipped a step."""
        self.skipped += 1

    def _tell(self, origin: Origin, reached: str) -> None:
        last = origin
        while origin.parent is not None and origin.parent.kind == "birth":
            origin = origin.parent  # an overflow or a log of 0 that only later became nan: the first birth is the cause
        if id(origin) in self.told or (origin.kind == "weights" and self.told):
            return  # weights that the first finding has already spoiled are no second one
        self.told.add(id(origin))
        step = self.watch.steps + 1
        where = place.where_of(origin.spot, module=self.watch.name_of_module(origin.module), op=origin.op)
        evidence: dict[str, Scalar] = {"step": step, "reached": reached, **origin.facts}
        for number, text in enumerate(origin.inputs):
            evidence[f"input_{number}"] = text
        if origin.output:
            evidence["output"] = origin.output
        if last is not origin and last.spot is not None:
            later = place.where_of(last.spot)
            evidence["becomes_nan_in"] = f"{last.op} at {later.file}:{later.line}"
        if origin.parent is not None and origin.parent.spot is not None:
            parent = place.where_of(origin.parent.spot)
            evidence["inf_from"] = f"{origin.parent.op} at {parent.file}:{parent.line}"
        cause, fix = origin.cause, origin.fix
        if origin.kind == "weights":
            message = f"`{origin.name}` holds {origin.what} when {origin.op} reads it, and {reached} is not finite"
            before = self.watch.steps
            if cause is None and before:
                fix = "look at the update before: its learning rate, eps, and the gradient norm"
            elif cause is None:
                fix = "look at how it was initialised or loaded: no optimizer step had run"
            evidence["optimizer_steps_before"] = before
        elif origin.kind == "data":
            message = f"a tensor that no op of this run made holds {origin.what} when {origin.op} reads it, and {reached} is not finite"
            fix = "look at the data: torch.isfinite(batch).all() before the model"
        else:
            backward = f" in the backward of this line ({origin.node})" if origin.phase == "backward" else ""
            verb = "is written" if origin.kind == "fill" else "is born"
            message = f"{origin.what} {verb} in {origin.op}{backward} and reaches {reached} of step {step}"
        self.watch.find(
            Finding(
                probe=FINITE,
                severity="error",
                message=message,
                cause=cause,
                fix=fix,
                where=where,
                source=lines_at(where),
                expected="finite numbers",
                observed=origin.output or origin.what,
                evidence=evidence,
            )
        )

    def finish(self) -> None:
        """What waits on a device, and how near float16 came to its largest number."""
        self.flush()
        top, spot, op = self.largest
        if top > LITTLE_HEADROOM * LARGEST_FLOAT16:
            where = place.where_of(spot, op=op.partition(".")[0])
            self.watch.find(
                Finding(
                    probe=HEADROOM,
                    severity="note",
                    message=f"float16 reached {top:.4g} of {LARGEST_FLOAT16:.0f} in forward",
                    where=where,
                    source=lines_at(where),
                    fix="bfloat16 has the range of float32",
                    evidence={"largest": top, "limit": LARGEST_FLOAT16},
                )
            )


def describe(tensor: Tensor) -> str:
    """`f32[2,8], -1.2 .. 3.4, 3 nan`: the finite range and what is not finite."""
    info = TensorInfo(shape=tuple(tensor.shape), dtype=str(tensor.dtype)[6:])
    if not tensor.numel():
        return str(info)
    values = tensor.detach().float().flatten()
    finite = values[torch.isfinite(values)]
    parts = [str(info)]
    if finite.numel():
        parts.append(f"{float(finite.min()):.3g} .. {float(finite.max()):.3g}")
    nan, inf = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
    parts += [f"{nan} nan"] if nan else []
    parts += [f"{inf} inf"] if inf else []
    return ", ".join(parts)


def _kind(func: Any) -> int:
    """0: makes no values (a view, an allocation, a question), 1: look at its result."""
    schema = getattr(func, "_schema", None)
    name = getattr(func, "__name__", "")
    if schema is None or name.startswith(NO_VALUES):
        return 0
    views = [r for r in schema.returns if r.alias_info is not None and not r.alias_info.is_write]
    return 0 if views or name.startswith(("_unsafe_view", "_reshape_alias", "detach", "alias")) else 1


def _floats(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        plain = type(tree) is Tensor or type(tree) is nn.Parameter
        if plain and tree.is_floating_point() and tree.numel() and tree.device.type != "meta" and tree.layout == torch.strided:
            yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _floats(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _floats(item)


def _has(tensor: Tensor) -> tuple[bool, bool]:
    """(any nan, any inf)."""
    return bool(torch.isnan(tensor).any()), bool(torch.isinf(tensor).any())


def _pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is(left: Tensor, right: Tensor) -> bool:
    return left is right or (left.data_ptr() == right.data_ptr() and left.shape == right.shape)


def _line(code: Any, instruction: int) -> int:
    positions = list(code.co_positions())
    return positions[instruction // 2][0] or code.co_firstlineno
