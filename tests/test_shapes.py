"""The tree of named shapes."""

import functools
import io
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from olmodebug.api import shapes
from olmodebug.errors import SubjectError
from olmodebug.records import ModuleShape, ShapeTree
from olmodebug.render.layout import console
from olmodebug.render.shapes import shapes_view
from olmodebug.report import plain
from olmodebug.spec import Job
from olmodebug.tracing.shape_tree import folded, tree_of_spec


def _row(tree, path):  # type: ignore[no-untyped-def]
    return next(row for row in tree.rows if row.path == path)


def test_dimensions_carry_the_names_of_the_configuration() -> None:
    tree = shapes("olmo3-tiny")
    assert _row(tree, "model.layers.0.self_attn.q_proj").inputs == ("(B, T, hidden)",)
    assert _row(tree, "model.layers.0.self_attn.k_proj").outputs == ("(B, T, kv_heads*head_dim)",)
    assert _row(tree, "model.layers.0.mlp.gate_proj").outputs == ("(B, T, intermediate)",)
    assert _row(tree, "lm_head").outputs == ("(B, T, vocab)",)


def test_where_one_number_has_two_meanings_the_flow_of_the_data_decides() -> None:
    tree = shapes("olmo2-1B")
    attention = "model.layers.0.self_attn"
    assert tree.names["hidden"] == tree.names["heads*head_dim"] == 2048
    for name in ("q_proj", "k_proj", "v_proj"):
        assert _row(tree, f"{attention}.{name}").inputs == ("(B, T, hidden)",)
        assert _row(tree, f"{attention}.{name}").outputs == ("(B, T, heads*head_dim)",), "split into heads after a norm, or at once"
    assert _row(tree, f"{attention}.o_proj").inputs == ("(B, T, heads*head_dim)",)
    assert _row(tree, f"{attention}.o_proj").outputs == ("(B, T, hidden)",)


@pytest.mark.parametrize(
    ("spec", "path", "inputs", "outputs"),
    [
        ("GPT2LMHeadModel", "transformer.h.0.attn.c_attn", "(B, T, hidden)", "(B, T, 3*heads*head_dim)"),
        ("GPT2LMHeadModel", "transformer.h.0.mlp.c_fc", "(B, T, hidden)", "(B, T, 4*hidden)"),
        ("GPTNeoXForCausalLM", "gpt_neox.layers.0.attention.query_key_value", "(B, T, hidden)", "(B, T, heads*3*head_dim)"),
        ("MixtralForCausalLM", "model.layers.0.mlp.gate", "(B*T, hidden)", "(B*T, experts)"),
        ("MixtralForCausalLM", "model.layers.0.self_attn.k_proj", "(B, T, hidden)", "(B, T, kv_heads*head_dim)"),
    ],
)
def test_fused_projections_and_experts_of_transformers_classes_are_named(spec: str, path: str, inputs: str, outputs: str) -> None:
    row = _row(_tree(f"transformers:{spec}"), path)
    assert (row.inputs[0], row.outputs[0]) == (inputs, outputs)


@functools.cache
def _tree(spec: str) -> ShapeTree:
    return tree_of_spec(Job(spec=spec))


def test_a_class_whose_code_reads_values_runs_on_fake_tensors() -> None:
    tree = _tree("transformers:GPT2LMHeadModel")  # its mask code asks whether a mask is all ones
    assert tree.device == "fake"
    assert tree.runs == ((3, 11), (5, 17))


class Fused(nn.Module):
    """A file somebody wrote yesterday: no configuration, one fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.embed = nn.Embedding(97, 48)
        self.qkv = nn.Linear(48, 144)
        self.out = nn.Linear(48, 48)
        self.head = nn.Linear(48, 97)

    def forward(self, input_ids: Tensor) -> Tensor:
        batch, seq = input_ids.shape
        query, key, value = (t.view(batch, seq, self.heads, 12).transpose(1, 2) for t in self.qkv(self.embed(input_ids)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(self.out(mixed.transpose(1, 2).reshape(batch, seq, 48)))  # type: ignore[no-any-return]


def test_a_model_without_a_configuration_is_named_from_its_embedding_and_its_attributes() -> None:
    tree = shapes(Fused())
    assert _row(tree, "qkv").outputs == ("(B, T, 3*heads*head_dim)",)
    assert _row(tree, "out").inputs == ("(B, T, heads*head_dim)",)
    assert _row(tree, "head").outputs == ("(B, T, vocab)",)


def test_a_short_table_of_positions_still_tells_the_length_from_a_size() -> None:
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"max_position_embeddings": 8}
            self.embed = nn.Embedding(97, 48)
            self.position = nn.Embedding(8, 48)

        def forward(self, input_ids: Tensor) -> Tensor:
            return (self.embed(input_ids) + self.position(torch.arange(input_ids.shape[1]))) @ self.embed.weight.t()

    tree = shapes(Short())
    assert tree.runs == ((3, 7), (5, 5))
    assert _row(tree, "position").inputs == ("(T,)",)


def test_a_length_that_is_padded_to_whole_chunks_is_still_the_length() -> None:
    class Chunks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(97, 24)

        def forward(self, input_ids: Tensor) -> Tensor:
            assert input_ids.shape[1] % 4 == 0, "whole chunks only"
            return self.embed(input_ids) @ self.embed.weight.t()

    assert _row(shapes(Chunks()), "embed").outputs == ("(B, T, hidden)",)


def test_a_model_too_large_to_allocate_is_not_allocated_for_its_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "reads.py"
    file.write_text(
        "import torch\nfrom torch import nn\nclass Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.embed = nn.Embedding(97, 48)\n    def forward(self, input_ids):\n        x = self.embed(input_ids)\n"
        "        return x @ self.embed.weight.t() if x.sum().item() == x.sum().item() else x\n",
        encoding="utf-8",
    )
    assert tree_of_spec(Job(spec=f"{file}:Model")).device == "cpu"
    monkeypatch.setattr("olmodebug.tracing.shape_tree.MOST_BYTES", 1000)
    with pytest.raises(SubjectError, match="18.2 KiB are not allocated"):
        tree_of_spec(Job(spec=f"{file}:Model"))


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
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(97, 48)
            self.unused = nn.Linear(48, 31)
            self.head = nn.Linear(48, 97)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(input_ids))  # type: ignore[no-any-return]

    tree = shapes(Model())
    assert not _row(tree, "unused").called
    assert _row(tree, "head").inputs == ("(B, T, hidden)",), "the embedding's width, for want of a configuration"
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
    console(stream, width=width).print(shapes_view(plain(tree)))
    return stream.getvalue()
