"""What several commands say and ask: arguments that mean the same everywhere, progress, and the last look before the work."""

import argparse
import contextlib
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
# Named here and not taken from render.formats, which loads rich; a test holds the two together.
FORMATS = ("full", "concise", "json", "jsonl", "junit", "github", "sarif", "md")
FILES = {"json": "JSON (schema olmodebug/report@1)", "html": "one HTML page that needs no network", "md": "Markdown"}
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


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, observed {text}")


def seconds(text: str) -> float:
    """A time above zero, for argparse."""
    with contextlib.suppress(ValueError):
        if (number := float(text)) > 0:
            return number
    raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, observed {text}")


def say(text: str) -> None:
    """A notice on standard error."""
    sys.stderr.write(text + "\n")


def add_output(parser: argparse.ArgumentParser) -> None:
    """How a report leaves a command: --json, --html and --md write files, --format chooses what goes to standard output."""
    parser.add_argument("--format", choices=FORMATS, default="full", help="what standard output gets (default full, for people)")
    for name, what in FILES.items():
        parser.add_argument(f"--{name}", metavar="FILE", help=f"also write the report as {what}")
    parser.add_argument("-v", "--verbose", action="store_true", help="every probe's outcome, notes in full, versions")


def check_output(arguments: argparse.Namespace) -> None:
    """Find out before the work, not after it, that a file of `add_output` cannot be written."""
    for name in FILES:
        must_be_writable(getattr(arguments, name), option=f"--{name}")


def must_be_writable(path: str | None, *, option: str = "--json") -> None:
    """UsageError when a file cannot be written there."""
    if path is None:
        return
    target = Path(path)
    writable = os.access(target, os.W_OK) if target.exists() else target.parent.is_dir() and os.access(target.parent, os.W_OK)
    if target.is_dir() or not writable:
        raise UsageError(f"{option} {path}: cannot write there")


def deliver(arguments: argparse.Namespace, report: "Report") -> int:
    """Write the files that were asked for, show the report on standard output, and give back its exit code.

    A file that cannot be written is an error, and the work is shown all the same.
    """
    try:
        write_files(arguments, report)
    finally:
        if arguments.format == "full":
            show(report, verbose=arguments.verbose)
        else:
            _show_as(arguments.format, report)
    return report.exit_code


def write_files(arguments: argparse.Namespace, report: "Report") -> None:
    """Write the files that were asked for, those of `add_output` and a timeline; UsageError where one cannot be written."""
    from ..files import write_whole

    for option in (*FILES, "chrome-trace"):
        path = getattr(arguments, option.replace("-", "_"), None)
        if path is None:
            continue
        try:
            write_whole(Path(path), _file_text(option, report))
        except OSError as error:
            raise UsageError(f"--{option} {path}: cannot be written ({error.strerror})") from None


def show(report: "Report", *, verbose: bool) -> None:
    """Draw a report on standard output."""
    from ..render.terminal import console, report_view

    console(sys.stdout).print(report_view(report, verbose=verbose))


def _show_as(name: str, report: "Report") -> None:
    from ..render.formats import FORMATS as RENDERERS
    from ..render.layout import printable

    sys.stdout.write(printable(RENDERERS[name](report), sys.stdout.encoding or "utf-8"))
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if name == "github" and summary:  # where GitHub takes the page of a workflow step from
        with contextlib.suppress(OSError), Path(summary).open("a", encoding="utf-8") as page:
            page.write(RENDERERS["md"](report))


def _file_text(name: str, report: "Report") -> str:
    if name == "json":
        return report.to_json()
    if name == "html":
        from ..render.html import html

        return html(report)
    if name == "chrome-trace":
        from ..footprint.chrome_trace import chrome_trace

        return chrome_trace(report.sections["memory"])
    from ..render.markdown import markdown

    return markdown(report)


class Progress:
    """A line on standard error that says what runs, once that takes longer than two seconds."""

    def __init__(self, *, noun: str = "probes") -> None:
        self.noun = noun
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
            f"{done} of {total} {self.noun} done, {seconds:.0f} s; now {step}"
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
