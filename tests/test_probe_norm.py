"""Norms: their eps, their square, their place in the residual stream; and legal designs that look odd."""

from pathlib import Path

import pytest
import torch
from torch import nn

from olmodebug import check
from olmodebug.tracing.norms import acts_as_norm, norm_calls, unit_rms, with_unit_weights
from olmodebug.tracing.tracer import record
from tests.mutants.catalog import CLEAN, MUTANTS, NEUTRAL, materialize
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
        "hf/eps-ignored",
        "llama/eps-ignored",
        "hf/norm-squares-in-float16",
        "llama/norm-squares-in-float16",
        "hf/residual-overwritten-by-norm",
        "nanogpt/residual-forgotten",
        "llama/residual-overwritten-by-norm",
        "hf/final-norm-missing",
        "nanogpt/final-norm-missing",
        "llama/final-norm-missing",
        "nanogpt/unbiased-std",
    ],
)
def test_norm_probes_catch_place_and_explain(name: str) -> None:
    caught(name, "norm")


@pytest.mark.parametrize(
    "spec",  # the reference model is asked by every probe in tests/test_mutants.py
    [
        f"{CLEAN / 'hf_style.py'}:build_qk_norm",
        f"{CLEAN / 'nanogpt_style.py'}:build",
        f"{CLEAN / 'llama_style.py'}:build_moe",
        "transformers:OPTForCausalLM",
        "transformers:Gemma2ForCausalLM",
        "transformers:CohereForCausalLM",
        "transformers:BeamForCausalLM",
    ],
)
def test_norm_probes_are_silent_on_correct_models(spec: str) -> None:
    package, _, name = spec.partition(":")
    if package == "transformers" and not hasattr(pytest.importorskip(package), name):
        pytest.skip(f"this version of transformers has no {name}")
    assert loud(spec, "norm") == []


@pytest.mark.parametrize(
    "name", ["nanogpt/post-norm", "hf/sandwich-norms", "hf/norm-after-branch", "hf/parallel-block", "hf/embedding-scaled"]
)
def test_where_a_norm_stands_is_a_choice(name: str, tmp_path: Path) -> None:
    neutral = next(m for m in NEUTRAL if m.name == name)
    assert loud(f"{materialize(neutral, tmp_path)}:{neutral.build}", "norm") == []


class Norm(nn.Module):
    """Shifts by one or not, and centres or not."""

    def __init__(self, *, shift: float = 0.0, centre: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))
        self.shift, self.centre = shift, centre

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centre else x
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * (self.weight + self.shift)


@pytest.mark.parametrize("norm", [Norm(), Norm(centre=True), Norm(shift=1.0), nn.LayerNorm(12), nn.RMSNorm(12)])
def test_a_norm_is_known_by_what_it_does(norm: nn.Module) -> None:
    twin = with_unit_weights(norm)
    assert acts_as_norm(twin, 12)
    assert unit_rms(twin, 12) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("other", [nn.Linear(12, 12), nn.Identity(), nn.GELU(), nn.PReLU(12)])
def test_other_modules_are_no_norms(other: nn.Module) -> None:
    assert not acts_as_norm(other.double(), 12)


class Placed(nn.Module):
    """A norm that has its eps in one of several places."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.weight, self.eps, self.place = nn.Parameter(torch.ones(12)), 1e-3, place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.place == "in the mean":
            return self.weight * x * torch.rsqrt((x.pow(2) + self.eps).mean(-1, keepdim=True))
        mean = x.pow(2).mean(-1, keepdim=True)
        if self.place == "behind a cast root":
            return self.weight * (x / (mean.sqrt().to(torch.float32) + self.eps)).to(x.dtype)
        if self.place == "chosen":
            mean = torch.where(mean > self.eps, mean, self.eps)
        return self.weight * x * torch.rsqrt(mean)


class Single(nn.Module):
    """A model of one norm, whose config declares an eps or not."""

    def __init__(self, place: str, **config: float) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(31, 12), Placed(place), nn.Linear(12, 31, bias=False)
        self.config = {"hidden_size": 12, **config}

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(input_ids)))


@pytest.mark.parametrize("config", [{}, {"rms_norm_eps": 1e-3}], ids=["held", "declared"])
@pytest.mark.parametrize(("place", "told"), [("in the mean", 0), ("behind a cast root", 0), ("chosen", 0), ("nowhere", 1)])
def test_an_eps_may_stand_in_several_places_and_not_in_none(place: str, told: int, config: dict[str, float]) -> None:
    report = check(Single(place, **config), select_probes="eps-as-configured")
    assert [f.message.partition(",")[0] for f in report.findings] == ["this RMS norm adds no eps"] * told


def test_the_eps_of_a_norm_is_read_from_its_run() -> None:
    norm = Norm()
    calls = norm_calls(record(norm, lambda: norm(torch.randn(2, 3, 12)), keep=True))
    assert [(call.eps, call.width, call.kind) for call in calls] == [(1e-3, 12, "RMS norm")]
    layer = nn.LayerNorm(12, eps=1e-4)
    calls = norm_calls(record(layer, lambda: layer(torch.randn(2, 3, 12)), keep=True))
    assert [(call.eps, call.width, call.kind) for call in calls] == [(1e-4, 12, "layer norm")]
