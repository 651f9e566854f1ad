"""The loss probes on models that differ in what they add to the cross-entropy."""

from types import SimpleNamespace

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from olmodebug.examine import run_probe
from olmodebug.first_run import from_model
from olmodebug.probe import select, shipped_probes


class Penalised(nn.Module):
    """Adds the squares of its states, as a mean or as a sum over tokens, and has places for three rows."""

    def __init__(self, total: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=31, max_batch_size=3)
        self.embed, self.head, self.total = nn.Embedding(31, 8), nn.Linear(8, 31), total
        self.rows = nn.Buffer(self.head.weight.new_zeros(3, 1, 8))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        hidden = self.embed(input_ids) + self.rows[: len(input_ids)]
        logits = self.head(hidden)
        if labels is None:
            return logits, None
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, 31), labels[:, 1:].reshape(-1))
        added = hidden.square().mean(-1)
        return logits, loss + 0.01 * (added.sum() if self.total else added.mean())


@pytest.mark.parametrize(("total", "severities"), [(True, ["warning"]), (False, [])])
def test_a_sum_beside_the_cross_entropy_is_told_and_a_mean_is_not(total: bool, severities: list[str]) -> None:
    (probe,) = select(shipped_probes(), "same-for-copies")
    result = run_probe(probe, from_model(Penalised(total)))
    assert [finding.severity for finding in result.findings] == severities
    assert result.outcome.status == "passed"
