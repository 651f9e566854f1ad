"""`olmodebug report`: a stored report, drawn again without torch."""

import argparse
from pathlib import Path

from ..errors import EXIT_PASS
from .shared import Commands, add_command, add_output, check_output, deliver


def declare(commands: Commands) -> None:
    """The arguments of `report`."""
    drawing = add_command(commands, report)
    drawing.add_argument("run_or_file", nargs="?", metavar="FILE|ID", help="a report's JSON file, or a recorded run")
    add_output(drawing)


def report(arguments: argparse.Namespace) -> int:
    """Draw a stored report again: a file, or a recorded run by its id; the newest without one."""
    from ..store import load_report

    check_output(arguments)
    deliver(arguments, load_report(Path.cwd(), arguments.run_or_file))
    return EXIT_PASS  # drawing is what was asked for, and that is done
