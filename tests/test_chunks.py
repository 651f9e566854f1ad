"""Chunks through a cache, laid beside one full forward."""

import pytest
import torch

from olmodebug.records import Case
from olmodebug.relations.chunks import Chunk, NoCache, aligned, locate, pieces, run_chunks
from olmodebug.spec import Job, resolve
from olmodebug.subject import Subject
from tests.mutants.catalog import CLEAN, MUTANTS, materialize

SEQ = 7


def subject_of(spec: str) -> Subject:
    return resolve(Job(spec=spec)).twin()


def one_row(twin: Subject, seq: int = SEQ) -> Case:
    return Case(name="one row", input_ids=twin.token_ids(1, seq))


def test_sizes_become_chunks_that_follow_each_other() -> None:
    assert pieces((4, 1, 2)) == [Chunk(start=0, stop=4, seq=7), Chunk(start=4, stop=5, seq=7), Chunk(start=5, stop=7, seq=7)]
    assert [str(chunk) for chunk in pieces((4, 1))] == ["positions 0..3", "position 4"]


def test_queries_keys_and_the_rest_are_cut_out_of_a_full_tensor() -> None:
    chunk = Chunk(start=4, stop=6, seq=SEQ)
    scores = torch.arange(3.0 * SEQ * SEQ).view(1, 3, SEQ, SEQ)
    (view,) = aligned(scores, torch.empty(1, 3, 2, 6), chunk)
    assert torch.equal(view, scores[:, :, 4:6, :6])
    states = torch.arange(SEQ * 8.0).view(1, SEQ, 8)
    (view,) = aligned(states, torch.empty(1, 2, 8), chunk)
    assert torch.equal(view, states[:, 4:6])


def test_keys_that_a_window_has_left_are_the_last_ones() -> None:
    keys = torch.arange(float(SEQ)).view(1, SEQ)
    (view,) = aligned(keys, torch.empty(1, 4), Chunk(start=5, stop=6, seq=SEQ))
    assert view.tolist() == [[2.0, 3.0, 4.0, 5.0]]


def test_tensors_that_cannot_be_compared_have_no_view() -> None:
    chunk = Chunk(start=4, stop=6, seq=SEQ)
    assert aligned(torch.empty(1, SEQ), torch.empty(SEQ), chunk) == []
    assert aligned(torch.empty(1, 5), torch.empty(1, 4), chunk) == []


def test_tokens_times_experts_may_lie_either_way_round() -> None:
    flat = torch.arange(float(SEQ * 3))
    views = aligned(flat, torch.empty(2 * 3), Chunk(start=4, stop=6, seq=SEQ))
    assert [view.tolist() for view in views] == [[12, 13, 14, 15, 16, 17], [4, 5, 11, 12, 18, 19]]


def test_chunks_of_a_correct_model_give_the_logits_of_one_forward() -> None:
    twin = subject_of("olmo2-tiny")
    case = one_row(twin)
    found, _ = run_chunks(twin, case, pieces((3, 1, 3)))
    assert [tuple(logits.shape[:2]) for logits in found] == [(1, 3), (1, 1), (1, 3)]
    assert torch.allclose(torch.cat(found, dim=1), twin.logits(case), atol=1e-10)
    assert locate(twin, case, pieces((3, 1, 3)), limit=1e-9) is None


def test_a_model_without_a_cache_says_so() -> None:
    twin = subject_of(f"{CLEAN / 'nanogpt_style.py'}:build")
    with pytest.raises(NoCache):
        run_chunks(twin, one_row(twin), pieces((3, 1)))


def test_the_line_where_a_chunk_parts_is_confirmed_by_putting_it_right(tmp_path) -> None:  # type: ignore[no-untyped-def]
    mutant = next(m for m in MUTANTS if m.name == "hf/decode-positions-restart")
    twin = subject_of(f"{materialize(mutant, tmp_path)}:build")
    runs = locate(twin, one_row(twin, 3), pieces((2, 1)), limit=1e-4)
    assert runs is not None and runs.parting is not None
    assert runs.chunk == Chunk(start=2, stop=3, seq=3)
    assert runs.parting.confirmed
    assert (runs.parting.where.function, runs.parting.where.op) == ("MyModel.forward", "arange")
    assert [good.tolist() for good in runs.parting.good] == [[2]]


def test_what_the_cached_path_leaves_out_is_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    mutant = next(m for m in MUTANTS if m.name == "hf/cached-keys-not-rotated")
    twin = subject_of(f"{materialize(mutant, tmp_path)}:build")
    runs = locate(twin, one_row(twin, 3), pieces((2, 1)), limit=1e-4)
    assert runs is not None and runs.parting is not None
    assert {event.where.function for event in runs.parting.missing} == {"apply_rotary_pos_emb", "rotate_half"}
