"""The activation of a gated feed-forward block: left out, or there in another way than as one op of torch; and what experts give, put together."""

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


def added(out: Tensor, rows: Tensor, given: Tensor) -> None:
    out[rows] += given


def overwritten(out: Tensor, rows: Tensor, given: Tensor) -> None:
    out[rows] = given


def looked_at(out: Tensor, rows: Tensor, given: Tensor) -> None:
    out[rows] = torch.maximum(out[rows], given)


def by_columns(out: Tensor, rows: Tensor, given: Tensor) -> None:
    half = torch.arange(6)
    for columns in (half, half + 6):
        out.index_copy_(1, columns, out.detach()[:, columns].index_add(0, rows, given[:, columns]))


class Experts(nn.Module):
    def __init__(self, put: Callable[[Tensor, Tensor, Tensor], None], top: int = 2) -> None:
        super().__init__()
        self.put, self.top, self.router = put, top, nn.Linear(12, 3)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 12)
        weights, chosen = self.router(flat).softmax(-1).topk(self.top)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            self.put(out, rows, expert(flat[rows]) * weights[rows, slot, None])
        return out.view_as(x)


class Mixture(Model):
    def __init__(self, experts: Experts) -> None:
        super().__init__(lambda x: x)
        self.mlp = experts


def test_experts_that_overwrite_each_other_are_told_at_the_line_that_writes() -> None:
    (finding,) = check(Mixture(Experts(overwritten)), select_probes="experts-add-up").findings
    assert (finding.severity, finding.where.function, finding.where.module) == ("warning", "overwritten", "mlp")
    assert "overwrites what another gave" in (finding.cause or "")


@pytest.mark.parametrize("experts", [Experts(added), Experts(looked_at), Experts(by_columns), Experts(overwritten, top=1)])
def test_experts_whose_results_all_count_are_silent(experts: Experts) -> None:
    assert not check(Mixture(experts), select_probes="experts-add-up").findings
