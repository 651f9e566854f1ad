"""What a recording shows of rotary embeddings."""

import math

import pytest
import torch

from olmodebug.spec import Job, resolve
from olmodebug.subject import Subject
from olmodebug.tracing.rotation import angle_tables, attentions, constant_case, maker, table_factor, trace_case, varies
from tests.mutants.catalog import CLEAN

ROTARY = [
    "hf_style.py:build",
    "hf_style.py:build_sdpa",
    "llama_style.py:build",
    "nanogpt_style.py:build_rope",
    "nanogpt_style.py:build_rope_flash",
]


def subject_of(spec: str) -> Subject:
    return resolve(Job(spec=str(CLEAN / spec) if ".py:" in spec else spec)).twin()


@pytest.mark.parametrize("spec", ROTARY)
def test_queries_and_keys_turn_with_the_position_and_values_do_not(spec: str) -> None:
    twin = subject_of(spec)
    case = constant_case(twin)
    found = attentions(trace_case(twin, case), case.seq_len)
    assert len(found) == 3  # layers
    first = found[0]
    assert varies(first.query, 1e-4) and varies(first.key, 1e-4)
    assert first.value is not None and not varies(first.value, 1e-4)


def test_learned_positions_reach_the_values() -> None:
    twin = subject_of("nanogpt_style.py:build")
    case = constant_case(twin)
    first = attentions(trace_case(twin, case), case.seq_len)[0]
    assert first.value is not None and varies(first.value, 1e-4)


@pytest.mark.parametrize(
    ("spec", "theta", "pairs"),
    [("hf_style.py:build", 50000.0, 6), ("llama_style.py:build", 10000.0, 7), ("nanogpt_style.py:build_rope", 10000.0, 6)],
)
def test_the_frequencies_in_use_are_recovered(spec: str, theta: float, pairs: int) -> None:
    twin = subject_of(spec)
    case = constant_case(twin)
    (table,) = angle_tables(trace_case(twin, case), case.seq_len)
    expected = torch.tensor([theta ** (-i / pairs) for i in range(pairs)], dtype=torch.float64)
    assert torch.allclose(table.frequencies, expected, rtol=1e-3)


def test_frequencies_do_not_depend_on_where_positions_start() -> None:
    twin = subject_of("hf_style.py:build")
    tables = [angle_tables(trace_case(twin, case), case.seq_len)[0] for case in (constant_case(twin), constant_case(twin, start=9))]
    assert torch.allclose(tables[0].frequencies, tables[1].frequencies, atol=1e-5)


def test_scores_depend_on_the_distance_alone() -> None:
    twin = subject_of("olmo1-tiny")
    case = constant_case(twin)
    scores = attentions(trace_case(twin, case), case.seq_len)[0].scores
    assert torch.allclose(scores[:, :-1, :-1], scores[:, 1:, 1:], atol=1e-6 * float(scores.abs().max()) + 1e-12)


@pytest.mark.parametrize(("spec", "factor"), [("hf_style.py:build", 1.0), ("hf_style.py:build_attention_factor", 1.3)])
def test_the_attention_factor_is_read_from_the_table(spec: str, factor: float) -> None:
    twin = subject_of(spec)
    case = constant_case(twin)
    recording = trace_case(twin, case)
    (table,) = angle_tables(recording, case.seq_len)
    observed = table_factor(recording, table, case.seq_len)
    assert observed is not None and math.isclose(observed, factor, rel_tol=1e-6)


def test_the_op_that_made_the_queries_is_the_rotation() -> None:
    twin = subject_of("nanogpt_style.py:build_rope")
    case = constant_case(twin)
    recording = trace_case(twin, case)
    made = maker(recording, attentions(recording, case.seq_len)[0].index, 0)
    assert made is not None
    assert (recording.events[made].op, recording.events[made].where.function) == ("add", "apply_rope")
