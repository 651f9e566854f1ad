"""The activation of a gated feed-forward block: left out, or there in another way than as one op of torch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmodebug import check
from olmodebug.tracing.norms import is_polynomial


@torch.library.custom_op("olmodebug_tests::fused_silu", mutates_args=())
def fused_silu(x: Tensor) -> Tensor:
    """As kernels of other libraries are: an op that nobody knows by its name."""
    return F.silu(x)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "an op of another library": lambda x: fused_silu(x),
    "a mask": lambda x: x * (x > 0),
    "a choice": lambda x: torch.where(x > 0, x, 0.0),
    "a bound": lambda x: torch.clamp_min(x, 0.0),
    "a quotient": lambda x: x / (1 + x.abs()),
}


class Gated(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 12)
        self.act, self.way = nn.SiLU(), way

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.way(self.gate(x)) * self.up(x))


class Model(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.config = {"hidden_size": 12, "vocab_size": 31, "hidden_act": "silu"}
        self.embed, self.mlp, self.head = nn.Embedding(31, 12), Gated(way), nn.Linear(12, 31, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.mlp(x))


@pytest.mark.parametrize("way", WAYS)
def test_an_activation_in_other_words_is_one(way: str) -> None:
    assert not check(Model(WAYS[way]), select_probes="activation-as-configured").findings
    assert not is_polynomial(Gated(WAYS[way]).double(), 12)


def test_an_activation_that_is_held_and_never_called_is_told_where_it_belongs() -> None:
    (finding,) = check(Model(lambda x: x), select_probes="activation-as-configured").findings
    assert (finding.severity, finding.where.function, finding.where.module) == ("error", "Gated.forward", "mlp")
    assert "mlp.act is never called" in (finding.cause or "")
