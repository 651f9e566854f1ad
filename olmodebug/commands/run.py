"""`olmodebug run -- CMD ...`: a training script as it is, under the guards, and what really went wrong in it."""

import argparse
import os
import sys
from pathlib import Path

from ..errors import EXIT_NOTHING_CHECKED, EXIT_PASS, UsageError
from .shared import Commands, add_command, must_be_writable, say

ALL_GUARDS = "index,nan,shape,oom,loop"


def declare(commands: Commands) -> None:
    """The arguments of `run`."""
    one = add_command(commands, run)
    one.usage = "olmodebug run [--guard NAMES] [--record FOLDER] [--json FILE] [-v] -- CMD ..."
    one.add_argument("--guard", default=ALL_GUARDS, metavar="NAMES", help=f"which guards, separated by commas (default {ALL_GUARDS})")
    one.add_argument(
        "--record", metavar="FOLDER", help="note the first training step of every process there; olmodebug parity A B compares two of them"
    )
    one.add_argument("--json", metavar="FILE", help="also write the report as JSON (schema olmodebug/report@1)")
    one.add_argument("-v", "--verbose", action="store_true", help="every guard's outcome, notes in full, versions")
    one.add_argument("cmd", nargs=argparse.REMAINDER, metavar="CMD", help="the command, after --: python train.py ..., torchrun ...")


def run(arguments: argparse.Namespace) -> int:
    """Run a training script unchanged under guards, and tell what really went wrong: index, nan, shape, oom, loop.

    The script keeps the terminal, its signals and its exit status; the diagnosis follows on standard error.
    """
    import tempfile
    import time

    from ..guards.diagnosis import diagnose
    from ..guards.run import run_guarded
    from ..guards.settings import Settings, parse_guards
    from ..store import new_run

    command = arguments.cmd[1:] if arguments.cmd[:1] == ["--"] else arguments.cmd
    if not command:
        raise UsageError("run: expected a command after --, as in olmodebug run -- python train.py")
    guards = parse_guards(arguments.guard)
    must_be_writable(arguments.json)
    record = new_run(Path.cwd())
    if record.problem:
        say(f"olmodebug: {record.problem}")
    noted = _new_folder(arguments.record) if arguments.record else None
    with tempfile.TemporaryDirectory(
        prefix="olmodebug-"
    ) as spare:  # the guards write what they find, and a script may run where nobody can write
        settings = Settings(guards=guards, folder=(record.folder or Path(spare)).resolve(), record=noted)
        started = time.perf_counter()
        ended = run_guarded(command, settings, os.environ)
        report = diagnose(command, settings, ended, time.perf_counter() - started)
    report = record.save(report, {"command": report.subject.spec, "guards": list(guards)})
    _show(report, verbose=arguments.verbose)
    if arguments.json:
        report.write(Path(arguments.json))
    if noted is not None:
        say(_recorded(arguments.record))
    if ended.exit_code != EXIT_PASS:
        return ended.exit_code
    if report.exit_code == EXIT_NOTHING_CHECKED:
        say("olmodebug: nothing was checked: no Python process of the command imported torch")
    fault = next((outcome.reason for outcome in report.outcomes if outcome.status == "error"), None)
    if fault:
        say(f"{fault}\nolmodebug: this is a fault of olmodebug itself; please report it with the lines above")
    return report.exit_code


def _new_folder(name: str) -> Path:
    """The folder of a new record, made; UsageError where it cannot be written or holds a record already."""
    from ..ranks.calls import ranks_in

    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--record {name}: {error.strerror or error}") from None
    if ranks_in(folder):
        raise UsageError(f"--record {name}: the folder holds a record already; name another")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--record {name}: cannot write there")
    return folder.resolve()


def _recorded(name: str) -> str:
    from ..ranks.calls import ranks_in

    count = ranks_in(Path(name))
    if not count:
        return f"olmodebug: nothing was recorded in {name}: no process called a model with trainable weights"
    processes = "1 process" if count == 1 else f"{count} processes"
    return f"olmodebug: the first training step of {processes} is in {name}; compare it with that of another run: olmodebug parity OTHER {name}"


def _show(report: "object", *, verbose: bool) -> None:
    from ..render.guard import guarded_run_view
    from ..render.terminal import console
    from ..report import Report

    assert isinstance(report, Report)
    sys.stdout.flush()
    console(sys.stderr).print(guarded_run_view(report, verbose=verbose))
