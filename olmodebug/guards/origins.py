"""Where a non-finite value came from, and the finding on it once it has reached something that counts."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..records import TensorInfo
from ..report import Finding, Scalar
from ..sources import Spot
from . import place
from .excerpts import lines_at

FINITE = "numerics.finite"


@dataclass(slots=True, kw_only=True)
class Origin:
    """Where a non-finite value came from. `kind` is birth, fill (written on purpose), given, and then weights or data."""

    kind: str
    what: str
    op: str
    spot: Spot | None
    module: nn.Module | None = None
    phase: str = "forward"
    node: str = ""
    inputs: tuple[str, ...] = ()
    output: str = ""
    pointer: int = 0  # of the memory that was given
    name: str = ""
    cause: str | None = None
    fix: str | None = None
    parent: "Origin | None" = None
    facts: dict[str, Scalar] = field(default_factory=dict)


def first_birth(origin: Origin) -> Origin:
    """An overflow or a log of 0 that only later became nan: the first birth is the cause."""
    while origin.parent is not None and origin.parent.kind == "birth":
        origin = origin.parent
    return origin


def words_of(origin: Origin) -> str:
    """`inf is born in mul, in the backward of train.py:33 (MulBackward0)`, and its cause where that is established."""
    where = place.where_of(origin.spot)
    at = f"{where.file}:{where.line}" if where.file else "an unknown line"
    if origin.kind == "weights":
        words = f"`{origin.name}` holds {origin.what}, which {origin.op} reads at {at}"
    elif origin.kind == "data":
        words = f"a tensor that no op of this run made holds {origin.what}, which {origin.op} reads at {at}"
    elif origin.phase == "backward":
        words = f"{origin.what} is born in {origin.op}, in the backward of {at} ({origin.node})"
    else:
        words = f"{origin.what} is born in {origin.op} at {at}"
    return f"{words}: {origin.cause}" if origin.cause else words


def explain_origin(last: Origin, reached: str, *, module: str, step: int, before: int) -> Finding:
    """The finding on an origin that reached the loss or a gradient of a step; `before` optimizer steps had run."""
    origin = first_birth(last)
    evidence: dict[str, Scalar] = {"step": step, "reached": reached, **origin.facts}
    evidence |= {f"input_{number}": text for number, text in enumerate(origin.inputs)}
    if origin.output:
        evidence["output"] = origin.output
    if last is not origin and last.spot is not None:
        later = place.where_of(last.spot)
        evidence["becomes_nan_in"] = f"{last.op} at {later.file}:{later.line}"
    if origin.parent is not None and origin.parent.spot is not None:
        parent = place.where_of(origin.parent.spot)
        evidence["inf_from"] = f"{origin.parent.op} at {parent.file}:{parent.line}"
    fix = origin.fix
    if origin.kind == "weights":
        message = f"`{origin.name}` holds {origin.what} when {origin.op} reads it, and {reached} is not finite"
        if origin.cause is None and before:
            fix = "look at the update before: its learning rate, eps, and the gradient norm"
        elif origin.cause is None:
            fix = "look at how it was initialised or loaded: no optimizer step had run"
        evidence["optimizer_steps_before"] = before
    elif origin.kind == "data":
        message = f"a tensor that no op of this run made holds {origin.what} when {origin.op} reads it, and {reached} is not finite"
        fix = "look at the data: torch.isfinite(batch).all() before the model"
    else:
        backward = f" in the backward of this line ({origin.node})" if origin.phase == "backward" else ""
        verb = "is written" if origin.kind == "fill" else "is born"
        message = f"{origin.what} {verb} in {origin.op}{backward} and reaches {reached} of step {step}"
    where = place.where_of(origin.spot, module=module, op=origin.op)
    return Finding(
        probe=FINITE,
        severity="error",
        message=message,
        cause=origin.cause,
        fix=fix,
        where=where,
        source=lines_at(where),
        expected="finite numbers",
        observed=origin.output or origin.what,
        evidence=evidence,
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
