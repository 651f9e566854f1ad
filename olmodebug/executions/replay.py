"""An aten op once more, in float64 on the CPU, on the inputs that it really had: its exact result and its legal error.

`expect(func, args, kwargs)` must run before the op does, because the op may write into its arguments. What it cannot
vouch for it says, with the reason: nothing passes unseen.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from . import bound
from .bound import LAMBDA, Exact

RANDOM = {"bernoulli", "bernoulli_", "native_dropout", "rand", "randn", "randint", "rand_like", "randn_like", "normal_", "uniform_"}
RANDOM |= {"multinomial", "randperm", "exponential_", "normal", "_fused_dropout", "random_", "dropout"}
UNWRITTEN = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_", "resize_", "record_stream"}
# They move, choose or compare numbers: nothing is rounded, so nothing may differ.
MOVING = set(
    "embedding index index_select gather cat stack where masked_fill clone copy slice_scatter select_scatter clamp clamp_min clamp_max "
    "maximum minimum amax amin max min neg abs relu threshold_backward tril triu repeat flip roll zero zeros ones zeros_like ones_like "
    "new_zeros new_ones masked_scatter constant_pad_nd slice_backward select_backward sign floor ceil round trunc _unsafe_index scatter "
    "lift_fresh_copy sort topk masked_select index_copy index_fill eq ne lt le gt ge logical_and logical_or logical_not isnan isinf "
    "isfinite bitwise_and bitwise_or bitwise_not any all nonzero argmax argmin one_hot hardtanh hardtanh_backward relu6 _copy_from "
    "masked_fill_backward expand_copy view_copy permute_copy complex real imag view_as_real view_as_complex take put unfold_backward "
    "leaky_relu_copy bucketize searchsorted _reshape_copy _unsafe_view _reshape_alias diag_embed value_selecting_reduction_backward".split()
)
# They round a number once, on the way into their dtype.
WRITING = {"_to_copy", "full", "fill", "full_like", "new_full", "scalar_tensor", "arange", "linspace", "lift_fresh", "_to_dtype", "tensor"}
# Roundings in the compute precision, relative to the result: vendors' largest errors in units in the last place
# (CUDA C++ Programming Guide, mathematical functions; SLEEF's u10 and u35 variants on the CPU), two roundings a unit.
FUNCTIONS = {
    "mul": 1, "div": 2, "sqrt": 2, "rsqrt": 4, "reciprocal": 3, "exp": 5, "exp2": 5, "log": 5, "log2": 5, "log1p": 5, "expm1": 5, "sin": 5,
    "cos": 5, "tan": 9, "tanh": 6, "atan": 5, "erf": 6, "pow": 18, "sigmoid": 8, "square": 1, "polar": 8, "outer": 1, "ldexp": 1,
}  # fmt: skip
ERF_ABSOLUTE = 8  # the CPU's vectors take a polynomial whose error is absolute, 4e-7
ADDING = {"add", "sub", "rsub"}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "vdot", "linear", "matmul"}
SUMS = {"sum", "mean", "cumsum", "nansum"}
SCANS = {"logcumsumexp", "cumprod"}
SCATTERED = {"embedding_dense_backward", "index_put", "_index_put_impl", "index_add", "scatter_add", "scatter_reduce", "index_reduce"}
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
}
SAMPLES = 4  # of random roundings for an op without a derived bound
MOST_CALIBRATED = 1 << 22  # elements of an op that is still replayed SAMPLES times for each argument


@dataclass(slots=True, kw_only=True)
class Expected:
    """The exact outputs of one op, by position among its tensor outputs; None where there is nothing to compare.

    `unverified` says why nothing can be compared at all; `kind` is `view`, `moved`, `arithmetic` or `none`.
    """

    outputs: list[Exact | None] = field(default_factory=list)
    compute: torch.dtype = torch.float32
    kind: str = "arithmetic"
    unverified: str | None = None
    products: bool = False


def expect(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Expected:
    """What an op must give, replayed in float64 before it runs."""
    name = op_name(func)
    if name in UNWRITTEN or name.rstrip("_") in UNWRITTEN:
        return Expected(kind="none")
    if name in RANDOM or name.rstrip("_") in RANDOM:
        if name == "native_dropout" and not kwargs.get("train", args[2] if len(args) > 2 else True):
            name = "clone"
        else:
            return Expected(kind="none", unverified=f"{name} is random")
    if _is_view(func):
        return Expected(kind="view")
    call = _call(func, name.rstrip("_") if name != "_index_put_impl_" else "index_put", args, kwargs)
    if any(t.layout != torch.strided for t in call.tensors):
        return Expected(kind="none", unverified=f"{name} on a sparse tensor")
    rule = _rule(call)
    try:
        outputs = rule(call)
    except Exception as error:  # an op may refuse float64; then nothing is claimed about it
        text = str(error).partition("\n")[0][:100]
        return Expected(kind="none", unverified=f"{name} does not replay in float64 ({type(error).__name__}: {text})")
    if not outputs:
        return Expected(kind="none")
    kind = "moved" if rule is _moved else "arithmetic"
    return Expected(outputs=outputs, compute=call.compute, kind=kind, products=call.name in PRODUCTS or "convolution" in call.name)


def op_name(func: Any) -> str:
    """`mm` of `aten.mm.default`."""
    name: str = func._schema.name.rpartition("::")[2]
    return name


def is_arithmetic(func: Any) -> bool:
    """Whether an op rounds its results and writes them into memory of its own."""
    name = op_name(func)
    known = name in MOVING or name in WRITING or name in UNWRITTEN or name in RANDOM
    return not known and not func._schema.is_mutable and not _is_view(func)


def upcast(value: Any, compute: torch.dtype = torch.float32) -> Any:
    """Tensors copied to the CPU in float64, dtypes replaced by float64, Python numbers rounded as the op rounds them."""
    if isinstance(value, Tensor):
        if value.dtype.is_complex:
            return value.detach().to("cpu", torch.complex128, copy=True)
        if value.dtype.is_floating_point:
            return value.detach().to("cpu", torch.float64, copy=True)
        return value.detach().to("cpu", copy=True)
    if isinstance(value, torch.dtype):
        return torch.complex128 if value.is_complex else torch.float64 if value.is_floating_point else value
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if type(value) is float and math.isfinite(value):
        return float(torch.tensor(value, dtype=compute))
    return value


@dataclass(slots=True, kw_only=True)
class _Call:
    func: Any
    name: str
    named: dict[str, Any]  # upcast, by the schema's names
    args: Any
    kwargs: dict[str, Any]
    compute: torch.dtype
    dtypes: set[torch.dtype]
    on_cpu: bool

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    @property
    def floats(self) -> list[Tensor]:
        return [t for t in self.tensors if t.dtype.is_floating_point or t.dtype.is_complex]

    def run(self, args: Any = None) -> list[Tensor]:
        """The op's outputs in float64. Arguments are copied: an op in place would change them."""
        used = _copied(self.args if args is None else args), _copied(self.kwargs)
        return [t for t in tree_leaves(self.func(*used[0], **used[1])) if isinstance(t, Tensor)]


def _call(func: Any, name: str, args: Any, kwargs: Mapping[str, Any]) -> _Call:
    given = [t for t in tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor)]
    dtypes = {t.dtype for t in given if t.dtype.is_floating_point or t.dtype.is_complex}
    asked = kwargs.get("dtype")
    compute = bound.compute_dtype(*dtypes, *([asked] if isinstance(asked, torch.dtype) and asked.is_floating_point else []))
    up = tree_map(lambda v: upcast(v, compute), (tuple(args), dict(kwargs)))
    named = {spec.name: value for spec, value in zip(func._schema.arguments, up[0], strict=False)} | up[1]
    return _Call(
        func=func,
        name=name,
        named=named,
        args=up[0],
        kwargs=up[1],
        compute=compute,
        dtypes=dtypes,
        on_cpu=all(t.device.type == "cpu" for t in given),
    )


def _rule(call: _Call) -> Callable[[_Call], list[Exact | None]]:
    name = call.name
    if name in MOVING or (
        name in SUMS | ADDING | set(FUNCTIONS) and not call.dtypes and not isinstance(call.kwargs.get("dtype"), torch.dtype)
    ):
        return _moved
    for names, rule in RULES:
        if name in names:
            return rule
    has_floats = any(t.dtype.is_floating_point or t.dtype.is_complex for t in call.tensors)
    return _calibrated if has_floats else _moved


def _moved(call: _Call) -> list[Exact | None]:
    mixed = len(call.dtypes) > 1 or any(type(leaf) is float for leaf in tree_leaves((call.args, call.kwargs)))
    return [_plain(y, rounded=mixed) for y in call.run()]


def _plain(y: Tensor, *, rounded: bool) -> Exact:
    return Exact(value=y, rounded=rounded)


def _written(call: _Call) -> list[Exact | None]:
    if call.name in ("arange", "linspace"):
        return [Exact(value=y, roundings=4 * y.abs()) for y in call.run()]
    if call.name == "_to_copy":
        source = call.args[0]
        kind = call.kwargs.get("dtype")
        if kind is not None and not (kind.is_floating_point or kind.is_complex):
            source = source.to(kind)
        return [Exact(value=source)]
    return [Exact(value=y) for y in call.run()]


def _function(call: _Call) -> list[Exact | None]:
    count = FUNCTIONS[call.name]
    if call.name == "pow" and not isinstance(call.args[0], Tensor) and len(call.dtypes) == 1:
        (dtype,) = call.dtypes  # a number to the power of a tensor becomes one of its dtype first
        call.args = (float(torch.tensor(call.args[0], dtype=dtype)), *call.args[1:])
    outputs = [Exact(value=y, roundings=count * y.abs()) for y in call.run()]
    if call.name == "erf" and call.on_cpu:
        outputs = [Exact(value=y, roundings=count * y.abs() + ERF_ABSOLUTE) for y in call.run()]
    exponent = call.args[1] if call.name == "pow" and not isinstance(call.args[1], Tensor) else None
    if exponent in (3, -2):
        for exact in outputs:  # multiplied, and each product rounded to the tensor's own dtype
            exact.stored, exact.absolute = 2 * exact.value.abs(), 2.0
    if call.on_cpu and (call.name == "rsqrt" or exponent == -0.5):
        for exact in outputs:  # what is left over from whole vectors: a root in the tensor's own dtype, and 1 divided by it
            exact.stored = exact.value.abs()
    return [*outputs]


def _added(call: _Call) -> list[Exact | None]:
    (y,) = call.run()
    alpha = call.named.get("alpha", 1)
    if alpha == 1:
        number = next((n for n in call.args[:2] if isinstance(n, int | float) and not isinstance(n, bool)), None)
        rounded = torch.full_like(y, abs(number), dtype=torch.float64) if number is not None and call.on_cpu else None
        return [Exact(value=y, roundings=y.abs(), stored=rounded)]  # on the CPU a number is rounded to the tensor's dtype first
    scaled = call.named["other"] if call.name != "rsub" else call.named["self"]
    size = (abs(alpha) * (scaled.abs() if isinstance(scaled, Tensor) else torch.as_tensor(abs(scaled)))).expand_as(y)
    return [Exact(value=y, roundings=y.abs(), stored=2 * size, absolute=2.0)]  # on the CPU alpha is rounded to the tensors' dtype


def _combined(call: _Call) -> list[Exact | None]:
    """lerp, addcmul, addcdiv: a number and a small product on top."""
    (y,) = call.run()
    named = call.named
    if call.name == "lerp":
        weight = named["weight"]
        weight = weight.abs() if isinstance(weight, Tensor) else abs(weight)
        size = named["self"].abs() + (1 + weight) * (named["self"].abs() + named["end"].abs())
    else:
        product = y - named["self"]
        size = y.abs() + 4 * product.abs() + named["self"].abs()
    return [Exact(value=y, roundings=2 * size)]


def _gated(call: _Call) -> list[Exact | None]:
    """silu, gelu and their gradients, whose factors may cancel."""
    (y,) = call.run()
    x = call.named["self"]
    if call.name == "silu":
        return [Exact(value=y, roundings=10 * y.abs())]
    if call.name == "gelu":
        return [Exact(value=y, roundings=8 * y.abs() + 6 * x.abs())]
    gradient = call.named["grad_output"]
    if call.name == "silu_backward":
        gate = torch.sigmoid(x)
        return [Exact(value=y, roundings=12 * gradient.abs() * gate * (1 + x.abs() * (1 - gate)) + 2 * y.abs())]
    density = torch.exp(-0.5 * x * x)
    return [Exact(value=y, roundings=gradient.abs() * (16 + 16 * x.abs() * density * (1 + x * x)) + 2 * y.abs())]


def _slope(call: _Call) -> list[Exact | None]:
    """tanh_backward and sigmoid_backward, from the saved output."""
    (y,) = call.run()
    gradient, output = call.named["grad_output"].abs(), call.named["output"].abs()
    size = gradient * (1 + output**2) if call.name == "tanh_backward" else gradient * output * (1 + output)
    return [Exact(value=y, roundings=4 * size, stored=2 * size, absolute=4.0)]  # 1 - output and the products are kept in the tensors' dtype


def _product(call: _Call) -> list[Exact | None]:
    named = call.named
    if call.name in ("mm", "bmm"):
        return [bound.contraction(named["self"], named["mat2"])]
    if call.name == "addmm":
        scales = {"scale": float(named.get("alpha", 1)), "add_scale": float(named.get("beta", 1))}
        return [_sum_apart(call, bound.contraction(named["mat1"], named["mat2"], added=named["self"], **scales), scales["add_scale"])]
    if call.name == "baddbmm":
        scales = {"scale": float(named.get("alpha", 1)), "add_scale": float(named.get("beta", 1))}
        added = None if scales["add_scale"] == 0 else named["self"]
        return [_sum_apart(call, bound.contraction(named["batch1"], named["batch2"], added=added, **scales), scales["add_scale"])]
    (y,) = call.run()
    left, right = (t for t in call.floats[-2:])
    size, spread = call.func(left.abs(), right.abs()), call.func(left * left, right * right).sqrt()
    length = left.shape[-1]
    partial = torch.minimum(size, y.abs() + LAMBDA * spread)
    return [Exact(value=y, summed=LAMBDA * math.sqrt(length) * partial, spread=spread, length=max(2, length))]


def _sum_apart(call: _Call, exact: Exact, add_scale: float) -> Exact:
    """cuBLAS may write the product in the output's dtype before the bias is added (seen on an H100 with a few columns)."""
    if not call.on_cpu and add_scale:
        exact.stored = (exact.value - add_scale * call.named["self"]).abs()
    return exact


def _convolved(call: _Call) -> list[Exact | None]:
    named = call.named
    (y,) = call.run()
    rest = {k: v for k, v in named.items() if k not in ("input", "weight", "bias")}
    x, weight, bias = named["input"], named["weight"], named.get("bias")
    size = call.func(x.abs(), weight.abs(), None, **rest)
    spread = call.func(x * x, weight * weight, None, **rest).sqrt()
    length = math.prod(weight.shape[1:])
    partial = torch.minimum(size, y.abs() + LAMBDA * spread)
    roundings = 2 * y.abs() + size if bias is not None else None
    return [Exact(value=y, summed=LAMBDA * math.sqrt(length) * partial, roundings=roundings, spread=spread, length=max(2, length))]


def _summed(call: _Call) -> list[Exact | None]:
    terms = call.named["self"]
    rest = call.args[1:]
    kwargs = call.kwargs
    once = call.func(torch.zeros((), dtype=torch.float64).expand(terms.shape), *rest, **kwargs)
    length = terms.shape[call.named["dim"]] if call.name == "cumsum" else max(1, terms.numel() // max(1, once.numel()))
    exact = bound.sum_of(lambda t: call.func(t, *rest, **kwargs), terms, length)
    if call.name == "cumsum":
        exact.own_accumulation = not call.on_cpu  # CUDA's scan keeps its sums in the tensor's own dtype
    if call.name == "mean":
        # The mean of squares is no root of anything: undo the division under the root.
        exact.spread = (exact.spread / math.sqrt(length)) if exact.spread is not None else None
        size = call.func(terms.abs(), *rest, **kwargs)
        exact.summed = LAMBDA * math.sqrt(length) * size
        exact.roundings = 2 * exact.value.abs()
        exact.stored = exact.value.abs()  # on the CPU torch writes the sum in the output's dtype and then divides
    return [exact]


def _scattered(call: _Call) -> list[Exact | None]:
    """Additions into rows: as many as the most frequent index has."""
    named = call.named
    (y,) = call.run()
    if call.name in ("index_put", "_index_put_impl") and not named.get("accumulate", False):
        return [_plain(y, rounded=len(call.dtypes) > 1)]
    source = {"embedding_dense_backward": "grad_output", "index_put": "values", "_index_put_impl": "values"}.get(call.name, "source")
    source = source if source in named else "src"
    names = [spec.name for spec in call.func._schema.arguments]
    position = names.index(source)
    base = named.get("self")
    args = list(call.args)
    args[position] = named[source].abs()
    if base is not None:
        args[0] = base.abs()
    (size,) = call.run(tuple(args))
    index = [t for t in call.tensors if not t.dtype.is_floating_point and t.dtype != torch.bool]
    most = max((int(t.flatten().unique(return_counts=True)[1].max()) for t in index if t.numel()), default=1)
    if call.name in ("index_put", "_index_put_impl") and len(index) > 1:
        most = named[source].numel()
    exact = Exact(value=y, summed=size * min(float(most) + 1, LAMBDA * math.sqrt(most + 1)), length=2, own_accumulation=True)
    return [exact]


def _loss(call: _Call) -> list[Exact | None]:
    outputs = call.run()
    picked = call.named["self"]
    count = max(1, picked.numel() // picked.shape[-1])
    size = picked.abs().amax() if outputs[0].numel() == 1 else None
    value = outputs[0]
    if size is None:
        return [_plain(value, rounded=True), _plain(outputs[1], rounded=True)]
    terms = outputs[1] if int(call.named["reduction"]) == 2 else torch.ones_like(value)
    summed = LAMBDA * math.sqrt(count) * value.abs() if bool((picked <= 0).all()) else size * terms * count
    return [Exact(value=value, summed=summed, roundings=4 * value.abs(), length=2, own_accumulation=True), _plain(outputs[1], rounded=True)]


def _loss_backward(call: _Call) -> list[Exact | None]:
    return [Exact(value=y, roundings=3 * y.abs()) for y in call.run()]


def _softmax(call: _Call) -> list[Exact | None]:
    x, dim = call.named["self"], call.named["dim"]
    exact = bound.log_softmax(x, dim) if "log" in call.name else bound.softmax(x, dim)
    if "log" not in call.name and call.on_cpu:
        exact.stored, exact.absolute = 2 * exact.value, 4.0  # the CPU keeps the exponentials and their sum in the dtype of the scores
    if call.name == "_safe_softmax":
        exact.value, exact.ignored = exact.value.nan_to_num(0.0), None
        exact.roundings = exact.roundings.nan_to_num(0.0) if exact.roundings is not None else None
        exact.summed = exact.summed.nan_to_num(0.0) if exact.summed is not None else None
    return [exact]


def _logsumexp(call: _Call) -> list[Exact | None]:
    """The maximum plus the logarithm of the sum, which may cancel."""
    x, dims, keep = call.named["self"], tuple(call.named["dim"]), bool(call.named.get("keepdim", False))
    (y,) = call.run()
    top, below = x.amax(dims, keepdim=True), (x - x.amax(dims, keepdim=True)).abs().nan_to_num(0.0, 0.0, 0.0)
    weights = (x - x.logsumexp(dims, keepdim=True)).exp().nan_to_num(0.0)
    share = (weights * below).sum(dims, keepdim=keep)
    top = (top if keep else top.amax(dims)).abs().nan_to_num(0.0, 0.0, 0.0)
    count = math.prod(x.shape[d] for d in dims)
    roundings = 2 * (y.abs() + top + share) + 2 * math.log(count + 1) + 6
    stored = 2 * top + y.abs() + 2 + share  # differences, exponentials and their sum are tensors in the dtype of the scores
    return [Exact(value=y, roundings=roundings, summed=torch.full_like(y, LAMBDA * math.sqrt(count)), stored=stored)]


def _softmax_backward(call: _Call) -> list[Exact | None]:
    gradient, output, dim = (call.named[name] for name in ("grad_output", "output", "dim"))
    if "log" in call.name:
        return [bound.log_softmax_backward(gradient, output, dim)]
    exact = bound.softmax_backward(gradient, output, dim)
    if not call.on_cpu:  # CUDA writes gradient times output in their dtype first
        product = gradient * output
        carried = torch.minimum(product.abs().sum(dim, keepdim=True), LAMBDA * product.square().sum(dim, keepdim=True).sqrt())
        exact.stored = product.abs() + output.abs() * carried
        exact.absolute = 2 + output.abs() * output.shape[dim]
    return [exact]


def _rms_norm(call: _Call) -> list[Exact | None]:
    """`_fused_rms_norm` and its reciprocal root; without an eps it takes that of the dtype in which it computes."""
    n = call.named
    x, weight, eps = n["input"], n.get("weight"), n.get("eps")
    dims = tuple(range(x.ndim - len(n["normalized_shape"]), x.ndim))
    scale = (x.pow(2).mean(dims, keepdim=True) + (torch.finfo(call.compute).eps if eps is None else eps)).rsqrt()
    y = x * scale if weight is None else x * scale * weight
    sums = LAMBDA * math.sqrt(math.prod(x.shape[d] for d in dims))
    return [Exact(value=v, roundings=8 * v.abs(), summed=sums * v.abs()) for v in (y, scale)]


def _rms_norm_backward(call: _Call) -> list[Exact | None]:
    """The gradients of input and weight of `_fused_rms_norm`, from the saved reciprocal root."""
    n = call.named
    x, scale, weight, gradient = n["input"], n["rstd"], n.get("weight"), n["grad_out"]
    results = bound.rms_norm_backward(gradient, x, len(n["normalized_shape"]), scale, weight)
    return [exact if wanted else None for exact, wanted in zip(results, n["output_mask"], strict=True)]


def _layer_norm(call: _Call) -> list[Exact | None]:
    named = call.named
    return [*bound.layer_norm(named["input"], len(named["normalized_shape"]), named.get("weight"), named.get("bias"), named["eps"])]


def _layer_norm_backward(call: _Call) -> list[Exact | None]:
    n = call.named
    shape = len(n["normalized_shape"])
    results = bound.layer_norm_backward(n["grad_out"], n["input"], shape, n["mean"], n["rstd"], n.get("weight"), n.get("bias"))
    for exact in results[1:]:
        if exact is not None:
            exact.own_accumulation = call.on_cpu  # the CPU adds the rows up in the weight's dtype
    return results


def _grouped(call: _Call) -> list[Exact | None]:
    """Products of groups of rows with one matrix each, or of groups of columns: experts, forward and backward."""
    left, right, ends = call.named["self"], call.named["mat2"], call.named["offs"]
    starts = [0, *ends.tolist()]
    spans = list(itertools.pairwise(starts))
    parts: list[Exact]
    if left.ndim == 2 and right.ndim == 3:
        parts = [bound.contraction(left[a:b], right[i]) for i, (a, b) in enumerate(spans)]
        joined = [torch.cat([getattr(p, name) for p in parts]) for name in ("value", "summed", "spread")]
        rest = left.shape[0] - starts[-1]
        joined = [torch.nn.functional.pad(t, (0, 0, 0, rest)) for t in joined]
        return [Exact(value=joined[0], summed=joined[1], spread=joined[2], length=max(2, left.shape[-1]))]
    if left.ndim == 2 and right.ndim == 2:
        parts = [bound.contraction(left[:, a:b], right[a:b]) for a, b in spans]
        joined = [torch.stack([getattr(p, name) for p in parts]) for name in ("value", "summed", "spread")]
        return [Exact(value=joined[0], summed=joined[1], spread=joined[2], length=max(2, left.shape[-1]))]
    raise ValueError("this layout of groups has no rule")


def _attended(call: _Call) -> list[Exact | None]:
    if call.named.get("dropout_p"):
        raise ValueError("dropout is on")
    return [bound.attention(call.named)]


def _attended_backward(call: _Call) -> list[Exact | None]:
    if call.named.get("dropout_p"):
        raise ValueError("dropout is on")
    rows = call.named["query"].shape[-2]
    in_16_bits = call.on_cpu and bool(call.dtypes & {torch.float16, torch.bfloat16})  # the row sums are float32
    # FlashAttentionKernel.cpp adds to the gradients of key and value block by block of queries: 256 of them, or 64 of few.
    return [*bound.attention_backward(call.named, blocks=-(-rows // (256 if rows >= 768 else 64)) if in_16_bits else 1)]


def _log_sigmoid(call: _Call) -> list[Exact | None]:
    """The second output is a buffer of the CPU's own; on CUDA it is empty."""
    (first, *rest) = _calibrated(call)
    return [first, *(rest if call.on_cpu else [None for _ in rest])]


def _calibrated(call: _Call) -> list[Exact | None]:
    """An op without a derived bound: how far random roundings of its arguments carry it, and eight of the result."""
    if sum(t.numel() for t in call.floats) > MOST_CALIBRATED:
        raise ValueError("no derived bound, and too large to be calibrated")
    plain = call.run()
    moved = [torch.zeros_like(y, dtype=torch.float64) for y in (t.abs() for t in plain)]
    generator = torch.Generator().manual_seed(0)
    step = 2.0**-20
    for _ in range(SAMPLES):

        def shaken(t: Any) -> Any:
            if isinstance(t, Tensor) and t.dtype.is_floating_point:
                return t * (1 + step * torch.randn(t.shape, generator=generator, dtype=torch.float64))
            return t

        again = call.run(tree_map(shaken, call.args))
        moved = [torch.maximum(m, ((a - p).abs() / step).nan_to_num(0.0)) for m, a, p in zip(moved, again, plain, strict=True)]
    size = max((t.numel() for t in call.floats), default=1)
    results: list[Exact | None] = []
    for y, m in zip(plain, moved, strict=True):
        if not (y.dtype.is_floating_point or y.dtype.is_complex):
            results.append(None)
            continue
        scanned = y.shape[call.named["dim"]] if call.name in SCANS and y.ndim else 1
        length = max(scanned, size // max(1, y.numel()))
        grown = math.sqrt(length)
        summed = (LAMBDA * m + 8 * y.abs()) * grown
        results.append(Exact(value=y, summed=summed, length=2, own_accumulation=True, absolute=LAMBDA * grown, derived=False))
    return results


RULES: tuple[tuple[set[str], Callable[[_Call], list[Exact | None]]], ...] = (
    (WRITING, _written),
    (set(FUNCTIONS), _function),
    (ADDING, _added),
    ({"lerp", "addcmul", "addcdiv"}, _combined),
    ({"silu", "gelu", "silu_backward", "gelu_backward"}, _gated),
    ({"tanh_backward", "sigmoid_backward"}, _slope),
    (PRODUCTS, _product),
    ({"_grouped_mm"}, _grouped),
    ({"convolution"}, _convolved),
    (SUMS, _summed),
    (SCATTERED, _scattered),
    ({"nll_loss_forward", "nll_loss2d_forward"}, _loss),
    ({"nll_loss_backward", "nll_loss2d_backward"}, _loss_backward),
    ({"_softmax", "_safe_softmax", "_log_softmax"}, _softmax),
    ({"_softmax_backward_data", "_log_softmax_backward_data"}, _softmax_backward),
    ({"native_layer_norm"}, _layer_norm),
    ({"_fused_rms_norm"}, _rms_norm),
    ({"_fused_rms_norm_backward"}, _rms_norm_backward),
    ({"log_sigmoid_forward"}, _log_sigmoid),
    ({"logsumexp"}, _logsumexp),
    ({"native_layer_norm_backward"}, _layer_norm_backward),
    (ATTENTION, _attended),
    ({f"{name}_backward" for name in ATTENTION}, _attended_backward),
)


def _copied(tree: Any) -> Any:
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, tree)


def _is_view(func: Any) -> bool:
    """Whether every output shares its memory with an argument and nothing is written."""
    returns = func._schema.returns
    written = any(spec.alias_info is not None and spec.alias_info.is_write for spec in func._schema.arguments)
    return bool(returns) and not written and all(r.alias_info is not None for r in returns)
