"""Implementations of one thing that give different results, and why."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from olmodebug.probes.kernels import checkpointing_agrees, compile_agrees, embeddings_as_input_agree
from torch import nn

from olmodebug.first_run import from_model
from olmodebug.spec import Job, resolve
from olmodebug.switches import attention_twins
from olmodebug.tracing.tracer import record
from tests.mutants.catalog import CLEAN, MUTANTS
from tests.scoreboard import findings_on, judge


def caught(name: str, topic: str) -> None:
    """The mutant of the catalog is detected, placed and explained by the probes of this topic alone."""
    row = judge(replace(next(m for m in MUTANTS if m.name == name), topics=(topic,)), f"{topic}. and not compile")
    assert not row["broke"], row["broke"]
    assert row["detected"] and row["placed"], row["places"]
    assert row["explained"], row["words"]


def loud(spec: str, topic: str) -> list[str]:
    return [f"{f['probe']}: {f['message']}" for f in findings_on(spec, f"{topic}. and not compile") if f["severity"] != "note"]


@pytest.mark.parametrize(
    "name",
    [
        "hf/sdpa-bool-of-additive-mask",
        "hf/sdpa-not-causal",
        "hf/scale-missing-in-eager",
        "hf/scale-missing-in-sdpa",
        "hf/softcap-dropped-by-sdpa",
        "hf/window-never-reaches-sdpa",
        "nanogpt/scale-missing-in-manual",
        "hf/reentrant-checkpointing",
    ],
)
def test_kernels_probes_catch_place_and_explain(name: str) -> None:
    caught(name, "kernels")


@pytest.mark.parametrize(
    "spec",  # the reference model is asked by every probe in tests/test_mutants.py
    [
        f"{CLEAN / 'hf_style.py'}:build_qk_norm",
        f"{CLEAN / 'nanogpt_style.py'}:build",
        f"{CLEAN / 'llama_style.py'}:build_moe",
        "transformers:GPTNeoXForCausalLM",
    ],
)
def test_kernels_probes_are_silent_on_correct_models(spec: str) -> None:
    assert loud(spec, "kernels") == []


def test_gemma_2_is_told_by_the_versions_of_transformers_whose_fused_attention_drops_its_softcap() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

    found = loud("transformers:Gemma2ForCausalLM", "kernels")
    assert [name.partition(":")[0] for name in found] == ["kernels.implementations-agree"] * Gemma2PreTrainedModel._supports_sdpa


@pytest.mark.slow
def test_a_compiled_model_that_froze_a_length_is_told_and_a_clean_one_is_not(tmp_path: Path) -> None:
    text = (CLEAN / "llama_style.py").read_text(encoding="utf-8")
    old = "        h = rms_norm(h, self.norm, self.params.norm_eps)\n"
    assert text.count(old) == 1
    frozen = old + "        h = h * (2.0 if torch.compiler.is_compiling() else 1.0) + h\n"
    (tmp_path / "model.py").write_text(text.replace(old, frozen), encoding="utf-8")
    assert [f.severity for f in compile_agrees(resolve(Job(spec=f"{tmp_path / 'model.py'}:build")))] == ["warning"]
    assert list(compile_agrees(resolve(Job(spec="olmo2-tiny")))) == []


def test_embeddings_as_input_must_meet_what_ids_meet() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(97, 12), nn.Linear(12, 97)

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

        def forward(self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None) -> SimpleNamespace:
            x = self.embed(input_ids) * 3.0 if inputs_embeds is None else inputs_embeds
            return SimpleNamespace(logits=self.head(x))

    (finding,) = embeddings_as_input_agree(from_model(Scaled()))
    assert finding.severity == "warning" and "inputs_embeds" in finding.message


@pytest.mark.parametrize("spec", ["olmo1-tiny", "olmo2-tiny", "olmo3-tiny", "datadecide-tiny"])
def test_the_reference_really_runs_the_attention_that_a_twin_is_switched_to(spec: str) -> None:
    subject = resolve(Job(spec=spec))
    case = subject.first_case()
    used = {}
    for name, twin in attention_twins(subject):
        with torch.no_grad():
            events = record(twin.model, lambda twin=twin: twin.call(case)).events
        used[name] = {event.op for event in events if "softmax" in event.op or "scaled_dot_product" in event.op}
    assert used["eager"] == {"_softmax"}
    assert not used["eager"] & used["sdpa"]


@pytest.mark.parametrize(("factor", "loud"), [(1.0, False), (1.01, True)])
def test_a_gradient_that_is_zero_but_for_rounding_is_the_same_with_checkpointing(factor: float, loud: bool) -> None:
    class Keyed(nn.Module):
        """One head whose keys have a bias: it moves all scores of a row alike, so its gradient is zero."""

        def __init__(self) -> None:
            super().__init__()
            self.gradient_checkpointing = False
            self.embed, self.q, self.k, self.head = nn.Embedding(97, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 97)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            q, k = self.q(x), self.k(x)
            scores = q @ k.mT
            if self.gradient_checkpointing:  # the same sums in another order, as a kernel may take them
                scores = factor * (q @ nn.functional.linear(x, self.k.weight).mT + (q @ self.k.bias)[..., None])
            seq = input_ids.shape[1]
            scores = scores.masked_fill(torch.ones(seq, seq, dtype=torch.bool).triu(1), float("-inf"))
            return self.head(x + scores.softmax(-1) @ x)

    findings = list(checkpointing_agrees(from_model(Keyed())))
    assert [(f.severity, "another gradient" in f.message) for f in findings] == [("error", True)] * loud
