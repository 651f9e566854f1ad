"""Decoding with a cache in two implementations: which side leaves its own forward, and where; sides without a cache say so."""

from pathlib import Path

import pytest

from olmodebug.implementations.comparison import compare
from olmodebug.report import Outcome, Report
from olmodebug.subject import Subject
from tests.benchmarks.implementations import reference_of, subject_of
from tests.mutants.catalog import CLEAN, MUTANTS, materialize

LLAMA = "transformers:LlamaForCausalLM"


@pytest.fixture(scope="module")
def clean() -> Subject:
    return subject_of(CLEAN / "hf_style.py", "build")


def mutant(name: str, folder: Path) -> Subject:
    found = next(m for m in MUTANTS if m.name == name)
    return subject_of(materialize(found, folder), found.build)


def outcome(report: Report) -> Outcome:
    return next(o for o in report.outcomes if o.probe == "parity.decoding")


@pytest.mark.parametrize(
    ("name", "function", "cause"),
    [
        ("hf/decode-positions-restart", "MyModel.forward", "positions restart at 0"),
        pytest.param("hf/cached-keys-not-rotated", "apply_rotary_pos_emb", "leaves out 22 ops", marks=pytest.mark.slow),
        pytest.param("hf/cached-values-in-wrong-order", "MyAttention.forward", "wrong order", marks=pytest.mark.slow),
    ],
)
def test_what_only_the_cached_path_of_the_subject_does_is_its_fault(
    name: str, function: str, cause: str, clean: Subject, tmp_path: Path
) -> None:
    (finding,) = compare(mutant(name, tmp_path), reference_of(LLAMA, clean)).findings
    assert (finding.probe, finding.severity, finding.where.function) == ("parity.decoding", "error", function)
    assert cause in (finding.cause or "")
    assert (finding.evidence["subject_leaves_its_forward"], finding.evidence["reference_leaves_its_forward"]) == (True, False)


def test_what_only_the_cached_path_of_the_reference_does_is_no_error_of_the_subject(clean: Subject, tmp_path: Path) -> None:
    report = compare(clean, mutant("hf/decode-positions-restart", tmp_path))
    (finding,) = report.findings
    assert (report.verdict, finding.severity, finding.where.file) == ("pass", "warning", None)
    assert "the reference, " in finding.message
    assert (finding.cause or "").startswith("in the reference, positions restart at 0")
    assert "MyModel.forward" in str(finding.evidence["place in the reference"])


def test_two_right_caches_agree_and_a_side_without_one_says_so(clean: Subject) -> None:
    report = compare(clean, reference_of(LLAMA, clean))
    assert (report.findings, outcome(report).status) == ((), "passed")
    bare = subject_of(CLEAN / "llama_style.py", "build")
    report = compare(bare, reference_of(LLAMA, bare))
    assert (outcome(report).status, outcome(report).reason) == ("not-applicable", "the subject: forward takes no cache")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["course_style", "litgpt_style", "serving_style", "flex_style", "jax_style"])
def test_a_cache_that_the_model_keeps_or_is_handed_is_compared_too(base: str) -> None:
    subject = subject_of(CLEAN / f"{base}.py", "build")
    report = compare(subject, subject)
    assert (report.findings, outcome(report).status) == ((), "passed")
