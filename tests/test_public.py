"""Faults first seeded in public models are caught, placed and explained; what is legal beside them gets neither error nor warning."""

from pathlib import Path

import pytest

from tests.mutants.catalog import Mutant, materialize
from tests.mutants.public import LEGAL, PUBLIC
from tests.scoreboard import findings_on, judge

SHARP = frozenset(
    """
    hf/decode-positions-lag lit/freqs-one-late course/triu-without-past lit/mask-rows-from-zero serving/keys-and-values-into-slot-0
    serving/slots-one-late-and-around serving/slots-from-the-end wordlm/mask-transposed
    megatron/rows-read-as-time course/eps-held-and-left-out course/eps-outside-the-root lit/declared-scale-unread
    hf/exponent-over-half course/keys-turned-back
    """.split()
)


def marked(mutants: tuple[Mutant, ...]) -> list[object]:
    return [pytest.param(m, id=m.name, marks=() if m.name in SHARP else pytest.mark.slow) for m in mutants]


@pytest.mark.parametrize("mutant", marked(PUBLIC))
def test_a_fault_of_a_public_model_is_caught_placed_and_explained(mutant: Mutant) -> None:
    row = judge(mutant, " or ".join(f"{topic}." for topic in {*mutant.topics, "causality", "build"}))
    assert not row["broke"], row["broke"]
    assert row["detected"], row["elsewhere"]
    assert row["placed"], f"expected {mutant.function}, observed {row['places']}"
    assert row["explained"], f"expected one of {mutant.words}, observed {row['words']}"


@pytest.mark.parametrize("name", ["wordlm/centred-over-time", "wordlm/mask-transposed", "megatron/softmax-over-queries"])
def test_a_sequence_that_comes_first_is_not_taken_for_the_batch(name: str, tmp_path: Path) -> None:
    mutant = next(m for m in PUBLIC if m.name == name)
    findings = findings_on(f"{materialize(mutant, tmp_path)}:{mutant.build}", "batch. or causality.no-future")
    assert {f["probe"].partition(".")[0] for f in findings if f["severity"] == "error"} == set(mutant.topics)


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("moe/expert-outputs-reversed", "index_add"),
        pytest.param("moe/weights-by-rank", "index_add", marks=pytest.mark.slow),
        ("moe/centred-behind-the-experts", "mean"),
    ],
)
def test_what_experts_pick_is_no_culprit(name: str, op: str, tmp_path: Path) -> None:
    mutant = next(m for m in PUBLIC if m.name == name)
    findings = findings_on(f"{materialize(mutant, tmp_path)}:{mutant.build}", "batch.rows-independent or causality.no-future")
    errors = [f for f in findings if f["severity"] == "error"]
    assert {(f["where"]["function"], f["where"]["op"]) for f in errors} == {(mutant.function, op)}


@pytest.mark.parametrize("mutant", marked(LEGAL))
def test_what_is_legal_beside_it_is_not_told(mutant: Mutant, tmp_path: Path) -> None:
    findings = findings_on(f"{materialize(mutant, tmp_path)}:{mutant.build}", "cache. or causality. or batch. or norm. or attention.")
    assert [f"{f['probe']}: {f['message']}" for f in findings if f["severity"] != "note"] == []
