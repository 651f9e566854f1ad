"""The tree of named shapes."""

import io
import time

import pytest

from olmodebug.api import shapes
from olmodebug.records import ModuleShape
from olmodebug.render.layout import console
from olmodebug.render.shapes import shapes_view
from olmodebug.shape_tree import folded


def _row(tree, path):  # type: ignore[no-untyped-def]
    return next(row for row in tree.rows if row.path == path)


def test_dimensions_carry_the_names_of_the_configuration() -> None:
    tree = shapes("olmo3-tiny")
    assert _row(tree, "model.layers.0.self_attn.q_proj").inputs == ("(B, T, hidden)",)
    assert _row(tree, "model.layers.0.self_attn.k_proj").outputs == ("(B, T, kv_heads*head_dim)",)
    assert _row(tree, "model.layers.0.mlp.gate_proj").outputs == ("(B, T, intermediate)",)
    assert _row(tree, "lm_head").outputs == ("(B, T, vocab)",)


def test_identical_layers_fold_into_one() -> None:
    tree = shapes("olmo2-1B")
    layer = _row(tree, "model.layers.0")
    assert layer.repeat == 16
    assert not any(row.path.startswith("model.layers.1.") for row in tree.rows)


def test_a_seven_billion_model_needs_no_memory_and_has_its_published_size() -> None:
    started = time.process_time()
    tree = shapes("olmo2-7B")
    assert tree.device == "meta"
    assert tree.parameters == 7_298_617_344
    assert time.process_time() - started < 30


def test_a_module_that_forward_never_calls_is_said_to_be_so() -> None:
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(97, 48)
            self.unused = nn.Linear(48, 31)
            self.head = nn.Linear(48, 97)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(input_ids))

    tree = shapes(Model())
    assert not _row(tree, "unused").called
    assert _row(tree, "head").inputs == ("(B, T, 48)",)
    assert "not called" in _drawn(tree)


def test_unlike_siblings_are_not_folded() -> None:
    def block(i: int, out: str) -> ModuleShape:
        return ModuleShape(path=f"layers.{i}", kind="Block", depth=2, inputs=("(B, T, 8)",), outputs=(out,), parameters=3)

    rows = [block(0, "(B, T, 8)"), block(1, "(B, T, 8)"), block(2, "(B, T, 9)")]
    assert [(row.path, row.repeat) for row in folded(rows)] == [("layers.0", 2), ("layers.2", 1)]


@pytest.mark.parametrize("width", [40, 120])
def test_brackets_and_names_survive_the_drawing(width: int) -> None:
    text = _drawn(shapes("olmo1-tiny"), width=width)
    assert "q_proj" in text
    assert "(B, T, hidden)" in " ".join(text.split())


def _drawn(tree, width: int = 120) -> str:  # type: ignore[no-untyped-def]
    stream = io.StringIO()
    console(stream, width=width).print(shapes_view(tree))
    return stream.getvalue()
