"""The CPU's own kernels, op by op over sizes, scales and dtypes, stay inside the bound: none of them is a bug of a model."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from olmodebug.executions.judge import expect, judge

aten = torch.ops.aten
SIZES = (1, 2, 3, 5, 7, 13, 33, 101, 257)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Draw:
    """Tensors of one dtype, from one seed."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self.random, self.generator = dtype, random.Random(seed), torch.Generator().manual_seed(seed)

    def of(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.dtype)

    def any(self, scale: float | None = None) -> Tensor:
        """A tensor of any sizes and, unless one is given, of any scale that the dtype holds."""
        shape = [self.random.choice(SIZES) for _ in range(self.random.choice([1, 2, 3]))]
        scales = (1e-3, 0.3, 1.0, 10.0, 30.0 if self.dtype == torch.float16 else 300.0)
        return self.of(*shape, scale=self.random.choice(scales) if scale is None else scale)

    def like(self, other: Tensor) -> Tensor:
        return self.of(*other.shape)

    def positive(self) -> Tensor:
        return (self.any(1.0).abs() + 0.05).to(self.dtype)

    def dim(self, tensor: Tensor) -> int:
        return self.random.randrange(tensor.ndim)


def unary(name: str, make: Callable[[Draw], Tensor] = Draw.any) -> tuple[str, Any, Callable[[Draw], Any]]:
    return name, getattr(aten, name).default, lambda d: ((make(d),), {})


def small(d: Draw) -> Tensor:
    return d.any(0.3)


def pair(d: Draw, *rest: Any, **kwargs: Any) -> Any:
    first = d.any()
    return (first, d.like(first), *rest), kwargs


def over_dim(d: Draw, *rest: Any, listed: bool = False, **kwargs: Any) -> Any:
    x = d.any()
    return (x, [d.dim(x)] if listed else d.dim(x), *rest), kwargs


def layer_norm(d: Draw, *, plain: bool = False) -> Any:
    x = d.any()
    n = x.shape[-1]
    return (x, [n], None if plain else d.of(n), None if plain else d.of(n), 1e-5), {}


def layer_norm_backward(d: Draw) -> Any:
    (x, shape, weight, bias, eps), _ = layer_norm(d)
    _, mean, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
    return (d.like(x), x, shape, mean, scale, weight, bias, [True, True, True]), {}


def rms_norm(d: Draw) -> Any:
    x = d.any()
    return (x, [x.shape[-1]], d.of(x.shape[-1]), d.random.choice([1e-6, None])), {}


def softmax_backward(d: Draw, function: Callable[[Tensor, int], Tensor]) -> Any:
    x = d.any()
    return (d.like(x), function(x, -1), -1, d.dtype), {}


def product(d: Draw, *, added: bool = False) -> Any:
    n, k, m = d.random.choice([1, 3, 17, 64]), d.random.choice([1, 5, 33, 256]), d.random.choice([1, 7, 50])
    return ((d.of(m),) if added else ()) + (d.of(n, k), d.of(k, m)), {}


def attention(d: Draw) -> Any:
    length, width = d.random.choice([1, 5, 33, 130]), d.random.choice([4, 16, 20])
    return tuple(d.of(2, 3, length, width) for _ in range(3)) + (0.0, d.random.random() < 0.5), {}


def rows(d: Draw) -> Tensor:
    return torch.randint(0, 7, (40,), generator=d.generator)


OPS = [
    *(unary(n) for n in ("silu gelu relu tanh sigmoid sin cos erf erfc neg abs square softplus mish hardswish hardsigmoid leaky_relu elu celu selu "
                         "log_sigmoid_forward tan atan floor sign asinh hardtanh").split()),
    *(unary(n, small) for n in "exp expm1 exp2 sinh cosh logit".split()),
    *(unary(n, Draw.positive) for n in "sqrt rsqrt reciprocal log log2 log1p".split()),
    ("gelu-tanh", aten.gelu.default, lambda d: ((d.any(),), {"approximate": "tanh"})),
    *((n, getattr(aten, n).Tensor, pair) for n in ("add", "sub", "mul")),
    *((f"{n}-number", getattr(aten, n).Tensor, lambda d: ((d.any(1.0), d.random.choice([0.1, 3.7, 2])), {})) for n in ("add", "sub", "mul", "div")),
    ("add-alpha", aten.add.Tensor, lambda d: pair(d, alpha=d.random.choice([0.1, 3]))),
    *((f"pow{e}", aten.pow.Tensor_Scalar, lambda d, e=e: ((d.positive(), e), {})) for e in (2, 3, 0.5, -1, -0.5, 1.5, -2, 4)),
    ("pow-of-a-number", aten.pow.Scalar, lambda d: ((10000.0 if d.dtype != torch.float16 else 30.0, d.of(9, scale=0.3)), {})),
    ("pow-of-tensors", aten.pow.Tensor_Tensor, lambda d: ((x := d.positive(), d.of(*x.shape)), {})),
    ("softmax", aten._softmax.default, lambda d: over_dim(d, False)),
    ("log_softmax", aten._log_softmax.default, lambda d: over_dim(d, False)),
    ("softmax_backward", aten._softmax_backward_data.default, lambda d: softmax_backward(d, torch.softmax)),
    ("log_softmax_backward", aten._log_softmax_backward_data.default, lambda d: softmax_backward(d, torch.log_softmax)),
    ("sum", aten.sum.dim_IntList, lambda d: over_dim(d, listed=True)),
    ("mean", aten.mean.dim, lambda d: over_dim(d, listed=True)),
    ("sum-all", aten.sum.default, lambda d: ((d.any(),), {})),
    ("cumsum", aten.cumsum.default, over_dim),
    ("logsumexp", aten.logsumexp.default, lambda d: over_dim(d, listed=True)),
    ("logcumsumexp", aten.logcumsumexp.default, over_dim),
    ("var", aten.var.correction, lambda d: over_dim(d, listed=True, correction=0)),
    ("std", aten.std.correction, lambda d: over_dim(d, listed=True, correction=0)),
    ("norm", aten.linalg_vector_norm.default, lambda d: ((x := d.any(), 2, [d.dim(x)], True), {})),
    ("layer_norm", aten.native_layer_norm.default, layer_norm),
    ("layer_norm-plain", aten.native_layer_norm.default, lambda d: layer_norm(d, plain=True)),
    ("layer_norm_backward", aten.native_layer_norm_backward.default, layer_norm_backward),
    ("rms_norm", aten._fused_rms_norm.default, rms_norm),
    ("group_norm", aten.native_group_norm.default, lambda d: ((d.of(3, 8, 5), d.of(8), d.of(8), 3, 8, 5, 4, 1e-5), {})),
    ("addcmul", aten.addcmul.default, lambda d: ((x := d.any(), d.like(x), d.like(x)), {"value": 0.3})),
    ("lerp", aten.lerp.Scalar, lambda d: pair(d, 0.3)),
    ("mm", aten.mm.default, product),
    ("addmm", aten.addmm.default, lambda d: product(d, added=True)),
    ("conv", aten.convolution.default, lambda d: ((d.of(2, 6, 11), d.of(6, 1, 4), d.of(6), [1], [3], [1], False, [0], 6), {})),
    ("attention", aten._scaled_dot_product_flash_attention_for_cpu.default, attention),
    *((n, getattr(aten, n).default, pair) for n in ("silu_backward", "gelu_backward")),
    ("tanh_backward", aten.tanh_backward.default, lambda d: ((x := d.any(), d.like(x).tanh()), {})),
    ("sigmoid_backward", aten.sigmoid_backward.default, lambda d: ((x := d.any(), d.like(x).sigmoid()), {})),
    ("embedding_backward", aten.embedding_dense_backward.default, lambda d: ((d.of(40, 9), rows(d), 7, -1, False), {})),
    ("index_add", aten.index_add.default, lambda d: ((d.of(7, 9), 0, rows(d), d.of(40, 9)), {})),
]  # fmt: skip


@pytest.mark.parametrize("seeds", [pytest.param(range(5), id="few"), pytest.param(range(5, 80), id="many", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "op", "make"), OPS, ids=[name for name, *_ in OPS])
def test_a_kernel_of_torch_is_no_bug(name: str, op: Any, make: Callable[[Draw], Any], seeds: range) -> None:
    wrong = []
    for dtype in DTYPES:
        for seed in seeds:
            args, kwargs = make(Draw(dtype, seed))
            expected, result = expect(op, args, kwargs), op(*args, **kwargs)
            found = judge(expected, [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)])
            if found.verdict not in ("exact", "within", "range"):
                wrong.append((str(dtype), seed, found))
    assert wrong == []


@pytest.mark.parametrize(
    ("length", "dtype"),
    [
        *((length, dtype) for length in (64, 300, 700) for dtype in (torch.bfloat16, torch.float16)),
        (3000, torch.bfloat16),
        pytest.param(3000, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_gradients_that_fused_attention_adds_up_in_16_bits_are_no_bug(length: int, dtype: torch.dtype) -> None:
    draw = Draw(dtype, length)
    query, key, value, gradient = (draw.of(1, 2 if length < 1000 else 1, length, 16) for _ in range(4))
    output, sums = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)
    args = (gradient, query, key, value, output, sums, 0.0, True)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    expected, results = expect(backward, args, {}), backward(*args)
    assert judge(expected, results).verdict in ("exact", "within")
    wrong = torch.where(results[1].abs() == results[1].abs().max(), 2 * results[1], results[1])
    assert judge(expected, [results[0], wrong, results[2]]).verdict in ("explained", "diverged")  # one wrong number hides among many
