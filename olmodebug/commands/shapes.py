"""`olmodebug shapes`: the tree of a model with named dimensions."""

import argparse
import sys
from pathlib import Path

from ..errors import EXIT_FINDINGS
from .shared import Commands, add_command, add_subject, say


def declare(commands: Commands) -> None:
    """The arguments of `shapes`."""
    add_subject(add_command(commands, shapes))


def shapes(arguments: argparse.Namespace) -> int:
    """Print the tree of a model with named dimensions, parameters and bytes; a model of any size, without its memory."""
    from ..render.shapes import shapes_view
    from ..render.terminal import console
    from ..spec_text import parse_config

    say("loading torch ...")
    from ..explain import explain
    from ..load import SubjectCodeError
    from ..shape_tree import shape_tree
    from ..spec import Job, resolve

    config = parse_config(arguments.config)
    sys.path.insert(0, str(Path.cwd()))
    tree = None
    for meta in (True, False):
        try:
            tree = shape_tree(resolve(Job(spec=arguments.subject, config=config, meta=meta)))
            break
        except SubjectCodeError as error:
            if not meta:
                from ..render.terminal import finding_view

                console(sys.stdout).print(finding_view(explain(error).finding()))
                return EXIT_FINDINGS
    assert tree is not None
    console(sys.stdout).print(shapes_view(tree))
    return 0
