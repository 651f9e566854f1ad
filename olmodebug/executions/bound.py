"""How far arithmetic of a declared precision may carry an op from its exact result, element by element.

Derived, not tuned: roundings are taken as independent with mean zero, so that their sum stays under `factor(alpha)` times
its root mean square (Hoeffding and Azuma, as in Ipsen and Zhou, arXiv:1906.10465). The one constant that anybody chooses
is `ALPHA`, the accepted probability of one false alarm in a whole report.

An op's bound is made of counts of roundings: `roundings` in the precision that it computes in, `summed` in the precision
that it accumulates in, `stored` in the precision of its output, and one rounding more when the output is written.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALPHA = 1e-6
MOST_ELEMENTS = 2**32  # tested in one report; fewer only make a false alarm rarer

# Unit roundoff: half the distance from 1 to the next number.
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.complex64: 2.0**-24,
    torch.complex128: 2.0**-53,
}
FLUSHED = 256  # how many smallest normal numbers a function may lose where its inner exponential leaves the range
SMALLEST = {  # the smallest subnormal
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
    torch.complex64: 2.0**-149,
    torch.complex128: 2.0**-1074,
}
TF32 = 2.0**-11  # ten bits of mantissa
CHUNK = 1 << 24  # elements of a float64 matrix held at once: 128 MiB


def factor(alpha: float = ALPHA) -> float:
    """How many root mean squares a sum of roundings stays within, for every element of a report, but for `alpha`."""
    return math.sqrt(2 * math.log(2 * MOST_ELEMENTS / alpha))


LAMBDA = factor()


@dataclass(slots=True, kw_only=True)
class Exact:
    """One output of an op in float64, and what its roundings multiply.

    `roundings`, `summed` and `stored` have the shape of `value`: the first counts in units of the compute precision, the
    second of the accumulation precision, the third of the output's. `spread` is the root of the sum of squared terms of
    a contraction, `length` how many terms it has; `ignored` marks elements that have no defined value. `typical` is the root
    mean square of what `summed` is a bound of.
    `absolute` counts half steps of the output's smallest subnormal, which roundings of small numbers add.
    `own_accumulation`: torch documents no wider accumulator for this op, so its sums may be kept in the output's dtype.
    """

    value: Tensor
    roundings: Tensor | None = None
    summed: Tensor | None = None
    stored: Tensor | None = None
    absolute: Tensor | float = 0.0
    spread: Tensor | None = None
    typical: Tensor | None = None
    length: int = 1
    ignored: Tensor | None = None
    own_accumulation: bool = False
    rounded: bool = True
    derived: bool = True


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What an op on these dtypes computes in: float32 for 16 bits and float32, else the widest of them."""
    wide = (torch.float64, torch.complex128)
    return torch.float64 if any(dtype in wide for dtype in dtypes) else torch.float32


def limit(
    exact: Exact, output: torch.dtype, compute: torch.dtype, *, accumulation: float | None = None, products: float | None = None
) -> Tensor:
    """The largest legal error of each element of an output of this dtype.

    `accumulation` and `products` are the unit roundoffs of a policy: of the running sum, and of the factors of a product.
    """
    u, out = ROUNDOFF[compute], ROUNDOFF[output]
    sums = accumulation if accumulation is not None else max(u, out) if exact.own_accumulation else u
    size = exact.value.abs()
    error = torch.zeros_like(size)
    if exact.roundings is not None:
        error += u * exact.roundings
    if exact.summed is not None:
        error += sums * exact.summed
    if exact.stored is not None:
        error += out * exact.stored
    if products is not None and exact.spread is not None:
        error += LAMBDA * math.sqrt(2) * products * exact.spread  # both factors of every term are rounded
    if not exact.rounded:
        return error
    error += SMALLEST[output] / 2 * exact.absolute
    # Half the smallest subnormal to the nearest; a kernel that flushes subnormals to zero errs by up to the smallest normal,
    # of what it computes in: 1 / (1 + exp(100)) is 0 in float32, and 100 times that too.
    floor = SMALLEST[output] / 2 if exact.length == 1 or output == torch.float16 else torch.finfo(output).tiny
    floor += FLUSHED * torch.finfo(compute).tiny
    return error + out * (size + error) + floor


def deviation(exact: Exact, output: torch.dtype, compute: torch.dtype) -> Tensor | None:
    """The standard deviation that legal roundings may have in each element: the bound with its factors of safety taken out.

    A single rounding errs by up to half a step, its root mean square is a sqrt(3)rd of that. None where nothing is rounded.
    """
    if not exact.rounded and exact.roundings is None and exact.summed is None and exact.stored is None:
        return None
    if exact.ignored is not None:
        return limit(exact, output, compute).masked_fill(exact.ignored, 0.0)
    u, out = ROUNDOFF[compute], ROUNDOFF[output]
    error = out * exact.value.abs() / math.sqrt(3)
    if exact.roundings is not None:
        error += u * exact.roundings
    if exact.summed is not None:
        error += (max(u, out) if exact.own_accumulation else u) * (exact.summed / LAMBDA if exact.typical is None else exact.typical)
    if exact.stored is not None:
        error += out * exact.stored
    return error


# Sums of products


def contraction(left: Tensor, right: Tensor, *, added: Tensor | None = None, scale: float = 1.0, add_scale: float = 1.0) -> Exact:
    """`scale * left @ right + add_scale * added` for `[..., M, K] @ [..., K, N]`, all in float64.

    The error of a sum is the sum of its partial sums' roundings: at most sqrt(K) times a partial sum, which is at most the
    sum of magnitudes, and for terms in no special order near the result plus the spread of the terms.
    """
    length = left.shape[-1]
    values, magnitudes, spreads = [], [], []
    step = max(1, CHUNK // max(1, right[..., :1].numel()))
    squares, sizes = left * left, left.abs()
    for start in range(0, right.shape[-1], step):
        part = right[..., start : start + step]
        values.append(left @ part)
        magnitudes.append(sizes @ part.abs())
        spreads.append((squares @ (part * part)).sqrt_())
    value, magnitude, spread = (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0] for parts in (values, magnitudes, spreads))
    if scale != 1.0:
        value, magnitude, spread = value * scale, magnitude * abs(scale), spread * abs(scale)
    partial = torch.minimum(magnitude, value.abs() + LAMBDA * spread)
    summed = LAMBDA * math.sqrt(length) * partial
    typical = math.sqrt(length) * torch.minimum(magnitude, value.abs() + spread)
    roundings = None
    if added is not None:
        value = value + add_scale * added
        roundings = 2 * value.abs() + abs(add_scale) * added.abs() + partial
    return Exact(value=value, summed=summed, typical=typical, spread=spread, length=max(2, length), roundings=roundings)


def sum_of(run: Callable[[Tensor], Tensor], terms: Tensor, length: int) -> Exact:
    """A sum `run(terms)` of `length` terms, each taken once."""
    value, magnitude, spread = run(terms), run(terms.abs()), run(terms * terms).sqrt()
    partial, typical = (torch.minimum(magnitude, value.abs() + safety * spread) for safety in (LAMBDA, 1.0))
    root = math.sqrt(max(1, length))
    return Exact(value=value, summed=LAMBDA * root * partial, typical=root * typical, spread=spread, length=max(2, length))


# Softmax and its relatives


def softmax(scores: Tensor, dim: int) -> Exact:
    value = scores.softmax(dim)
    distance = _distance(scores, dim)
    count = math.sqrt(scores.shape[dim])
    moved = 2 * distance + 2 * (value * distance).sum(dim, keepdim=True) + 6
    exact = Exact(value=value, roundings=value * moved, summed=value * (LAMBDA * count))
    empty = torch.isneginf(scores).all(dim, keepdim=True)
    if bool(empty.any()):
        exact.ignored = empty.expand_as(value)
    return exact


def log_softmax(scores: Tensor, dim: int) -> Exact:
    value = scores.log_softmax(dim)
    distance = _distance(scores, dim)
    share = (value.exp() * distance).sum(dim, keepdim=True)
    total = scores.shape[dim]
    roundings = 2 * distance + value.abs() + 2 * share + 2 * math.log(total + 1) + 6 + scores.abs().nan_to_num(0, 0, 0)
    # torch's CPU kernel keeps the sum, its logarithm, and the maximum added to that in the dtype of the scores
    stored = ((scores - value).abs() + value.abs() + 1).nan_to_num(0, 0, 0)
    return Exact(value=value, roundings=roundings, summed=torch.full_like(value, LAMBDA * math.sqrt(total)), stored=stored)


def softmax_backward(gradient: Tensor, output: Tensor, dim: int) -> Exact:
    product = gradient * output
    inner = product.sum(dim, keepdim=True)
    value = output * (gradient - inner)
    magnitude = product.abs().sum(dim, keepdim=True)
    roundings = output.abs() * (2 * gradient.abs() + 2 * inner.abs() + magnitude) + 2 * value.abs()
    summed = output.abs() * magnitude * (LAMBDA * math.sqrt(output.shape[dim]))
    return Exact(value=value, roundings=roundings, summed=summed)


def log_softmax_backward(gradient: Tensor, output: Tensor, dim: int) -> Exact:
    share = output.exp()
    inner = gradient.sum(dim, keepdim=True)
    value = gradient - share * inner
    magnitude = gradient.abs().sum(dim, keepdim=True)
    roundings = gradient.abs() + share * inner.abs() * (6 + output.abs()) + value.abs()
    return Exact(value=value, roundings=roundings, summed=share * magnitude * (LAMBDA * math.sqrt(output.shape[dim])))


def attention(arguments: Mapping[str, Any]) -> Exact:
    """Fused attention, forward: scores, softmax, weighted sum, with the weights kept in the output's dtype."""
    parts = _attention_parts(arguments)
    weights, moved, value_states = parts["weights"], parts["moved"], parts["value"]
    spread = ((weights * weights) @ (value_states * value_states)).sqrt()
    size = weights @ value_states.abs()
    shifted = ((weights * moved) ** 2 @ value_states**2).sqrt() * LAMBDA
    worst = (weights * moved) @ value_states.abs()
    count = math.sqrt(weights.shape[-1])
    exact = Exact(
        value=weights @ value_states,
        roundings=torch.minimum(worst, shifted) + (weights * parts["common"]) @ value_states.abs() + 8 * size,
        summed=LAMBDA * count * size,
        stored=torch.minimum(size, LAMBDA * spread),
        absolute=value_states.abs().sum(-2, keepdim=True).expand_as(size),
        spread=spread,
        length=max(2, weights.shape[-1]),
    )
    if parts["empty"] is not None:
        exact.ignored = parts["empty"].expand_as(exact.value)
    return exact


def attention_backward(arguments: Mapping[str, Any], *, blocks: int = 1) -> list[Exact]:
    """Fused attention, backward: the gradients of query, key and value from the saved output.

    `blocks`: in how many parts a kernel adds up the gradients of key and value in their own dtype.
    """
    parts = _attention_parts(arguments)
    query, key, value_states, scale = parts["query"], parts["key"], parts["value"], parts["scale"]
    gradient = arguments["grad_out"] if "grad_out" in arguments else arguments["grad_out_"]
    output, weights = arguments["out"], parts["weights"]
    moved = weights * (parts["moved"] + parts["common"])
    width, rows, columns = math.sqrt(query.shape[-1]), math.sqrt(weights.shape[-2]), math.sqrt(weights.shape[-1])
    along = gradient @ value_states.transpose(-1, -2)
    along_size = gradient.abs() @ value_states.abs().transpose(-1, -2)
    inner = (gradient * output).sum(-1, keepdim=True)
    inner_size = (gradient * output).abs().sum(-1, keepdim=True)
    score = weights * (along - inner)
    score_error = moved * (along - inner).abs() + weights * (LAMBDA * width + 2) * (along_size + inner_size)

    def product(left: Tensor, error: Tensor, right: Tensor, by: float, count: float, added: float = 0.0) -> Exact:
        size = left.abs() @ right.abs() * by
        spread = (left**2 @ right**2).sqrt() * by
        error_sum = torch.minimum(error @ right.abs(), LAMBDA * (error**2 @ right**2).sqrt()) * by
        value = left @ right * by
        return Exact(
            value=value,
            roundings=error_sum + 8 * size,
            summed=LAMBDA * count * size,
            stored=torch.minimum(size, LAMBDA * spread) + added * torch.minimum(size, value.abs() + LAMBDA * spread),
            absolute=right.abs().sum(-2, keepdim=True).expand_as(size) * by,
            spread=spread,
            length=2,
        )

    groups = parts["groups"]
    added = 0.0 if blocks == 1 else min(blocks, LAMBDA * math.sqrt(blocks / 3))  # a rounding's root mean square is u / sqrt(3)
    results = [
        product(score, score_error, key, scale, columns),
        _folded(product(score.transpose(-1, -2), score_error.transpose(-1, -2), query, scale, rows, added), groups),
        _folded(product(weights.transpose(-1, -2), moved.transpose(-1, -2), gradient, 1.0, rows, added), groups),
    ]
    if parts["empty"] is not None:
        for result in results:
            result.ignored = torch.ones_like(result.value, dtype=torch.bool)
    return results


def _attention_parts(arguments: Mapping[str, Any]) -> dict[str, Any]:
    query, key, value_states = arguments["query"], arguments["key"], arguments["value"]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value_states = (t.repeat_interleave(groups, dim=1) for t in (key, value_states))
    given = arguments.get("scale")
    scale = float(given) if given is not None else query.shape[-1] ** -0.5
    scores = query @ key.transpose(-1, -2) * scale
    size = query.abs() @ key.abs().transpose(-1, -2) * abs(scale)
    shift = (LAMBDA * math.sqrt(query.shape[-1]) + 4) * size
    mask = arguments.get("attn_mask", arguments.get("attn_bias"))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        shift = shift + scores.abs().nan_to_num(0, 0, 0)
    if arguments.get("is_causal"):
        rows, columns = scores.shape[-2:]
        hidden = torch.ones(rows, columns, dtype=torch.bool).tril().logical_not()
        scores = scores.masked_fill(hidden, -math.inf)
    empty = torch.isneginf(scores).all(-1, keepdim=True)
    weights = scores.softmax(-1).nan_to_num(0.0)
    distance = _distance(scores, -1)
    moved = (shift + 2 * distance + 6).masked_fill(torch.isneginf(scores), 0.0)
    common = (weights * (moved + LAMBDA)).sum(-1, keepdim=True) + 4
    parts = {"query": query, "key": key, "value": value_states, "scale": scale, "groups": groups, "weights": weights}
    return parts | {"moved": moved, "common": common, "empty": empty if bool(empty.any()) else None}


def _folded(exact: Exact, groups: int) -> Exact:
    """The gradient of a key or value head that several query heads read."""
    if groups == 1:
        return exact
    assert exact.stored is not None and isinstance(exact.absolute, Tensor)
    exact.stored = exact.stored + groups * exact.value.abs()  # each head is added to what is stored already
    exact.absolute = exact.absolute + groups
    for name in ("value", "roundings", "summed", "stored"):
        tensor = getattr(exact, name)
        batch, heads, length, width = tensor.shape
        setattr(exact, name, tensor.view(batch, heads // groups, groups, length, width).sum(2))
    exact.spread = None
    exact.absolute = exact.absolute.view(batch, heads // groups, groups, length, width).sum(2)
    exact.roundings = exact.roundings + groups * exact.value.abs() if exact.roundings is not None else None
    return exact


def _distance(scores: Tensor, dim: int) -> Tensor:
    """How far each score lies under the largest of its row; 0 where it is masked."""
    distance = (scores - scores.amax(dim, keepdim=True)).abs()
    return distance.nan_to_num(0.0, 0.0, 0.0)


# Norms


def layer_norm(x: Tensor, shape: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> list[Exact]:
    """Output, mean and reciprocal deviation of `native_layer_norm`; the last `shape` dimensions are normed."""
    dims = tuple(range(x.ndim - shape, x.ndim))
    count = math.prod(x.shape[d] for d in dims)
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    variance = (centred * centred).mean(dims, keepdim=True)
    scale = (variance + eps).rsqrt()
    size = x.abs().mean(dims, keepdim=True)
    mean_error = (LAMBDA * math.sqrt(count) + 2) * size
    # The variance is of the same numbers moved by the mean's error; half its relative error reaches the scale.
    part = (
        2 * centred.abs().mean(dims, keepdim=True) * mean_error + 2 * (centred.abs() * (x.abs() + mean.abs())).mean(dims, keepdim=True)
    ) / (variance + eps)
    scale_error = scale * (0.5 * (LAMBDA * math.sqrt(count) + 3 + part) + 4)
    normed = centred * scale
    error = scale * (x.abs() + mean.abs() + mean_error) + centred.abs() * scale_error + 2 * normed.abs()
    value = normed if weight is None else normed * weight
    if weight is not None:
        error = error * weight.abs() + value.abs()
    if bias is not None:
        value = value + bias
        error = error + value.abs()
    return [
        Exact(value=value, roundings=error),
        Exact(value=mean, roundings=mean_error),
        Exact(value=scale, roundings=scale_error),
    ]


def rms_norm_backward(gradient: Tensor, x: Tensor, shape: int, scale: Tensor, weight: Tensor | None) -> list[Exact | None]:
    """The gradients of input and weight of `_fused_rms_norm`, from the saved reciprocal root of the mean square."""
    dims = tuple(range(x.ndim - shape, x.ndim))
    rows = tuple(range(x.ndim - shape))
    count = math.prod(x.shape[d] for d in dims)
    normed = x * scale
    given = gradient if weight is None else gradient * weight
    inner = (given * normed).mean(dims, keepdim=True)
    value = scale * (given - normed * inner)
    size = (given * normed).abs().mean(dims, keepdim=True)
    error = 3 * given.abs() + normed.abs() * ((LAMBDA * math.sqrt(count) + 6) * size + 2 * inner.abs())
    first = Exact(value=value, roundings=scale.abs() * error + 3 * value.abs())
    if weight is None:
        return [first, None]
    gain = gradient * normed

    def over_rows(t: Tensor) -> Tensor:
        return t.sum(rows) if rows else t  # a sum over no dimension would be one over all

    second = sum_of(over_rows, gain, math.prod(x.shape[d] for d in rows))
    second.roundings = 3 * over_rows(gain.abs())
    return [first, second]


def layer_norm_backward(
    gradient: Tensor, x: Tensor, shape: int, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None
) -> list[Exact | None]:
    """The gradients of input, weight and bias of `native_layer_norm`, from the saved mean and scale."""
    dims = tuple(range(x.ndim - shape, x.ndim))
    rows = tuple(range(x.ndim - shape))
    count = math.prod(x.shape[d] for d in dims)
    normed = (x - mean) * scale
    normed_error = scale * (x.abs() + mean.abs()) + 2 * normed.abs()
    given = gradient if weight is None else gradient * weight
    first, second = given.mean(dims, keepdim=True), (given * normed).mean(dims, keepdim=True)
    value = scale * (given - first - normed * second)
    sums = LAMBDA * math.sqrt(count) + 4
    size, product = given.abs().mean(dims, keepdim=True), (given * normed).abs().mean(dims, keepdim=True)
    carried = (given.abs() * normed_error).mean(dims, keepdim=True)
    error = 4 * given.abs() + sums * size + normed.abs() * (sums * product + carried) + normed_error * second.abs()
    results: list[Exact | None] = [Exact(value=value, roundings=scale * error + 4 * value.abs())]
    if weight is None:
        return [*results, None, None]
    number = math.prod(x.shape[d] for d in rows)
    gain = gradient * normed

    def over_rows(t: Tensor) -> Tensor:
        return t.sum(rows) if rows else t  # a sum over no dimension would be one over all

    weight_exact = sum_of(over_rows, gain, number)
    weight_exact.roundings = over_rows(gradient.abs() * normed_error + gain.abs())
    bias_exact = sum_of(over_rows, gradient, number) if bias is not None else None
    return [*results, weight_exact, bias_exact]
