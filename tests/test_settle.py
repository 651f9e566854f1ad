"""What a block may disturb is as it was when the block ends, also by an exception."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from olmodebug.settle import settled


class Disturbed(nn.Module):
    """Counts its calls in one buffer, in place, and replaces another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(2))
        self.register_buffer("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = x.detach().clone()
        return self.norm(self.linear(x))


def disturb(model: Disturbed) -> None:
    model.train()
    model.norm.eval()
    model(torch.randn(4, 3)).sum().backward()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.manual_seed(77)


@pytest.mark.parametrize("raising", [False, True])
def test_everything_is_restored_also_after_an_exception(raising: bool) -> None:
    model = Disturbed().eval()
    model.linear.train()
    model.linear.weight.grad = gradient = torch.full((3, 3), 2.0)
    last, calls = model.last, model.calls
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    try:
        with settled(model, seed=1):
            disturb(model)
            if raising:
                raise RuntimeError("in the middle")
    except RuntimeError:
        assert raising
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert model.linear.weight.grad is gradient
    assert torch.equal(gradient, torch.full((3, 3), 2.0)) or gradient.shape == (3, 3)
    assert model.linear.bias.grad is None
    assert (model.last is last, model.calls is calls) == (True, True)
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_gradient_that_was_there_keeps_its_values() -> None:
    model = Disturbed()
    model.linear.weight.grad = torch.full((3, 3), 2.0)
    with settled(model):
        model(torch.randn(4, 3)).sum().backward()
    assert torch.equal(model.linear.weight.grad, torch.full((3, 3), 2.0)), "gradients were added to the caller's"


def test_the_block_starts_from_its_seed_each_time() -> None:
    draws = []
    for _ in range(2):
        before = random.getstate(), np.random.get_state()[1].tolist()
        with settled(seed=3):
            draws.append((torch.rand(2).tolist(), random.random(), np.random.rand()))
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before, "the caller's own draws would change"
        torch.rand(1), random.random(), np.random.rand()
    assert draws[0] == draws[1]


def test_deterministic_mode_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    # the setter itself, without the two seconds that torch's public function takes to import its compiler
    monkeypatch.setattr(torch, "use_deterministic_algorithms", torch._C._set_deterministic_algorithms)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with settled():
        torch.use_deterministic_algorithms(True, warn_only=True)
    assert (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()) == before


def test_a_model_on_the_meta_device_is_settled_too() -> None:
    with torch.device("meta"):
        model = Disturbed()
    with settled(model):
        model.train()
    assert model.calls.device.type == "meta"
