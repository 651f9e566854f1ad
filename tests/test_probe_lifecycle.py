"""Saving, copying, casting, and being built on meta: what is lost on the way, and what may be."""

from pathlib import Path

import pytest
import torch
from torch import nn

from olmodebug.examine import run_probe
from olmodebug.first_run import from_model
from olmodebug.probe import select, shipped_probes
from olmodebug.spec import Job, resolve
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
        "hf/plain-list-of-layers",
        "llama/plain-list-of-layers",
        "hf/inv-freq-rounded-by-cast",
        "llama/table-rounded-by-cast",
        "hf/inv-freq-lost-by-to-empty",
        "llama/table-lost-by-to-empty",
        "llama/depth-scale-lost-by-to-empty",
        "hf/tying-lost-by-to-empty",
        "nanogpt/tying-lost-by-to-empty",
        "nanogpt/tied-by-data",
    ],
)
def test_lifecycle_probes_catch_place_and_explain(name: str) -> None:
    caught(name, "lifecycle")


@pytest.mark.parametrize(
    "spec",  # the reference model is asked by every probe in tests/test_mutants.py
    [
        f"{CLEAN / 'hf_style.py'}:build_qk_norm",
        f"{CLEAN / 'nanogpt_style.py'}:build",
        f"{CLEAN / 'llama_style.py'}:build_moe",
        "transformers:LlamaForCausalLM",
        "transformers:GPT2LMHeadModel",
        "transformers:MixtralForCausalLM",
    ],
)
def test_lifecycle_probes_are_silent_on_correct_models(spec: str) -> None:
    assert loud(spec, "lifecycle") == []


def test_the_subject_and_torch_are_left_as_they_were() -> None:
    subject = resolve(Job(spec=f"{CLEAN / 'hf_style.py'}:build_tied"))
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    state = torch.get_rng_state()
    for probe in select(shipped_probes(), "lifecycle."):
        run_probe(probe, subject)
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert subject.model.lm_head.weight is subject.model.model.embed_tokens.weight


def test_a_cast_that_transformers_itself_avoids_is_a_note() -> None:
    found = findings_on("transformers:LlamaForCausalLM", "lifecycle.dtype")
    assert [(f["severity"], f["where"]["function"]) for f in found] == [("note", "LlamaRotaryEmbedding.__init__")]


def test_train_mode_that_is_another_model_is_told(tmp_path: Path) -> None:
    text = (CLEAN / "llama_style.py").read_text(encoding="utf-8")
    old = "        h = rms_norm(h, self.norm, self.params.norm_eps)\n"
    assert text.count(old) == 1
    (tmp_path / "model.py").write_text(text.replace(old, old + "        h = h * 1.01 if self.training else h\n"), encoding="utf-8")
    (finding,) = findings_on(f"{tmp_path / 'model.py'}:build", "lifecycle.train")
    assert finding["severity"] == "warning" and "train mode differs" in finding["message"]


class Kept(nn.Module):
    """Two ways out of the usual: a table that copies hold together, and a save_pretrained that cannot save."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 8), nn.Linear(8, 31)

    def __deepcopy__(self, memo: dict[int, object]) -> "Kept":
        twin = Kept()
        twin.load_state_dict(self.state_dict())
        twin.embed = self.embed
        return twin

    def save_pretrained(self, folder: str) -> None:
        raise TypeError("a function is not JSON serializable")

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(input_ids))


def test_a_copy_that_shares_some_weights_names_them() -> None:
    (finding,) = run_probe(next(iter(select(shipped_probes(), "deepcopy-equal"))), from_model(Kept())).findings
    assert (finding.severity, finding.message) == ("error", "a deep copy shares embed.weight with the model it was made from")


def test_a_save_pretrained_that_fails_is_told_in_its_own_words() -> None:
    (finding,) = run_probe(next(iter(select(shipped_probes(), "safetensors-round-trip"))), from_model(Kept())).findings
    assert (finding.severity, finding.message) == ("warning", "save_pretrained fails: TypeError: a function is not JSON serializable")
