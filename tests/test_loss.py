"""The chunked loss equals the plain one, value and both gradients."""

import pytest
import torch
import torch.nn.functional as F

import olmodebug.training.loss
from olmodebug.training.loss import linear_cross_entropy, nll_sum


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows", [1, 3, 37])
def test_value_and_gradients_equal_the_plain_loss(dtype: torch.dtype, limit: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(olmodebug.training.loss, "CHUNK_ROWS_CPU", rows)
    torch.manual_seed(0)
    states = (3 * torch.randn(37, 8)).to(dtype).requires_grad_()
    weight = torch.randn(53, 8).to(dtype).requires_grad_()
    targets = torch.randint(53, (37,))
    targets[[0, 5, 36]] = -100
    plain = F.cross_entropy(states @ weight.T, targets)
    expected = torch.autograd.grad(plain * 3, (states, weight))
    chunked = linear_cross_entropy(states, weight, targets)
    observed = torch.autograd.grad(chunked * 3, (states, weight))
    assert abs((chunked - plain).item()) <= limit * plain.item()
    for a, b in zip(expected, observed, strict=True):
        assert float((a - b).abs().max()) <= limit * float(a.abs().max()) * 10


def test_rows_that_do_not_count_give_zero_and_no_gradient() -> None:
    states, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = linear_cross_entropy(states, weight, torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0 and states.grad is not None and weight.grad is not None
    assert not states.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_products_stay_within_their_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states, weight, targets = torch.randn(40, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True), torch.randint(64, (40,))
    exact = linear_cross_entropy(states.double(), weight.double(), targets)
    low = linear_cross_entropy(states, weight, targets, dtype=dtype)
    expected = torch.autograd.grad(exact, (states, weight))
    observed = torch.autograd.grad(low, (states, weight))
    # a logit of about 10 is rounded by 2^-9 of itself in bfloat16
    assert abs((low - exact).item()) < 10 * torch.finfo(dtype).eps
    for a, b in zip(expected, observed, strict=True):
        assert float((a - b).norm() / a.norm()) < 4 * torch.finfo(dtype).eps


def test_a_probability_too_small_for_its_dtype_does_not_make_the_loss_infinite() -> None:
    states, weight = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    assert linear_cross_entropy(states, weight, torch.tensor([1])).item() == 400.0


def test_the_summed_loss_counts_what_counts() -> None:
    states, weight, targets = torch.randn(9, 4), torch.randn(6, 4), torch.tensor([0, 1, 2, -100, 3, 4, 5, -100, 0])
    total, count = nll_sum(states, weight, targets)
    assert count == 7
    assert float(total) == pytest.approx(float(F.cross_entropy(states @ weight.T, targets, reduction="sum")), rel=1e-6)
