"""The plain values: how they print, and what they derive."""

import dataclasses

import pytest

from olmodebug.records import Case, Difference, Event, TensorInfo, Where


def test_a_tensor_prints_its_dtype_and_shape() -> None:
    assert str(TensorInfo(shape=(2, 8, 16), dtype="float32")) == "f32[2,8,16]"
    assert str(TensorInfo(shape=(), dtype="bfloat16")) == "bf16[]"


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (Where(), ""),
        (Where(module="model.norm"), "module model.norm"),
        (Where(file="model.py"), "model.py"),
        (Where(line=3), ""),
        (
            Where(module="model.norm", function="Norm.forward", file="model.py", line=88, op="mean"),
            "Norm.forward, model.py:88, module model.norm, mean",
        ),
    ],
)
def test_a_place_prints_what_is_known_of_it(where: Where, text: str) -> None:
    assert str(where) == text


def test_a_case_knows_its_batch_size_and_sequence_length() -> None:
    case = Case(name="two rows", input_ids=((1, 2, 3), (4, 5, 6)))
    assert (case.batch_size, case.seq_len) == (2, 3)
    empty = Case(name="empty", input_ids=())
    assert (empty.batch_size, empty.seq_len) == (0, 0)


def test_the_key_of_an_event_leaves_out_its_index_and_tensors() -> None:
    where = Where(module="model.norm", file="model.py", line=88, op="mean")
    first = Event(index=1, op="mean", where=where, inputs=(TensorInfo(shape=(2,), dtype="float64"),))
    again = Event(index=7, op="mean", where=where)
    backward = Event(index=7, op="mean", where=where, phase="backward")
    assert first.key == again.key != backward.key


def test_a_relative_difference_is_a_share_of_the_scale() -> None:
    assert Difference(max_abs=0.5, scale=4.0, mismatched=1, total=10).relative == 0.125
    assert Difference(max_abs=0.5, scale=0.0, mismatched=1, total=10).relative == 0.5


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Where().module = "model.norm"  # type: ignore[misc]
