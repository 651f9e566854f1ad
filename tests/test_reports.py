"""The committed reports: valid, free of machine paths, and every drawing of one is what its JSON gives today."""

import io
import json
import re
from pathlib import Path

import jsonschema
import pytest

import olmodebug.report
from olmodebug.render.terminal import console
from olmodebug.report import read
from tests.readme import PICTURES, SHOWN, picture, words
from tests.reports import REPORTS, SAMPLES, drawings, view
from tests.test_render_html import check_page

SCHEMA = json.loads(Path(olmodebug.report.__file__).with_name("report.schema.json").read_text(encoding="utf-8"))
RECORDED = [name for name in SAMPLES if (REPORTS / f"{name}.json").is_file()]
MACHINE = re.compile(r"/(root|home|tmp|work)/|site-packages")
LARGEST_BYTES = 150_000


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_report_is_valid_and_names_its_command_versions_and_seed(name: str) -> None:
    text = (REPORTS / f"{name}.json").read_text(encoding="utf-8")
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(text))
    environment = read(REPORTS / f"{name}.json").environment
    assert environment.command.startswith("olmodebug ")
    assert environment.olmodebug
    assert environment.torch or "run" in name  # a guarded script's own torch stands in its section


@pytest.mark.parametrize("path", [path for path in REPORTS.rglob("*") if path.is_file()], ids=lambda path: path.name)
def test_a_report_is_small_and_names_no_path_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST_BYTES or path.parent.name == "gpu" or path.stem in ("scoreboard", "transformers")
    assert not MACHINE.search(text), MACHINE.search(text)


def test_every_drawing_of_a_report_is_what_its_json_gives_today() -> None:
    for path, text in drawings().items():
        assert path.is_file(), f"{path.name}: run python -m tests.reports --draw"
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python -m tests.reports --draw"
        if path.suffix == ".html":
            check_page(text)


@pytest.mark.parametrize("name", SHOWN)
def test_a_picture_of_the_readme_shows_what_the_report_says_today_and_loads_nothing(name: str) -> None:
    svg = (PICTURES / f"{name}.svg").read_text(encoding="utf-8")
    assert words(svg) == words(picture(name)), "run python -m tests.readme"
    urls = set(re.findall(r"https?://[^\s\"'<]+", re.sub(r"<!--.*?-->", "", svg)))
    assert urls == {"http://www.w3.org/2000/svg"}  # the name of the format, which nobody fetches
    assert "url(#" in svg or "url(" not in svg


def test_a_drawing_shows_each_section_once() -> None:
    text = (REPORTS / "memory-olmo1-4M.txt").read_text(encoding="utf-8")
    assert text.count("at the peak, by category") == 1


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_can_be_drawn_in_ascii_and_nothing_of_ours_is_escaped(name: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console(stream, width=80).print(view(read(REPORTS / f"{name}.json")))
    stream.flush()
    assert "\\u2" not in stream.buffer.getvalue().decode("ascii")
