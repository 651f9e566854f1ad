"""The documents in files of every usual form, one after the other, never all in memory.

JSON lines (`.jsonl`, `.json`, each also as `.gz` or `.zst`), Parquet, Arrow, plain text, and folders of these, as Hugging Face
datasets are stored (`save_to_disk` writes Arrow). A line that cannot be read costs that line alone: it becomes a `Problem` with
file and line, and the rest is read.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from ..errors import UsageError
from .columnar import Damaged, arrow_column, needed, parquet_column

JSON_LINES = (".jsonl", ".json", ".ndjson")
PACKED = (".gz", ".zst")
PARQUET = (".parquet",)
ARROW = (".arrow",)
TEXT = (".txt", ".text", ".md")
READABLE = (*JSON_LINES, *PARQUET, *ARROW, *TEXT)

# A text file marks no documents: it is cut at the first blank line after so many characters, about eight windows of 512 tokens.
TEXT_PIECE_CHARACTERS = 16_000
TEXT_PIECE_MOST = 4 * TEXT_PIECE_CHARACTERS  # without any blank line

ARRAY = "a JSON array, not JSON lines: write one object a line"

PROBLEMS_KEPT = 20  # the first ones; all are counted

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text and where it begins."""

    text: str
    file: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What could not be read, and where; `line` is None where the whole file is meant."""

    file: str
    line: int | None
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


@dataclass(slots=True, kw_only=True)
class Problems:
    """All problems counted, the first ones kept; the same place is counted once, however often the data is read."""

    first: list[Problem] = field(default_factory=list)
    places: set[tuple[str, int | None]] = field(default_factory=set)

    def add(self, problem: Problem) -> None:
        place = (problem.file, problem.line)
        if place not in self.places:
            self.places.add(place)
            if len(self.first) < PROBLEMS_KEPT:
                self.first.append(problem)

    @property
    def count(self) -> int:
        return len(self.places)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which documents train, validate and test, by their number in the data: of every `period`, validation and test get these."""

    period: int = 20
    validation: tuple[int, ...] = (18,)
    test: tuple[int, ...] = (19,)

    def fitted(self, documents: int) -> "Split":
        """The same, or where there are fewer documents than a period has, the last but one validates and the last tests."""
        if documents >= self.period:
            return self
        return Split(period=max(1, documents), validation=(max(1, documents - 2),), test=(max(2, documents - 1),))

    def part(self, index: int) -> Part:
        place = index % self.period
        return "validation" if place in self.validation else "test" if place in self.test else "train"


def find_files(patterns: Sequence[str]) -> tuple[Path, ...]:
    """The files that paths, folders and globs name, in order; UsageError for one that names none."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = [p for p in sorted(path.rglob("*")) if _is_data(p) and not _is_hidden(p.relative_to(path))]
            if not files:
                raise UsageError(f"--data {pattern}: the folder has no file of {', '.join(READABLE)}")
        else:
            files = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
            if not files:
                raise UsageError(f"--data {pattern}: no such file, and no file fits it as a pattern")
            for file in files:
                if _suffix(file) not in READABLE:
                    raise UsageError(f"--data {file}: expected a file of {', '.join(READABLE)}, each also packed as .gz or .zst")
        found += files
    return tuple(dict.fromkeys(found))


DATASET_CARDS = ("README.md", "dataset_info.json", "state.json", "dataset_dict.json")
DERIVED = "cache-"  # what `datasets` keeps of a `map` beside the data


def _is_data(path: Path) -> bool:
    """Whether a file in a folder holds documents."""
    derived = _suffix(path) in ARROW and path.name.startswith(DERIVED)
    return path.is_file() and _suffix(path) in READABLE and path.name not in DATASET_CARDS and not derived


def _is_hidden(path: Path) -> bool:
    """Whether a file or a folder on the way to it is hidden: versions, caches, and this tool's own records."""
    return any(part.startswith(".") for part in path.parts)


def read_documents(files: Iterable[Path], problems: Problems, *, text_field: str = "text") -> Iterator[Document]:
    """Every document of the files, in order; what cannot be read goes to `problems`, and reading goes on behind it."""
    for path in files:
        count = 0
        for item in _read(path, text_field):
            if isinstance(item, Problem):
                problems.add(item)
            elif item.text.strip():
                yield item
            else:
                problems.add(Problem(file=item.file, line=item.line, text="an empty document"))
            count += 1
        if count == 0:
            problems.add(Problem(file=str(path), line=None, text="an empty file"))


def _read(path: Path, text_field: str) -> Iterator[Document | Problem]:
    kind = _suffix(path)
    reader: Callable[[Path, str], Iterator[Document | Problem]] = (
        _read_columns if kind in (*PARQUET, *ARROW) else _read_text if kind in TEXT else _read_json_lines
    )
    try:
        yield from reader(path, text_field)
    except FileNotFoundError:
        yield Problem(file=str(path), line=None, text="the file is gone: it was there when the run began")
    except OSError as error:
        yield Problem(file=str(path), line=None, text=f"cannot be read: {error.strerror or error}")


def _read_json_lines(path: Path, text_field: str) -> Iterator[Document | Problem]:
    number, told = 0, 0
    try:
        with _open(path) as stream:
            for number, raw in enumerate(stream, start=1):
                if raw.strip():
                    told += 1
                    yield _parsed(raw, path, number, text_field)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield _cut_short(path, number, error)
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        yield _cut_short(path, number, error)


def _parsed(raw: bytes, path: Path, number: int, text_field: str) -> Document | Problem:
    def problem(text: str) -> Problem:
        return Problem(file=str(path), line=number, text=text)

    try:
        record = json.loads(raw)
    except UnicodeDecodeError as error:
        return problem(f"no valid UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return problem(ARRAY if number == 1 and raw.lstrip()[:1] == b"[" else f"no valid JSON: {error}")
    if number == 1 and isinstance(record, list):
        return problem(ARRAY)
    if not isinstance(record, dict):
        return problem(f"expected an object with the field {text_field!r}, observed {type(record).__name__}")
    if text_field not in record:
        return problem(f"no field {text_field!r}; it has {', '.join(sorted(map(str, record))[:8]) or 'none'} (--text-field names another)")
    text = record[text_field]
    if not isinstance(text, str):
        return problem(f"the field {text_field!r} holds {type(text).__name__}, no text")
    return Document(text=text, file=str(path), line=number)


def _read_text(path: Path, _: str) -> Iterator[Document | Problem]:
    piece: list[str] = []
    size, start, number = 0, 1, 0
    try:
        with _open(path) as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    yield Problem(file=str(path), line=number, text=f"no valid UTF-8 at byte {error.start} of the line")
                    continue
                piece.append(text)
                size += len(text)
                if (size >= TEXT_PIECE_CHARACTERS and not text.strip()) or size >= TEXT_PIECE_MOST:
                    yield Document(text="".join(piece), file=str(path), line=start)
                    piece, size, start = [], 0, number + 1
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield _cut_short(path, number, error)
    if "".join(piece).strip():
        yield Document(text="".join(piece), file=str(path), line=start)


def _read_columns(path: Path, text_field: str) -> Iterator[Document | Problem]:
    number = 0
    try:
        for values in (parquet_column if _suffix(path) in PARQUET else arrow_column)(path, text_field):
            for text in values:
                number += 1
                if isinstance(text, str):
                    yield Document(text=text, file=str(path), line=number)
                else:
                    yield Problem(file=str(path), line=number, text=f"the column {text_field!r} holds {type(text).__name__}, no text")
    except KeyError as error:
        names = ", ".join(error.args[0][:8])
        yield Problem(file=str(path), line=None, text=f"no column {text_field!r}; it has {names} (--text-field names another)")
    except Damaged as error:
        yield Problem(file=str(path), line=number + 1 if number else None, text=str(error))


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstandard(path))
    return path.open("rb")


class _Zstandard(io.RawIOBase):
    """A `.zst` file, frame after frame. EOFError where it ends inside a frame, of which the package's own reader says nothing."""

    def __init__(self, path: Path) -> None:
        package: Any = needed("zstandard", path, "zstandard")
        self._new_frame = package.ZstdDecompressor().decompressobj
        self._source = path.open("rb")
        self._frame: Any = None
        self._packed, self._ready = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._source.read(io.DEFAULT_BUFFER_SIZE)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._ready = self._frame.decompress(self._packed)
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


def _cut_short(path: Path, number: int, error: Exception) -> Problem:
    text = str(error).strip().rstrip(".").lower()
    if number == 0:
        return Problem(file=str(path), line=None, text=f"a packed file of which nothing can be read ({text})")
    return Problem(file=str(path), line=number + 1, text=f"the packed file ends or breaks here ({text}); the lines before were read")


def _suffix(path: Path) -> str:
    return (Path(path.stem).suffix if path.suffix in PACKED else path.suffix).lower()
