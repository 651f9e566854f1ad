"""A deep copy uses its own weights, also in functions that were made with the first model's."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from olmodebug.deep_copies import deep_copy, functions_left_behind


class Holder(nn.Module):
    """One linear layer, used by a function of each kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        linear, weight = self.linear, self.linear.weight

        def inner(x: Tensor) -> Tensor:
            return linear(x)

        def by_name(x: Tensor, *, layer: nn.Module = linear) -> Tensor:
            return layer(x)

        def again(x: Tensor, times: int = 2) -> Tensor:
            return again(linear(x), times - 1) if times else x

        self.apply_it = {
            "module": inner,
            "tensor": lambda x: x @ weight.T,
            "default": lambda x, layer=linear: layer(x),
            "keyword": by_name,
            "nested": lambda x: inner(x) * 2,
            "method": lambda x, run=self.run: run(x),
            "itself": again,
            "listed": [inner],
            "partial": partial(torch.nn.functional.linear, weight=weight),
            "none": torch.tanh,
        }[kind]

    def run(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_it[0](x) if isinstance(self.apply_it, list) else self.apply_it(x)


@pytest.mark.parametrize("kind", ["module", "tensor", "default", "keyword", "nested", "method", "itself", "listed", "partial"])
def test_a_copy_follows_its_own_weights(kind: str) -> None:
    first, x = Holder(kind), torch.ones(1, 3)
    before = first(x)
    copied = deep_copy(first)
    assert torch.equal(copied(x), before)
    with torch.no_grad():
        copied.linear.weight.zero_()  # type: ignore[union-attr]
        copied.linear.bias.zero_()  # type: ignore[union-attr]
    assert not copied(x).any()
    assert torch.equal(first(x), before)


@pytest.mark.parametrize(
    ("kind", "variable"),
    [
        ("module", "linear"),
        ("tensor", "weight"),
        ("default", "layer"),
        ("keyword", "layer"),
        ("nested", "inner's linear"),
        ("method", "run"),
        ("listed", "linear"),
    ],
)
def test_what_a_plain_copy_leaves_behind_is_named(kind: str, variable: str) -> None:
    (found,) = functions_left_behind(Holder(kind))
    assert found[:2] == ("apply_it", variable)


@pytest.mark.parametrize("kind", ["partial", "none"])
def test_what_copy_deepcopy_copies_is_not_named(kind: str) -> None:
    assert list(functions_left_behind(Holder(kind))) == []


def test_a_hook_of_the_copy_uses_the_copy() -> None:
    first, x = Holder("none"), torch.ones(1, 3)
    linear = first.linear
    first.register_forward_hook(lambda module, args, output: linear(output))
    copied = deep_copy(first)
    with torch.no_grad():
        copied.linear.weight.zero_()  # type: ignore[union-attr]
        copied.linear.bias.zero_()  # type: ignore[union-attr]
    assert not copied(x).any()
    assert copy.deepcopy(first)(x).any()
