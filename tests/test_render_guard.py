"""The terminal drawing of a watched run, and the sample report that every other drawing is made from."""

import io
import json
from pathlib import Path

import jsonschema

import olmodebug.report
from olmodebug.render.guard import guard_view, guarded_run_view
from olmodebug.render.layout import console
from olmodebug.report import Report, from_json

SAMPLE = Path(__file__).parent / "samples" / "guard.json"
SCHEMA = json.loads(Path(olmodebug.report.__file__).with_name("report.schema.json").read_text())


def drawn(view: object, width: int = 100) -> str:
    stream = io.StringIO()
    console(stream, width=width).print(view)  # type: ignore[arg-type]
    return stream.getvalue()


def sample() -> Report:
    return from_json(SAMPLE.read_text())


def test_the_sample_fits_the_schema() -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(SAMPLE.read_text()))


def test_findings_stand_before_the_memory_and_the_closing_line() -> None:
    text = drawn(guarded_run_view(sample()))
    assert text.index("memory.fits") < text.index("asked for  195 MiB") < text.index("olmodebug: 1 error; the script: exit status 1")
    assert "activation  oom.py:16 in <module>  (1 tensor)" in text


def test_a_clean_run_is_one_line() -> None:
    report = sample()
    section = {**report.sections["guard"], "memory": None, "ended": {"status": 0, "signal": None, "text": "exit status 0"}}
    clean = Report(subject=report.subject, environment=report.environment, sections={"guard": section}, seconds=3.2)
    assert drawn(guarded_run_view(clean)) == "olmodebug: no finding; the script: exit status 0; 3.2 s\n"


def test_the_section_tells_every_process_and_how_it_ended() -> None:
    section = dict(sample().sections["guard"])
    section["processes"] = [{**section["processes"][0], "rank": rank} for rank in (0, 1)]
    text = drawn(guard_view(section))
    assert "rank 0: oom.py" in text and "rank 1: oom.py" in text and "it ended with RuntimeError" in text
