"""How the operands of a failed op are told."""

import textwrap
from pathlib import Path

import pytest
import torch

from olmodebug import check
from olmodebug.explain import operands
from olmodebug.sources import Spot, traceback_frames
from olmodebug.tracing.dims import named_shape


def test_a_batch_has_one_dimension_and_equal_lengths_have_two() -> None:
    assert named_shape((4, 4, 7, 7), {4: "B", 7: "T"}) == "(B=4, 4, T=7, T=7)"
    assert named_shape((3,), {}) == "(3,)"


@pytest.mark.parametrize(("left", "told"), [(torch.ones(2), "left (2,), right (3,)"), (torch.tensor(1.0), "")])
def test_operands_are_told_with_their_shapes_unless_all_are_single_numbers(left: torch.Tensor, told: str) -> None:
    right = torch.ones(3) if told else torch.tensor(2.0)
    with pytest.raises(RuntimeError) as raised:
        torch.add(left, right, out=torch.empty(5, device="meta"))
    frame, instruction, line = traceback_frames(raised.value.__traceback__)[0]
    assert operands(raised.value, Spot(frame.f_code, instruction, line), {}) == told


ASSERTS = """
    import torch
    from torch import nn

    def added(x, table):
        assert table.shape == x.shape[1:]
        return x + table

    class Asserts(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.table = nn.Embedding(31, 8), nn.Parameter(torch.zeros(3, 8))

        def forward(self, input_ids):
            return added(self.embed(input_ids), self.table) @ self.embed.weight.T
"""


def test_an_assert_without_words_is_told_by_the_shapes_of_what_it_compares(tmp_path: Path) -> None:
    (tmp_path / "asserts.py").write_text(textwrap.dedent(ASSERTS), encoding="utf-8")
    (finding,) = check(f"{tmp_path / 'asserts.py'}:Asserts", select_probes="rope").findings
    assert finding.message == "forward raises AssertionError (table (3, 8), x (B=2, T=5, 8))"
    assert finding.raised == "AssertionError"
