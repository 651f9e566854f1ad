"""Where a nan or inf is born, forward or backward, told once it has reached a loss, a gradient or a weight that counts.

Every floating result is asked for one sum. Only when that is not finite are values looked at: an op whose inputs had no nan
and whose output has one is a birth, and everything computed from it carries the birth along. Infinities of masks, overflows
that a loss scaler skips and values that are masked away later are no findings: nothing that counts ever reads them.

On a device the sums stay there and are read in one go at the next step, so no op waits; the births then have no ranges.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..group import COLLECTIVE_NAMESPACES
from ..report import Finding
from ..sources import Spot
from . import place
from .excerpts import lines_at
from .gradients import has_plain_gradient, parameters
from .origins import Origin, describe, explain_origin, first_birth
from .part import Part
from .undefined import cause_of

HEADROOM = "numerics.float16-headroom"

LARGEST_FLOAT16 = 65504.0
LITTLE_HEADROOM = 0.5  # of 65504: one doubling is left, which a few steps of training make
DEFERRED_OPS = 4096  # results on a device that wait for one read
MOST_DROPPED = 8  # losses in a row that a script may drop; a run that drops more of them learns nothing
MOST_PLACES = 200_000  # forward lines kept for backward; a graph of more ops forgets its oldest lines

NO_VALUES = ("empty", "new_empty", "_efficientzerotensor", "_resize", "resize", "set_", "_local_scalar", "item", "equal", "is_")
FILLS = ("masked_fill", "full", "fill", "where", "scalar_tensor", "new_full", "constant_pad", "_masked_softmax", "lift")


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


class NonFinite(Part):
    """The observer of one watched process."""

    def __init__(self, watch: Any, *, deferred: bool = False) -> None:
        self.watch = watch
        self.deferred = deferred
        self.origins: dict[int, Origin] = {}
        self.places: dict[int, tuple[Any, int, nn.Module | None]] = {}
        self.kinds: dict[int, int] = {}
        self.pending: list[_Pending] = []
        self.largest = (0.0, None, "")  # in float16, forward
        self.dropped = 0  # losses in a row whose gradients were dropped
        self.told: set[int] = set()
        self.waiting: list[tuple[Origin, str, int]] = []  # what reached a loss; told unless the script drops its gradients

    def listen(self) -> None:
        events = self.watch.events
        self.watch.observers.append(self.observe)
        events.on("backward", self.backward)
        events.on("step", self.step)
        events.on("stepped", self.stepped)
        events.on("zeroed", self._reset)
        events.on("module_zeroed", self._reset)

    def observe(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Look at the result of one op."""
        if self.watch.events.stepping:
            return
        kind = self.kinds.get(id(func))  # the dispatch mode holds every op that it has seen
        if kind is None:
            kind = self.kinds[id(func)] = _kind(func)
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
        """A non-finite input that no op of this run made: a weight, a buffer or the data. Which of them is asked when it counts."""
        tensor = next(t for t, (nan, inf) in parents if (nan if what == "nan" else inf))
        spot, module = self._place_of(None)
        return Origin(kind="given", what=what, op=op, spot=spot, module=module, pointer=_pointer(tensor), output=describe(tensor))

    def _settle(self, origin: Origin) -> None:
        """Whether a given value is a weight or buffer: a search through the models, too slow for every -inf that a script writes."""
        if origin.kind == "given":
            name = self.watch.models.at(origin.pointer)
            origin.kind, origin.name = "weights" if name else "data", name or ""

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
                    self.waiting.append((origin, item.symptom, self.watch.steps + 1))
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

    def place_of_node(self, node: Any) -> Spot | None:
        """The line of the forward op that made a node, or, of a view, the line of the next op."""
        number = node._sequence_nr()
        if number not in self.places:
            number = min((n for n in self.places if n > number), default=None)
            if number is None:
                return None
        code, instruction, _ = self.places[number]
        return Spot(code, instruction, _line(code, instruction))

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
                    self.waiting.append((origin, "the loss", self.watch.steps + 1))

    def _scaled(self, origin: Origin) -> bool:
        """Born when a finite loss was multiplied by a scale: what counts then are the gradients, which a scaler looks at before a step."""
        code = origin.spot.code.co_name if origin.spot else ""
        return origin.op in ("mul", "mul_") and origin.what == "inf" and code != "forward"

    def step(self, optimizer: Any, spot: Spot | None) -> None:
        """A gradient that is not finite is about to be applied; a loss scaler would not have come here."""
        self.flush()
        self._tell_waiting()
        origin, parameter = self._of_gradients(optimizer)
        if origin is not None:
            self._tell(origin, f"the gradient of {self.watch.name_of_tensor(parameter) or 'a parameter'}")
        self.places.clear()

    def _of_gradients(self, optimizer: Any) -> tuple[Origin | None, Any]:
        """Where the first gradient that is not finite came from, and its parameter."""
        for parameter in parameters(optimizer) if self.origins else ():
            if has_plain_gradient(parameter):
                origin = self.origins.get(_pointer(parameter.grad))  # type: ignore[arg-type]
                if origin is not None and any(_has(parameter.grad)):  # type: ignore[arg-type]
                    return origin, parameter
        return None, None

    def birth(self, optimizer: Any) -> Origin | None:
        """The birth behind the gradients of an optimizer, where they are not finite."""
        self.flush()
        origin, _ = self._of_gradients(optimizer)
        if origin is not None:
            origin = first_birth(origin)
            self._settle(origin)
        return origin

    def stepped(self, optimizer: Any, spot: Spot | None) -> None:
        self.origins.clear()

    def _reset(self, args: Any, kwargs: Any, spot: Spot | None) -> None:
        """Gradients are dropped before any step: the script looks for nan itself, or scales its loss by hand."""
        self.flush()
        self.dropped = self.dropped + 1 if self.waiting else self.dropped
        if self.dropped < MOST_DROPPED:
            self.waiting.clear()

    def _tell_waiting(self) -> None:
        waiting, self.waiting, self.dropped = self.waiting, [], 0
        for origin, reached, step in waiting:
            self._tell(origin, reached, step)

    def _tell(self, origin: Origin, reached: str, step: int | None = None) -> None:
        root = first_birth(origin)
        self._settle(root)
        given = root.kind in ("weights", "data")  # gathered from the shards of the ranks, weights have memory of their own
        if id(root) in self.told or (given and self.told) or self.watch.spoiled:
            return  # weights that the first finding has already spoiled are no second one
        self.told.add(id(root))
        module = self.watch.name_of_module(root.module)
        self.watch.find(explain_origin(origin, reached, module=module, step=step or self.watch.steps + 1, before=self.watch.steps))

    def finish(self) -> None:
        """What waits on a device, and how near float16 came to its largest number."""
        self.flush()
        self._tell_waiting()
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


def _kind(func: Any) -> int:
    """0: makes no values (a view, an allocation, a question), or is a collective, whose result is written while the script
    goes on; 1: look at its result."""
    schema = getattr(func, "_schema", None)
    name = getattr(func, "__name__", "")
    if schema is None or name.startswith(NO_VALUES) or getattr(func, "namespace", "") in COLLECTIVE_NAMESPACES:
        return 0
    views = [r for r in schema.returns if r.alias_info is not None and not r.alias_info.is_write]
    return 0 if views or name.startswith(("_unsafe_view", "_reshape_alias", "detach", "alias")) else 1


def _floats(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        plain = type(tree) is Tensor or type(tree) is nn.Parameter
        readable = tree.layout == torch.strided and not tree.is_nested and tree.device.type != "meta"
        if plain and readable and tree.is_floating_point() and tree.numel():
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
