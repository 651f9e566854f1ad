"""Whether what an op gave is what arithmetic of its precision could have made: a verdict, and the margin to the limit.

`exact`: the float64 result, rounded; `within`: inside the derived bound; `explained`: outside it, and inside that of a
named policy; `diverged`: nothing explains it; `range`: the result does not fit the dtype; `unverified`: with the reason.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .bound import LAMBDA, ROUNDOFF, TF32, Exact, limit
from .policies import BF16_POLICY, LOW_POLICY, REDUCED_POLICY, TF32_POLICY
from .replay import Expected, expect

Verdict = Literal["exact", "within", "explained", "diverged", "nondeterministic", "range", "unverified"]

SPLITS = 32  # partial sums that a split-K matmul writes in the output's precision
# Between an IEEE float32 matmul (2^-21.9 measured at 1024 terms) and TF32 (2^-11.7), as roots of mean squares.
TF32_LIKE = 2.0**-14
BF16_LIKE = 2.0**-10.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """How one op or module did. `margin` is the largest error as a share of its limit; `roundoff` the effective unit
    roundoff of a product of matrices. `index`, `observed`, `exact` and `limit` are those of the worst element."""

    verdict: Verdict
    margin: float = 0.0
    reason: str | None = None
    policy: str | None = None
    output: int = 0
    index: tuple[int, ...] = ()
    observed: float = 0.0
    exact: float = 0.0
    limit: float = 0.0
    mismatched: int = 0
    total: int = 0
    roundoff: float | None = None
    derived: bool = True

    @property
    def bad(self) -> bool:
        return self.verdict in ("diverged", "nondeterministic")


def judge(expected: Expected, outputs: Sequence[Tensor], *, declared: frozenset[str] = frozenset()) -> Judgement:
    """The judgement on an op's tensor outputs. `declared` are the policies that its execution asked for."""
    if expected.unverified:
        return Judgement(verdict="unverified", reason=expected.unverified)
    if expected.kind in ("view", "none"):
        return Judgement(verdict="exact", reason=expected.kind)
    found = [
        _one(exact, output.detach(), expected, position, declared)
        for position, (exact, output) in enumerate(zip(expected.outputs, outputs, strict=False))
        if exact is not None
    ]
    if not found:
        return Judgement(verdict="unverified", reason="no output that can be compared")
    order = ("exact", "within", "explained", "range", "diverged")
    return max(found, key=lambda one: (order.index(one.verdict), one.margin))


def agree(reference: Tensor, candidate: Tensor, allowed: Tensor | float, *, declared: frozenset[str] = frozenset()) -> Judgement:
    """The judgement on two tensors of one shape, where `allowed` is the largest legal error of each element."""
    if reference.shape != candidate.shape:
        text = f"shape {list(candidate.shape)} against {list(reference.shape)}"
        return Judgement(verdict="diverged", margin=math.inf, reason=text, mismatched=candidate.numel(), total=candidate.numel())
    kind = torch.complex128 if reference.dtype.is_complex else torch.float64
    value, seen = reference.detach().to("cpu", kind), candidate.detach().to("cpu", kind)
    bounds = torch.as_tensor(allowed, dtype=torch.float64).expand(value.shape)
    return _compared(value, seen, bounds, output=0)


def _one(exact: Exact, output: Tensor, expected: Expected, position: int, declared: frozenset[str]) -> Judgement:
    if tuple(exact.value.shape) != tuple(output.shape):
        text = f"shape {list(output.shape)}, expected {list(exact.value.shape)}"
        return Judgement(verdict="diverged", margin=math.inf, reason=text, output=position)
    if not (output.dtype.is_floating_point or output.dtype.is_complex):
        return _integers(exact.value, output, position)
    if output.dtype not in ROUNDOFF:
        return Judgement(verdict="unverified", reason=f"no unit roundoff for {output.dtype}")
    kind = torch.complex128 if output.dtype.is_complex else torch.float64
    seen = output.to("cpu", kind)
    value = exact.value.to(kind)
    rounded = value.to(output.dtype).to(kind)
    if torch.equal(rounded, seen) and bool(torch.isfinite(rounded.abs()).eq(torch.isfinite(value.abs())).all()):
        return Judgement(
            verdict="exact", output=position, total=seen.numel(), roundoff=_roundoff(exact, value, seen, output.dtype, expected)
        )
    allowed = limit(exact, output.dtype, expected.compute)
    found = _compared(value, seen, allowed, output=position, ignored=exact.ignored, largest=_largest(output.dtype))
    roundoff = _roundoff(exact, value, seen, output.dtype, expected)
    values = {name: getattr(found, name) for name in Judgement.__dataclass_fields__} | {"roundoff": roundoff, "derived": exact.derived}
    if found.verdict == "diverged" and math.isfinite(found.margin):
        values |= _explained(exact, value, seen, output.dtype, expected, declared)
    elif found.verdict == "within" and roundoff is not None and expected.products and output.dtype == torch.float32:
        # Long sums leave room in which coarser products hide from the largest error, not from the mean square.
        if roundoff > TF32_LIKE and not _ieee(exact, value, seen, expected):
            policy = BF16_POLICY if roundoff > BF16_LIKE else TF32_POLICY
            values |= {"verdict": "explained", "policy": policy}
    return Judgement(**values)


def _compared(
    value: Tensor, seen: Tensor, allowed: Tensor, *, output: int, ignored: Tensor | None = None, largest: float = math.inf
) -> Judgement:
    error = (seen - value).abs()
    both = (seen == value) | (seen.isnan() & value.isnan())
    if ignored is not None:
        both = both | ignored
    finite = torch.isfinite(seen.abs())
    share = torch.where(error > 0, error / allowed, torch.zeros_like(error)).nan_to_num(math.inf, math.inf, math.inf)
    share = torch.where(finite, share, torch.full_like(share, math.inf)).masked_fill(both, 0.0)
    worst = int(share.argmax()) if share.numel() else 0
    margin = float(share.flatten()[worst]) if share.numel() else 0.0
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), share.shape)) if share.numel() else ()
    fields: dict[str, Any] = {
        "margin": margin,
        "output": output,
        "index": place,
        "mismatched": int((share > 1).sum()),
        "total": share.numel(),
        "observed": _number(seen, place),
        "exact": _number(value, place),
        "limit": _number(allowed, place),
    }
    if margin <= 1:
        return Judgement(verdict="within", **fields)
    over = ~finite & torch.isfinite(value.abs()) & (value.abs() + allowed >= largest)
    wrong = (share > 1) & ~over
    if not bool(wrong.any()):
        return Judgement(verdict="range", reason=f"the result exceeds {largest:.6g}, the largest number of its dtype", **fields)
    if bool((over & (share > 1)).any()):
        return _compared(value, seen, allowed, output=output, ignored=over | both)
    return Judgement(verdict="diverged", **fields)


def _explained(
    exact: Exact, value: Tensor, seen: Tensor, dtype: torch.dtype, expected: Expected, declared: frozenset[str]
) -> dict[str, Any]:
    """The smallest policy under which the error is legal, if there is one."""
    error = (seen - value).abs()
    out = ROUNDOFF[dtype]
    usual = out * value.abs()
    if exact.summed is not None:
        usual = usual + ROUNDOFF[expected.compute] * exact.summed / LAMBDA
    policies: list[tuple[str, dict[str, float]]] = []
    if expected.products and dtype == torch.float32:
        policies += [(TF32_POLICY, {"products": TF32}), (BF16_POLICY, {"products": ROUNDOFF[torch.bfloat16]})]
    if exact.spread is not None and dtype in (torch.float16, torch.bfloat16):
        policies.append((REDUCED_POLICY, {"accumulation": out * math.sqrt(min(1.0, SPLITS / exact.length))}))
        policies.append((LOW_POLICY, {"accumulation": out}))
    for policy, changes in policies:
        allowed = limit(exact, dtype, expected.compute, **changes)
        inside = error <= allowed
        if exact.ignored is not None:
            inside |= exact.ignored
        # One precision's roundings may all go one way where factors repeat, as those of the loss's gradient do.
        if bool(inside.all()) and (policy in declared or _everywhere(error, seen, value, usual)):
            return {"verdict": "explained", "policy": policy}
    return {}


def _everywhere(error: Tensor, seen: Tensor, value: Tensor, usual: Tensor) -> bool:
    """Whether an error is in most elements and of either sign, as a policy's is, and not in a few of them or along them.

    Half of the elements that are rounded correctly err by less than half of `usual`.
    """
    along = abs(((seen - value) * value.conj()).sum().item())
    size = float(error.norm() * value.norm())
    return float((error / usual.clamp_min(torch.finfo(torch.float64).tiny)).median()) > 0.5 and along < 0.5 * size


def _roundoff(exact: Exact, value: Tensor, seen: Tensor, dtype: torch.dtype, expected: Expected) -> float | None:
    """Root mean square of the error over that of the terms' spread: what precision a product of matrices behaved like."""
    if not expected.products or exact.spread is None:
        return None
    error, spread = (seen - value).abs(), exact.spread
    if not bool(torch.isfinite(error).all()):
        return None
    size = float(spread.square().mean().sqrt())
    return float(error.square().mean().sqrt()) / size if size else None


def _ieee(exact: Exact, value: Tensor, seen: Tensor, expected: Expected) -> bool:
    """Whether the mean square is one that a float32 sum of these terms, one by one, could have."""
    if exact.summed is None:
        return False
    typical = exact.summed / LAMBDA * ROUNDOFF[expected.compute]  # sqrt(K) times a partial sum: the worst order's root mean square
    return float((seen - value).square().mean()) <= float(typical.square().mean())


def _integers(value: Tensor, output: Tensor, position: int) -> Judgement:
    seen = output.to("cpu")
    wrong = value.to(seen.dtype) != seen if value.dtype != seen.dtype else value != seen
    count = int(wrong.sum())
    if not count:
        return Judgement(verdict="exact", output=position, total=seen.numel())
    place = tuple(int(i) for i in wrong.nonzero()[0])
    return Judgement(
        verdict="diverged",
        margin=math.inf,
        output=position,
        index=place,
        observed=float(seen[place]),
        exact=float(value[place]),
        mismatched=count,
        total=seen.numel(),
    )


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


def _number(tensor: Tensor, place: tuple[int, ...]) -> float:
    item = tensor[place].item() if tensor.numel() else 0.0
    return abs(item) if isinstance(item, complex) else float(item)


__all__ = ["Judgement", "Verdict", "agree", "expect", "judge", "judgement_of"]


def judgement_of(func: Any, args: Any, kwargs: Mapping[str, Any], *, declared: frozenset[str] = frozenset()) -> tuple[Any, Judgement]:
    """Run an op and judge it: (its result, the judgement)."""
    from torch.utils._pytree import tree_leaves

    expected = expect(func, args, kwargs)
    result = func(*args, **kwargs)
    return result, judge(expected, [t for t in tree_leaves(result) if isinstance(t, Tensor)], declared=declared)
