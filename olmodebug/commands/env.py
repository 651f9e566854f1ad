"""`olmodebug env`: the machine that results depend on."""

import argparse
import sys

from .shared import Commands, add_command


def declare(commands: Commands) -> None:
    """The arguments of `env`: none."""
    add_command(commands, env)


def env(arguments: argparse.Namespace) -> int:
    """Tell the machine: versions, CPU, memory, GPU and driver, and the settings of torch that change results."""
    from ..environment import environment, machine
    from ..render.terminal import console, environment_view

    console(sys.stdout).print(environment_view(environment(seed=0, command="olmodebug env"), machine()))
    return 0
