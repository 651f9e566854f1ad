"""Models written to be served are asked as others are: under inference mode, with one position's logits, cache first."""

from pathlib import Path

import pytest
import torch
from torch import nn

import olmodebug
from olmodebug.report import Report
from olmodebug.spec import Job, resolve
from olmodebug.tracing.tracer import record
from tests.mutants.catalog import Mutant
from tests.mutants.serving import SERVING
from tests.scoreboard import judge

STYLE = Path(__file__).parent / "mutants" / "clean" / "serving_style.py"

SHARP = ("serving/values-of-the-prompt-only", "serving/queries-not-turned", "serving/mask-of-the-future")  # the others are slow tests


def asked(build: str, probes: str) -> Report:
    return olmodebug.check(f"{STYLE}:{build}", select_probes=probes)


@pytest.mark.parametrize("build", ["build", "build_last", "build_prepared"])
def test_a_served_model_is_right_by_every_rule_of_its_attention_and_cache(build: str) -> None:
    report = asked(build, "rope.depends or rope.keeps or cache.matches or groups-agree or leaves-things or save-and-load or causality")
    assert [(f.probe, f.message) for f in (*report.of("error"), *report.of("warning"))] == []
    passed = {o.probe for o in report.outcomes if o.status == "passed"}
    assert {"rope.depends-on-distance", "cache.matches-full-forward", "state.leaves-things-alone"} <= passed


def test_inference_mode_hides_no_op() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ x.transpose(-1, -2)).softmax(-1)

    class Served(Plain):
        forward = torch.inference_mode()(Plain.forward)

    x = torch.randn(2, 3, 5)
    seen = []
    for model in (Plain(), Served()):
        with torch.no_grad():
            ops = [event.op for event in record(model, lambda: model(x)).events]  # noqa: B023 - called at once
            seen.append([op.removeprefix("_unsafe_") for op in ops])
    assert "bmm" in seen[1]
    assert seen[0] == seen[1]


def test_a_forward_that_is_openly_for_inference_gets_a_note_and_no_warning() -> None:
    (finding,) = asked("build", "reach-every-parameter").findings
    assert finding.severity == "note"
    assert finding.cause == "forward is decorated with torch.inference_mode: a model for inference only"
    assert finding.where.function == "Served.forward"


def test_a_cache_made_for_one_call_is_gone_after_it() -> None:
    subject = resolve(Job(spec=f"{STYLE}:build_prepared"))
    assert subject.convention.sets_up
    for rows in (3, 2, 1):  # setup_caches would keep the larger one
        ids = subject.token_ids(rows, 9)
        assert subject.forward({"idx": torch.tensor(ids)}).shape == (rows, 9, 101)
    assert all(layer.cache is None for layer in subject.model.layers)
    assert not [name for name in subject.model.state_dict() if "cache" in name]


def test_logits_of_the_last_position_are_taken_from_every_prefix() -> None:
    subject = resolve(Job(spec=f"{STYLE}:build_last"))
    assert subject.convention.last_only
    assert subject.vocab_size == 101
    case = subject.first_case()
    logits = subject.logits(case)
    assert logits.shape == (case.batch_size, case.seq_len, 101)
    alone = subject.model(torch.tensor(case.input_ids)[:, :2], 0)
    assert torch.equal(logits[:, 1], alone)


@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.name, marks=() if m.name in SHARP else pytest.mark.slow) for m in SERVING])
def test_a_served_mutant_is_caught_placed_and_explained(mutant: Mutant) -> None:
    row = judge(mutant, " or ".join(f"{topic}." for topic in {*mutant.topics, "causality", "build"}))
    assert not row["broke"], row["broke"]
    assert row["detected"], row["elsewhere"]
    assert row["placed"], f"expected {mutant.function}, observed {row['places']}"
    assert row["explained"], f"expected one of {mutant.words}, observed {row['words']}"
