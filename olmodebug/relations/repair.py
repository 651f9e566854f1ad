"""Edits of the subject's source that a diagnosis suggests, and a check of them on a copy before anybody is told.

An edit replaces one expression, found by its exact place. `RepairedSource` writes the edited file into a temporary
folder and loads the subject from there; the user's file is never touched.
"""

import ast
import io
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from ..report import Finding
from ..sources import Spot
from ..spec import Job, resolve
from ..subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Characters `start..end` of a file's text replaced by `new`."""

    file: str
    start: int
    end: int
    new: str

    def apply(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found(Finding):
    """A finding inside a run: with the edits that would mend it, and its smallest case as values that can be judged again
    (`relations.stored`); the report carries neither."""

    edits: tuple[Edit, ...] = ()
    records: tuple[Mapping[str, Any], ...] = ()

    def told(self, **changes: Any) -> Finding:
        """The finding as a report has it, with changes."""
        return Finding(**{**{name: getattr(self, name) for name in Finding.__dataclass_fields__}, **changes})


class Expressions:
    """The syntax tree of a file, searched by place."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.text = Path(file).read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self._starts = [0]
        self._lines = io.StringIO(self.text).readlines()  # not splitlines: Python's lines do not end at a form feed
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))

    def at(self, spot: Spot) -> list[ast.expr | ast.stmt]:
        """The node that was running, and the nodes around it, innermost first."""
        span = spot.span
        if span is None:
            return []
        first, last, start, end = span
        around = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.expr | ast.stmt) and node.end_lineno is not None and node.end_col_offset is not None:
                if (node.lineno, node.col_offset) <= (first, start) and (last, end) <= (node.end_lineno, node.end_col_offset):
                    around.append(node)
        return sorted(around, key=lambda node: len(self.source(node)))

    def source(self, node: ast.AST) -> str:
        return ast.get_source_segment(self.text, node) or ""

    def replace(self, node: ast.expr | ast.stmt, new: str) -> Edit:
        """The edit that puts `new` in the place of a node."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return Edit(
            file=self.file,
            start=self._offset(node.lineno, node.col_offset),
            end=self._offset(node.end_lineno, node.end_col_offset),
            new=new,
        )

    def _offset(self, line: int, column: int) -> int:
        """A place in characters: ast counts columns in UTF-8 bytes."""
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())


def expressions(spot: Spot | None) -> Expressions | None:
    """The syntax tree of the file that a spot lies in; None where it cannot be read."""
    if spot is None:
        return None
    try:
        return Expressions(spot.file)
    except (OSError, SyntaxError, ValueError):
        return None


class RepairedSource:
    """A context in which the subject is built from an edited copy of its file; None where that is not possible.

    Only a subject given as `file.py:attribute` whose own file the edits touch can be rebuilt this way.
    """

    def __init__(self, job: Job, edits: Iterable[Edit]) -> None:
        self.job, self.edits = job, tuple(edits)
        self._folder: Path | None = None
        self._modules: set[str] = set()

    def __enter__(self) -> Subject | None:
        place, _, attribute = self.job.spec.rpartition(":")
        path = Path(place)
        if not self.edits or not place.endswith(".py") or not path.is_file():
            return None
        if any(Path(edit.file).resolve() != path.resolve() for edit in self.edits):
            return None
        text = path.read_text(encoding="utf-8")
        for edit in sorted(self.edits, key=lambda edit: edit.start, reverse=True):
            text = edit.apply(text)
        self._folder = Path(tempfile.mkdtemp(prefix="olmodebug-"))
        self._modules = set(sys.modules)
        copy = self._folder / path.name
        copy.write_text(text, encoding="utf-8")
        try:
            return resolve(replace(self.job, spec=f"{copy}:{attribute}"))
        except BaseException:
            self.__exit__(None, None, None)  # Python does not, when __enter__ itself raises
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._folder is None:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        if str(self._folder) in sys.path:
            sys.path.remove(str(self._folder))
        for name in set(sys.modules) - self._modules:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(self._folder)):
                del sys.modules[name]
