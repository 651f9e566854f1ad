"""The memory section: a real report of it keeps to the schema, its pictures are drawn from it alone."""

import io
import json
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console

import olmodebug
from olmodebug.footprint.chrome_trace import chrome_trace
from olmodebug.footprint.confirm import EMPTY
from olmodebug.footprint.findings import findings_of
from olmodebug.footprint.section import compare, section
from olmodebug.render.figures.memory import draw
from olmodebug.render.memory import memory_view
from olmodebug.report import read

SAMPLE = Path(__file__).parent / "samples" / "memory.json"
SCHEMA = Path(olmodebug.__file__).parent / "report.schema.json"


@pytest.fixture(scope="module")
def body() -> dict:
    return json.loads(SAMPLE.read_text(encoding="utf-8"))


def drawn(value: dict) -> str:
    out = io.StringIO()
    Console(file=out, width=80, no_color=True, markup=False, highlight=False).print(memory_view(value))
    return out.getvalue()


def test_the_sample_keeps_to_the_schema(body: dict) -> None:
    jsonschema.validate(body, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert read(SAMPLE).sections["memory"] == body["sections"]["memory"]


def test_the_sample_names_no_folder_of_a_machine(body: dict) -> None:
    assert not any(h["file"] and h["file"].startswith("/") for h in body["sections"]["memory"]["holders"])


def test_the_timeline_is_bounded_and_its_peak_is_the_fullest(body: dict) -> None:
    line = body["sections"]["memory"]["timeline"]
    assert 0 < len(line["points"]) <= 400
    assert line["points"][line["peak"]]["allocated_bytes"] == max(p["allocated_bytes"] for p in line["points"])
    assert line["points"][line["peak"]]["allocated_bytes"] == body["sections"]["memory"]["figures"]["tensors"]["expected"]
    assert all(sum(p["categories"]) == p["allocated_bytes"] for p in line["points"])


def test_the_categories_and_the_modules_each_make_up_the_peak(body: dict) -> None:
    memory = body["sections"]["memory"]
    for shares in (memory["categories"], memory["modules"]):
        assert sum(share["bytes"] for share in shares) == memory["figures"]["tensors"]["expected"]


def test_it_reads_at_80_columns(body: dict) -> None:
    text = drawn(body["sections"]["memory"])
    assert max(map(len, text.splitlines())) <= 80
    assert "of the peak is three float32 copies of the logits" in text
    assert "does not fit" in text and "chunked cross-entropy" in text


@pytest.mark.parametrize(("factor", "word", "short"), [(1.01, "fits", "yes"), (0.99, "may not fit", "maybe"), (0.5, "does not fit", "no")])
def test_a_need_between_expected_and_safe_is_told_as_that(body: dict, factor: float, word: str, short: str) -> None:
    memory = json.loads(json.dumps(body["sections"]["memory"]))
    change = next(row for row in memory["what_ifs"] if row["needed"])
    for needed in (memory["figures"]["process"], change["needed"]):
        needed |= {"expected": int(0.9 * needed["safe"])}
    memory["budget_bytes"] = int(factor * memory["figures"]["process"]["safe"])
    change["needed"] = memory["figures"]["process"]
    lines = drawn(memory).splitlines()
    assert any(line.startswith(f"{word}  a budget of") for line in lines)
    assert next(line for line in lines if line.strip().startswith(change["change"])).endswith(f" {short}")
    assert f"It {word} a budget of" in draw(memory) and word in draw(memory).partition("What would help")[2]


def test_a_need_that_is_mostly_the_context_is_blamed_on_no_tensor(body: dict) -> None:
    memory = json.loads(json.dumps(body["sections"]["memory"]))
    memory["budget_bytes"], memory["confirmation"] = 300 << 20, None
    assert "of the peak is" in (findings_of(memory)[0].cause or "")
    for name, expected in (("reserved", 24), ("process", 574)):
        memory["figures"][name] |= {"expected": expected << 20}
    (finding,) = findings_of(memory)
    assert finding.cause == "96% of it is the CUDA context, 550 MiB before any tensor is made"
    assert finding.where.file is None


def test_a_chrome_trace_counts_the_bytes_of_every_category(body: dict) -> None:
    memory = body["sections"]["memory"]
    events = json.loads(chrome_trace(memory))["traceEvents"]
    counters = [event for event in events if event["ph"] == "C" and event["name"] == "allocated bytes"]
    assert max(sum(event["args"].values()) for event in counters) == memory["figures"]["tensors"]["expected"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {"step 1 forward", "step 2 backward", "step 3 optimizer"} <= {span["name"] for span in spans}
    assert all(left["ts"] + left["dur"] <= right["ts"] for left, right in zip(spans, spans[1:], strict=False))


def test_two_runs_are_compared_category_by_category() -> None:
    figures = {"tensors": {"low": 1, "expected": 900, "safe": 1000}, "reserved": None, "process": None}
    left = section(categories=[{"name": "parameters", "bytes": 100}, {"name": "logits and loss", "bytes": 800}], figures=figures)
    figures = {"tensors": {"low": 1, "expected": 150, "safe": 200}, "reserved": None, "process": None}
    right = section(categories=[{"name": "parameters", "bytes": 100}, {"name": "saved activations", "bytes": 50}], figures=figures)
    both = compare(left, right, ("a.json", "b.json"))
    assert [(row["name"], row["left_bytes"], row["right_bytes"]) for row in both["categories"]] == [
        ("logits and loss", 800, 0),
        ("saved activations", 0, 50),
        ("parameters", 100, 100),
    ]
    assert both["figures"] == [{"name": "tensors", "left_bytes": 900, "right_bytes": 150}]
    assert "-800 B" in drawn(section(kind="comparison", comparison=both))


def test_a_training_that_ends_in_nan_is_a_warning_and_is_drawn(body: dict) -> None:
    memory = json.loads(json.dumps(body["sections"]["memory"]))
    training = {"steps": 40, "losses": [6.2, "nan"], "first_loss": 6.2, "last_loss": "nan", "fell": False, "overflow_steps": 3}
    training |= {"overflow_at": [1, 2, 3], "scales": [1.0], "overflow_text": "none", "sample": "", "seconds": 1.0}
    memory["confirmation"] = {**EMPTY, "plan": "a plan", "training": training}
    (finding,) = [f for f in findings_of(memory) if f.probe == "memory.short-training-learns"]
    assert finding.message == "the loss of the short training did not fall: 6.2 at first, nan after 40 steps"
    assert "6.200 to nan" in drawn(memory)
