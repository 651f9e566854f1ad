"""Why an op gave nan or inf from finite inputs: stated only where its own arguments show it."""

from typing import Any

import torch
from torch import Tensor

LARGEST_FLOAT16 = 65504.0
INFINITE_SLOPES = {"SqrtBackward0": "sqrt", "LinalgVectorNormBackward0": "norm", "NormBackward0": "norm", "PowBackward0": "pow"}

Words = tuple[str | None, str | None]  # cause, fix


def cause_of(op: str, func: Any, args: Any, kwargs: Any, output: Tensor, what: str, node: Any) -> Words:
    """The cause and the repair, or (None, None) where the arguments do not establish one."""
    name = op.strip("_")
    if node is not None and node.name() in INFINITE_SLOPES:
        return (
            f"the derivative of {INFINITE_SLOPES[node.name()]} at 0 is infinite",
            "add a small eps inside the root, or clamp its argument",
        )
    if name in ("nll_loss_forward", "nll_loss2d_forward") and what == "nan" and bool((args[1] == args[4]).all()):
        return (
            "no label of this batch is valid: the mean over nothing is 0/0",
            "skip such a batch, or divide the sum by max(1, number of labels)",
        )
    if name in ("softmax", "safe_softmax", "log_softmax") and isinstance(args[0], Tensor):
        rows = torch.isneginf(args[0]).all(dim=args[1])
        if bool(rows.any()):
            count = int(rows.sum())
            return (
                f"{count} of {rows.numel()} rows are -inf throughout: every position is masked, and the softmax of nothing is nan",
                "let a padded query see itself, or mask with torch.finfo(dtype).min",
            )
    if name in ("log", "log2", "log10", "log1p") and isinstance(args[0], Tensor):
        smallest = float(args[0].min()) + (1.0 if name == "log1p" else 0.0)
        if smallest <= 0:
            return f"{name} of {'0' if smallest == 0 else 'a negative number'}", "clamp the argument to a small positive number"
    if name in ("sqrt", "rsqrt") and isinstance(args[0], Tensor) and float(args[0].min()) <= 0:
        zero = float(args[0].min()) == 0
        return f"{name} of {'0' if zero else 'a negative number'}", "add a small eps, or clamp the argument"
    if name == "div" and len(args) > 1:
        divisor = args[1]
        zeros = bool((divisor == 0).any()) if isinstance(divisor, Tensor) else divisor == 0
        if zeros:
            return "division by 0", "clamp the divisor, or skip the rows in which it is 0"
    if name == "reciprocal" and bool((args[0] == 0).any()):
        return "division by 0", "clamp the divisor"
    return _overflow(func, args, kwargs, output)


def _overflow(func: Any, args: Any, kwargs: Any, output: Tensor) -> Words:
    """The same op on the same numbers in float32 is finite and larger than the dtype's largest number: an overflow."""
    largest = torch.finfo(output.dtype).max
    wide = torch.float64 if output.dtype is torch.float32 else torch.float32
    pure = func.namespace == "aten" and not func._schema.is_mutable  # an op of somebody's own may do more than compute
    if not pure or not args or not isinstance(args[0], Tensor):
        return None, None

    def widened(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(wide)
        if isinstance(value, (list, tuple)):
            return type(value)(widened(item) for item in value)
        return value

    if "dtype" in kwargs or func.__name__.startswith("_to_copy"):
        source = args[0].detach().abs()
        top = float(source[torch.isfinite(source)].max()) if bool(torch.isfinite(source).any()) else 0.0
    else:
        if torch.Tag.nondeterministic_seeded in func.tags:
            return None, None  # never draw a random number that the script did not
        try:
            again = func(*(widened(value) for value in args), **{key: widened(value) for key, value in kwargs.items()})
        except (RuntimeError, TypeError, NotImplementedError):
            return None, None
        if isinstance(again, (list, tuple)):
            again = again[0]
        if not isinstance(again, Tensor) or not bool(torch.isfinite(again).all()):
            return None, None
        top = float(again.detach().abs().max())
    if top <= largest:
        return None, None
    name = str(output.dtype)[6:]
    fix = "bfloat16 has the range of float32; in float16 keep this op in float32" if name == "float16" else "look for what grows before it"
    return f"overflow: the value is {top:.4g}, and the largest {name} is {largest:.4g}", fix
