"""How far two tensors are apart, in float64, with non-finite values taken seriously."""

import torch
from torch import Tensor

from .records import Difference

# How many roundings of the least precise dtype in the traced forward may separate two runs that agree. A relation in
# float64 leaves about nine decimal places between this and the smallest effect that a broken rule has on logits.
ROUNDINGS = 256
# Where float32 appears inside, its roundings are carried through every following layer and may grow there.
FLOAT32_ROUNDINGS = 1024


def difference(left: Tensor, right: Tensor, *, relative_limit: float = 0.0) -> Difference | None:
    """Where two tensors of one shape differ by more than `relative_limit` times their largest magnitude; None where
    they agree. Integers must be equal; NaN agrees with NaN, and an infinity only with itself."""
    if left.shape != right.shape:
        return Difference(max_abs=float("inf"), scale=1.0, mismatched=1, total=1)
    if left.device != right.device:
        left, right = left.cpu(), right.cpu()
    if left.numel() == 0 or (left.dtype == right.dtype and torch.equal(left, right)):
        return None
    if not left.dtype.is_floating_point and not left.dtype.is_complex:
        wrong = left != right
        return _found(wrong, wrong.double(), 1.0, 0.0)
    kind = torch.complex128 if left.dtype.is_complex or right.dtype.is_complex else torch.float64
    a, b = left.detach().to(kind), right.detach().to(kind)
    same = (a == b) | (torch.isnan(a) & torch.isnan(b))
    if bool(same.all()):
        return None
    gap = (a - b).abs().masked_fill(same, 0.0)
    gap = gap.masked_fill(~torch.isfinite(gap), float("inf"))
    magnitude = torch.maximum(a.abs(), b.abs())
    usable = magnitude[torch.isfinite(magnitude)]
    scale = float(usable.max()) if usable.numel() else 1.0
    return _found(gap > relative_limit * scale, gap, scale, relative_limit * scale)


def roundings_limit(dtypes: set[str]) -> float:
    """The relative limit for runs in which these floating dtypes appear; float32 is the least precise that counts,
    since below it a relation in float64 could prove nothing."""
    if dtypes and not dtypes & {"float32", "bfloat16", "float16"}:
        return ROUNDINGS * torch.finfo(torch.float64).eps
    return FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps


def _found(wrong: Tensor, gap: Tensor, scale: float, limit: float) -> Difference | None:
    count = int(wrong.sum())
    if not count:
        return None
    index = int(gap.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), gap.shape))
    return Difference(max_abs=float(gap.max()), scale=scale, mismatched=count, total=gap.numel(), index=place, limit=limit)
