"""`olmodebug check`: run the probes on a subject in a child process, and draw what they found."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .shared import Commands, Progress, add_command, add_output, add_subject, check_output, deliver, positive, say, seconds

if TYPE_CHECKING:
    from ..report import Report
    from ..supervise import Order


def declare(commands: Commands) -> None:
    """The arguments of `check`."""
    one = add_command(commands, check)
    add_subject(one)
    one.add_argument("-k", dest="select", metavar="EXPR", help="only probes whose name fits, as in pytest: -k 'rope or mask'")
    one.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, or a folder with one, that must fit the vocabulary")
    one.add_argument(
        "--adapter", metavar="FILE.py:NAME", help="a function (model, input_ids, ...) -> logits, where the call cannot be guessed"
    )
    one.add_argument("--vocab-size", type=positive, metavar="N", help="the number of token ids, where it cannot be found")
    one.add_argument("--seed", type=int, default=0, help="seed of the weights and of every case (default 0)")
    one.add_argument("--device", default="cpu", help="where the model runs (default cpu)")
    one.add_argument("--dtype", help="cast the model first: float32, bfloat16, float16")
    one.add_argument("--quick", action="store_true", help="leave out the slow probes")
    one.add_argument("--timeout", type=seconds, default=300.0, metavar="SECONDS", help="the longest any one step may take (default 300)")
    one.add_argument("--probes", action="append", default=[], metavar="FILE.py", help="probes of your own, beside the shipped ones")
    one.add_argument("--expect-failure", action="append", default=[], metavar="PROBE=REASON", help="a failure that is known; strict")
    one.add_argument("--download", action="store_true", help="let hf:org/name use the network")
    add_output(one)


def check(arguments: argparse.Namespace) -> int:
    """Check a model: is this implementation right, and where not, which line, why, and how to mend it."""
    import shlex

    from ..spec_text import parse_config
    from ..supervise import Order

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
    check_output(arguments)
    return deliver(arguments, run_check(order))


def run_check(order: "Order", *, module: str = "olmodebug.child") -> "Report":
    """The report on an order, recorded in `.olmodebug/`, with progress on standard error; `module` is the child that works."""
    from ..store import new_run
    from ..supervise import InternalFault, check, order_record

    run = new_run(Path.cwd())
    if run.problem:
        say(f"olmodebug: {run.problem}")
    progress = Progress()
    try:
        report = check(order, run, progress, module=module)
    except InternalFault as fault:
        progress.clear()
        raise RuntimeError(f"the checking process failed:\n{fault}") from None
    progress.clear()
    return run.save(report, order_record(order))


def _known_selection(expression: str | None, own: Sequence[str]) -> None:
    """A UsageError when a -k expression can be seen to select nothing, with near names."""
    if not expression:
        return
    from ..probe import declared_in, declared_probes, no_such_probe, select

    names = declared_probes()
    for path in own:
        if not Path(path).is_file():
            raise UsageError(f"--probes {path}: no such file")
        names += declared_in(Path(path))
    if not select(names, expression) and expression != "build":
        say(f"olmodebug: {no_such_probe(expression, [item.name for item in names])}")


def _expected(pairs: Sequence[str]) -> dict[str, str]:
    from ..probe import declared_probes, no_such_probe

    expected = {}
    names = [item.name for item in declared_probes()]
    for pair in pairs:
        name, equals, reason = pair.partition("=")
        if not equals or not reason.strip():
            raise UsageError(f"--expect-failure {pair}: give a reason, as in --expect-failure {name}='no KV cache yet'")
        if name not in names:
            raise UsageError(f"--expect-failure: {no_such_probe(name, names)}")
        expected[name] = reason.strip()
    return expected
