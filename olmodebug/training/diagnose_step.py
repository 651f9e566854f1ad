"""Why a training step gave no finite loss or gradient: the step's batch once more under the tracer, and its first bad value."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private

from ..guards.undefined import cause_of
from ..report import Finding
from ..settle import settled
from ..subject import Subject
from ..tracing.tracer import record
from .head import as_case
from .loop import LossOf

PROBE = "train.finite"


def diagnose(subject: Subject, batch: Tensor, step: int, dtype: str, *, reason: str) -> Finding:
    """The finding on a step that could not be used: a parameter that is not finite already, or the first op that gave such a value."""
    bad = [name for name, parameter in subject.model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    if bad:
        return Finding(
            probe=PROBE,
            severity="error",
            message=f"step {step + 1}: {bad[0]} holds nan or inf before the forward pass, as do {len(bad) - 1} other parameters",
            cause="the update of an earlier step, or the weights that the run began with, made it so",
            expected="finite parameters",
            observed=f"{len(bad)} of {sum(1 for _ in subject.model.parameters())} parameters not finite",
            evidence={"parameters": ", ".join(bad[:8])},
        )
    row = _bad_row(subject, batch, dtype)
    piece = batch[row : row + 1]
    with settled(subject.model, seed=subject.seed):
        recording = record(subject.model, lambda: LossOf(subject, None, dtype)(piece).backward(), statistics=True)
    first = next((event for event in recording.events if _makes_bad(event)), None)
    message = f"step {step + 1}: {_reason(reason)}"
    if first is None:
        return Finding(
            probe=PROBE, severity="error", message=f"{message}; the same batch alone does not show it again", evidence={"dtype": dtype}
        )
    inputs = [str(info) for info in first.inputs]
    with settled(subject.model, seed=subject.seed), _FirstBad(first.op) as again:
        LossOf(subject, None, dtype)(piece).backward()
    largest = {"largest_input": again.largest} if again.largest is not None else {}
    return Finding(
        probe=PROBE,
        severity="error",
        message=f"{message}; {first.op} in the {first.phase} pass is the first op that gives nan or inf, from finite inputs",
        where=first.where,
        cause=again.cause,
        fix=again.fix,
        expected="finite values",
        observed=f"{first.op}({', '.join(inputs)}) gives nan or inf",
        evidence={"dtype": dtype, **largest, "row_of_the_batch": row},
        case=as_case(piece),
    )


def _reason(reason: str) -> str:
    words = {"nan": "the loss or the gradient is not finite", "overflow": "gradients overflow at every loss scale down to 1e-4"}
    return words.get(reason, reason)


class _FirstBad(TorchDispatchMode):
    """The first op of a name that gives nan or inf from finite inputs, asked why as the guards ask it."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op.strip("_")
        self.largest: float | None = None
        self.cause: str | None = None
        self.fix: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mine = self.largest is None and func.__name__.partition(".")[0].strip("_") == self.op
        given = [t.abs().max() for t in args if isinstance(t, Tensor) and t.numel() and t.is_floating_point()] if mine else []
        output = func(*args, **(kwargs or {}))
        made = output[0] if isinstance(output, tuple | list) and output else output
        if given and isinstance(made, Tensor) and all(map(math.isfinite, given)) and not bool(torch.isfinite(made).all()):
            self.largest = max(map(float, given))
            if not func._schema.is_mutable:  # its arguments are no longer what they were
                what = "nan" if bool(made.isnan().any()) else "inf"
                self.cause, self.fix = cause_of(self.op, func, args, kwargs or {}, made, what, None)
        return output


def _makes_bad(event: Any) -> bool:
    """Whether an op turned finite inputs into something else; filling with -inf, as masks are made, is meant so."""
    made = any(info.finite is False for info in event.outputs)
    fills = ("fill", "full", "where", "masked", "scalar_tensor", "tensor", "triu", "tril", "empty")
    return made and all(info.finite is not False for info in event.inputs) and not any(word in event.op for word in fills)


def _bad_row(subject: Subject, batch: Tensor, dtype: str) -> int:
    """The first row whose loss alone is not finite; 0 where each is."""
    with settled(subject.model, seed=subject.seed), torch.no_grad():
        for row in range(len(batch)):
            if not math.isfinite(float(LossOf(subject, None, dtype)(batch[row : row + 1]))):
                return row
    return 0
