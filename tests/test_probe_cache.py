"""The cache probes: silent on correct caches, exact about broken ones."""

from pathlib import Path

import pytest

from olmodebug.examine import Result, run_probe
from olmodebug.probe import probes_in
from olmodebug.probes import cache
from olmodebug.report import Finding
from olmodebug.spec import Job, resolve
from tests.mutants.catalog import CLEAN, MUTANTS, materialize

PROBES = {probe.name.partition(".")[2]: probe for probe in probes_in(cache)}


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
    ("mutant", "cause"),
    [
        ("hf/decode-positions-restart", "restart at 0"),
        ("hf/causal-mask-top-left", "aligned top-left"),
        ("hf/sdpa-causal-top-left", "is_causal=True with 2 queries and 4 keys"),
        ("hf/second-turn-masked-from-zero", "aligned top-left"),
        ("hf/cached-keys-not-rotated", "leaves out 22 ops that the full forward runs, in apply_rotary_pos_emb, rotate_half"),
        ("hf/cached-values-in-wrong-order", "the new tokens stand in front of the cached ones"),
        ("hf/position-stops-when-cache-is-full", "tokens read, and the full forward gives weight up to"),
        ("hf/alibi-on-query-length", "built over the query length 1"),
    ],
)
def test_a_broken_cache_is_explained(mutant: str, cause: str, tmp_path: Path) -> None:
    finding = caught("matches-full-forward", mutant, tmp_path)
    assert finding.severity == "error"
    assert cause in (finding.cause or "")
    assert finding.fix
    assert finding.case is not None and finding.case.seq_len <= 8


def test_padding_that_is_counted_in_decode_only_is_seen_only_with_padding(tmp_path: Path) -> None:
    item = next(m for m in MUTANTS if m.name == "hf/decode-positions-count-padding")
    assert run("matches-full-forward", f"{materialize(item, tmp_path)}:build").outcome.status == "passed"
    finding = caught("left-padded-rows-decode", item.name, tmp_path)
    assert "positions count the 3 padded tokens" in (finding.cause or "")


def test_a_table_that_ends_before_the_context_is_found_by_decoding_to_its_end(tmp_path: Path) -> None:
    text = (CLEAN / "hf_style.py").read_text()
    old = "        position_embeddings = self.rotary_emb(hidden_states, position_ids)\n"
    assert text.count(old) == 1
    path = tmp_path / "short.py"
    path.write_text(text.replace(old, old.replace("position_ids)", "position_ids.clamp(max=61))")))
    assert run("table-end", f"{path}:build").outcome.status == "passed"  # the same wrong thing with and without a cache
    path = tmp_path / "restart.py"
    path.write_text(text.replace(old, old.replace("position_ids)", "position_ids if past_length < 62 else position_ids - past_length)")))
    assert run("table-end", f"{path}:build").outcome.status == "failed"


@pytest.mark.parametrize("spec", ["olmo2-tiny", "olmo3-tiny", "hf_style.py:build_window_sdpa"])
def test_a_correct_cache_gets_no_finding(spec: str) -> None:
    for name in PROBES:
        result = run(name, str(CLEAN / spec) if ".py" in spec else spec)
        assert result.findings == (), result.findings
        assert result.outcome.status in ("passed", "not-applicable"), result.outcome


@pytest.mark.parametrize("name", ["MistralForCausalLM", "BloomForCausalLM", "OPTForCausalLM", "DeepseekV3ForCausalLM"])
def test_caches_of_transformers_pass(name: str) -> None:
    for probe in PROBES:
        result = run(probe, f"transformers:{name}")
        assert [f for f in result.findings if f.severity == "error"] == []
        assert result.outcome.status in ("passed", "not-applicable"), result.outcome


def test_several_tokens_on_a_recurrent_state_are_a_warning_only() -> None:
    result = run("matches-full-forward", "transformers:MambaForCausalLM")
    assert result.outcome.status == "passed"
    assert [f.severity for f in result.findings] in ([], ["warning"])  # transformers may mend it


def test_without_a_cache_the_probes_do_not_apply() -> None:
    for name in PROBES:
        assert run(name, f"{CLEAN / 'nanogpt_style.py'}:build").outcome.status == "not-applicable"
