"""The initialisation: never called, scaled twice or on the wrong matrix, dead from the start; and weights nothing wrote into."""

from pathlib import Path

import pytest
import torch
from olmodebug.probes.init import finite_weights

from olmodebug.convention import Convention
from olmodebug.load import load_file
from olmodebug.sources import Sources
from olmodebug.subject import Subject
from olmodebug.tracing.births import watch_build
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


@pytest.mark.parametrize(
    "name",
    [
        "hf/residual-init-never-applied",
        "hf/residual-init-twice",
        "hf/init-never-called",
        "nanogpt/init-never-called",
        "nanogpt/init-too-large",
        "nanogpt/residual-init-never-applied",
        "llama/residual-init-on-w3",
        "llama/residual-init-twice",
        "llama/init-never-called",
        "hf/zero-embedding-rows",
        "hf/value-and-output-both-zero",
        "llama/feed-forward-dead",
    ],
)
def test_init_probes_catch_place_and_explain(name: str) -> None:
    caught(name, "init")


@pytest.mark.parametrize(
    "spec",  # the reference model is asked by every probe in tests/test_mutants.py
    [
        f"{CLEAN / 'hf_style.py'}:build_qk_norm",
        f"{CLEAN / 'nanogpt_style.py'}:build",
        f"{CLEAN / 'llama_style.py'}:build_moe",
        "transformers:GPT2LMHeadModel",
        "transformers:MambaForCausalLM",
        "transformers:GPTNeoXForCausalLM",
    ],
)
def test_init_probes_are_silent_on_correct_models(spec: str) -> None:
    assert loud(spec, "init") == []


def edited(folder: Path, old: str, new: str) -> str:
    text = (CLEAN / "llama_style.py").read_text(encoding="utf-8")
    assert text.count(old) == 1
    (folder / "edited.py").write_text(text.replace(old, new), encoding="utf-8")
    return f"{folder / 'edited.py'}:build"


def test_a_weight_that_nothing_wrote_into_is_named(tmp_path: Path) -> None:
    spec = edited(
        tmp_path,
        "        self.attention_norm = nn.Parameter(torch.ones(args.dim))",
        "        self.attention_norm = nn.Parameter(torch.empty(args.dim))",
    )
    found = [f for f in findings_on(spec, "init.every") if f["severity"] == "warning"]
    assert [f["where"]["function"] for f in found] == ["TransformerBlock.__init__"]
    assert "layers.0.attention_norm is never initialised" in found[0]["message"]


def test_a_weight_that_is_not_finite_is_an_error_and_a_mask_of_infinities_is_none(tmp_path: Path) -> None:
    old = '        self.register_buffer("freqs_cos", freqs_cos, persistent=False)\n'
    mask = '        self.register_buffer("mask", torch.full((4, 4), float("-inf")))\n'
    assert loud(edited(tmp_path, old, old + mask), "init") == []
    model = torch.nn.ModuleDict({"a": torch.nn.Embedding(11, 4), "b": torch.nn.Linear(4, 11)})
    model["b"].weight.data[2, 1] = float("inf")
    subject = Subject(spec="live", model=model, convention=Convention(ids="x"))
    (finding,) = finite_weights(subject)
    assert finding.severity == "error" and "b.weight holds 1 of 44" in finding.message


def test_who_wrote_a_weight_last_is_known() -> None:
    module = load_file(CLEAN / "llama_style.py")
    build = watch_build(module.build, Sources(module.build()))
    births = {name: (birth.op, birth.spot.function if birth.spot else None) for name, birth in build.births.items()}
    assert births["layers.0.attention.wo.weight"] == ("normal_", "Transformer.init_weights")
    assert births["layers.0.attention_norm"][1] == "TransformerBlock.__init__"
    assert list(build.never_true()) == []
