"""The rotary probes: silent on every legal rotation, exact about wrong ones."""

from pathlib import Path

import pytest

from olmodebug.examine import Result, run_probe
from olmodebug.probe import probes_in
from olmodebug.probes import rope
from olmodebug.report import Finding
from olmodebug.spec import Job, resolve
from tests.mutants.catalog import CLEAN, MUTANTS, materialize

PROBES = {probe.name.partition(".")[2]: probe for probe in probes_in(rope)}


def run(name: str, spec: str) -> Result:
    subject = resolve(Job(spec=spec))
    return run_probe(PROBES[name], subject)


def caught(name: str, mutant: str, folder: Path) -> Finding:
    """The one finding that the probe makes on a mutant, which must be in the right function with the right words."""
    item = next(m for m in MUTANTS if m.name == mutant)
    result = run(name, f"{materialize(item, folder)}:{item.build}")
    assert len(result.findings) == 1, (result.outcome, [f.message for f in result.findings])
    finding = result.findings[0]
    assert finding.where.function in (item.function, *item.also)
    assert any(word in f"{finding.message} {finding.cause}".lower() for word in item.words)
    return finding


@pytest.mark.parametrize(
    ("probe", "mutant", "cause"),
    [
        ("depends-on-distance", "hf/mixed-rope-styles", "do not turn by one angle"),
        ("depends-on-distance", "nanogpt/mixed-rope-styles", "do not turn by one angle"),
        ("depends-on-distance", "hf/partial-rotary-wrong-partner", "do not turn by one angle"),
        ("depends-on-distance", "llama/mixed-rope-styles", "different order"),
        ("depends-on-distance", "hf/rope-on-query-only", "queries are rotated and keys are not"),
        ("depends-on-distance", "hf/positions-clamped", "positions saturate: 30..46"),
        ("keeps-norm", "hf/attention-factor-twice", "1.3 is applied twice"),
        ("angles-are-precise", "hf/positions-clamped", "saturate"),
        ("angles-are-precise", "nanogpt/phase-in-bfloat16", "8 bits"),
        ("angles-are-precise", "llama/frequencies-in-bfloat16", "8 bits"),
        ("frequencies-as-configured", "hf/rope-theta-ignored", "base in use is 10000"),
        ("frequencies-as-configured", "llama/rope-theta-ignored", "base in use is 10000"),
        ("frequencies-as-configured", "hf/partial-rotary-exponent", "divided by head_dim 12, and only 6"),
        ("frequencies-as-configured", "hf/rope-scaling-ignored", "factor 4 and has no effect"),
    ],
)
def test_a_wrong_rotation_is_explained(probe: str, mutant: str, cause: str, tmp_path: Path) -> None:
    finding = caught(probe, mutant, tmp_path)
    assert finding.severity == "error"
    assert cause in (finding.cause or "")


def edited(folder: Path, *edits: tuple[str, str]) -> str:
    text = (CLEAN / "hf_style.py").read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "edited.py"
    path.write_text(text)
    return f"{path}:build"


def test_positions_in_the_models_dtype_are_a_warning_about_bfloat16(tmp_path: Path) -> None:
    longer = ("max_position_embeddings: int = 64", "max_position_embeddings: int = 1024")
    spec = edited(tmp_path, longer, ("position_ids.to(torch.float32)", "position_ids.to(hidden_states.dtype)"))
    (finding,) = run("angles-are-precise", spec).findings
    assert finding.severity == "warning"
    assert "after model.to(bfloat16)" in finding.message and "bfloat16" in (finding.cause or "")


def test_a_buffer_that_a_cast_rounds_is_a_note(tmp_path: Path) -> None:
    mutant = next(m for m in MUTANTS if m.name == "hf/inv-freq-rounded-by-cast")
    (finding,) = run("angles-are-precise", f"{materialize(mutant, tmp_path)}:build").findings
    assert finding.severity == "note"
    assert "inv_freq" in (finding.cause or "")


def test_positions_that_are_all_one_too_high_are_no_bug(tmp_path: Path) -> None:
    spec = edited(tmp_path, ("position_ids.to(torch.float32)", "position_ids.to(torch.float32) + 1"))
    for name in PROBES:
        assert run(name, spec).findings == ()


def test_queries_scaled_by_their_position_are_no_bug(tmp_path: Path) -> None:
    spec = edited(
        tmp_path,
        (
            "        if past_key_value is not None:\n",
            "        query = query * (1 + torch.arange(query_length)).log1p()[:, None]\n        if past_key_value is not None:\n",
        ),
    )
    for name in PROBES:
        result = run(name, spec)
        assert [f for f in result.findings if f.severity == "error"] == [], result.findings


def test_a_short_convolution_over_keys_is_no_bug(tmp_path: Path) -> None:
    old = "        cos, sin = position_embeddings\n"
    spec = edited(tmp_path, (old, "        key = key + F.pad(key, (0, 0, 1, 0))[:, :, :-1]\n" + old))
    for name in PROBES:
        assert run(name, spec).findings == ()


CLEAN_SPECS = [
    "olmo3-tiny",
    "hf_style.py:build_partial_rotary",
    "hf_style.py:build_attention_factor",
    "hf_style.py:build_linear_scaling",
    "llama_style.py:build_positions",
    "nanogpt_style.py:build_rope",
]


@pytest.mark.parametrize("spec", CLEAN_SPECS)
def test_a_legal_rotation_gets_no_finding(spec: str) -> None:
    for name in PROBES:
        result = run(name, str(CLEAN / spec) if ".py" in spec else spec)
        assert result.findings == (), result.findings
        assert result.outcome.status in ("passed", "not-applicable"), result.outcome


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "FalconForCausalLM", "Gemma3ForCausalLM"])
def test_rotations_of_transformers_pass(name: str) -> None:
    for probe in PROBES:
        result = run(probe, f"transformers:{name}")
        assert [f for f in result.findings if f.severity != "note"] == []


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BloomForCausalLM"])
def test_learned_positions_and_alibi_are_not_judged(name: str) -> None:
    for probe in PROBES:
        assert run(probe, f"transformers:{name}").outcome.status == "not-applicable"
