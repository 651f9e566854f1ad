"""Readers: every form gives the same documents, and damage costs only what is damaged."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from olmodebug.errors import UsageError
from olmodebug.training.corpus import shipped_documents
from olmodebug.training.data import TEXT_PIECE_CHARACTERS, Problems, Split, find_files, read_documents

TEXTS = ["one", "two zwei", "drei"]


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def read(*files: Path, field: str = "text") -> tuple[list[str], Problems]:
    problems = Problems()
    return [document.text for document in read_documents(files, problems, text_field=field)], problems


def test_plain_and_gzipped_json_lines_give_the_same_documents(tmp_path: Path) -> None:
    body = lines(*({"text": text} for text in TEXTS))
    (tmp_path / "a.jsonl").write_bytes(body)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(body))
    assert read(tmp_path / "a.jsonl")[0] == read(tmp_path / "b.json.gz")[0] == TEXTS


def test_zstandard_gives_the_same_documents(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    one, two = (zstandard.ZstdCompressor().compress(lines({"text": text})) for text in TEXTS[:2])
    path.write_bytes(one + two)
    assert read(path)[0] == TEXTS[:2]
    path.write_bytes(one + two[:-4])
    texts, problems = read(path)
    assert texts == TEXTS[:1]
    assert "a.jsonl.zst:2: the packed file ends or breaks here" in str(problems.first[0])
    path.write_bytes(one + b"no frame of zstandard at all")
    assert "a.jsonl.zst:2: the packed file ends or breaks here" in str(read(path)[1].first[0])


@pytest.mark.parametrize("form", ["a.parquet", "stream.arrow", "file.arrow"])
def test_parquet_and_arrow_give_the_same_documents(tmp_path: Path, form: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / form
    table = pyarrow.table({"n": [1, 2, 3, 4], "text": [*TEXTS, None]})
    write_columns(path, table)
    texts, problems = read(path)
    assert texts == TEXTS
    assert str(problems.first[0]).endswith(f"{form}:4: the column 'text' holds NoneType, no text")
    assert "no column 'words'; it has n, text" in str(read(path, field="words")[1].first[0])
    path.write_bytes(b"PAR1 nonsense, and nothing that Arrow would know")
    assert "no readable" in str(read(path)[1].first[0])


def test_a_parquet_file_with_damage_inside_gives_what_stands_before_it(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    many = [f"document {i} of many" for i in range(2000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": many}), path, row_group_size=500, compression="gzip")
    body = bytearray(path.read_bytes())
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    body[start : start + 200] = b"\xff" * 200
    path.write_bytes(bytes(body))
    texts, problems = read(path)
    assert texts == many[: len(texts)] and 500 <= len(texts) <= 1000
    assert "no readable Parquet file" in str(problems.first[0])


def test_a_saved_hugging_face_dataset_is_read_without_its_caches(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    write_columns(tmp_path / "data-00000-of-00001.arrow", pyarrow.table({"text": TEXTS}))
    write_columns(tmp_path / "cache-0123456789abcdef.arrow", pyarrow.table({"text": ["derived"]}))
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    assert read(*find_files([str(tmp_path)]))[0] == TEXTS


@pytest.mark.parametrize(("form", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow"), ("a.arrow", "pyarrow")])
def test_a_missing_optional_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, package: str) -> None:
    for name in (package, f"{package}.parquet", f"{package}.ipc"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / form).write_bytes(b"x")
    with pytest.raises(UsageError, match=rf"needs the package {package}: pip install 'olmodebug\[data\]'"):
        read(tmp_path / form)


def write_columns(path: Path, table: Any) -> None:
    """A table in the form that the name says."""
    import pyarrow.ipc
    import pyarrow.parquet

    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return
    kind = pyarrow.ipc.new_file if path.name == "file.arrow" else pyarrow.ipc.new_stream
    with path.open("wb") as sink, kind(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"text": "cut\n', "a.jsonl:2: no valid JSON"),
        (b'{"words": "x"}\n', "a.jsonl:2: no field 'text'; it has words"),
        (b'{"text": 3}\n', "a.jsonl:2: the field 'text' holds int, no text"),
        (b"[1, 2]\n", "a.jsonl:2: expected an object with the field 'text', observed list"),
        (b'{"text": "\xff"}\n', "a.jsonl:2: no valid UTF-8"),
        (b'{"text": "  "}\n', "a.jsonl:2: an empty document"),
    ],
)
def test_a_corrupt_line_is_told_with_file_and_line_and_costs_only_itself(tmp_path: Path, bad: bytes, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "one"}) + bad + lines({"text": "three"}))
    texts, problems = read(path)
    assert texts == ["one", "three"]
    assert problems.count == 1
    assert words in str(problems.first[0])


def test_a_truncated_gzip_keeps_the_lines_before_the_cut(tmp_path: Path) -> None:
    import random

    draw = random.Random(0)  # text that does not pack well, so that the cut falls into the middle
    texts = ["".join(draw.choice("abcdefghijklmnop") for _ in range(4000)) for _ in range(40)]
    whole = gzip.compress(lines(*({"text": text} for text in texts)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    read_texts, problems = read(tmp_path / "a.jsonl.gz")
    assert read_texts == texts[: len(read_texts)]
    assert 10 < len(read_texts) < 30
    assert problems.count == 1
    assert problems.first[0].line == len(read_texts) + 1
    assert "ends or breaks here" in problems.first[0].text


def test_a_packed_file_of_which_nothing_can_be_read_claims_no_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(lines({"text": "one"}))  # named so, and not packed
    texts, problems = read(path)
    assert texts == [] and str(problems.first[0]).endswith(
        "a.jsonl.gz: a packed file of which nothing can be read (not a gzipped file (b'{\"'))"
    )


@pytest.mark.parametrize("body", [b'[{"text": "one"}, {"text": "two"}]', b'[\n{"text": "one"},\n{"text": "two"}\n]\n'])
def test_a_json_array_is_told_as_that(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(body)
    assert "a.json:1: a JSON array, not JSON lines: write one object a line" in str(read(path)[1].first[0])


def test_an_empty_file_and_a_vanished_shard_are_told_and_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "good.jsonl").write_bytes(lines({"text": "one"}))
    texts, problems = read(tmp_path / "empty.jsonl", tmp_path / "gone.jsonl", tmp_path / "good.jsonl")
    assert texts == ["one"]
    told = [str(problem).replace(f"{tmp_path}/", "") for problem in problems.first]
    assert told[0] == "empty.jsonl: an empty file"
    assert told[1] == "gone.jsonl: the file is gone: it was there when the run began"


def test_the_same_damage_is_counted_once_over_several_epochs(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"nonsense\n" + lines({"text": "one"}))
    problems = Problems()
    for _ in range(3):
        assert len(list(read_documents([path], problems))) == 1
    assert problems.count == 1


def test_a_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    body = "".join(f"paragraph {i} " + "x" * 500 + "\n\n" for i in range(100))
    (tmp_path / "a.txt").write_text(body)
    texts, _ = read(tmp_path / "a.txt")
    assert "".join(texts) == body
    assert len(texts) == 4  # 52 KB in pieces of 16,000 characters and a rest
    assert all(text.endswith("\n\n") and len(text) < TEXT_PIECE_CHARACTERS + 600 for text in texts)


def test_globs_and_folders_name_files_in_order_and_a_name_of_nothing_is_refused(tmp_path: Path) -> None:
    for name in ("b-1.jsonl", "b-0.jsonl", "dataset_info.json"):
        (tmp_path / name).write_bytes(lines({"text": name}))
    expected = (tmp_path / "b-0.jsonl", tmp_path / "b-1.jsonl")
    assert find_files([str(tmp_path / "b-*.jsonl")]) == expected
    (tmp_path / ".olmodebug" / "runs").mkdir(parents=True)
    (tmp_path / ".olmodebug" / "runs" / "job.json").write_bytes(lines({"text": "a record of this tool"}))
    assert find_files([str(tmp_path)]) == expected
    with pytest.raises(UsageError, match="no such file, and no file fits it"):
        find_files([str(tmp_path / "c-*.jsonl")])
    (tmp_path / "x.exe").write_bytes(b"")
    with pytest.raises(UsageError, match="expected a file of"):
        find_files([str(tmp_path / "x.exe")])


def test_a_split_gives_every_document_to_one_part() -> None:
    split = Split(period=100, validation=tuple(range(80, 90)), test=tuple(range(90, 100)))
    parts = [split.part(index) for index in range(200)]
    assert parts[:80] == ["train"] * 80 and parts[80:90] == ["validation"] * 10 and parts[90:100] == ["test"] * 10
    assert parts[100:] == parts[:100]


@pytest.mark.parametrize(("documents", "parts"), [(1, "t"), (2, "tv"), (3, "tve"), (15, "t" * 13 + "ve"), (20, "t" * 18 + "ve")])
def test_few_documents_are_split_too(documents: int, parts: str) -> None:
    names = {"train": "t", "validation": "v", "test": "e"}
    split = Split().fitted(documents)
    assert "".join(names[split.part(index)] for index in range(documents)) == parts


def test_the_shipped_corpus_has_text_without_a_network() -> None:
    documents = list(shipped_documents())
    assert len(documents) > 100
    assert sum(len(document.text) for document in documents) > 1_000_000
    assert documents == list(shipped_documents())
