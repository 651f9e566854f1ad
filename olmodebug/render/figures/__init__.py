"""The pictures of the HTML page: one module a topic of `Report.sections`, each from the section's JSON alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from . import guard, leaks, memory, parity, ranks, shapes, training


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """How one topic is headed and drawn."""

    title: str
    draw: Callable[[Mapping[str, Any]], Markup]


# In the order of the page.
FIGURES: dict[str, Figure] = {
    "parity": Figure(title="Parity", draw=parity.draw),
    "implementations": Figure(title="Against a reference", draw=parity.implementations),
    "ranks": Figure(title="One step on several ranks", draw=ranks.draw),
    "leaks": Figure(title="Who sees the future", draw=leaks.draw),
    "memory": Figure(title="Memory", draw=memory.draw),
    "training": Figure(title="Training", draw=training.draw),
    "shapes": Figure(title="Shapes", draw=shapes.draw),
    "guard": Figure(title="The guarded run", draw=guard.draw),
}
