"""A forward kept in float64 gives the same function with more digits, and the derivative to the same digits."""

import torch
import torch.nn.functional as F

from olmodebug.double import KeepDouble


def test_casts_to_float32_are_kept_in_float64() -> None:
    x = torch.full((3,), 1 / 3, dtype=torch.float64)
    with KeepDouble():
        assert x.float().dtype == x.to(torch.float32).dtype == F.softmax(x, dim=-1, dtype=torch.float32).dtype == torch.float64
        assert torch.arange(3, dtype=torch.float32).dtype == torch.float64
        assert torch.equal(x.float().double(), x)
    assert x.float().dtype == torch.float32


def test_a_float32_tensor_of_before_meets_float64_ones() -> None:
    table = torch.ones(2, 2)
    with KeepDouble():
        assert torch.equal(torch.eye(2, dtype=torch.float64) @ table, torch.ones(2, 2, dtype=torch.float64))


def test_gradients_flow_through_a_cast() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    with KeepDouble():
        x.float().pow(3).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, 12.0]
