"""The command line: it reads the arguments, runs one command, prints, and sets the exit code.

0 no error finding, 1 at least one, 2 could not run, 3 a fault of olmodebug's own, 5 nothing was checked.
Results go to standard output, progress and notices to standard error. Nothing heavy is imported before it is needed.
"""

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Sequence

from .commands import ALL
from .commands.shared import say
from .errors import EXIT_COULD_NOT_RUN, EXIT_INTERNAL, OlmodebugError, UsageError

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return EXIT_COULD_NOT_RUN
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()  # a closed pipe is met here, not when the interpreter leaves
        return code
    except OlmodebugError as error:
        say(f"olmodebug: {error}")
        return EXIT_COULD_NOT_RUN
    except KeyboardInterrupt:
        say("olmodebug: interrupted")
        return 130
    except (BrokenPipeError, SystemExit):  # `olmodebug ... | head`: the reader has seen enough, and rich turns that into an exit
        _discard_output()
        return 141
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            return _fault()
        _discard_output()  # what is still in the buffer cannot be written either
        say(f"olmodebug: cannot write the output: {error.strerror}")
        return EXIT_COULD_NOT_RUN
    except Exception:
        return _fault()


def _fault() -> int:
    """Show the traceback of what nobody foresaw."""
    import traceback

    traceback.print_exc()
    say("olmodebug: this is a fault of olmodebug itself; please report it with the lines above")
    return EXIT_INTERNAL


def _discard_output() -> None:
    """Send standard output to nowhere, so that the interpreter does not stumble over the rest when it leaves."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line that Python wrote; UsageError where it cannot be meant."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit:  # argparse has told why on standard error
        raise UsageError(f"olmodebug {' '.join(argv)} cannot be meant") from None
    arguments.argv = list(argv)
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="olmodebug",
        description="The doctor for language-model code: is this implementation right, and where it is not, which line, why, and how to mend it.",
        epilog="exit codes: 0 no error finding, 1 at least one, 2 could not run, 3 a fault of olmodebug's own, 5 nothing was checked",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in ALL:
        command.declare(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from .environment import olmodebug_version

        print(f"olmodebug {olmodebug_version()}")
        parser.exit()
