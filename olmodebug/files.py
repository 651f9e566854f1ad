"""Text files that are written whole or not at all."""

import contextlib
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file by way of a neighbour, so that nobody ever reads half of it.

    A device, a pipe or a link (`/dev/stdout`) is written to as it is: putting a file in its place would destroy it.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
