"""`olmodebug parity --ranks N`: one training step on several processes beside the same step in one."""

import argparse
import shlex
from pathlib import Path

from ..errors import UsageError
from .shared import Progress, deliver, say, seconds

STRATEGIES = ("ddp", "fsdp", "tp", "pp")  # named here and not taken from parallel, which loads torch; a test holds the two together


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """The options of a comparison across processes."""
    group = parser.add_argument_group("one process against several")
    group.add_argument("--ranks", type=int, metavar="N", help="take one training step on N processes and in one, and compare")
    group.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="how the model is spread over them (default ddp)")
    group.add_argument("--launch", metavar="FILE.py:NAME", help="your own wrap(model, mesh): the parallel model, or (model, train_step)")
    group.add_argument("--mesh", metavar="DPxTP", help="two mesh dimensions, dp and tp: with --strategy fsdp both at once, as in 2x2")
    group.add_argument("--patience", type=seconds, default=60.0, metavar="SECONDS", help="how long a collective may wait (default 60)")


def compare_ranks(arguments: argparse.Namespace) -> int:
    """Run the comparison that `--ranks` asks for."""
    from ..ranks.run import RankOrder, compare_step, order_record
    from ..spec_text import parse_config
    from ..store import new_run

    if len(arguments.subject) != 1:
        raise UsageError("--ranks takes one subject")
    job = {"spec": arguments.subject[0], "config": parse_config(arguments.config), "seed": arguments.seed}
    order = RankOrder(
        job=job,
        ranks=arguments.ranks,
        strategy=arguments.strategy,
        launch=arguments.launch,
        mesh=_sizes(arguments.mesh),
        timeout_seconds=arguments.timeout,
        patience_seconds=arguments.patience,
        command=shlex.join(["olmodebug", *arguments.argv]),
    )
    run = new_run(Path.cwd())
    if run.problem:
        say(f"olmodebug: {run.problem}")
    progress = Progress(noun="ranks")
    try:
        report = compare_step(order, run, lambda step, seconds: progress(0, order.ranks, step, seconds))
    finally:
        progress.clear()
    report = run.save(report, order_record(order))
    return deliver(arguments, report)


def _sizes(text: str | None) -> tuple[int, ...]:
    """`2x2` as sizes; none without a text."""
    if text is None:
        return ()
    words = text.split("x")
    if len(words) != 2 or not all(word.isdigit() and int(word) for word in words):
        raise UsageError(f"--mesh {text}: expected two sizes, data parallel times tensor parallel, as in 2x2")
    return tuple(map(int, words))
