"""The command line: it reads the arguments, runs one command, prints, and sets the exit code.

0 no error finding, 1 at least one, 2 could not run, 3 a fault of olmodebug's own, 5 nothing was checked.
Results go to standard output, progress and notices to standard error. Nothing heavy is imported before it is needed.
"""

import argparse
import contextlib
import difflib
import errno
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

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
    parser = _Parser(
        prog="olmodebug",
        description="The doctor for language-model code: is this implementation right, and where it is not, which line, why, and how to mend it.",
        epilog="exit codes: 0 no error finding, 1 at least one, 2 could not run, 3 a fault of olmodebug's own, 5 nothing was checked",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in ALL:
        command.declare(commands)
    parser.commands = commands.choices
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line, with what is nearest to the word that it does not know."""

    commands: dict[str, "_Parser"] = {}

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As usual, but an option that is not known is looked for among those of the command."""
        arguments, rest = self.parse_known_args(args, namespace)
        if rest:
            of = self.commands.get(getattr(arguments, "command", None) or "", self)
            known = set(re.findall(r"--?[\w-]+", of.format_usage()))
            near = [
                close for word in rest if word.startswith("-") for close in difflib.get_close_matches(word.partition("=")[0], known, n=1)
            ]
            of.error(f"unrecognized arguments: {' '.join(rest)}{_meant(near)}")
        return arguments

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(?P<word>[^']*)' \(choose from (?P<known>[^)]*)\)", message)
        if found:
            near = difflib.get_close_matches(found["word"], re.findall(r"[\w.-]+", found["known"]), n=3)
            if near:
                message = message[: found.start()] + f"invalid choice: {found['word']!r}{_meant(near)}" + message[found.end() :]
        say(f"{self.prog}: {message}; {self.prog} --help tells what there is")
        raise SystemExit(EXIT_COULD_NOT_RUN)


def _meant(near: Sequence[str]) -> str:
    return f"; did you mean {', '.join(near)}?" if near else ""


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from .environment import olmodebug_version

        print(f"olmodebug {olmodebug_version()}")
        parser.exit()
