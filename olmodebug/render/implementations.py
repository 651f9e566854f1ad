"""The section on two implementations in the terminal: what was compared, how far apart it is, and how the weights were mapped."""

import re
from collections.abc import Iterator, Mapping
from math import log10
from typing import Any

from rich.console import Group

from .layout import LABEL, Line, line, row

BARS = 24
FLOOR = 1e-16  # a bar starts here: a rounding of float64


def implementations_view(section: Mapping[str, Any]) -> Group:
    """The section `implementations` of a report: verdict, drift by weight where the two differ, and the mapping, one line for all layers."""
    return Group(*_lines(section))


def _lines(section: Mapping[str, Any]) -> Iterator[Line]:
    yield row("reference", f"{section['reference']}, on {section['case']} and the same drawn weights, in float64")
    logits, gradients, tensors = section["logits"], section["gradients"], section["tensors"]
    verdict = "agree" if logits["agree"] else "differ"
    share = _share(logits["largest_difference"], logits["largest_magnitude"])
    yield row("logits", f"{verdict}: {share} of the largest, where rounding may make {section['limit']:.1e}")
    if gradients is not None:
        words = "all agree" if not gradients["differing"] else f"{gradients['differing']} differ"
        yield row(
            "gradients", f"{words} of {gradients['compared']}; loss {gradients['loss']:.6g}, reference {gradients['reference_loss']:.6g}"
        )
    found = f"{tensors['subject_found']} of {tensors['subject']} found in the reference by value"
    yield row("tensors", f"{found}, {tensors['reference_found']} of {tensors['reference']} of its own found here")
    for text in section["settled_by_value"]:
        yield row("by value", text)
    if not logits["agree"]:
        for layer in section["layers"]:
            yield line(f"{_bar(layer['difference'])} {_number(layer['difference'])}  {layer['module']}", indent=LABEL)
    for i, (subject, reference) in enumerate(_once_for_all_layers(section["mapping"])):
        text = f"{subject}  =  {reference}" if subject != reference else f"{subject}  =  the same name"
        yield row("mapping", text) if i == 0 else line(text, indent=LABEL)


def _once_for_all_layers(mapping: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Pairs of names, those of a layer once, with its number as i."""
    pairs = [(_folded(pair["subject"]), _folded(pair["reference"])) for pair in mapping]
    return list(dict.fromkeys(pairs))


def _folded(name: str) -> str:
    """A parameter's name without its layer and expert."""
    return re.sub(r"\[\d+\]", "[i]", re.sub(r"\.\d+(?=\.)", ".i", name))


def _bar(value: float | str) -> str:
    """A bar whose length is the logarithm of a relative difference: empty at a rounding, full at 1."""
    number = 1.0 if isinstance(value, str) else value
    filled = 0 if number <= FLOOR else min(BARS, round(BARS * (1 - log10(max(number, FLOOR)) / log10(FLOOR))))
    return "#" * filled + "." * (BARS - filled)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:8.1e}"


def _share(part: float | str, whole: float | str) -> str:
    if isinstance(part, str) or isinstance(whole, str) or not whole:
        return str(part)
    return f"{part / whole:.1e}"
