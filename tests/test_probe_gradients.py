"""Why a parameter gets no gradient, or backward raises: the line and its reason."""

import pytest
import torch
import torch.nn.functional as F
from olmodebug.probes.gradients import reach_every_parameter
from torch import Tensor, nn

from olmodebug.first_run import from_model
from olmodebug.overwritten import overwritten


class Gate(nn.Module):
    """The probabilities of the chosen experts, divided by their sum in the module that owns the weight."""

    def __init__(self, chosen: int) -> None:
        super().__init__()
        self.weight, self.chosen = nn.Parameter(torch.randn(3, 12)), chosen

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, index = torch.topk(F.linear(x, self.weight).sigmoid(), self.chosen, dim=-1)
        return 1.5 * (scores / scores.sum(dim=-1, keepdim=True)), index


class Routed(nn.Module):
    def __init__(self, chosen: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.gate, self.head = nn.Embedding(41, 12), Gate(chosen), nn.Linear(12, 41)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        weights, index = self.gate(x)
        every = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return self.head(x + (weights[..., None] * every.gather(-2, index[..., None].expand(*index.shape, 12))).sum(-2))


def test_one_renormalised_expert_is_told_of_a_router_that_is_a_module_of_its_own() -> None:
    assert list(reach_every_parameter(from_model(Routed(2)))) == []
    (finding,) = reach_every_parameter(from_model(Routed(1)))
    assert (finding.where.function, finding.where.op) == ("Gate.forward", "div")
    assert finding.cause is not None and finding.cause.endswith("one expert a token, renormalised")


class Writes(nn.Module):
    """A write in place: over what an op keeps for its backward, or over what none needs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed, self.head = kind, nn.Embedding(41, 12), nn.Linear(12, 41)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        y = x.sigmoid()  # keeps its output
        if self.kind == "part":
            y[:, 0] = 0.0
        elif self.kind == "sum":
            x += y  # sigmoid needs x no more
        elif self.kind == "given":
            with torch.no_grad():
                torch.add(x, 1.0, out=y)  # y is written, and x, which stands first, is not
        return self.head(x + y)


@pytest.mark.parametrize(("kind", "op", "below"), [("part", "fill_", 2), ("given", "add", 7), ("sum", None, 0), ("none", None, 0)])
def test_a_write_over_what_backward_needs_is_told_at_its_line(kind: str, op: str | None, below: int) -> None:
    model = Writes(kind)
    told = overwritten(model, lambda: model(torch.tensor([[3, 5, 7]])))
    assert (None if told is None else told.op) == op
    found = list(reach_every_parameter(from_model(model)))
    assert [f.where.op for f in found] == ([op] if op else [])
    if told is not None and told.kept is not None:
        assert f"line {told.kept.line} computed with" in str(found[0].cause)
        assert found[0].where.line == told.written.line == told.kept.line + below
