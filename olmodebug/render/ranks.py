"""What a step on several ranks showed beside its findings: how much was compared, and the collectives of each rank."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group

from ..units import plural
from .layout import row

START = "the data and the weights before the step"  # where a step in 16 bits lets nothing else be judged


def ranks_view(section: Mapping[str, Any]) -> Group:
    """The section `ranks` of a report."""
    compared = section["compared"] or {}
    counts = [
        plural(compared[name], noun)
        for name, noun in (("forward", "module output"), ("gradient", "gradient"), ("step", "weight"), ("state", "optimizer tensor"))
        if compared.get(name)
    ]
    calls = section["collectives"]
    alike = (
        f"{plural(calls[0], 'collective')} on every rank"
        if calls and len(set(calls)) == 1
        else f"{', '.join(map(str, calls)) or 'no'} collectives, by rank"
    )
    beside = section.get("beside")
    other = f"{plural(beside['world'], 'rank')} ({beside['strategy']})" if beside else "one process with the same weights and batch"
    return Group(
        row("ranks", f"{section['world']} ({section['strategy']}), beside {other}"),
        row(
            "compared",
            ", ".join(counts) or ("nothing: the steps cannot be held against each other" if section["compared"] is None else START),
        ),
        row("called", alike),
    )
