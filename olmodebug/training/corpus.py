"""The text that ships with every Python: the interpreter's documentation topics and the standard library's sources.

The data of a training run that names none. It needs no network, and one Python version has the same text everywhere.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .data import Document

MOST_CHARACTERS = 6_000_000
SAID = "the documentation topics and standard library of this Python"


def shipped_documents() -> Iterator[Document]:
    """Each documentation topic, then each module at the top of the standard library, alphabetically, up to a size."""
    size = 0
    for document in (*_topics(), *_modules()):
        size += len(document.text)
        if size > MOST_CHARACTERS:
            return
        yield document


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions split the documentation off
        return
    for name in sorted(topics):
        yield Document(text=topics[name], file=f"pydoc_data.topics[{name!r}]", line=1)


def _modules() -> Iterator[Document]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.glob("*.py")):
        if path.name.startswith("_"):  # generated tables among them
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        yield Document(text=text, file=path.name, line=1)
