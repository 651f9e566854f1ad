"""The sliding-window probe: one key too many is one too many."""

from pathlib import Path

import pytest

from olmodebug.examine import Result, run_probe
from olmodebug.probe import probes_in
from olmodebug.probes import window
from olmodebug.report import Finding
from olmodebug.spec import Job, resolve
from tests.mutants.catalog import CLEAN, MUTANTS, materialize

PROBES = {probe.name.partition(".")[2]: probe for probe in probes_in(window)}


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
    ("mutant", "keys", "cause"),
    [
        ("hf/window-off-by-one", 6, "off by one: 6 keys are seen"),
        ("hf/window-never-reaches-sdpa", 11, "no attn_mask: the sliding window never reaches it"),
        ("hf/mask-cache-without-window", 11, "full causal one"),
    ],
)
def test_a_wrong_window_is_explained(mutant: str, keys: int, cause: str, tmp_path: Path) -> None:
    finding = caught("receptive-field", mutant, tmp_path)
    assert finding.severity == "error"
    assert finding.evidence["keys seen"] == keys
    assert cause in (finding.cause or "")


def test_a_window_on_a_full_layer_is_found(tmp_path: Path) -> None:
    text = (CLEAN / "hf_style.py").read_text()
    old = "layer_mask = masks[layer.attention_type]"
    assert text.count(old) == 1
    path = tmp_path / "everywhere.py"
    path.write_text(text.replace(old, 'layer_mask = masks["sliding_attention"]'))
    (finding,) = run("receptive-field", f"{path}:build_window").findings
    assert "layer 1 (full_attention) sees 5 keys" in finding.message


@pytest.mark.parametrize(
    "spec",
    [
        "olmo3-tiny",
        "hf_style.py:build_window",
        "hf_style.py:build_window_sdpa",
        "transformers:MistralForCausalLM",
        "transformers:Gemma3ForCausalLM",
        "transformers:GptOssForCausalLM",
    ],
)
def test_a_right_window_passes(spec: str) -> None:
    result = run("receptive-field", str(CLEAN / spec) if ".py" in spec else spec)
    assert (result.outcome.status, result.findings) == ("passed", ())


@pytest.mark.parametrize("spec", ["olmo1-tiny", "transformers:Qwen2ForCausalLM", "hf_style.py:build"])
def test_without_a_window_there_is_nothing_to_ask(spec: str) -> None:
    assert run("receptive-field", str(CLEAN / spec) if ".py" in spec else spec).outcome.status == "not-applicable"
