"""`olmodebug explain`: a pasted log decoded, or the long page of a probe."""

import argparse
import sys
from pathlib import Path

from ..errors import EXIT_NOTHING_CHECKED, EXIT_PASS, UsageError
from .shared import Commands, add_command, say


def declare(commands: Commands) -> None:
    """The arguments of `explain`."""
    one = add_command(commands, explain)
    one.add_argument("what", nargs="?", default="-", metavar="FILE|-|PROBE", help="a log file, - for standard input, or a probe's name")


def explain(arguments: argparse.Namespace) -> int:
    """Decode a pasted log or traceback, or print a probe's long page.

    Repeated assertion lines are folded, the kernel is named, the usual causes are ranked with how to tell them apart, and the
    one command that finds the fault is given.
    """
    from ..guards.decode import decode
    from ..render.decoded import decoded_view
    from ..render.terminal import console

    what = arguments.what
    if what != "-" and not Path(what).is_file():
        return _page(what)
    found = decode(_text(what))
    if not found:
        say("olmodebug: no text that is known here: no CUDA assertion, torch error or out-of-memory message")
        return EXIT_NOTHING_CHECKED
    console(sys.stdout).print(decoded_view(found))
    return EXIT_PASS


def _page(name: str) -> int:
    import difflib

    from ..guards.pages import guard_pages
    from ..probe import declared_probes
    from ..render.terminal import console, probes_view

    pages = [(item.name, item.title, item.doc) for item in declared_probes()] + guard_pages()
    chosen = [page for page in pages if page[0] == name]
    if not chosen:
        near = difflib.get_close_matches(name, [page[0] for page in pages], n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; olmodebug probes lists the probes"
        raise UsageError(f"explain {name}: neither a file nor a probe{hint}")
    console(sys.stdout).print(probes_view(chosen, full=True))
    return EXIT_PASS


def _text(what: str) -> str:
    if what == "-":
        if sys.stdin.isatty():
            say("olmodebug: paste the log, then Ctrl-D")
        return sys.stdin.buffer.read().decode("utf-8", "replace")
    try:
        return Path(what).read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise UsageError(f"explain {what}: {error.strerror}") from None
