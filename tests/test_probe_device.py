"""Tensors made on the wrong device, found on a machine that has one device."""

import pytest
import torch
from olmodebug.probes.device import made_where_the_inputs_are
from torch import nn

from olmodebug.devices import on_the_cpu
from olmodebug.first_run import from_model
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


@pytest.mark.parametrize("name", ["hf/key-positions-on-the-cpu", "nanogpt/causal-mask-on-the-cpu"])
def test_device_probes_catch_place_and_explain(name: str) -> None:
    caught(name, "device")


@pytest.mark.parametrize(
    "spec",  # the reference model is asked by every probe in tests/test_mutants.py
    [
        f"{CLEAN / 'hf_style.py'}:build_qk_norm",
        f"{CLEAN / 'nanogpt_style.py'}:build",
        f"{CLEAN / 'llama_style.py'}:build_moe",
        "transformers:LlamaForCausalLM",
        "transformers:BloomForCausalLM",
        "transformers:MptForCausalLM",
        "transformers:Gemma2ForCausalLM",
    ],
)
def test_device_probes_are_silent_on_correct_models(spec: str) -> None:
    assert loud(spec, "device") == []


HERE = "cuda" if torch.cuda.is_available() else "cpu"  # as scripts have it at their top


class Model(nn.Module):
    """One line of each kind that mixes devices, or only seems to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table = torch.ones(97, 12)  # a plain attribute
        self.register_buffer("scale", torch.tensor(2.0))
        self.embed = nn.Embedding(97, 12)
        self.head = nn.Linear(12, 97)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        if self.kind == "attribute":
            x = x + self.table[: x.shape[1]]
        elif self.kind == "made elsewhere":
            x = x + torch.arange(12.0)
        elif self.kind == "literal":
            x = x * torch.tensor([1.0] * 12)
        elif self.kind == "chosen above":
            x = x + torch.arange(12.0, device=HERE)
        elif self.kind == "written down":
            x = x + torch.arange(12.0, device="cpu")
        elif self.kind == "made without autocast":
            with torch.autocast(device_type=x.device.type, enabled=False):
                x = x + torch.arange(12.0)
        elif self.kind.startswith("counted"):  # as routers count: the CPU has no kernel for integers
            counted = input_ids.float() if input_ids.device.type == "cpu" else input_ids.int()
            x = x * torch.histc(counted, bins=12, min=0, max=96)
            x = x + torch.arange(12.0) if self.kind == "counted, made elsewhere" else x
        elif self.kind == "scalar":
            x = x * torch.tensor(2.0)
        elif self.kind == "moved":
            x = x + torch.arange(12.0).to(x.device) + torch.tensor([1.0] * 12, device=x.device)
        elif self.kind == "indexed from the cpu":
            x = x[:, torch.arange(x.shape[1])] * self.scale
        elif self.kind == "asks for values":
            x = x * (2.0 if bool((input_ids > 5).any()) else 1.0) * float(x.abs().max().item())
            x[input_ids == 3] = 0.0
        return self.head(x)


def stray(kind: str) -> list[tuple[str, str | None]]:
    subject = from_model(Model(kind))
    return [(f.severity, f.where.op) for f in made_where_the_inputs_are(subject)]


@pytest.mark.parametrize(
    ("kind", "op"),
    [
        ("made elsewhere", "arange"),
        ("counted, made elsewhere", "arange"),
        ("made without autocast", "arange"),
        ("literal", "lift_fresh"),
        ("written down", "arange"),
    ],
)
def test_a_tensor_made_elsewhere_is_an_error_at_its_own_line(kind: str, op: str) -> None:
    assert stray(kind) == [("error", op)]


def test_a_device_chosen_apart_from_the_model_is_told_with_its_condition() -> None:
    (finding,) = made_where_the_inputs_are(from_model(Model("chosen above")))
    assert (finding.severity, finding.where.op) == ("warning", "arange")
    assert finding.evidence["condition"] == "a model on another device than HERE"


def test_a_plain_attribute_that_does_not_move_is_told() -> None:
    assert stray("attribute") == [("warning", "add")]  # a live model: whether a fresh build has it is not known


@pytest.mark.parametrize("kind", ["scalar", "counted", "moved", "indexed from the cpu", "asks for values", "none"])
def test_what_torch_allows_is_no_finding(kind: str) -> None:
    assert stray(kind) == []


def test_an_op_that_is_not_there_for_another_reason_is_not_answered() -> None:
    def absent(given: torch.Tensor) -> torch.Tensor:
        if given.dtype != torch.float64:
            raise NotImplementedError("for float")
        return given

    with pytest.raises(NotImplementedError, match="for float"):
        on_the_cpu(absent, (torch.ones(3),), {})
    assert on_the_cpu(absent, (torch.ones(3, dtype=torch.int32),), {}).dtype == torch.int32


def test_the_model_is_left_on_its_device() -> None:
    subject = from_model(Model("none"))
    list(made_where_the_inputs_are(subject))
    assert {t.device.type for t in [*subject.model.parameters(), *subject.model.buffers()]} == {"cpu"}
