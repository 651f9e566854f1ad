"""What the terminal shows of a training run, from the stored section alone."""

import io
import json
from pathlib import Path

import jsonschema

import olmodebug.report
from olmodebug.render.layout import console
from olmodebug.render.training import plot, progress_text, table_cells, training_view

SAMPLE = Path(__file__).parent / "samples" / "training.json"
SCHEMA = json.loads(Path(olmodebug.report.__file__).with_name("report.schema.json").read_text(encoding="utf-8"))


def test_the_sample_fits_the_schema_and_is_drawn() -> None:
    body = json.loads(SAMPLE.read_text(encoding="utf-8"))
    jsonschema.validate(body, SCHEMA)
    section = body["sections"]["training"]
    stream = io.StringIO()
    console(stream, width=120).print(training_view(section))
    text = stream.getvalue()
    after = section["runs"][0]["evaluated"]["validation_after"]["perplexity"]
    assert f"perplexity {after:,.1f} after training" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_plot_falls_with_the_loss_and_shows_its_ends() -> None:
    assert plot([4.0, 3.0, 2.0, 1.0], width=4, height=2) == ["  4.000 █▃", "  1.000 ██▆▁"]
    assert plot([2.0, None, 2.0], width=3, height=1) == ["  2.000 ▁ ▁"]
    assert plot([None]) == []


def test_progress_names_a_loss_that_is_not_finite() -> None:
    step = {"step": 5, "loss": None, "rate": 0.01, "grad_norm": None, "tokens": 100, "seconds": 0.5}
    assert progress_text("train.runs", [step], 5) == "step 5 of 5, loss not finite, rate 0.01, gradient overflows, 200 tokens/s"


def test_a_row_without_numbers_has_dashes() -> None:
    run = {
        "parameters": 10,
        "steps": [],
        "evaluated": {"validation_after": None, "test_after": None},
        "peak_bytes": None,
        "tokens_per_second": None,
        "seconds": 1.0,
    }
    assert table_cells(run) == ["10", "-", "-", "-", "-", "-", "-", "1.0 s"]
