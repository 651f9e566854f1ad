"""The terminal's drawings of `Report.sections`, one a topic; a topic without one is left to the JSON and the HTML page."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import RenderableType

from .guard import guard_view
from .implementations import implementations_view
from .leaks import leaks_view
from .memory import memory_view
from .parity import parity_view
from .ranks import ranks_view
from .shapes import shapes_view
from .training import training_view

# In the order of the report.
VIEWS: dict[str, Callable[[Mapping[str, Any]], RenderableType]] = {
    "shapes": shapes_view,
    "leaks": leaks_view,
    "parity": parity_view,
    "implementations": implementations_view,
    "ranks": ranks_view,
    "memory": memory_view,
    "training": training_view,
    "guard": guard_view,
}


def section_views(sections: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What a report's sections look like."""
    for topic, view in VIEWS.items():
        if topic in sections:
            yield view(sections[topic])
