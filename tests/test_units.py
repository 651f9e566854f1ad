"""Numbers as text: three digits, the right unit, and no value that breaks it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmodebug.units import (
    bytes_text,
    count_text,
    dtype_text,
    facts_text,
    listed,
    number_text,
    plural,
    seconds_text,
    value_text,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 * 1024 - 1, "10.0 KiB"),
        (1024**2 - 1, "1.00 MiB"),
        (1610612736, "1.50 GiB"),
        (3 * 1024**4, "3.00 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_bytes_are_powers_of_1024(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00K"), (3742016, "3.74M"), (999_999, "1.00M"), (7_000_000_000, "7.00B")],
)
def test_counts_are_powers_of_1000(count: int, text: str) -> None:
    assert count_text(count) == text


@given(st.integers(min_value=1024, max_value=10**15))
def test_sizes_show_three_digits_or_four_before_the_next_unit(count: int) -> None:
    number = bytes_text(count).split()[0]
    assert len(number.replace(".", "")) == 3 or 1000 <= int(number) <= 1023
    assert len(count_text(count)[:-1].replace(".", "")) >= 3


@given(st.integers(min_value=1024, max_value=2**60))
def test_bytes_text_is_within_half_a_percent(count: int) -> None:
    number, unit = bytes_text(count).split()
    assert float(number) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit) == pytest.approx(count, rel=0.006)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0123, "12 ms"),
        (0.9999, "1.0 s"),
        (59.94, "59.9 s"),
        (59.99, "1 min 0 s"),
        (75.2, "1 min 15 s"),
        (119.9, "2 min 0 s"),
        (math.nan, "nan s"),
        (math.inf, "inf s"),
    ],
)
def test_seconds_choose_their_unit_after_rounding(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0.03124, "0.0312"), (1.2e-9, "1.2e-09"), (431.2, "431"), (1234567, "1234567")])
def test_numbers_keep_three_digits_and_integers_all(number: float, text: str) -> None:
    assert number_text(number) == text


@pytest.mark.parametrize(("dtype", "text"), [("torch.bfloat16", "bf16"), ("float32", "f32"), ("bool", "bool"), ("quint8", "quint8")])
def test_dtypes_are_short_and_unknown_ones_stay(dtype: str, text: str) -> None:
    assert dtype_text(dtype) == text


def test_the_name_of_a_value_says_its_unit() -> None:
    facts = {"peak_bytes": 1610612736, "wall_seconds": 75.2, "max_abs": 0.43123, "ids": 55, "same": True, "mask": None}
    expected = "peak_bytes = 1.50 GiB, wall_seconds = 1 min 15 s, max_abs = 0.431, ids = 55, same = yes, mask = none"
    assert facts_text(facts) == expected


@given(st.text(), st.none() | st.booleans() | st.integers() | st.floats() | st.text())
def test_every_value_has_a_text(name: str, value: str | int | float | bool | None) -> None:
    for ending in ("", "_bytes", "_seconds"):
        assert isinstance(value_text(name + ending, value), str)


def test_of_many_names_the_first_are_told() -> None:
    assert [listed("abcd"[:count], 2) for count in (0, 1, 2, 4)] == ["", "a", "a, b", "a, b and 2 more"]


def test_one_is_singular() -> None:
    assert [plural(count, "probe") for count in (0, 1, 2)] == ["0 probes", "1 probe", "2 probes"]
