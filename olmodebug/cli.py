"""The command line: it reads the arguments, runs one command, prints, and sets the exit code.

0 no error finding, 1 at least one, 2 could not run, 3 a fault of olmodebug's own, 5 nothing was checked.
Results go to standard output, progress and notices to standard error. Nothing heavy is imported before it is needed.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import EXIT_COULD_NOT_RUN, EXIT_FINDINGS, EXIT_INTERNAL, EXIT_NOTHING_CHECKED, OlmodebugError, UsageError

if TYPE_CHECKING:
    from .report import Report
    from .supervise import Order

DEFAULT_SUBJECT = "olmo1-4M"
SUBJECT_HELP = (
    "what to check: a preset (olmo1-4M, the default), file.py:attribute, package.module:attribute, a local Hugging Face "
    "checkpoint folder, transformers:ClassName, or hf:org/name"
)
SHOW_PROGRESS_AFTER_SECONDS = 2.0


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
        _say(f"olmodebug: {error}")
        return EXIT_COULD_NOT_RUN
    except KeyboardInterrupt:
        _say("olmodebug: interrupted")
        return 130
    except (BrokenPipeError, SystemExit):  # `olmodebug ... | head`: the reader has seen enough, and rich turns that into an exit
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:
        import traceback

        traceback.print_exc()
        _say("olmodebug: this is a fault of olmodebug itself; please report it with the lines above")
        return EXIT_INTERNAL


def check(arguments: argparse.Namespace) -> int:
    """Check a model: is this implementation right, and where not, which line, why, and how to mend it."""
    import shlex

    from .spec_text import parse_config
    from .supervise import Order

    _known_selection(arguments.select, arguments.probes)
    job = {
        "spec": arguments.subject,
        "config": parse_config(arguments.config),
        "seed": arguments.seed,
        "tokenizer": arguments.tokenizer,
        "adapter": arguments.adapter,
        "vocab_size": arguments.vocab_size,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "download": arguments.download,
    }
    order = Order(
        job=job,
        select=arguments.select,
        own_probes=tuple(arguments.probes),
        quick=arguments.quick,
        expected=_expected(arguments.expect_failure),
        timeout_seconds=arguments.timeout,
        command=shlex.join(["olmodebug", *arguments.argv]),
    )
    for path in (arguments.json,):
        _must_be_writable(path)
    report = _checked(order)
    if arguments.json:
        report.write(Path(arguments.json))
    _show(report, verbose=arguments.verbose)
    return report.exit_code


def probes(arguments: argparse.Namespace) -> int:
    """List every probe with what must hold; with a name or --verbose, why it matters and what it catches."""
    from .probe import declared_probes, select
    from .render.terminal import console, probes_view

    found = select(declared_probes(), arguments.name)
    if not found:
        raise UsageError(_no_such_probe(arguments.name, [item.name for item in declared_probes()]))
    console(sys.stdout).print(probes_view([(item.name, item.title, item.doc) for item in found], full=arguments.verbose))
    return 0


def shapes(arguments: argparse.Namespace) -> int:
    """Print the tree of a model with named dimensions, parameters and bytes; a model of any size, without its memory."""
    from .render.shapes import shapes_view
    from .render.terminal import console
    from .spec_text import parse_config

    _say("loading torch ...")
    from .explain import explain
    from .load import SubjectCodeError
    from .shape_tree import shape_tree
    from .spec import Job, resolve

    config = parse_config(arguments.config)
    sys.path.insert(0, str(Path.cwd()))
    tree = None
    for meta in (True, False):
        try:
            tree = shape_tree(resolve(Job(spec=arguments.subject, config=config, meta=meta)))
            break
        except SubjectCodeError as error:
            if not meta:
                from .render.terminal import finding_view

                console(sys.stdout).print(finding_view(explain(error).finding()))
                return EXIT_FINDINGS
    assert tree is not None
    console(sys.stdout).print(shapes_view(tree))
    return 0


def env(arguments: argparse.Namespace) -> int:
    """Tell the machine: versions, CPU, memory, GPU and driver, and the settings of torch that change results."""
    from .environment import environment, machine
    from .render.terminal import console, environment_view

    console(sys.stdout).print(environment_view(environment(seed=0, command="olmodebug env"), machine()))
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Draw a stored report again: a file, or a recorded run by its id; the newest without one."""
    from .store import load_report

    _show(load_report(Path.cwd(), arguments.run_or_file), verbose=arguments.verbose)
    return 0


def replay(arguments: argparse.Namespace) -> int:
    """Run the failed probes of a recorded run again: `fixed`, `still fails` or `error` for each."""
    import json
    from dataclasses import replace

    from .report import read
    from .store import find_run
    from .supervise import order_from

    folder = find_run(Path.cwd(), arguments.id)
    old = read(folder / "report.json")
    failed = [outcome.probe for outcome in old.outcomes if outcome.status == "failed"]
    if not failed:
        print(f"{folder.name}: no probe failed in this run, so there is nothing to replay")
        return EXIT_NOTHING_CHECKED
    order = order_from(json.loads((folder / "job.json").read_text(encoding="utf-8")))
    names = [name for name in failed if not name.startswith("build.")]
    again = _checked(replace(order, select=" or ".join(names) or "build"))
    status = {outcome.probe: outcome.status for outcome in again.outcomes}
    words = {"passed": "fixed", "failed": "still fails", "skipped": "not reached", "not-applicable": "does not apply any more"}
    for name in failed:
        print(f"{words.get(status.get(name, 'error'), 'error'):12s} {name}")
    return 0 if all(status.get(name) in ("passed", "not-applicable") for name in failed) else again.exit_code or 1


def _checked(order: "Order") -> "Report":
    from .store import new_run
    from .supervise import InternalFault, check, order_record

    run = new_run(Path.cwd())
    if run.problem:
        _say(f"olmodebug: {run.problem}")
    progress = _Progress()
    try:
        report = check(order, run, progress)
    except InternalFault as fault:
        progress.clear()
        raise RuntimeError(f"the checking process failed:\n{fault}") from None
    progress.clear()
    with contextlib.suppress(OSError):
        run.save(report, order_record(order))
    return report


def _show(report: "Report", *, verbose: bool) -> None:
    from .render.terminal import console, report_view

    console(sys.stdout).print(report_view(report, verbose=verbose))


class _Progress:
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


def _known_selection(expression: str | None, own: Sequence[str]) -> None:
    """A UsageError when a -k expression can be seen to select nothing, with near names."""
    if not expression:
        return
    from .probe import declared_in, declared_probes, select

    names = declared_probes()
    for path in own:
        if not Path(path).is_file():
            raise UsageError(f"--probes {path}: no such file")
        names += declared_in(Path(path))
    if not select(names, expression) and expression != "build":
        _say(f"olmodebug: {_no_such_probe(expression, [item.name for item in names])}")


def _no_such_probe(expression: str, names: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(expression, names, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; olmodebug probes lists them"
    return f"no probe matches {expression!r}{hint}"


def _expected(pairs: Sequence[str]) -> dict[str, str]:
    from .probe import declared_probes

    expected = {}
    names = [item.name for item in declared_probes()]
    for pair in pairs:
        name, equals, reason = pair.partition("=")
        if not equals or not reason.strip():
            raise UsageError(f"--expect-failure {pair}: give a reason, as in --expect-failure {name}='no KV cache yet'")
        if name not in names:
            raise UsageError(f"--expect-failure: {_no_such_probe(name, names)}")
        expected[name] = reason.strip()
    return expected


def _must_be_writable(path: str | None) -> None:
    """Find out before the work, not after it."""
    if path is None:
        return
    target = Path(path)
    folder = target.parent
    if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"--json {path}: cannot write there")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="olmodebug",
        description="The doctor for language-model code: is this implementation right, and where it is not, which line, why, and how to mend it.",
        epilog="exit codes: 0 no error finding, 1 at least one, 2 could not run, 3 a fault of olmodebug's own, 5 nothing was checked",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        text = (run.__doc__ or "").strip()
        made = commands.add_parser(run.__name__, help=text.rstrip(".").replace("%", "%%"), description=text)
        made.set_defaults(run=run)
        return made

    one = command(check)
    one.add_argument("subject", nargs="?", default=DEFAULT_SUBJECT, metavar="SUBJECT", help=SUBJECT_HELP)
    one.add_argument("-k", dest="select", metavar="EXPR", help="only probes whose name fits, as in pytest: -k 'rope or mask'")
    one.add_argument("--config", action="append", default=[], metavar="KEY=VALUE|FILE", help="what a class that needs a config gets")
    one.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, or a folder with one, that must fit the vocabulary")
    one.add_argument(
        "--adapter", metavar="FILE.py:NAME", help="a function (model, input_ids, ...) -> logits, where the call cannot be guessed"
    )
    one.add_argument("--vocab-size", type=int, metavar="N", help="the number of token ids, where it cannot be found")
    one.add_argument("--seed", type=int, default=0, help="seed of the weights and of every case (default 0)")
    one.add_argument("--device", default="cpu", help="where the model runs (default cpu)")
    one.add_argument("--dtype", help="cast the model first: float32, bfloat16, float16")
    one.add_argument("--quick", action="store_true", help="leave out the slow probes")
    one.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="the longest any one step may take (default 300)")
    one.add_argument("--probes", action="append", default=[], metavar="FILE.py", help="probes of your own, beside the shipped ones")
    one.add_argument("--expect-failure", action="append", default=[], metavar="PROBE=REASON", help="a failure that is known; strict")
    one.add_argument("--json", metavar="FILE", help="also write the report as JSON (schema olmodebug/report@1)")
    one.add_argument("--download", action="store_true", help="let hf:org/name use the network")
    one.add_argument("-v", "--verbose", action="store_true", help="every probe's outcome, notes in full, versions")

    listing = command(probes)
    listing.add_argument("name", nargs="?", metavar="EXPR", help="only probes whose name fits")
    listing.add_argument("-v", "--verbose", action="store_true", help="the whole description of each")

    tree = command(shapes)
    tree.add_argument("subject", nargs="?", default=DEFAULT_SUBJECT, metavar="SUBJECT", help=SUBJECT_HELP)
    tree.add_argument("--config", action="append", default=[], metavar="KEY=VALUE|FILE", help="what a class that needs a config gets")

    command(env)

    drawing = command(report)
    drawing.add_argument("run_or_file", nargs="?", metavar="FILE|ID", help="a report's JSON file, or a recorded run")
    drawing.add_argument("-v", "--verbose", action="store_true", help="every probe's outcome, notes in full, versions")

    again = command(replay)
    again.add_argument("id", nargs="?", metavar="ID", help="a recorded run (default: the newest)")
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from .environment import olmodebug_version

        print(f"olmodebug {olmodebug_version()}")
        parser.exit()
