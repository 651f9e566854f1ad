"""What several commands say and ask: arguments that mean the same everywhere, progress, and the last look before the work."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from ..report import Report

DEFAULT_SUBJECT = "olmo1-4M"
SUBJECT_HELP = (
    "what to check: a preset (olmo1-4M, the default), file.py:attribute, package.module:attribute, a local Hugging Face "
    "checkpoint folder, transformers:ClassName, or hf:org/name"
)
SHOW_PROGRESS_AFTER_SECONDS = 2.0

Commands = Any  # argparse names the type of its subparsers with an underscore


def add_command(commands: Commands, run: Callable[[argparse.Namespace], int], *, name: str | None = None) -> argparse.ArgumentParser:
    """A subparser called like the function, or `name`, that shows the function's docstring and runs it."""
    text = (run.__doc__ or "").strip()
    made: argparse.ArgumentParser = commands.add_parser(
        name or run.__name__, help=text.partition("\n")[0].rstrip(".").replace("%", "%%"), description=text.replace("%", "%%")
    )
    made.set_defaults(run=run)
    return made


def add_subject(parser: argparse.ArgumentParser) -> None:
    """SUBJECT and what its spec may need."""
    parser.add_argument("subject", nargs="?", default=DEFAULT_SUBJECT, metavar="SUBJECT", help=SUBJECT_HELP)
    parser.add_argument("--config", action="append", default=[], metavar="KEY=VALUE|FILE", help="what a class that needs a config gets")


def say(text: str) -> None:
    """A notice on standard error."""
    sys.stderr.write(text + "\n")


def must_be_writable(path: str | None) -> None:
    """Find out before the work, not after it."""
    if path is None:
        return
    target = Path(path)
    folder = target.parent
    if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"--json {path}: cannot write there")


def show(report: "Report", *, verbose: bool) -> None:
    """Draw a report on standard output."""
    from ..render.terminal import console, report_view

    console(sys.stdout).print(report_view(report, verbose=verbose))


class Progress:
    """A line on standard error that says what runs, once that takes longer than two seconds."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.last = 0.0
        self.shown = False

    def __call__(self, done: int, total: int, step: str, seconds: float) -> None:
        now = time.monotonic()
        pause = 0.2 if self.terminal else 15.0
        if seconds < SHOW_PROGRESS_AFTER_SECONDS or now - self.last < pause:
            return
        self.last = now
        text = (
            f"{done} of {total} probes done, {seconds:.0f} s; now {step}"
            if done
            else f"loading torch and building the model, {seconds:.0f} s"
        )
        if self.terminal:
            sys.stderr.write(f"\r\x1b[2K{text[: max(20, os.get_terminal_size(2).columns - 1)]}")
            self.shown = True
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def clear(self) -> None:
        if self.shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
