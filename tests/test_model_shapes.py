"""The shape comments of the reference model are true: our own tracer measures every line that carries one."""

import re
from math import prod
from pathlib import Path

import torch

import olmodebug.model as model_file
from olmodebug.model import Olmo, OlmoConfig
from olmodebug.tracing.tracer import record

SOURCE = Path(model_file.__file__)
COMMENT = re.compile(r"  # \[([0-9A-Z, *]+)\]$")

# Pairwise different, so that no comment is true by chance. S: cached and new.
SIZES = {"B": 3, "T": 5, "S": 12, "H": 6, "K": 2, "D": 8, "E": 48, "I": 56, "V": 71}


def commented_lines() -> dict[int, str]:
    lines = enumerate(SOURCE.read_text(encoding="utf-8").splitlines(), start=1)
    return {number: match[1] for number, text in lines if (match := COMMENT.search(text))}


def measured_lines() -> dict[int, tuple[int, ...]]:
    """Line -> the shape that its last op gave, in a forward with a cache, a mask and grouped heads."""
    config = OlmoConfig(
        vocab_size=SIZES["V"],
        hidden_size=SIZES["E"],
        intermediate_size=SIZES["I"],
        num_hidden_layers=2,
        num_attention_heads=SIZES["H"],
        num_key_value_heads=SIZES["K"],
        max_position_embeddings=64,
        norm="rms_norm",
        norm_position="post",
        qk_norm=True,
        attn_implementation="eager",
    )
    model = Olmo(config)
    ids = torch.randint(SIZES["V"], (SIZES["B"], SIZES["S"]))
    old = SIZES["S"] - SIZES["T"]
    with torch.no_grad():
        cache = model(ids[:, :old], use_cache=True).past_key_values
        run = lambda: model(ids[:, old:], attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)  # noqa: E731
        events = record(model, run).events
    return {e.where.line: e.outputs[0].shape for e in events if e.outputs and e.where.line and Path(str(e.where.file)).name == SOURCE.name}


def test_every_shape_comment_of_the_reference_is_what_the_tracer_measures() -> None:
    comments, measured = commented_lines(), measured_lines()
    assert len(comments) >= 15
    for number, text in comments.items():
        expected = tuple(prod(SIZES.get(name) or int(name) for name in dimension.strip().split("*")) for dimension in text.split(","))
        assert measured.get(number) == expected, f"{SOURCE.name}:{number} says [{text}] = {expected}, measured {measured.get(number)}"
