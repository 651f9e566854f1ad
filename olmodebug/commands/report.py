"""`olmodebug report`: a stored report, drawn again without torch."""

import argparse
from pathlib import Path

from .shared import Commands, add_command, show


def declare(commands: Commands) -> None:
    """The arguments of `report`."""
    drawing = add_command(commands, report)
    drawing.add_argument("run_or_file", nargs="?", metavar="FILE|ID", help="a report's JSON file, or a recorded run")
    drawing.add_argument("-v", "--verbose", action="store_true", help="every probe's outcome, notes in full, versions")


def report(arguments: argparse.Namespace) -> int:
    """Draw a stored report again: a file, or a recorded run by its id; the newest without one."""
    from ..store import load_report

    show(load_report(Path.cwd(), arguments.run_or_file), verbose=arguments.verbose)
    return 0
