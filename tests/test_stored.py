"""A finding's case is stored as values, and judged again without Hypothesis and, where two runs are compared, without the probe."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olmodebug.examine import Result, run_probe
from olmodebug.first_run import from_model
from olmodebug.load import SubjectCodeError
from olmodebug.probe import Probe, select, shipped_probes
from olmodebug.relations.pair import Pair
from olmodebug.relations.stored import broken_by
from olmodebug.replaying import replay_probe
from olmodebug.subject import Subject


class Model(nn.Module):
    """Causal, unless it `peeks` at the mean of all positions; in train mode only where `training_only`."""

    def __init__(self, peeks: bool, *, training_only: bool = False, width: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.peeks, self.training_only = peeks, training_only
        self.embed = nn.Embedding(97, width)
        self.head = nn.Linear(width, 97)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        if self.peeks and (self.training or not self.training_only):
            hidden = hidden + hidden.mean(1, keepdim=True)
        return self.head(hidden)  # type: ignore[no-any-return]


class Cached(nn.Module):
    """Adds up what it has read; with a `drift`, decoding counts every chunk after the first once more."""

    def __init__(self, drift: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.drift = drift
        self.embed = nn.Embedding(97, 48)
        self.head = nn.Linear(48, 97)

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> dict[str, Any]:
        hidden = self.embed(input_ids).cumsum(1)
        if past_key_values is not None:
            hidden = hidden + past_key_values[0] * (2 if self.drift else 1)
        found = {"logits": self.head(hidden)}
        return {**found, "past_key_values": (hidden[:, -1:],)} if use_cache else found


class Loss(nn.Module):
    """Next-token cross-entropy, and the cross-entropy of the token just read where it does not `shift`."""

    def __init__(self, shift: bool, width: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shift = shift
        self.embed = nn.Embedding(97, width)
        self.head = nn.Linear(width, 97)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.embed(input_ids))
        if labels is None:
            return {"logits": logits}
        scores, told = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
        return {"logits": logits, "loss": nn.functional.cross_entropy(scores.reshape(-1, 97), told.reshape(-1))}


class PlainList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(97, 48), nn.Linear(48, 97)
        self.layers = [nn.Linear(48, 48)]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.layers[0](self.embed(input_ids)))  # type: ignore[no-any-return]


def probe(name: str) -> Probe:
    (found,) = select(shipped_probes(), name)
    return found


def records_of(model: nn.Module, name: str) -> dict[str, list[dict[str, Any]]]:
    """What `cases.json` would hold after this probe failed on the model."""
    result = run_probe(probe(name), from_model(model))
    assert result.outcome.status == "failed", result
    found = {
        str(number): [{**record, "probe": name, "severity": finding.severity} for record in finding.records or ({},)]
        for number, finding in enumerate(result.found, start=1)
    }
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def again(model: nn.Module, name: str, stored: dict[str, list[dict[str, Any]]]) -> tuple[Result, list[tuple[int, str, str]]]:
    subject = from_model(model)
    result, parts = replay_probe(probe(name), subject, stored, lambda: run_probe(probe(name), subject))
    return result, [(part.finding, part.status, part.text) for part in parts]


@pytest.mark.parametrize("training_only", [False, True])
def test_a_stored_pair_says_whether_the_rule_is_still_broken(training_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record for own in records_of(Model(True, training_only=training_only), "causality.no-future").values() for record in own]
    assert {r["kind"] for r in records} == {"relation"}
    assert {r["training"] for r in records} == ({True} if training_only else {False})
    assert all(len(r["left"]["input_ids"][0]) == 2 for r in records), "the smallest: two tokens"
    monkeypatch.setattr("hypothesis.find", lambda *_, **__: pytest.fail("Hypothesis was asked"))
    finding = broken_by(from_model(Model(True, training_only=training_only)), records[0])
    assert finding is not None
    assert finding.case is not None
    assert finding.case.seq_len == 2
    assert "still breaks the rule" in finding.message
    assert broken_by(from_model(Model(False)), records[0]) is None


def test_a_stored_case_that_breaks_is_an_error_of_a_probe_that_passes_on_its_own_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = records_of(Model(True), "causality.no-future")
    none: list[Pair] = []
    monkeypatch.setattr("olmodebug.probes.causality.pairs", lambda twin: iter(none))
    monkeypatch.setattr("olmodebug.probes.causality.drawn", lambda *_, **__: None)  # another Hypothesis draws other cases
    result, parts = again(Model(True), "causality.no-future", stored)
    assert [status for _, status, _ in parts] == ["still fails"]
    assert result.outcome.status == "failed"
    assert [finding.message for finding in result.findings] == [parts[0][2]]
    assert [part.records for part in result.found] == [(stored["1"][0],)], "this run can be replayed in its turn"
    assert again(Model(False), "causality.no-future", stored)[1] == [(1, "fixed", "the recorded case holds now")]


def test_a_model_that_takes_the_stored_case_no_more_is_no_fixed_one() -> None:
    stored = records_of(Model(True), "causality.no-future")
    other = Model(True)
    other.embed, other.head = nn.Embedding(13, 48), nn.Linear(48, 13)  # the stored ids lie beyond this vocabulary
    with pytest.raises(SubjectCodeError):
        broken_by(from_model(other), stored["1"][0])
    assert [status for _, status, _ in again(other, "causality.no-future", stored)[1]] == ["error"]


def test_chunks_with_a_cache_are_stored_and_judged_again() -> None:
    stored = records_of(Cached(True), "cache.matches-full-forward")
    ((record,),) = stored.values()
    assert (record["kind"], sum(record["sizes"])) == ("chunks", len(record["case"]["input_ids"][0]))
    assert len(record["case"]["input_ids"]) == 1, "one row"
    assert [part[1] for part in again(Cached(True), "cache.matches-full-forward", stored)[1]] == ["still fails"]
    assert [part[1] for part in again(Cached(False), "cache.matches-full-forward", stored)[1]] == ["fixed"]


def test_a_probe_that_judges_one_run_is_run_again_on_the_values_that_it_drew() -> None:
    stored = records_of(Loss(False), "loss.next-token-cross-entropy")
    record = stored["1"][0]
    assert record["kind"] == "draws"
    batch, seq = record["sizes"]
    (ids,) = (value for name, value in record.items() if name == f"{batch}x{seq} seed 10")
    ids[0][:3] = [90, 91, 92]  # as another torch might have drawn them
    subject = from_model(Loss(False, width=3 * 11 * 13))  # for which other sizes would be drawn
    assert subject.sizes() != (batch, seq)
    result, parts = replay_probe(
        probe("loss.next-token-cross-entropy"), subject, stored, lambda: run_probe(probe("loss.next-token-cross-entropy"), subject)
    )
    assert [part.status for part in parts] == ["still fails"]
    assert "on the recorded values" in parts[0].text
    case = result.findings[0].case
    assert case is not None
    assert (case.batch_size, case.seq_len, case.input_ids[0][:3]) == (batch, seq, (90, 91, 92))
    assert subject.draws.given == {}, "the next probe draws for itself"
    assert again(Loss(True), "loss.next-token-cross-entropy", stored)[1][0][1] == "fixed"


def test_a_probe_that_draws_nothing_is_run_again_and_the_replay_says_so() -> None:
    stored = records_of(PlainList(), "structure.registered")
    assert "kind" not in stored["1"][0]
    (part,) = again(PlainList(), "structure.registered", stored)[1]
    assert part[1] == "still fails"
    assert "the probe was run again, since its case has no values" in part[2]
    (part,) = again(Model(False), "structure.registered", stored)[1]
    assert part[1:] == ("fixed", "the probe was run again, since its case has no values, and passes")


def test_ids_beyond_a_smaller_vocabulary_are_drawn_anew() -> None:
    subject: Subject = from_model(Model(False))
    subject.draws.given = {"1x2 seed 0": [[1, 96]], "1x3 seed 0": [[1, 2, 97]], "sizes": [4, 9]}
    assert subject.token_ids(1, 2) == ((1, 96),)
    assert max(subject.token_ids(1, 3)[0]) < 97
    assert subject.twin().sizes() == (4, 9)
