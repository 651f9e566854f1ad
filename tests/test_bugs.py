"""The four bugs that a user brought, on faithful reconstructions: found, placed, explained, and the repair re-checked."""

import importlib
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from olmodebug.examine import Result, build, run_probe
from olmodebug.probe import shipped_probes
from olmodebug.relations.invariance import findings_of, limit_of, violation
from olmodebug.report import Finding
from olmodebug.spec import Job
from olmodebug.subject import Subject

BUGS = Path(__file__).parent / "mutants" / "bugs"
TOKENS = 50277  # allenai/gpt-neox-olmo-dolma-v1_5: 50254 words and 23 added tokens for runs of spaces
ADDED = 23


def job_of(spec: str, *, tokenizer: Path | None = None) -> Job:
    return Job(spec=f"{BUGS / spec}", tokenizer=str(tokenizer) if tokenizer else None)


@cache
def built(spec: str, tokenizer: str | None) -> Subject:
    subject = build(Job(spec=spec, tokenizer=tokenizer)).subject
    assert subject is not None
    return subject


def subject_of(job: Job) -> Subject:
    return built(job.spec, job.tokenizer)


def outcome(name: str, job: Job) -> Result:
    probe = next(p for p in shipped_probes() if p.name == name)
    return run_probe(probe, subject_of(job), job=job)


def only(findings: tuple[Finding, ...]) -> Finding:
    errors = [finding for finding in findings if finding.severity == "error"]
    assert len(errors) == 1, [finding.message for finding in errors]
    return errors[0]


def line_of(file: str, text: str, nth: int = 0) -> int:
    """The number of the nth line that holds this text."""
    lines = (BUGS / file).read_text(encoding="utf-8").splitlines()
    return [number for number, line in enumerate(lines, start=1) if text in line][nth]


def must_say(finding: Finding, *words: str) -> None:
    said = f"{finding.message} {finding.cause} {finding.fix}".lower()
    missing = [word for word in words if word.lower() not in said]
    assert not missing, f"{missing} not in: {said}"


# 1. self.inv_freq = ... followed by register_buffer("inv_freq", ...)


def test_a_buffer_registered_over_its_own_attribute_is_found_explained_and_mended() -> None:
    results = build(job_of("inv_freq_twice.py:build")).results
    assert [(r.outcome.probe, r.outcome.status) for r in results] == [("build.constructs", "failed"), ("build.runs", "skipped")]
    finding = only(results[0].findings)
    first, second = line_of("inv_freq_twice.py", "self.inv_freq = "), line_of("inv_freq_twice.py", "register_buffer(")
    assert (finding.where.function, finding.where.line) == ("RotaryEmbedding.__init__", second)
    assert str(finding.where.file).endswith("inv_freq_twice.py")
    assert finding.raised == "KeyError: \"attribute 'inv_freq' already exists\""
    must_say(finding, "register_buffer", "inv_freq", f"line {first}", f"line {second}", "local variable")
    assert finding.fix_verified
    assert [line.number for line in finding.source if line.marked] == [second]


# 2. a vocabulary smaller than the tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 50277 tokens like OLMo's: 50254 words, then 23 added tokens that are runs of spaces."""
    made = Tokenizer(WordLevel({f"w{i}": i for i in range(TOKENS - ADDED)}, unk_token="w0"))
    added = made.add_tokens([" " * (ADDED + 1 - i) for i in range(ADDED)])
    assert (added, made.get_vocab_size()) == (ADDED, TOKENS)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(file))
    return file


@pytest.mark.parametrize(("rows", "missing", "why"), [(50254, 23, "added tokens"), (50257, 20, "GPT-2")])
def test_tokens_without_an_embedding_row_are_named(rows: int, missing: int, why: str, tokenizer: Path) -> None:
    finding = only(outcome("vocab.tokenizer-fits", job_of(f"vocab_too_small.py:build_{rows}", tokenizer=tokenizer)).findings)
    must_say(finding, f"{missing} tokens", "50276", f"{rows} rows", "50277", "50304", why)
    assert finding.where.module == "embed_tokens"
    assert finding.where.function == "OLMoForCausalLM.__init__"
    assert str(finding.where.file).endswith("vocab_too_small.py")
    named = str(finding.evidence["tokens without a row"])
    spaces = ADDED + 1 - (rows - 50254)  # in the token of the first id that has no row
    assert named.startswith(f"{rows} ({spaces} spaces), {rows + 1} ({spaces - 1} spaces), ")
    assert named.endswith(f" and {missing - 8} more")


def test_the_line_of_a_table_that_is_too_small_is_the_line_that_makes_the_table(tokenizer: Path) -> None:
    finding = only(outcome("vocab.tokenizer-fits", job_of("vocab_too_small.py:build_50254", tokenizer=tokenizer)).findings)
    assert finding.where.line == line_of("vocab_too_small.py", "nn.Embedding(config.vocab_size")


@pytest.mark.parametrize("rows", [50280, 50304])
def test_an_embedding_padded_beyond_the_tokenizer_is_no_error(rows: int, tokenizer: Path) -> None:
    result = outcome("vocab.tokenizer-fits", job_of(f"vocab_too_small.py:build_{rows}", tokenizer=tokenizer))
    assert (result.outcome.status, result.findings) == ("passed", ())


def test_without_a_tokenizer_the_question_is_not_asked() -> None:
    result = outcome("vocab.tokenizer-fits", job_of("vocab_too_small.py:build_50254"))
    assert result.outcome.status == "not-applicable"
    assert "--tokenizer" in str(result.outcome.reason)


# 3. cos[position_ids] with too short a table, and the two-dimensional index where broadcasting was meant


def test_a_rotary_table_shorter_than_the_declared_context_is_placed_at_the_lookup() -> None:
    finding = only(outcome("position.whole-context-runs", job_of("short_rope_table.py:build")).findings)
    lookup = line_of("short_rope_table.py", "self.cos[position_ids].unsqueeze(1)")
    assert (finding.where.module, finding.where.function) == ("layers.0.attn.rope", "RotaryEmbedding.forward")
    assert (finding.where.line, finding.where.op) == (lookup, "index")
    must_say(finding, "position 63", "32 rows", "64 positions", "layers.0.attn.rope.cos", "device-side assert")
    assert finding.evidence["largest index"] == 63
    assert finding.evidence["rows"] == 32


def test_a_two_dimensional_index_is_explained_and_mended() -> None:
    results = build(job_of("short_rope_table.py:build_two_dimensional_index")).results
    assert [r.outcome.status for r in results] == ["passed", "failed"]
    finding = only(results[1].findings)
    assert finding.where.function == "apply_rope"
    assert finding.where.line == line_of("short_rope_table.py", "q = q * cos")
    assert (finding.where.module, finding.where.op) == ("layers.0.attn", "mul")
    must_say(finding, "position_ids", "batch", "heads", "unsqueeze(1)")
    assert finding.fix_verified


def test_sizes_in_a_message_are_never_called_by_the_name_of_another_dimension() -> None:
    finding = only(build(job_of("short_rope_table.py:build_two_dimensional_index")).results[1].findings)
    assert "heads=4 lines up with B=" in finding.message, finding.message


# 4. a mask [batch, seq] added to scores [batch, heads, seq, seq]: three forms

ADD = "scores = scores + attention_mask"


def test_a_mask_added_to_the_scores_is_caught_where_the_sizes_differ() -> None:
    finding = only(outcome("padding.mask-is-accepted", job_of("mask_added.py:build_loud")).findings)
    assert (finding.where.module, finding.where.function) == ("layers.0.attn", "OLMoAttention.forward")
    assert (finding.where.line, finding.where.op) == (line_of("mask_added.py", ADD), "add")
    must_say(finding, "[batch, seq_len]", "scores", "heads=4", "mask[:, None, None, :]", "finfo.min")
    assert finding.fix_verified


def test_a_mask_added_to_the_scores_is_caught_where_batch_equals_sequence() -> None:
    square_pairs = importlib.import_module("olmodebug.probes.batch").square_pairs
    twin = subject_of(job_of("mask_added.py:build_loud")).twin()
    pair = next(p for p in square_pairs(twin) if p.change == "masks")
    assert pair.part.batch == pair.part.seq
    broken = violation(twin, pair, limit=limit_of(twin))
    assert broken is not None, "the silent form went unnoticed"
    finding = findings_of(broken, message="")[0]
    assert (finding.where.function, finding.where.op) == ("OLMoAttention.forward", "add")
    assert finding.where.line == line_of("mask_added.py", ADD)
    must_say(finding, "rows line up with the queries", "batch equals seq_len", "mask[:, None, None, :]")
    assert finding.edits, "no repair is offered for the silent form"


def test_the_repair_that_adds_zeros_and_ones_and_forgets_causality_is_caught_twice() -> None:
    job = job_of("mask_added.py:build_repaired")
    future = only(outcome("causality.no-future", job).findings)
    softmax = line_of("mask_added.py", "F.softmax(scores", nth=1)
    assert (future.where.function, future.where.line, future.where.op) == ("RepairedOLMoAttention.forward", softmax, "_softmax")
    must_say(future, "no causal mask", "later key")
    assert future.fix_verified
    assert future.case is not None
    assert (future.case.batch_size, future.case.seq_len) == (1, 2), "the smallest case is one row of two tokens"

    padding = only(outcome("padding.left-content-ignored", job).findings)
    assert (padding.where.function, padding.where.op) == ("RepairedOLMoAttention.forward", "add")
    assert padding.where.line == line_of("mask_added.py", "attention_mask[:, None, None, :]")
    must_say(padding, "zeros and ones", "1/e", "finfo.min")
    assert padding.fix_verified


def test_no_other_probe_of_the_spine_blames_the_mask_bug_on_another_place() -> None:
    job = job_of("mask_added.py:build_loud")
    lines = set()
    for name in ("batch.rows-independent", "causality.no-future", "position.whole-context-runs", "loss.next-token-cross-entropy"):
        lines |= {(finding.where.function, finding.where.line) for finding in outcome(name, job).findings}
    assert lines == {("OLMoAttention.forward", line_of("mask_added.py", ADD))}
