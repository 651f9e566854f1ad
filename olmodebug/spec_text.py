"""`--config` pairs as values, read without torch."""

import json
from pathlib import Path
from typing import Any

from .errors import UsageError


def parse_config(pairs: list[str]) -> dict[str, Any]:
    """`["hidden_size=64", "more.json"]` as one dict; values are read as JSON where they can be, else as text."""
    merged: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if equals:
            merged[key] = _json_or_text(value)
            continue
        try:
            content = json.loads(Path(pair).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--config {pair}: expected key=value or a JSON file; {error.strerror}") from None
        except ValueError as error:
            raise UsageError(f"--config {pair}: not valid JSON ({error})") from None
        if not isinstance(content, dict):
            raise UsageError(f"--config {pair}: expected a JSON object, observed a {type(content).__name__}")
        merged |= content
    return merged


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(value, value)
