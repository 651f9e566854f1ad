"""Documents in a column of a Parquet or Arrow file, batch by batch: the forms in which Hugging Face stores a dataset.

Arrow comes as a stream (what `save_to_disk` writes) or as a file with a footer; which one a file is, its first bytes say.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from ..errors import UsageError

BATCH_ROWS = 256
ARROW_FILE_MAGIC = b"ARROW1"


class Damaged(Exception):
    """The file cannot be read from here on; the text says why."""


def parquet_column(path: Path, name: str) -> Iterator[list[Any]]:
    """The values of a column, some rows at a time. Damaged where the file is, KeyError with the columns where none has that name."""
    parquet: Any = needed("pyarrow.parquet", path, "pyarrow")
    try:
        with closing(parquet.ParquetFile(path)) as table:
            _expect(name, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=[name]):
                yield batch.column(0).to_pylist()
    except _damage() as error:
        _raise_where_a_file_system_failed(error)
        raise Damaged(f"no readable Parquet file: {_first_line(error)}") from None


def arrow_column(path: Path, name: str) -> Iterator[list[Any]]:
    """As `parquet_column`, of an Arrow stream or file."""
    ipc: Any = needed("pyarrow.ipc", path, "pyarrow")
    try:
        with path.open("rb") as source:
            is_file = source.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
            source.seek(0)
            with ipc.open_file(source) if is_file else ipc.open_stream(source) as reader:
                _expect(name, reader.schema.names)
                for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader:
                    values = batch.column(batch.schema.get_field_index(name))
                    for start in range(0, len(values), BATCH_ROWS):
                        yield values.slice(start, BATCH_ROWS).to_pylist()
    except _damage() as error:
        _raise_where_a_file_system_failed(error)
        raise Damaged(f"no readable Arrow file: {_first_line(error)}") from None


def needed(module: str, path: Path, package: str) -> Any:
    """A module of an optional package; UsageError with what to install where it is not there."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"{path} needs the package {package}: pip install 'olmodebug[data]'") from None


def _expect(name: str, names: list[str]) -> None:
    if name not in names:
        raise KeyError(names)


def _damage() -> tuple[type[Exception], ...]:
    """What pyarrow raises for damaged bytes: kinds of its own, and OSError where its Parquet reader fails."""
    from pyarrow import ArrowException

    return (ArrowException, UnicodeDecodeError, OSError)


def _raise_where_a_file_system_failed(error: Exception) -> None:
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
