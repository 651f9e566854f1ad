"""The section on two implementations in the terminal, from a real report."""

import io
import json
from pathlib import Path

import jsonschema

import olmodebug.report
from olmodebug.render.implementations import implementations_view
from olmodebug.render.layout import console
from olmodebug.report import from_json

SAMPLE = Path(__file__).parent / "samples" / "implementations.json"


def drawn() -> str:
    stream = io.StringIO()
    console(stream, width=120).print(implementations_view(from_json(SAMPLE.read_text()).sections["implementations"]))
    return stream.getvalue()


def test_it_says_how_far_the_logits_are_apart_where_the_drift_grows_and_how_weights_were_mapped() -> None:
    text = drawn()
    assert "logits     differ: 1.4e-01 of the largest, where rounding may make 1.2e-04" in text
    assert "########" in next(line for line in text.splitlines() if line.endswith("model.layers.0.self_attn.o_proj"))
    assert "mapping    model.embed_tokens.weight  =  the same name" in text
    assert text.count("mlp.gate_proj.weight") == 1


def test_the_sample_fits_the_schema() -> None:
    schema = json.loads(Path(olmodebug.report.__file__).with_name("report.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(json.loads(SAMPLE.read_text()))
