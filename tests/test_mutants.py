"""Broken models are caught by the right probe, in the right function, with the right words; clean ones stay clean.

The default run takes one mutant of each kind in each style and only the probes of its topics, and leaves those to
`tests/test_probe_*.py` that stand there; `-m slow` and `python -m tests.scoreboard` take them all.
"""

import re
from pathlib import Path

import pytest
import torch

from olmodebug.spec import Job, resolve
from tests.mutants.catalog import MUTANTS, NEUTRAL, Mutant, materialize
from tests.scoreboard import findings_on, judge

CLEAN = Path(__file__).parent / "mutants" / "clean"

SHARP = frozenset(
    """
    hf/no-causal-mask hf/mask-polarity hf/causal-off-by-one hf/zero-one-mask-added hf/mask-minus-1e4
    hf/fully-masked-row-nan hf/eager-without-mask hf/layer-1-without-mask hf/mask-not-forwarded
    llama/norm-result-unused hf/norm-without-division llama/norm-without-division
    hf/dropout-rate-forgotten-eager hf/raises-in-eager-alone hf/key-mask-on-queries hf/heads-merged-without-transpose hf/softmax-over-queries hf/dropout-in-eval-sdpa
    hf/position-ids-ignored hf/norm-used-twice hf/final-norm-missing hf/batch-mean hf/plain-list-of-layers
    hf/tying-by-copy hf/labels-shifted-twice hf/labels-not-shifted hf/ignored-labels-count
    hf/padding-mask-of-an-earlier-call hf/residual-overwritten-by-norm nanogpt/no-causal-mask
    nanogpt/flash-not-causal nanogpt/not-causal-in-training nanogpt/mask-minus-1e4
    nanogpt/heads-split-without-transpose nanogpt/dropout-without-training-flag nanogpt/mean-over-the-sequence
    nanogpt/roll-instead-of-shift nanogpt/convolution-centred nanogpt/targets-shifted-again
    nanogpt/input-mutated-in-place nanogpt/residual-branch-detached llama/no-causal-mask llama/causal-off-by-one
    llama/heads-merged-without-transpose llama/softmax-over-queries llama/table-too-short llama/position-ids-ignored
    llama/norm-over-sequence llama/scale-by-width llama/plain-list-of-layers hf/wrong-activation
    hf/final-softcap-missing hf/pad-token-outside hf/zero-embedding-rows hf/labels-mutated-in-place hf/rope-no-op
    nanogpt/attention-weights-detached nanogpt/tied-by-data llama/positions-of-an-earlier-call
    """.split()
)


def _expression(mutant: Mutant) -> str:
    """Its topics, and the probes that those depend on."""
    return " or ".join(f"{topic}." for topic in {*mutant.topics, "causality", "build"})


def _params() -> list[object]:
    return [pytest.param(m, id=m.name, marks=() if m.name in SHARP else pytest.mark.slow) for m in MUTANTS]


@pytest.mark.parametrize("mutant", _params())
def test_a_broken_model_is_caught_placed_and_explained(mutant: Mutant) -> None:
    if mutant.name in KNOWN_GAPS:
        pytest.xfail(KNOWN_GAPS[mutant.name])
    row = judge(mutant, _expression(mutant))
    assert not row["broke"], row["broke"]
    assert row["detected"], f"not detected by {mutant.topics}"
    assert row["placed"], f"expected {mutant.function}, observed {row['places']}"
    if mutant.name in FOUND_WITHOUT_CAUSE:
        return
    assert row["explained"], f"expected one of {mutant.words}, observed {row['words']}"


@pytest.mark.parametrize("name", ["hf_style", "nanogpt_style", "llama_style", "titan_style"])
def test_a_clean_model_gets_no_error(name: str) -> None:
    findings = findings_on(f"{CLEAN / name}.py:build")
    assert [f"{f['probe']}: {f['message']}" for f in findings if f["severity"] in ("error", "broke")] == []


@pytest.mark.parametrize("preset", ["olmo1-tiny", "olmo2-tiny", "olmo3-tiny", "datadecide-tiny"])
def test_the_reference_gets_no_finding_at_all_but_notes(preset: str) -> None:
    findings = findings_on(preset)
    assert [f"{f['probe']}: {f['message']}" for f in findings if f["severity"] != "note"] == []


@pytest.mark.parametrize("name", ["OlmoForCausalLM", "LlamaForCausalLM", "GPTNeoXForCausalLM", "GPT2LMHeadModel"])
def test_transformers_classes_get_no_error(name: str) -> None:
    findings = findings_on(f"transformers:{name}")
    assert [f"{f['probe']}: {f['message']}" for f in findings if f["severity"] in ("error", "broke")] == []


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.name) for m in NEUTRAL])
def test_a_legal_design_gets_no_error(mutant: Mutant, tmp_path: Path) -> None:
    findings = findings_on(f"{materialize(mutant, tmp_path)}:{mutant.build}")
    assert [f"{f['probe']}: {f['message']}" for f in findings if f["severity"] in ("error", "broke")] == []


def test_every_sharp_mutant_is_in_the_catalog() -> None:
    assert {m.name for m in MUTANTS} >= SHARP
    assert KNOWN_GAPS.keys() <= {m.name for m in MUTANTS} - SHARP


def test_every_topic_of_the_catalog_has_probes() -> None:
    from olmodebug.probe import declared_probes

    topics = {item.name.partition(".")[0] for item in declared_probes()} | {"build"}
    named = {topic for m in MUTANTS for topic in m.topics}
    assert all(re.fullmatch(r"[a-z]+", topic) for topic in named)
    assert {m.name for m in MUTANTS if not set(m.topics) & topics} <= KNOWN_GAPS.keys()


# What the probes do not see yet, each with the reason; `python -m tests.scoreboard` counts them as misses.
KNOWN_GAPS: dict[str, str] = {}

# Detected and placed, with no cause told: the scoreboard counts them as not explained.
FOUND_WITHOUT_CAUSE: frozenset[str] = frozenset()


def test_an_attention_that_raises_in_every_dtype_does_not_make_a_model_of_one_dtype(tmp_path: Path) -> None:
    (mutant,) = (m for m in MUTANTS if m.name == "hf/raises-in-eager-alone")
    subject = resolve(Job(spec=f"{materialize(mutant, tmp_path)}:{mutant.build}"))
    assert (subject.twin(attention="eager").dtype, subject.assumptions) == (torch.float64, [])
