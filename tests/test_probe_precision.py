"""16 bits: where they overflow, and where the code casts to them unasked."""

from pathlib import Path

import pytest

from tests.mutants.catalog import CLEAN, MUTANTS
from tests.scoreboard import findings_on, judge


def caught(name: str, topic: str) -> None:
    """The mutant of the catalog is detected, placed and explained by the probes of this topic alone."""
    row = judge(next(m for m in MUTANTS if m.name == name), f"{topic}.")
    assert not row["broke"], row["broke"]
    assert row["detected"] and row["placed"], row["places"]
    assert row["explained"], row["words"]


def loud(spec: str, topic: str) -> list[str]:
    return [f"{f['probe']}: {f['message']}" for f in findings_on(spec, f"{topic}.") if f["severity"] != "note"]


@pytest.mark.parametrize("name", ["hf/softmax-in-bfloat16", "hf/loss-in-bfloat16", "nanogpt/phase-in-bfloat16"])
def test_precision_probes_catch_place_and_explain(name: str) -> None:
    caught(name, "precision")


@pytest.mark.parametrize(
    "spec",
    [
        "olmo1-tiny",
        "olmo2-tiny",
        f"{CLEAN / 'hf_style.py'}:build_qk_norm",
        f"{CLEAN / 'nanogpt_style.py'}:build",
        f"{CLEAN / 'llama_style.py'}:build_moe",
        "transformers:GemmaForCausalLM",
        "transformers:BloomForCausalLM",
    ],
)
def test_precision_probes_are_silent_on_correct_models(spec: str) -> None:
    assert loud(spec, "precision") == []


def edited(folder: Path, old: str, new: str) -> str:
    text = (CLEAN / "llama_style.py").read_text(encoding="utf-8")
    assert text.count(old) == 1
    (folder / "edited.py").write_text(text.replace(old, new), encoding="utf-8")
    return f"{folder / 'edited.py'}:build"


def test_a_constant_beyond_float16_is_a_warning_that_names_the_dtype_and_the_op(tmp_path: Path) -> None:
    old = "    scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(head_dim)\n"
    spec = edited(tmp_path, old, old + "    scores = (scores * 1e9) - (scores * 1e9)\n")
    (finding,) = [f for f in findings_on(spec, "precision.finite") if f["severity"] != "note"]
    assert finding["severity"] == "warning"
    assert "in float16" in finding["message"]
    assert (finding["where"]["function"], finding["where"]["op"]) == ("attention", "mul")


def test_an_attention_softmax_in_bfloat16_is_no_more_than_a_note() -> None:
    found = findings_on(f"{CLEAN / 'nanogpt_style.py'}:build", "precision.softmax")
    assert [f["severity"] for f in found] == ["note"]
    assert findings_on(f"{CLEAN / 'llama_style.py'}:build", "precision.softmax") == []
