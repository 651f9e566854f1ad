"""`olmodebug parity`: two executions of a model, or two bundles, and the first place where they part."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..ranks.calls import ranks_in
from .ranks import add_ranks, compare_ranks
from .shared import DEFAULT_SUBJECT, SUBJECT_HELP, Commands, Progress, add_command, add_output, check_output, deliver, say, seconds

if TYPE_CHECKING:
    from ..executions.check import Side
    from ..report import Report

FORMS = "device, dtype, attention, compile and flags with commas, as in cpu,bfloat16,sdpa or SUBJECT@cpu,float32,eager"


def declare(commands: Commands) -> None:
    """The arguments of `parity`."""
    one = add_command(commands, parity)
    one.add_argument(
        "subject",
        nargs="*",
        default=[DEFAULT_SUBJECT],
        metavar="SUBJECT|BUNDLE|RECORD",
        help=f"{SUBJECT_HELP}; or two bundles; or two records",
    )
    one.add_argument("--config", action="append", default=[], metavar="KEY=VALUE|FILE", help="what a class that needs a config gets")
    one.add_argument("--device", default="cpu", help="the device that is compared with float64 on the CPU (default cpu)")
    one.add_argument("--dtype", help="one dtype instead of float32, TF32 (CUDA), bfloat16 and float16 in turn")
    one.add_argument("--left", metavar="EXECUTION", help=f"what the right side is held against (default cpu,float64): {FORMS}")
    one.add_argument("--right", action="append", default=[], metavar="EXECUTION", help="the execution under test; may be given again")
    one.add_argument("--reference", metavar="OTHER", help="another implementation of the same model, or git:REV:path.py:attribute")
    one.add_argument(
        "--reference-config",
        action="append",
        default=[],
        metavar="KEY=VALUE|FILE",
        help="what the reference's config gets; a transformers class gets the subject's sizes by itself",
    )
    one.add_argument("--map", metavar="FILE", help="JSON: a parameter of the subject -> name, name[start:stop] or name.T of the reference")
    one.add_argument("--case", action="append", default=[], metavar="NAME", help="only padded, long, decode or step (default all)")
    one.add_argument("--seed", type=int, default=0, help="seed of the weights and of every case (default 0)")
    one.add_argument("--adapter", metavar="FILE.py:NAME", help="a function (model, input_ids, ...) -> logits")
    one.add_argument("--whole", action="store_true", help="a large preset at its own size, not a small copy of it")
    one.add_argument("--once", action="store_true", help="do not run a second time to find ops that give other bits")
    one.add_argument("--budget", type=float, default=256.0, metavar="MIB", help="tensors that one bundle may hold (default 256)")
    one.add_argument("--keep", action="store_true", help="leave the bundles in the run's record, to compare them again")
    one.add_argument("--timeout", type=seconds, default=300.0, metavar="SECONDS", help="the longest silence of an execution (default 300)")
    one.add_argument("--download", action="store_true", help="let hf:org/name use the network")
    add_ranks(one)
    add_output(one)


def parity(arguments: argparse.Namespace) -> int:
    """Compare two executions op by op: does the GPU, bfloat16, another kernel or implementation compute what the other does?

    Every op is replayed in float64 on its own inputs and accepted if arithmetic of its precision could have made the error.
    """
    check_output(arguments)
    if arguments.ranks is not None:
        return compare_ranks(arguments)
    return deliver(arguments, parity_report(arguments))


def parity_report(arguments: argparse.Namespace) -> "Report":
    """The report that these arguments ask for, recorded in `.olmodebug/`."""
    import shlex

    from ..store import new_run

    command = shlex.join(["olmodebug", *arguments.argv])
    bundles = [name for name in arguments.subject if name.rstrip("/").endswith(".bundle")]
    records = [name for name in arguments.subject if ranks_in(Path(name))]
    if records:
        return _recorded(records, arguments.subject, command)
    if len(arguments.subject) > 1 and len(bundles) != 2:
        raise UsageError("expected one subject, two bundles (folders that end in .bundle), or two records of olmodebug run --record")
    by_value = bool(arguments.reference) and not (arguments.left or arguments.right or arguments.dtype or arguments.device != "cpu")
    _no_vain_option(arguments, by_value and not bundles)
    run = new_run(Path.cwd())
    if run.problem:
        say(f"olmodebug: {run.problem}")
    if bundles:
        from ..executions.check import compare_bundles

        if len(bundles) != 2:
            raise UsageError("one bundle alone has nothing to be compared with; give two")
        report = compare_bundles(Path(bundles[0]), Path(bundles[1]), run, command=command)
        job: dict[str, Any] = {"bundles": bundles}
    elif by_value:
        report, job = _held_against(arguments, run, command)
    else:
        report, job = _executed(arguments, run, command)
    return run.save(report, job)


def _no_vain_option(arguments: argparse.Namespace, by_value: bool) -> None:
    """UsageError for an option that the comparison which was asked for would not look at."""
    alone = "--reference without --left, --right, --dtype and --device"
    for given, name in ((arguments.map, "--map"), (arguments.reference_config, "--reference-config")):
        if given and not by_value:
            raise UsageError(
                f"{name} belongs to {alone}: there weights are matched by name, shape and value, here both sides have the same names"
            )
    if arguments.case and by_value:
        raise UsageError(f"--case {arguments.case[0]}: {alone} has a case of its own; with --dtype float64 the cases are run in both")


def _recorded(records: list[str], given: list[str], command: str) -> "Report":
    """Two recorded training runs (`olmodebug run --record`), on any numbers of processes."""
    from ..ranks.recorded import compare_recorded
    from ..store import new_run

    if len(records) != 2 or len(given) != 2:
        raise UsageError("a recorded run is compared with another one: give two folders that olmodebug run --record wrote")
    run = new_run(Path.cwd())
    report = compare_recorded(Path(records[0]), Path(records[1]), command=command, id=run.id)
    return run.save(report, {"records": records})


def _executed(arguments: argparse.Namespace, run: Any, command: str) -> "tuple[Report, dict[str, Any]]":
    from ..executions.check import ParityOrder, Side, check_parity
    from ..executions.execution import Execution, defaults, parse
    from ..spec_text import parse_config
    from ..supervise import InternalFault

    job = {
        "spec": arguments.subject[0],
        "config": parse_config(arguments.config),
        "seed": arguments.seed,
        "adapter": arguments.adapter,
        "download": arguments.download,
        "whole": arguments.whole,
    }

    def side(text: str, default: Execution) -> Side:
        spec, at, execution = text.rpartition("@")
        return _side({**job, "spec": spec} if at else job, parse(execution, default=default), run)

    truth, rights = defaults(arguments.device, arguments.dtype)
    if arguments.reference:
        truth = Execution(dtype=arguments.dtype or "float32")
        rights = [truth]
    left = side(arguments.left, truth) if arguments.left else _side(job, truth, run)
    if arguments.reference:
        left = _side({**job, "spec": arguments.reference}, left.execution, run)
    pairs = [(left, side(text, Execution(dtype=arguments.dtype or "float32"))) for text in arguments.right]
    pairs = pairs or [(left, _side(job, execution, run)) for execution in rights]
    order = ParityOrder(
        pairs=pairs,
        only=tuple(arguments.case),
        budget_bytes=int(arguments.budget * (1 << 20)),
        timeout_seconds=arguments.timeout,
        repeat=not arguments.once,
        keep=arguments.keep,
        command=command,
    )
    progress = Progress()
    try:
        report = check_parity(order, run, progress)
    except InternalFault as fault:
        progress.clear()
        raise RuntimeError(f"an execution failed in olmodebug's own code:\n{fault}") from None
    finally:
        progress.clear()
    return report, {"pairs": [[str(one.execution) for one in pair] for pair in pairs], "spec": arguments.subject[0]}


def _held_against(arguments: argparse.Namespace, run: Any, command: str) -> "tuple[Report, dict[str, Any]]":
    """Two implementations on the same weights, whatever their weights and modules are called."""
    from ..executions.check import git_source
    from ..implementations.against import Order, against
    from ..spec_text import parse_config
    from ..supervise import InternalFault

    if arguments.map and not Path(arguments.map).is_file():
        raise UsageError(f"--map {arguments.map}: no such file")
    specs = [arguments.subject[0], arguments.reference]
    for place, spec in enumerate(specs):
        if spec.startswith("git:"):
            if run.folder is None:
                raise UsageError(f"{spec}: the run's record cannot be written, so a revision has no place to go")
            specs[place] = git_source(spec, run.folder)
    job = {
        "spec": specs[0],
        "config": parse_config(arguments.config),
        "seed": arguments.seed,
        "adapter": arguments.adapter,
        "download": arguments.download,
    }
    order = Order(
        job=job,
        reference=specs[1],
        shown=arguments.reference,
        reference_config=parse_config(arguments.reference_config),
        stated=arguments.map,
        timeout_seconds=arguments.timeout,
        command=command,
    )
    progress = Progress()
    try:
        report = against(order, run, progress)
    except InternalFault as fault:
        progress.clear()
        raise RuntimeError(f"the comparing process failed:\n{fault}") from None
    finally:
        progress.clear()
    return report, {"spec": arguments.subject[0], "reference": arguments.reference}


def _side(job: Mapping[str, Any], execution: Any, run: Any) -> "Side":
    from ..executions.check import Side, git_source

    spec = str(job["spec"])
    if spec.startswith("git:"):
        if run.folder is None:
            raise UsageError(f"{spec}: the run's record cannot be written, so a revision has no place to go")
        job = {**job, "spec": git_source(spec, run.folder)}
    return Side(job=job, execution=execution)
