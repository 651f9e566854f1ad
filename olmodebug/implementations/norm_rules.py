"""What a norm computes where two implementations part: by which number it divides, and how it uses its weight."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..tracing.norms import norm_calls
from .anchors import Columns, Graph, same
from .captured import Parting
from .hypotheses import Cause
from .repaired import vanishes
from .wiring import weights_read

COMMON_EPS = {1e-5, 1e-6, 1e-8, 1e-12}


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _mean_square(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True)


DIVISIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "the root of the mean square": lambda x, eps: x * torch.rsqrt(_mean_square(x) + eps),
    "the standard deviation, the mean taken off first": lambda x, eps: _centred(x) * torch.rsqrt(_mean_square(_centred(x)) + eps),
    "the root of the sum of squares": lambda x, eps: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps),
    "the length of the vector, eps as its least value": lambda x, eps: x / x.norm(dim=-1, keepdim=True).clamp_min(eps),
    "the mean square, without a root": lambda x, eps: x / (_mean_square(x) + eps),
    "the root of the mean square, eps added behind the root": lambda x, eps: x / (_mean_square(x).sqrt() + eps),
    "the standard deviation, the mean left in": lambda x, eps: x * torch.rsqrt(_mean_square(_centred(x)) + eps),
    "the standard deviation of n - 1, the mean left in": lambda x, eps: x / (x.std(-1, keepdim=True) + eps),
    "the standard deviation of n - 1, the mean taken off first": lambda x, eps: _centred(x) / (x.std(-1, keepdim=True) + eps),
    "the root of the variance of n - 1, the mean taken off first": lambda x, eps: _centred(x) * torch.rsqrt(x.var(-1, keepdim=True) + eps),
}  # fmt: skip
USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multiplies by the weight": lambda value, weight: value * weight,
    "multiplies by 1 + weight": lambda value, weight: value * (1 + weight),
    "uses no weight": lambda value, weight: value,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NormRule:
    """One way to normalise the last dimension."""

    division: str
    use: str
    eps: float

    def __call__(self, x: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """The normalised tensor, with the weight and the bias among the vectors."""
        fitting = {name: v for name, v in vectors.items() if v.shape[0] == x.shape[-1]}
        weight = next((v for name, v in fitting.items() if "bias" not in name), None)
        bias = next((v for name, v in fitting.items() if "bias" in name), None)
        value = DIVISIONS[self.division](x.double(), self.eps)
        value = value if weight is None else USES[self.use](value, weight)
        return value if bias is None else value + bias


def norm_rule(parting: Parting) -> Cause | None:
    """A norm that divides by another number, or uses its weight in another way, than the reference's."""
    left, right = parting.left, parting.right
    if parting.other is None:
        return None
    eps = {c.eps for c in norm_calls(right.recording)}
    vectors = _vectors_next(parting)
    for source in parting.starts():
        x = left.nodes[source].tensor
        theirs = _found(parting, right, parting.other, x, vectors, eps)
        mine = _found(parting, left, parting.node, x, vectors, eps | COMMON_EPS) if theirs is not None else None
        theirs = _told_apart(parting, x, mine, theirs)
        if mine is None or theirs is None or (mine[0].division, mine[0].use) == (theirs[0].division, theirs[0].use):
            continue
        if vanishes(parting, source, mine[1], theirs[0]):
            return _cause(parting, mine[0], theirs[0], mine[1])
    return None


def _told_apart(
    parting: Parting, x: Tensor, mine: tuple[NormRule, int] | None, theirs: tuple[NormRule, int] | None
) -> tuple[NormRule, int] | None:
    """The reference's rule; with the subject's division, where these values do not tell the two divisions apart."""
    if mine is None or theirs is None:
        return theirs
    one, two = (parting.left.columns_of(replace(rule, use="uses no weight")(x, {})) for rule, _ in (mine, theirs))
    alike = one is not None and two is not None and same(one, two, parting.limit)
    return (replace(theirs[0], division=mine[0].division, eps=mine[0].eps), theirs[1]) if alike else theirs


def _vectors_next(parting: Parting) -> dict[str, Tensor]:
    """The weight and the bias of the norm that the reference goes through where the runs part."""
    weights = parting.aligned.weights
    for index, slot in weights_read(parting.right, parting.aligned.right.layout):
        if parting.other is not None and index >= parting.other and slot.endswith(".weight"):
            bias = weights.get(slot.removesuffix("weight") + "bias")
            return {} if weights[slot].ndim != 1 else {"weight": weights[slot], **({} if bias is None else {"bias": bias})}
    return {}


def _cause(parting: Parting, mine: NormRule, theirs: NormRule, node: int) -> Cause:
    says = [
        f"divides by {mine.division}" if mine.division != theirs.division else "",
        mine.use if mine.use != theirs.use else "",
    ]
    wants = [
        f"by {theirs.division}" if mine.division != theirs.division else "",
        theirs.use if mine.use != theirs.use else "",
    ]
    return Cause(
        name="norm",
        text=f"the norm {' and '.join(w for w in says if w)} where the reference's {'divides ' if wants[0] else ''}{' and '.join(w for w in wants if w)}; with the reference's rule in place, the logits agree",
        fix=f"divide by {theirs.division}" if wants[0] else f"do as the reference does: it {theirs.use}",
        spot=parting.spot(node),
        module=parting.left.event(node).where.module,
        op=parting.left.event(node).op,
    )


def _found(
    parting: Parting, graph: Graph, start: int | None, x: Tensor, vectors: dict[str, Tensor], candidates: set[float]
) -> tuple[NormRule, int] | None:
    """The rule that gives a tensor of this run best, and where it is first: of the last tensor that any rule gives."""
    near = [i for i in parting.near(graph, start) if graph.nodes[i].tensor.numel() == x.numel()]
    if not near or x.shape[-1] < 2:
        return None
    rules = [NormRule(division=d, use=u, eps=e) for d in DIVISIONS for u in USES for e in sorted(candidates)]
    made = [(rule, graph.columns_of(rule(x, vectors))) for rule in rules]
    found: list[tuple[NormRule, int]] = []
    for index in near:
        held = graph.nodes[index].columns
        assert held is not None
        fits = [(_apart(c, held), n) for n, (_, c) in enumerate(made) if c is not None and same(c, held, parting.limit)]
        if fits and (not found or found[-1][0] != made[min(fits)[1]][0]):  # views of it follow
            found.append((made[min(fits)[1]][0], index))
    return found[-1] if found else None


def _apart(one: Columns, other: Columns) -> float:
    return float((one.matrix - other.matrix).abs().max())


ON_NORMS: dict[str, Callable[[Parting], Cause | None]] = {"what a norm divides by, and its weight": norm_rule}
