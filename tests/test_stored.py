"""A pair that broke a rule is stored as values, and judged again without the probe and without Hypothesis."""

import json

import pytest
import torch
from torch import Tensor, nn

from olmodebug.examine import run_probe
from olmodebug.probe import select, shipped_probes
from olmodebug.relations.stored import pair_record, still_broken
from olmodebug.subject import Subject, from_model


class Model(nn.Module):
    """Causal, unless it `peeks` at the mean of all positions; in train mode only where `training_only`."""

    def __init__(self, peeks: bool, *, training_only: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.peeks, self.training_only = peeks, training_only
        self.embed = nn.Embedding(97, 48)
        self.head = nn.Linear(48, 97)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        if self.peeks and (self.training or not self.training_only):
            hidden = hidden + hidden.mean(1, keepdim=True)
        return self.head(hidden)  # type: ignore[no-any-return]


def broken_by(subject: Subject) -> list[dict[str, object]]:
    (probe,) = select(shipped_probes(), "causality.no-future")
    assert run_probe(probe, subject).outcome.status == "failed"
    return json.loads(json.dumps([pair_record(twin, pair) for twin, pair in subject.broken]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("training_only", [False, True])
def test_a_stored_case_says_whether_the_rule_is_still_broken(training_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    records = broken_by(from_model(Model(True, training_only=training_only)))
    assert [r["training"] for r in records] == ([True] if training_only else [False, True])
    assert all(len(r["left"]["input_ids"][0]) == 2 for r in records), "the smallest: two tokens"  # type: ignore[index]
    monkeypatch.setattr("hypothesis.find", lambda *_, **__: pytest.fail("Hypothesis was asked"))
    finding = still_broken(from_model(Model(True, training_only=training_only)), records)  # type: ignore[arg-type]
    assert finding is not None
    assert finding.case is not None
    assert finding.case.seq_len == 2
    assert "still breaks the rule" in finding.message
    assert still_broken(from_model(Model(False)), records) is None  # type: ignore[arg-type]


def test_a_case_that_the_model_takes_no_more_is_no_longer_broken() -> None:
    records = broken_by(from_model(Model(True)))
    other = Model(True)
    other.embed, other.head = nn.Embedding(13, 48), nn.Linear(48, 13)  # the stored ids lie beyond this vocabulary
    assert still_broken(from_model(other), records) is None  # type: ignore[arg-type]
