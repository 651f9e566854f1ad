"""`olmodebug shapes`: the tree of a model with named dimensions."""

import argparse

from .shared import Commands, add_command, add_output, add_subject, check_output, deliver, say, seconds


def declare(commands: Commands) -> None:
    """The arguments of `shapes`."""
    one = add_command(commands, shapes)
    add_subject(one)
    one.add_argument("--timeout", type=seconds, default=300.0, metavar="SECONDS", help="the longest it may take (default 300)")
    add_output(one)


def shapes(arguments: argparse.Namespace) -> int:
    """Print the tree of a model with named dimensions, parameters and bytes; a model of any size, without its memory."""
    import shlex

    from ..spec_text import parse_config
    from ..supervise import Order
    from .check import run_check

    check_output(arguments)
    say("loading torch ...")
    order = Order(
        job={"spec": arguments.subject, "config": parse_config(arguments.config)},
        select="build",
        timeout_seconds=arguments.timeout,
        command=shlex.join(["olmodebug", *arguments.argv]),
    )
    return deliver(arguments, run_check(order, module="olmodebug.tracing.shape_child"))
