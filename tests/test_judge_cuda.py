"""CUDA's kernels in 16 bits round where the CPU's do not: their arithmetic, written out on the CPU, stays inside the bound.

What each rounds was seen on an H100 (torch 2.11): `python -m tests.gpu_ops` asks the card itself.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from olmodebug.executions import replay
from olmodebug.executions.judge import judge
from olmodebug.executions.policies import TF32_POLICY

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls count as calls on a card."""
    given = replay._call
    monkeypatch.setattr(replay, "_call", lambda *args: replace(given(*args), on_cpu=False))


def cube(x: Tensor, exponent: int) -> Tensor:
    del exponent
    return x * x * x


def inverse_square(x: Tensor, exponent: int) -> Tensor:
    del exponent
    return (x * x).reciprocal()


def tanh_backward(gradient: Tensor, output: Tensor) -> Tensor:
    return gradient * (1 - output * output)


def sigmoid_backward(gradient: Tensor, output: Tensor) -> Tensor:
    return gradient * (1 - output) * output


def softmax_backward(gradient: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    product = (gradient * output).float()
    return (product - output.float() * product.sum(dim, keepdim=True)).to(dtype)


def logsumexp(x: Tensor, dims: list[int]) -> Tensor:
    top = x.amax(dims, keepdim=True)
    return (x - top).exp().sum(dims).log() + top.squeeze(dims[0])


def cumsum(x: Tensor, dim: int) -> Tensor:
    total, parts = torch.zeros_like(x.select(dim, 0)), []
    for part in x.unbind(dim):
        total = total + part
        parts.append(total)
    return torch.stack(parts, dim)


def addmm(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return bias + left @ right


def drawn(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32) * scale).to(dtype)


CALLS: dict[str, tuple[Any, Callable[..., Tensor], Callable[[torch.dtype], tuple[Any, ...]]]] = {
    "pow3": (aten.pow.Tensor_Scalar, cube, lambda d: (drawn(d, 40, 50), 3)),
    "pow-2": (aten.pow.Tensor_Scalar, inverse_square, lambda d: (drawn(d, 40, 50).abs() + 0.1, -2)),
    "tanh_backward": (aten.tanh_backward.default, tanh_backward, lambda d: (drawn(d, 40, 50), drawn(d, 50, 40).T.tanh())),
    "sigmoid_backward": (aten.sigmoid_backward.default, sigmoid_backward, lambda d: (drawn(d, 40, 50), drawn(d, 50, 40).T.sigmoid())),
    "softmax_backward": (
        aten._softmax_backward_data.default,
        softmax_backward,
        lambda d: (drawn(d, 40, 50), drawn(d, 50, 40, scale=3).T.softmax(-1), -1, d),
    ),
    "logsumexp": (aten.logsumexp.default, logsumexp, lambda d: (drawn(d, 40, 50, scale=3), [1])),
    "cumsum": (aten.cumsum.default, cumsum, lambda d: (drawn(d, 40, 50), 1)),
    "addmm": (aten.addmm.default, addmm, lambda d: (drawn(d, 7), drawn(d, 40, 64), drawn(d, 64, 7))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_what_a_card_rounds_is_no_bug_and_a_wrong_number_is_one(name: str, dtype: torch.dtype) -> None:
    op, card, make = CALLS[name]
    args = make(dtype)
    expected, result = replay.expect(op, args, {}), card(*args)
    assert judge(expected, [result]).verdict in ("exact", "within")
    wrong = result.clone()
    largest = wrong.abs().flatten().argmax()
    wrong.flatten()[largest] *= 2 if name == "cumsum" else 1 + 64 * torch.finfo(dtype).eps  # fifty sums in 16 bits leave room
    assert judge(expected, [wrong]).verdict == "diverged"


def test_the_buffer_that_a_card_does_not_fill_is_not_compared() -> None:
    x = drawn(torch.float32, 40, 50)
    expected = replay.expect(aten.log_sigmoid_forward.default, (x,), {})
    assert judge(expected, [torch.nn.functional.logsigmoid(x), torch.empty(0)]).verdict in ("exact", "within")


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradients_of_a_fused_rms_norm_are_those_of_its_formula(dtype: torch.dtype, weighted: bool) -> None:
    x, weight, gradient = drawn(dtype, 30, 64), drawn(dtype, 64) if weighted else None, drawn(dtype, 64, 30).T.contiguous()
    scale = (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    wide = x.float().requires_grad_()
    wide_weight = weight.float().requires_grad_() if weight is not None else None
    y = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    (y if wide_weight is None else y * wide_weight).backward(gradient.float())
    assert wide.grad is not None
    results = [wide.grad.to(dtype)]
    if wide_weight is not None and wide_weight.grad is not None:
        results.append(wide_weight.grad.to(dtype))
    call = (gradient, x, [64], scale, weight, [True, weighted])
    expected = replay.expect(aten._fused_rms_norm_backward.default, call, {})
    assert expected.unverified is None
    assert judge(expected, results).verdict in ("exact", "within")
    results[-1] = results[-1] * 1.05
    assert judge(expected, results).verdict == "diverged"


def to_tf32(x: Tensor) -> Tensor:
    """Ten bits of mantissa, to the nearest."""
    bits = x.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def test_tf32_that_was_asked_for_is_tf32_where_all_of_its_roundings_go_one_way() -> None:
    # The loss's gradient: each row holds one large factor, the same in all of them.
    gradient = torch.full((500, 55), 1e-9)
    gradient[torch.arange(500), torch.arange(500) % 55] = -1 / 55
    states = drawn(torch.float32, 55, 64)
    expected = replay.expect(aten.mm.default, (gradient, states), {})
    result = to_tf32(gradient) @ to_tf32(states)
    found = judge(expected, [result], declared=frozenset({TF32_POLICY}))
    assert (found.verdict, found.policy) == ("explained", TF32_POLICY)
    assert judge(expected, [result * 1.1], declared=frozenset({TF32_POLICY})).verdict == "diverged"
    assert judge(expected, [gradient @ states], declared=frozenset({TF32_POLICY})).verdict in ("exact", "within")
