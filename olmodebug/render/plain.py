"""What the terminal shows, as text without colour at a fixed width: for formats that carry a text inside."""

import io

from rich.console import Console, RenderableType

from ..report import Finding
from .finding import finding_view

WIDTH = 100  # columns: what a log, an annotation or a test report shows without a scroll bar


def plain_text(view: RenderableType, *, width: int = WIDTH) -> str:
    """A view as plain text, no colour whatever the environment says."""
    stream = io.StringIO()
    Console(file=stream, width=width, markup=False, highlight=False, emoji=False, color_system=None, force_terminal=False).print(view)
    return stream.getvalue()


def finding_text(finding: Finding, *, width: int = WIDTH) -> str:
    """One finding as the terminal shows it."""
    return plain_text(finding_view(finding), width=width)
