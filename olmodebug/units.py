"""Numbers as text: the only place where bytes, counts, seconds and dtypes become words."""

import math
from collections.abc import Iterable, Mapping

DTYPE_NAMES = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "f8e4m3",
    "float8_e5m2": "f8e5m2",
    "complex64": "c64",
    "complex128": "c128",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "bool": "bool",
}


def bytes_text(count: int) -> str:
    """`1610612736` as `1.50 GiB`; powers of 1024, three digits (four from 1000 to 1023)."""
    if abs(count) < 1024:
        return f"{count} B"
    size = count / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if abs(size) < 1023.5:
            return f"{_three_digits(size)} {unit}"
        size /= 1024
    return f"{_three_digits(size)} TiB"


def fit_text(expected_bytes: int, safe_bytes: int, budget_bytes: int) -> str:
    """Whether a predicted need stays within a budget: `fits` where its safe figure does, `may not fit` where only the expected one does."""
    if safe_bytes <= budget_bytes:
        return "fits"
    return "may not fit" if expected_bytes <= budget_bytes else "does not fit"


def count_text(count: int) -> str:
    """`3742016` as `3.74M`; powers of 1000, three digits."""
    if abs(count) < 1000:
        return str(count)
    size = count / 1000
    for unit in ("K", "M", "B"):
        if abs(size) < 999.5:
            return f"{_three_digits(size)}{unit}"
        size /= 1000
    return f"{_three_digits(size)}T"


def seconds_text(seconds: float) -> str:
    """`0.0123` as `12 ms`, `75.2` as `1 min 15 s`; `nan` and `inf` stay themselves."""
    if not math.isfinite(seconds):
        return f"{seconds} s"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def number_text(number: float) -> str:
    """A measured number with three digits: `0.0312`, `1.2e-09`, `431`."""
    return str(number) if isinstance(number, int) else f"{number:.3g}"


def dtype_text(dtype: str) -> str:
    """`torch.bfloat16` or `bfloat16` as `bf16`."""
    name = dtype.removeprefix("torch.")
    return DTYPE_NAMES.get(name, name)


def value_text(name: str, value: str | int | float | bool | None) -> str:
    """A measured value as words; a name that ends in `_bytes` or `_seconds` says the unit."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if name.endswith("_bytes") and isinstance(value, int):
        return bytes_text(value)
    return seconds_text(value) if name.endswith("_seconds") else number_text(value)


def facts_text(facts: Mapping[str, str | int | float | bool | None]) -> str:
    """`max_abs = 0.431, peak_bytes = 1.50 GiB`."""
    return ", ".join(f"{name} = {value_text(name, value)}" for name, value in facts.items())


def plural(count: int, noun: str) -> str:
    """`1 probe`, `2 probes`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(items: Iterable[object], most: int) -> str:
    """`a, b and 3 more`: the first of many."""
    names = list(map(str, items))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _three_digits(size: float) -> str:
    decimals = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{decimals}f}"
