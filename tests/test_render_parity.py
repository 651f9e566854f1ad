"""The parity section on a terminal, from its JSON alone."""

import io
import json
from pathlib import Path

from olmodebug.render.layout import console
from olmodebug.render.parity import parity_view

SAMPLE = Path(__file__).parent / "samples" / "parity.json"


def drawn(section: dict[str, object]) -> str:
    stream = io.StringIO()
    console(stream, width=110).print(parity_view(section))
    return stream.getvalue()


def test_a_pair_that_agrees_says_so_with_its_layers_products_and_decisions() -> None:
    text = drawn(json.loads(SAMPLE.read_text())["sections"]["parity"])
    assert "agrees  cpu bfloat16 against cpu float64" in text
    assert "model.layers.0" in text
    assert "like float32 sums, one rounding to bf16" in text
    assert "positions choose the same token" in text
    assert "nothing: every error is one that arithmetic of this precision makes" in text


def test_a_pair_that_parts_starts_with_the_first_place() -> None:
    section = json.loads(SAMPLE.read_text())["sections"]["parity"]
    run = section["runs"][0]
    run |= {"verdict": "parts"}
    run["first"] = {"module": "model.layers.1.mlp", "function": "OlmoMLP.forward", "file": "olmodebug/model.py", "line": 242, "op": "silu"}
    run["first"] |= {"phase": "forward", "case": "padded", "verdict": "diverged", "margin": "inf", "policy": None, "reason": None}
    run["layers"][1] |= {"margin": 12.5}
    text = drawn(section)
    assert "first      silu (forward), OlmoMLP.forward olmodebug/model.py:242, module" in text
    assert "12.5 over" in text
    assert "start at the first place" in text
