"""The nan guard: a birth that reaches a loss, a gradient or a weight is named with its line and cause; all others are silent."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmodebug.guards.journal import Journal
from olmodebug.guards.nonfinite import NonFinite
from olmodebug.guards.watch import Watch
from olmodebug.report import Finding

pytestmark = pytest.mark.usefixtures("_only_young_objects")


class Model(nn.Module):
    """A little attention; `middle` is what a test breaks."""

    def __init__(self, middle: Callable[[Tensor], Tensor] = lambda x: x, visible: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(31, 16), nn.Linear(16, 31)
        self.middle, self.visible = middle, visible

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril(self.visible)
        scores = (x @ x.transpose(1, 2)).masked_fill(~mask, -math.inf)
        return self.head(self.middle(scores.softmax(-1) @ x))


def train(model: nn.Module, *, steps: int = 2, labels: Tensor | None = None) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 31, (2, 9))
        loss = F.cross_entropy(model(ids).flatten(0, 1), (ids if labels is None else labels).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def found(run: Callable[[], Any], *, deferred: bool = False) -> list[Finding]:
    journal = Journal(None)
    with Watch(("nan",), journal) as watch:
        for part in watch.parts:
            if isinstance(part, NonFinite):
                part.deferred = deferred
        run()
    return [finding for finding in journal.findings if finding.severity == "error"]


def line_of(function: Callable[..., Any], text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if text in line)


@pytest.mark.parametrize("deferred", [False, True])
def test_infinities_of_a_mask_are_silent(deferred: bool) -> None:
    assert not found(lambda: train(Model()), deferred=deferred)


def test_a_row_that_is_masked_throughout_is_the_cause_of_its_nan() -> None:
    (finding,) = found(lambda: train(Model(visible=-1), steps=1))
    assert finding.message.startswith("nan is born in _softmax and reaches the loss of step 1")
    assert finding.cause is not None and finding.cause.startswith("2 of 18 rows are -inf throughout")
    assert finding.where.line == line_of(Model.forward, "softmax")
    assert "masked_fill" in str(finding.evidence["inf_from"])


def test_a_birth_on_a_device_that_is_read_later_has_the_same_place() -> None:
    now, later = found(lambda: train(Model(visible=-1), steps=1)), found(lambda: train(Model(visible=-1), steps=1), deferred=True)
    assert [(f.message, f.where.line) for f in later] == [(f.message, f.where.line) for f in now]


def test_the_log_of_zero_is_blamed_and_not_the_op_that_makes_nan_of_it() -> None:
    (finding,) = found(lambda: train(Model(lambda x: x + torch.log(x - x.detach()).sum()), steps=1))
    assert finding.message.startswith("inf is born in log ")
    assert finding.cause == "log of 0"
    assert str(finding.evidence["becomes_nan_in"]).startswith("addmm")


def test_a_birth_in_backward_is_placed_at_the_forward_line() -> None:
    def middle(x: Tensor) -> Tensor:
        return x / (1 + (x - x.detach()).pow(2).sum(-1, keepdim=True).sqrt())

    (finding,) = found(lambda: train(Model(middle), steps=1))
    assert "in the backward of this line (SqrtBackward0)" in finding.message
    assert finding.cause == "the derivative of sqrt at 0 is infinite"
    assert finding.where.line == line_of(middle, "sqrt()")
    assert finding.evidence["reached"] == "the gradient of embed.weight"


def test_a_batch_without_a_label_is_told() -> None:
    (finding,) = found(lambda: train(Model(), steps=1, labels=torch.full((2, 9), -100)))
    assert finding.cause is not None and finding.cause.startswith("no label of this batch is valid")


def test_an_overflow_of_float16_is_shown_by_the_same_op_in_float32() -> None:
    (finding,) = found(lambda: train(Model(lambda x: (x.half() * 60000).float()), steps=1))
    assert finding.cause is not None and finding.cause.startswith("overflow: the value is ") and "float16" in finding.cause
    assert finding.where.op == "mul"


def test_nan_of_the_weights_is_traced_to_them() -> None:
    model = Model()
    model.head.weight.data[3, 4] = math.nan
    (finding,) = found(lambda: train(model, steps=1))
    assert finding.message.startswith("`head.weight` holds nan")
    assert finding.evidence["optimizer_steps_before"] == 0


def test_nan_of_the_data_is_traced_to_it() -> None:
    data = torch.randn(4, 8)
    data[2, 3] = math.nan
    model = nn.Linear(8, 2)
    (finding,) = found(lambda: model(data).sum().backward())
    assert finding.message.startswith("a tensor that no op of this run made holds nan")


def test_values_that_are_masked_away_or_never_read_are_silent() -> None:
    def middle(x: Tensor) -> Tensor:
        torch.log(torch.zeros(3))
        return torch.where(x > 0, x, torch.zeros_like(x)) + torch.nan_to_num(torch.zeros(()) / torch.zeros(()))

    assert not found(lambda: train(Model(middle)))


def test_an_overflow_that_the_loss_scaler_skips_is_silent() -> None:
    def run() -> None:
        model = nn.Linear(8, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
        for _ in range(3):
            loss = (model(torch.randn(4, 8)) * 100).pow(2).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() < 2.0**127  # it did skip

    assert not found(run)


def test_losses_and_random_numbers_are_the_same_bit_for_bit() -> None:
    def run() -> tuple[list[float], float]:
        model = Model(lambda x: F.dropout(x, 0.3))
        return train(model, steps=3), float(torch.rand(()))

    plain = run()
    with Watch(("index", "nan", "shape", "oom", "loop"), Journal(None)):
        assert run() == plain


def test_a_fault_of_the_guard_itself_does_not_stop_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*values: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("olmodebug.guards.nonfinite._has", broken)
    with Watch(("nan",), Journal(None)) as watch:
        losses = train(Model())
    assert all(math.isfinite(loss) for loss in losses)
    assert watch.faults >= 1 and not watch.observers


def test_infinities_that_a_script_writes_by_hand_need_no_search_for_their_models() -> None:
    scores, asked = torch.randn(4, 9), []
    with Watch(("nan",), Journal(None)) as watch:
        watch.models.roots = lambda **_: asked.append(1) or []  # type: ignore[assignment, func-returns-value]
        for _ in range(3):
            scores[scores < scores.topk(3).values[:, [-1]]] = -math.inf
            scores.softmax(-1)
    assert bool(torch.isinf(scores).any()) and not asked
