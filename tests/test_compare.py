"""How far two tensors are apart: against a few lines of plain Python on lists."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from olmodebug.compare import FLOAT32_ROUNDINGS, ROUNDINGS, difference, roundings_limit

finite = st.floats(-1e6, 1e6, allow_nan=False)
anything = st.floats(width=64) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0])
pairs = st.lists(st.tuples(finite, finite), min_size=1, max_size=8)


def agrees(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def tensors(values: list[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = zip(*values, strict=True)
    return torch.tensor(left, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)


@given(st.lists(anything, max_size=8))
def test_a_tensor_agrees_with_itself_whatever_is_in_it(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    assert difference(tensor, tensor.clone()) is None


@given(st.lists(st.tuples(anything, anything), min_size=1, max_size=8))
def test_without_a_limit_any_inequality_counts_nan_agrees_with_nan_and_infinity_with_itself(values: list[tuple[float, float]]) -> None:
    left, right = tensors(values)
    found = difference(left, right)
    wrong = [i for i, (a, b) in enumerate(values) if not agrees(a, b)]
    assert (found is None) == (not wrong)
    if found is not None:
        assert (found.mismatched, found.total) == (len(wrong), len(values))
        assert found.index[0] in wrong
        assert found.max_abs > 0


@given(st.lists(st.tuples(anything, anything), min_size=1, max_size=8), st.floats(0, 1))
def test_the_order_of_the_two_does_not_matter(values: list[tuple[float, float]], limit: float) -> None:
    left, right = tensors(values)
    assert difference(left, right, relative_limit=limit) == difference(right, left, relative_limit=limit)


@given(pairs, st.floats(0, 2))
def test_a_finite_gap_counts_when_it_exceeds_the_limit_times_the_largest_magnitude(values: list[tuple[float, float]], limit: float) -> None:
    left, right = tensors(values)
    found = difference(left, right, relative_limit=limit)
    scale = max(max(abs(a), abs(b)) for a, b in values)
    gaps = [abs(a - b) for a, b in values]
    beyond = sum(gap > limit * scale for gap in gaps)
    assert (0 if found is None else found.mismatched) == beyond
    if found is not None:
        assert (found.max_abs, found.scale, found.limit) == (max(gaps), scale, limit * scale)
        assert gaps[found.index[0]] == max(gaps)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("limit", [0.0, 0.5, 1e300])
def test_no_limit_forgives_a_value_that_is_finite_on_one_side_only(odd: float, limit: float) -> None:
    for left, right in (([1.0, odd], [1.0, 2.0]), ([1.0, 2.0], [1.0, odd])):
        found = difference(torch.tensor(left), torch.tensor(right), relative_limit=limit)
        assert found is not None
        assert (found.max_abs, found.mismatched, found.index) == (math.inf, 1, (1,))


def test_infinities_of_opposite_sign_and_nan_against_infinity_differ() -> None:
    assert difference(torch.tensor([math.inf]), torch.tensor([-math.inf]), relative_limit=9.0) is not None
    assert difference(torch.tensor([math.nan]), torch.tensor([math.inf]), relative_limit=9.0) is not None


def test_the_scale_leaves_infinities_out() -> None:
    left, right = torch.tensor([math.inf, 4.0]), torch.tensor([math.inf, 4.1])
    assert difference(left, right, relative_limit=0.1) is None
    found = difference(left, right, relative_limit=0.01)
    assert found is not None
    assert found.scale == pytest.approx(4.1)


@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=6))
def test_integers_must_be_equal_whatever_the_limit(values: list[tuple[int, int]]) -> None:
    left, right = (torch.tensor([pair[i] for pair in values], dtype=torch.int64) for i in (0, 1))
    found = difference(left, right, relative_limit=10.0)
    wrong = sum(a != b for a, b in values)
    assert (0 if found is None else found.mismatched) == wrong


def test_neighbouring_integers_too_large_for_a_float_differ() -> None:
    assert difference(torch.tensor([2**53]), torch.tensor([2**53 + 1])) is not None


def test_booleans_are_compared() -> None:
    found = difference(torch.tensor([[True, False]]), torch.tensor([[True, True]]))
    assert found is not None
    assert (found.mismatched, found.index) == (1, (0, 1))


def test_complex_numbers_are_apart_by_the_modulus_of_their_difference() -> None:
    found = difference(torch.tensor([1 + 1j, 0j]), torch.tensor([1 + 1j, 3 + 4j]))
    assert found is not None
    assert (found.max_abs, found.scale, found.mismatched, found.index) == (5.0, 5.0, 1, (1,))
    assert difference(torch.tensor([3 + 4j]), torch.tensor([3 + 4.001j]), relative_limit=1e-2) is None


def test_empty_tensors_agree_and_shapes_must() -> None:
    assert difference(torch.empty(0, 3), torch.empty(0, 3)) is None
    for left, right in (((2, 3), (3, 2)), ((1,), ()), ((0, 3), (3, 0))):
        assert difference(torch.zeros(left), torch.zeros(right), relative_limit=9.0) is not None


def test_the_index_is_that_of_the_largest_gap_in_every_dimension() -> None:
    right = torch.zeros(2, 3, 4)
    right[1, 0, 2], right[1, 2, 3] = 1.0, -7.0
    found = difference(torch.zeros(2, 3, 4), right)
    assert found is not None
    assert (found.index, found.max_abs, found.mismatched, found.total) == ((1, 2, 3), 7.0, 2, 24)


def test_dtypes_are_compared_in_float64() -> None:
    assert difference(torch.tensor([0.5], dtype=torch.bfloat16), torch.tensor([0.5], dtype=torch.float64)) is None
    found = difference(torch.tensor([0.1], dtype=torch.float32), torch.tensor([0.1], dtype=torch.float64))
    assert found is not None
    assert found.max_abs == pytest.approx(1.4901161193847656e-09)  # 13421773 / 2**27 - 0.1


def test_tensors_with_gradients_can_be_compared() -> None:
    assert difference(torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)) is not None


def test_the_limit_follows_the_least_precise_dtype_down_to_float32() -> None:
    assert roundings_limit({"float64"}) == ROUNDINGS * 2.0**-52
    for dtypes in ({"float32"}, {"float64", "float32"}, {"float64", "bfloat16"}, {"float16"}):
        assert roundings_limit(dtypes) == FLOAT32_ROUNDINGS * 2.0**-23
