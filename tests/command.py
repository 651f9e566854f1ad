"""The command line in this process: the parent costs no interpreter, and its children are the forks of `tests.forked`."""

import contextlib
import io
import os
import subprocess
from pathlib import Path
from unittest import mock

from olmodebug.cli import main


def run_here(folder: Path, *arguments: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """What `olmodebug ARGUMENTS` prints in a folder, and its exit status."""
    out, err = io.StringIO(), io.StringIO()
    line = [str(each) for each in arguments]
    with mock.patch.dict(os.environ, environment), contextlib.chdir(folder):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(line)
            except SystemExit as left:  # as argparse leaves
                code = int(str(left.code))
    return subprocess.CompletedProcess(line, code, out.getvalue(), err.getvalue())
