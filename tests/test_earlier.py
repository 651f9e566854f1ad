"""A run that fails only after other calls is told where the model keeps what it keeps, under whichever probe it fails."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olmodebug.examine import run_probe
from olmodebug.first_run import from_model
from olmodebug.load import SubjectCodeError
from olmodebug.own_code import own_code
from olmodebug.probe import select, shipped_probes
from olmodebug.records import Case
from olmodebug.relations.earlier import different_calls, fails_after_another
from olmodebug.spec import Job, resolve
from olmodebug.subject import Subject
from tests.mutants.catalog import MUTANTS, materialize


class Keeps(nn.Module):
    """A mask kept by its length alone; `stubborn`: one row alone fails whatever came before."""

    def __init__(self, stubborn: bool = False, keeps: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 8), nn.Linear(8, 31)
        self.stubborn, self.keeps, self.kept = stubborn, keeps, None

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.stubborn and len(input_ids) == 1:
            raise RuntimeError("two rows at least")
        hidden = self.embed(input_ids)
        if self.kept is None or self.kept.shape[1] != input_ids.shape[1] or not self.keeps:
            self.kept = torch.ones_like(hidden)
        return self.head(hidden * self.kept)


def one_row(subject: Subject) -> Case:
    return Case(name="a sequence", input_ids=subject.token_ids(1, subject.sizes()[1]))


def failing(subject: Subject) -> SubjectCodeError:
    twin = subject.twin()
    twin.logits(Case(name="a batch", input_ids=twin.token_ids(*twin.sizes())))
    with pytest.raises(SubjectCodeError) as caught, own_code(twin, one_row(twin)):
        logits: Any = twin.logits(one_row(twin))
        assert logits.shape[0] == 1
    return caught.value


def test_a_run_that_fails_after_another_call_alone_is_told_where_that_call_is_kept() -> None:
    subject = from_model(Keeps())
    told = fails_after_another(subject, failing(subject))
    assert told is not None
    assert told.message == "a sequence goes through as the first call, and after a plain call it fails"
    assert (told.where.function, told.cause) == ("Keeps.forward", "self.kept is kept from one call and used in the next")
    assert told.where.file is not None
    assert Path(told.where.file).name == "test_earlier.py"


def test_a_run_that_fails_as_the_first_call_too_has_another_cause() -> None:
    subject = from_model(Keeps(stubborn=True, keeps=False))
    assert fails_after_another(subject, failing(subject)) is None


def test_the_probes_that_it_fails_under_point_at_one_line_and_none_breaks(tmp_path: Path) -> None:
    mutant = next(m for m in MUTANTS if m.name == "llama/positions-of-an-earlier-call")
    subject = resolve(Job(spec=f"{materialize(mutant, tmp_path)}:{mutant.build}"))
    subject.twin().logits(next(different_calls(subject.twin())))  # as other probes may have before
    results = [run_probe(probe, subject) for probe in select(shipped_probes(), "groups-agree or prefix-alone or calls-do-not-interfere")]
    assert {result.outcome.status for result in results} == {"failed"}
    assert {f.where.function for result in results for f in result.findings} == {"PositionedTransformer.forward"}
    assert len({f.where.line for result in results for f in result.findings}) == 1


def test_a_table_for_the_rows_of_an_earlier_call_is_found() -> None:
    (probe,) = select(shipped_probes(), "calls-do-not-interfere")
    (finding,) = run_probe(probe, from_model(Keeps())).findings
    assert finding.message == "a call with one row gives another result after other calls than as the first call: it fails"
    assert not run_probe(probe, from_model(Keeps(keeps=False))).findings
