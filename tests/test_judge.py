"""Every op on its own inputs against float64: what arithmetic could have made passes, what it could not does not."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from olmodebug.executions.bound import ALPHA, LAMBDA, contraction, deviation, factor, limit
from olmodebug.executions.judge import LOW_POLICY, TF32_POLICY, Judgement, agree, expect, judge, judgement_of

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
both = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def judged(op: torch._ops.OpOverload, *args: object, change: object = None, **kwargs: object) -> Judgement:
    """The judgement on an op whose first output was changed by `change(output)`."""
    expected = expect(op, args, kwargs)
    result = op(*args, **kwargs)
    outputs = [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]
    if callable(change):
        outputs[0] = change(outputs[0])
    return judge(expected, outputs)


def test_the_factor_is_hoeffdings_for_the_accepted_probability() -> None:
    assert LAMBDA == factor(ALPHA) == pytest.approx(math.sqrt(2 * math.log(2 * 2**32 / 1e-6)))
    assert factor(1e-3) < factor(1e-6) < 10


@pytest.mark.parametrize("length", [64, 1024])
def test_the_deviation_of_a_product_is_no_more_than_a_few_times_what_a_serial_sum_does(length: int) -> None:
    left, right = normal(32, length), normal(length, 48, seed=1)
    serial = torch.zeros(32, 48)
    for k in range(length):
        serial += left[:, k, None] * right[k]
    exact = contraction(left.double(), right.double())
    expected = deviation(exact, torch.float32, torch.float32)
    assert expected is not None
    share = float(((serial.double() - exact.value) / expected).square().mean().sqrt())
    assert 0.1 < share < 1


@both
@given(seed=st.integers(0, 50), length=st.integers(1, 300))
def test_a_matmul_summed_in_any_order_stays_inside_its_bound(dtype: torch.dtype, seed: int, length: int) -> None:
    left, right = normal(3, length, dtype=dtype, seed=seed), normal(length, 4, dtype=dtype, seed=seed + 1)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    total = torch.zeros(3, 4)
    for k in order.tolist():  # one by one, in float32
        total += left[:, k : k + 1].float() @ right[k : k + 1].float()
    assert judged(aten.mm.default, left, right, change=lambda _: total.to(dtype)).verdict in ("exact", "within")


@both
def test_a_wrong_element_is_found_with_its_index_and_its_exact_value(dtype: torch.dtype) -> None:
    def spoil(out: Tensor) -> Tensor:
        out = out.clone()
        out[2, 3] *= 1.05
        return out

    left, right = normal(5, 64, dtype=dtype), normal(64, 7, dtype=dtype, seed=1)
    found = judged(aten.mm.default, left, right, change=spoil)
    assert found.verdict == "diverged"
    assert found.index == (2, 3)
    assert found.mismatched == 1
    assert found.exact == pytest.approx(float((left.double() @ right.double())[2, 3]))


def test_tf32_products_are_named_not_called_wrong() -> None:
    left, right = normal(32, 256), normal(256, 32, seed=1)

    def tf32(x: Tensor) -> Tensor:
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    found = judged(aten.mm.default, left, right, change=lambda _: tf32(left) @ tf32(right))
    assert (found.verdict, found.policy) == ("explained", TF32_POLICY)
    assert 2**-13 < (found.roundoff or 0) < 2**-10


def test_sums_kept_in_bfloat16_are_named() -> None:
    left, right = normal(16, 512, dtype=torch.bfloat16), normal(512, 16, dtype=torch.bfloat16, seed=1)

    def low(_: Tensor) -> Tensor:
        total = torch.zeros(16, 16, dtype=torch.bfloat16)
        for k in range(0, 512, 8):
            total = (total.float() + left[:, k : k + 8].float() @ right[k : k + 8].float()).bfloat16()
        return total

    found = judged(aten.mm.default, left, right, change=low)
    assert found.verdict == "explained"
    assert found.policy in (LOW_POLICY, "reduced-precision reduction")


def test_a_uniform_scale_is_a_fault_and_no_policy() -> None:
    left, right = normal(16, 64, dtype=torch.bfloat16), normal(64, 16, dtype=torch.bfloat16, seed=1)
    assert judged(aten.mm.default, left, right, change=lambda out: out * 0.97).verdict == "diverged"


@both
def test_moving_ops_must_not_change_a_bit(dtype: torch.dtype) -> None:
    table, ids = normal(11, 6, dtype=dtype), torch.tensor([[1, 4, 10]])
    assert judged(aten.embedding.default, table, ids).verdict == "exact"

    def last_bit(out: Tensor) -> Tensor:
        out = out.clone()
        out[0, 0, 0] *= 1 + 2 * torch.finfo(dtype).eps
        return out

    assert judged(aten.embedding.default, table, ids, change=last_bit).verdict == "diverged"


def test_a_result_too_large_for_float16_is_a_matter_of_range() -> None:
    big = torch.full((2, 8), 200.0, dtype=torch.float16)
    found = judged(aten.mm.default, big, big.T.contiguous())
    assert found.verdict == "range"
    assert found.exact == 320000.0
    found = judged(aten.mm.default, big / 200, big.T.contiguous() / 200, change=lambda out: out * math.inf)
    assert found.verdict == "diverged"


def test_an_op_in_place_is_judged_on_what_it_read() -> None:
    x = normal(4)
    before = x.clone()
    result, found = judgement_of(aten.add_.Tensor, (x, normal(4, seed=1)), {})
    assert found.verdict == "exact"
    assert torch.equal(result, before + normal(4, seed=1))


def test_random_ops_and_ops_without_a_rule_say_that_they_are_unverified() -> None:
    found = judged(aten.bernoulli.default, torch.full((4,), 0.5))
    assert found.verdict == "unverified"
    assert found.reason == "bernoulli is random"


def test_fused_attention_is_judged_by_its_decomposition() -> None:
    q, k, v = (normal(2, 3, 9, 8, seed=s) for s in range(3))
    fused = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert judged(fused, q, k, v, is_causal=True).verdict in ("exact", "within")
    expected = expect(fused, (q, k, v), {"is_causal": True})
    assert judge(expected, [*fused(q, k, v, is_causal=False)]).verdict == "diverged"


def test_two_tensors_agree_within_a_bound_that_is_given() -> None:
    x = normal(3, 4).double()
    assert agree(x, x + 1e-9, 1e-8).verdict == "within"
    found = agree(x, x + torch.eye(3, 4) * 1e-6, 1e-8)
    assert (found.verdict, found.mismatched, found.total) == ("diverged", 3, 12)
    assert agree(x, x.T.contiguous(), 1.0).reason == "shape [4, 3] against [3, 4]"


def test_the_bound_of_a_long_sum_of_terms_without_a_sign_is_not_their_sum_of_sizes() -> None:
    left, right = normal(1, 10_000).double(), normal(10_000, 1, seed=1).double()
    exact = contraction(left, right)
    assert exact.summed is not None
    sizes = float(left.abs() @ right.abs())
    assert float(limit(exact, torch.float32, torch.float32)) < LAMBDA * 100 * 2**-24 * sizes / 5
