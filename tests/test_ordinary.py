"""Mutants as ordinary people write them, and legal variations of the same files. A few run by default, `-m slow` takes them all."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from olmodebug.first_run import from_model
from olmodebug.frequencies import declared_once
from olmodebug.rebuilt import with_another_base
from olmodebug.spec import Job, resolve
from tests.mutants.catalog import Mutant, materialize, source
from tests.mutants.ordinary import LEGAL, ORDINARY
from tests.scoreboard import findings_on, judge
from tests.test_mutants import CLEAN

SHARP = frozenset(
    "plain/generate-one-late gpt2/cached-behind-the-new gpt2/positions-clamped plain/table-shared-by-configs plain/cache-of-row-zero gpt2/gelu-constant postnorm/key-norm-with-another-eps postnorm/cosines-cast-down postnorm/sdpa-mask-lost-with-dropout postnorm/one-head-detached postnorm/silu-with-a-wrong-backward gpt2/values-cached-as-keys gpt2/cached-after-what-comes-again gpt2/no-query-sees-itself postnorm/exponent-over-the-width".split()
)
# A legal design, and the topics that were once loud on it.
ASKED = {
    "gpt2/gelu-written-as-erf": "mlp",
    "plain/last-logits-in-decode": "cache",
    "plain/rounded-activations": "gradients",
    "postnorm/embedding-learns-slower": "gradients",
    "gpt2/gradient-scaled": "gradients",
}


@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.name, marks=() if m.name in SHARP else pytest.mark.slow) for m in ORDINARY])
def test_an_ordinary_mutant_is_caught_placed_and_explained(mutant: Mutant) -> None:
    row = judge(mutant, " or ".join(f"{topic}." for topic in {*mutant.topics, "causality", "build"}))
    assert not row["broke"], row["broke"]
    assert row["detected"], f"not detected by {mutant.topics}"
    assert row["placed"], f"expected {mutant.function}, observed {row['places']}"
    assert row["explained"], f"expected one of {mutant.words}, observed {row['words']}"


@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.name) for m in LEGAL])
def test_a_legal_variation_gets_neither_error_nor_warning(mutant: Mutant, tmp_path: Path) -> None:
    findings = findings_on(f"{materialize(mutant, tmp_path)}:{mutant.build}", ASKED[mutant.name])
    assert [f"{f['probe']}: {f['message']}" for f in findings if f["severity"] in ("error", "warning", "broke")] == []


@pytest.mark.slow
@pytest.mark.parametrize("style", ["gpt2_style", "postnorm_style", "plain_style"])
def test_a_clean_model_as_people_write_it_gets_no_error(style: str) -> None:
    findings = findings_on(f"{CLEAN / style}.py:build")
    assert [f"{f['probe']}: {f['message']}" for f in findings if f["severity"] in ("error", "broke")] == []


def test_every_edit_of_an_ordinary_model_applies_and_compiles() -> None:
    for mutant in (*ORDINARY, *LEGAL):
        compile(source(mutant), mutant.name, "exec")
    assert {m.name for m in ORDINARY} >= SHARP
    assert {m.name for m in LEGAL} == ASKED.keys()


def test_a_base_is_declared_once_only_where_nothing_could_hold_it_unseen() -> None:
    plain = SimpleNamespace(rope_theta=10000.0, n_layer=2, act=len)
    assert declared_once(plain, 10000.0)
    assert not declared_once(plain, 500000.0)
    assert not declared_once(SimpleNamespace(rope_theta=10000.0, by_layer=[10000.0, 500000.0]), 10000.0)
    plain.parent = plain  # a cycle
    assert not declared_once(plain, 10000.0)


def test_a_second_model_is_built_from_a_config_of_any_kind_with_another_base() -> None:
    llama = resolve(Job(spec="transformers:LlamaForCausalLM"))
    usual = llama.config.rope_parameters["rope_theta"]  # type: ignore[attr-defined]
    for subject, base in ((llama, usual), (from_model(Turned(Sizes())), 10000.0)):
        model = with_another_base(subject, base, 7 * base)
        assert model is not None
        table = next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
        torch.testing.assert_close(table[1], torch.tensor((7 * base) ** (-1 / len(table))))


@dataclass(frozen=True)
class Sizes:
    vocab_size: int = 31
    rope_theta: float = 10000.0


class Turned(nn.Module):
    """A table of frequencies from a frozen config."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.config, self.embed, self.head = config, nn.Embedding(31, 8), nn.Linear(8, 31)
        self.register_buffer("inv_freq", config.rope_theta ** (-torch.arange(4) / 4))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))
