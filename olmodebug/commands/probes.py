"""`olmodebug probes`: every question that is asked."""

import argparse
import sys

from ..errors import UsageError
from .shared import Commands, add_command


def declare(commands: Commands) -> None:
    """The arguments of `probes`."""
    listing = add_command(commands, probes)
    listing.add_argument("name", nargs="?", metavar="EXPR", help="only probes whose name fits")
    listing.add_argument("-v", "--verbose", action="store_true", help="the whole description of each")


def probes(arguments: argparse.Namespace) -> int:
    """List every probe with what must hold; with a name or --verbose, why it matters and what it catches."""
    from ..probe import declared_probes, no_such_probe, select
    from ..render.terminal import console, probes_view

    found = select(declared_probes(), arguments.name)
    if not found:
        raise UsageError(no_such_probe(arguments.name, [item.name for item in declared_probes()]))
    console(sys.stdout).print(probes_view([(item.name, item.title, item.doc) for item in found], full=arguments.verbose))
    return 0
