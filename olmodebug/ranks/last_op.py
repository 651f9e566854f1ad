"""The op that a process runs, on disk before it runs: all that is left of one that is killed."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from ..records import Where

BYTES = 1024  # of one note; each is written over the one before


class LastOp:
    """Keeps the place of the newest op in a file of one note."""

    def __init__(self, file: Path) -> None:
        self.descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)

    def __enter__(self) -> "LastOp":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self.descriptor)

    def note(self, where: Where) -> None:
        text = json.dumps(asdict(where)).encode()
        if len(text) <= BYTES:
            os.pwrite(self.descriptor, text.ljust(BYTES), 0)


def read_last_op(file: Path) -> Where | None:
    """The place of the last op of a process that is gone; None where it ran none."""
    try:
        return Where(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
