"""The leak matrix shows who depends on whom, and the module that lets it through."""

import pytest
import torch
from torch import Tensor, nn

from olmodebug.api import check
from olmodebug.first_run import from_model
from olmodebug.relations.leaks import Leaks, leaks
from olmodebug.render.layout import console
from olmodebug.render.leaks import leaks_view
from olmodebug.report import from_json, plain


class Peek(nn.Module):
    """Each position also reads the one `ahead` of it."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + nn.functional.pad(hidden[:, self.ahead :], (0, 0, 0, self.ahead))


class Model(nn.Module):
    def __init__(self, *ahead: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(97, 48)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(48), Peek(n) if n else nn.Tanh()) for n in ahead)
        self.head = nn.Linear(48, 97)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]


def measured(*ahead: int, tokens: int = 7) -> Leaks:
    twin = from_model(Model(*ahead)).twin()
    return leaks(twin, twin.token_ids(1, tokens)[0], limit=1e-9)


def test_the_matrix_marks_exactly_the_positions_that_depend_on_a_later_token() -> None:
    found = measured(0, 2)
    dependent = {(t, p) for t, row in enumerate(found.matrix) for p, change in enumerate(row) if change > found.limit}
    assert dependent == {(t, t) for t in range(7)} | {(t, t - 2) for t in range(2, 7)}


def test_the_module_that_lets_it_through_is_told_from_those_that_pass_it_on() -> None:
    found = measured(0, 1, 0)
    assert [leak.module for leak in found.modules if leak.first] == ["blocks.1.1"]
    assert [leak.module for leak in found.modules] == ["blocks.1.1", "blocks.1", "blocks.2.0", "blocks.2.1", "blocks.2", "head", ""]


def test_a_causal_model_has_no_leak() -> None:
    found = measured(0, 0)
    assert found.modules == ()
    assert all(change == 0 for t, row in enumerate(found.matrix) for p, change in enumerate(row) if p != t)


@pytest.fixture(scope="module")
def report():  # type: ignore[no-untyped-def]
    return check(Model(1), select_probes="no-future")


def test_a_report_on_a_model_that_sees_the_future_carries_the_matrix(report) -> None:  # type: ignore[no-untyped-def]
    section = from_json(report.to_json()).sections["leaks"]
    size = len(section["input_ids"])
    assert len(section["matrix"]) == size
    assert all(section["matrix"][t][t - 1] > section["limit"] for t in range(1, size))
    assert [m["module"] for m in section["modules"] if m["first"]] == ["blocks.0.1"]


def test_a_report_on_a_causal_model_carries_none() -> None:
    assert "leaks" not in check(Model(0), select_probes="no-future").sections


def test_the_drawing_says_how_many_positions_leak_and_where() -> None:
    import io

    stream = io.StringIO()
    console(stream, width=100).print(leaks_view(plain(measured(1, tokens=4))))
    assert stream.getvalue().splitlines() == [
        "3 of 6 earlier positions change with a later token  (x changes, o and . as they may)",
        "  changed    0123  observed position",
        "  token 0    o...",
        "  token 1    xo..",
        "  token 2    .xo.",
        "  token 3    ..xo",
        *[text for text in stream.getvalue().splitlines() if "let in by" in text],
    ]
    assert "blocks.0.1 (Peek)" in stream.getvalue()
