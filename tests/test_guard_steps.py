"""What a loop does to gradients between a backward and a step, to weights before the first one, and to rates: told, or legal."""

import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from olmodebug.guards.journal import Journal
from olmodebug.guards.settings import GUARDS
from olmodebug.guards.watch import Watch
from olmodebug.report import Finding

from .test_guard_controls import VOCAB, Model, ids, loss_of

pytestmark = pytest.mark.usefixtures("_only_young_objects")


def found(run: Callable[[], None], *, guards: tuple[str, ...] = GUARDS) -> list[Finding]:
    """What is said of a piece of a script, which may raise."""
    torch.manual_seed(0)
    journal = Journal(None)
    try:
        with Watch(guards, journal) as watch:
            run()
    except (RuntimeError, AssertionError, IndexError):
        pass
    assert not watch.faults
    return journal.findings


def said(run: Callable[[], None], text: str) -> tuple[str, str, bool]:
    """The one finding on a faulty script: its probe and severity, and whether its line is the one with `text`."""
    (finding,) = found(run)
    lines, first = inspect.getsourcelines(run)
    (line,) = [first + number for number, source in enumerate(lines) if text in source]
    return finding.probe, finding.severity, finding.where.line == line


def made() -> tuple[Model, torch.optim.Optimizer]:
    model = Model()
    return model, torch.optim.AdamW(model.parameters())


def clip(model: nn.Module, limit: float = 1.0) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), limit)


# Thrown away


def reset_before_the_step() -> None:
    model, optimizer = made()
    for _ in range(5):
        loss_of(model, ids()).backward()
        optimizer.zero_grad()
        optimizer.step()


def step_before_the_backward() -> None:
    model, optimizer = made()
    for _ in range(5):
        model.zero_grad()
        loss = loss_of(model, ids())
        optimizer.step()
        loss.backward()


@pytest.mark.parametrize(
    ("fault", "line"), [(reset_before_the_step, "optimizer.zero_grad()"), (step_before_the_backward, "model.zero_grad()")]
)
def test_gradients_that_are_reset_before_they_are_applied_are_told(fault: Callable[[], None], line: str) -> None:
    assert said(fault, line) == ("loop.gradients-reach-the-step", "error", True)


def test_a_scaler_that_finds_no_gradient_says_so_itself_and_is_explained() -> None:
    def run() -> None:
        model, optimizer = made()
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(model, ids())).backward()
        optimizer.zero_grad()
        scaler.step(optimizer)

    assert said(run, "scaler.step(") == ("loop.scaler-in-order", "error", True)


def test_weights_that_a_step_changes_between_forward_and_backward_are_told_at_the_step() -> None:
    def run() -> None:
        model, optimizer = made()
        for _ in range(2):
            loss = loss_of(model, ids())
            optimizer.step()
            loss.backward()

    assert said(run, "optimizer.step()") == ("loop.backward-runs", "error", True)


@pytest.mark.parametrize("fully", [False, True])
@pytest.mark.parametrize("reset", [True, False])
def test_gradients_that_are_shards_are_followed_too(reset: bool, fully: bool) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    def sharded() -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
        mesh = init_device_mesh("cpu", (1,))
        if fully:  # adds up the local parts, below what the version of the whole tensor counts
            model = fully_shard(nn.Linear(3, 4), mesh=mesh)
            return list(model.parameters()), lambda: model(torch.randn(2, 3)).pow(2).sum()
        weight = nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Shard(0)]))
        return [weight], lambda: weight.to_local().pow(2).sum()

    def run() -> None:
        weights, loss = sharded()
        optimizer = torch.optim.SGD(weights, lr=0.1)
        for _ in range(3):
            loss().backward()
            optimizer.step()
            if reset:
                optimizer.zero_grad()

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert [f.probe for f in found(run)] == ([] if reset else ["loop.gradients-reset"])
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_that_wait_beside_a_gathered_weight_are_let_be() -> None:
    """Micro-batches without a reduction: FSDP keeps the whole gradient, and takes the memory of the whole weight back."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    def run() -> None:
        model = fully_shard(nn.Linear(3, 4), mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number in range(6):
            model.set_requires_gradient_sync(number % 2 == 1)
            (model(torch.randn(2, 3)).pow(2).sum() / 2).backward()
            if number % 2 == 1:
                optimizer.step()
                optimizer.zero_grad()

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert found(run) == []
    finally:
        torch.distributed.destroy_process_group()


def bad_steps_are_dropped() -> None:
    model, optimizer = made()
    for number in range(8):
        loss_of(model, ids()).backward()
        if number % 3 != 2:  # as after a gradient that is not finite
            optimizer.zero_grad()
            optimizer.step()
            continue
        optimizer.step()
        optimizer.zero_grad()


def one_of_two_players_waits() -> None:
    left, right = Model(), Model()
    first, second = torch.optim.Adam(left.parameters()), torch.optim.Adam(right.parameters())
    for number in range(8):
        second.zero_grad()
        loss_of(left, ids()).backward()
        if not number:
            loss_of(right, ids()).backward()
        first.step()
        second.step()
        first.zero_grad()


def closure_after_a_reset() -> None:
    model = Model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, ids())
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.zero_grad()
        optimizer.step(evaluate)


def only_the_last_micro_batch(*, take: Callable[[nn.Module], None] = clip) -> None:
    model, optimizer = made()
    for number in range(12):
        optimizer.zero_grad()
        (loss_of(model, ids()) / 3).backward()
        take(model)
        if number % 3 == 2:
            optimizer.step()


def test_micro_batches_whose_gradients_are_reset_are_told() -> None:
    (finding,) = found(only_the_last_micro_batch)
    assert (finding.probe, finding.severity) == ("loop.gradients-reach-the-step", "warning")
    assert "of 3 micro-batches only the last one" in finding.message
    lines, first = inspect.getsourcelines(only_the_last_micro_batch)
    assert finding.where.line == first + next(n for n, line in enumerate(lines) if "zero_grad" in line)


def gathered_by_hand() -> None:
    """Gradients clipped one by one and added up elsewhere, as for private training, and given back before the step."""
    total: list[Tensor] = []

    def take(model: nn.Module) -> None:
        clip(model)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        total[:] = [t + g for t, g in zip(total, grads, strict=True)] if total else [g.clone() for g in grads]
        for p, gradient in zip(model.parameters(), total, strict=True):
            p.grad = gradient.clone()

    only_the_last_micro_batch(take=take)


def sharpness_aware() -> None:
    """A first backward only shows where to move the weights before the second, whose gradient is applied to the old ones."""
    model, optimizer = made()

    def backward() -> None:
        loss_of(model, ids()).backward()

    for _ in range(5):
        optimizer.zero_grad()
        backward()
        moved = [0.05 * p.grad for p in model.parameters() if p.grad is not None]
        for p, change in zip(model.parameters(), moved, strict=True):
            p.data += change
        optimizer.zero_grad()
        backward()
        for p, change in zip(model.parameters(), moved, strict=True):
            p.data -= change
        optimizer.step()


# Nothing to apply


def no_backward() -> None:
    model, optimizer = made()
    for _ in range(5):
        loss_of(model, ids())
        optimizer.zero_grad()
        optimizer.step()


def optimizer_of_the_model_before() -> None:
    model, optimizer = made()
    for number in range(8):
        if number == 4:
            model = Model()  # as after loading a checkpoint
        loss_of(model, ids()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("fault", "cause"),
    [(no_backward, "backward was not called"), (optimizer_of_the_model_before, "the optimizer holds none of its parameters")],
)
def test_steps_that_find_no_gradient_are_told(fault: Callable[[], None], cause: str) -> None:
    (finding,) = found(fault)
    assert (finding.probe, finding.severity) == ("loop.gradients-reach-the-step", "error")
    assert cause in (finding.cause or "")


def test_gradients_that_no_optimizer_ever_applies_are_told() -> None:
    def run() -> None:
        model, optimizer = made()
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model, ids()).backward()
        optimizer.zero_grad()

    (finding,) = found(run)
    assert finding.message == "gradients were computed and reset 5 times, and no optimizer has ever stepped: no weight changes"


def a_schedule_is_looked_at() -> None:
    _, optimizer = made()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(6):
        optimizer.step()
        schedule.step()


def updates_by_hand_beside_an_optimizer() -> None:
    model, optimizer = made()
    for _ in range(6):
        loss_of(model, ids()).backward()
        for p in model.parameters():
            p.data -= 0.1 * p.grad  # type: ignore[operator]
        optimizer.zero_grad()


def test_gradients_of_which_the_smallest_are_zero_are_followed_too() -> None:
    """As those of low-rank additions, one factor of which begins at zero."""

    def run() -> None:
        down, up = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.zeros(2, 40))
        optimizer = torch.optim.SGD([down, up], lr=0.1)
        for _ in range(4):
            (torch.ones(3, 4) @ down @ up - 1).pow(2).mean().backward()
            optimizer.zero_grad()
            optimizer.step()

    assert said(run, "optimizer.zero_grad()") == ("loop.gradients-reach-the-step", "error", True)


# Clipped too late


def clipped_after_the_step() -> None:
    model, optimizer = made()
    for _ in range(5):
        loss_of(model, ids()).backward()
        optimizer.step()
        clip(model)
        optimizer.zero_grad()


def test_gradients_that_are_clipped_after_their_step_are_told() -> None:
    (finding,) = found(clipped_after_the_step)
    assert (finding.probe, finding.severity) == ("loop.clip-before-step", "warning")
    assert finding.where.function == "clip"


def clipped_before_and_after() -> None:
    model, optimizer = made()
    for _ in range(5):
        loss_of(model, ids()).backward()
        clip(model)
        optimizer.step()
        clip(model)
        optimizer.zero_grad()


def measured_with_the_loss_scale() -> None:
    model, optimizer = made()
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(3):
        scaler.scale(loss_of(model, ids())).backward()
        clip(model, float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def measured_after_the_step() -> None:
    model, optimizer = made()
    for _ in range(5):
        loss_of(model, ids()).backward()
        optimizer.step()
        clip(model, float("inf"))
        optimizer.zero_grad()


def each_optimizer_clipped_before_its_step() -> None:
    model = Model()
    first = torch.optim.SGD([model.embed.weight], lr=0.1)
    second = torch.optim.Adam([*model.body.parameters(), *model.head.parameters()])
    for _ in range(5):
        loss_of(model, ids()).backward()
        first.step()
        clip(model)
        second.step()
        model.zero_grad()


def test_clipping_is_given_all_of_a_generator_and_an_empty_one_warns_as_ever() -> None:
    model = Model()
    with Watch(GUARDS, Journal(None)):
        loss_of(model, ids()).backward()
        before = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        assert torch.allclose(nn.utils.clip_grad_norm_((p for p in model.parameters()), 1e-3), before)
        assert torch.allclose(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm(), torch.tensor(1e-3))
        with pytest.warns(UserWarning, match="empty generator"):
            nn.utils.clip_grad_norm_((p for p in ()), 1.0)


# Applied with the loss scale


def step_past_the_scaler() -> None:
    model, optimizer = made()
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(3):
        scaler.scale(loss_of(model, ids())).backward()
        optimizer.step()
        optimizer.zero_grad()


def second_optimizer_past_the_scaler() -> None:
    model = Model()
    first = torch.optim.SGD([model.embed.weight], lr=0.1)
    second = torch.optim.Adam([*model.body.parameters(), *model.head.parameters()])
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        scaler.scale(loss_of(model, ids())).backward()
        scaler.step(second)
        first.step()
        scaler.update()
        model.zero_grad()


def test_a_step_on_gradients_that_carry_the_loss_scale_is_told_at_its_line() -> None:
    first = found(step_past_the_scaler)[0]
    assert (first.probe, first.severity, first.evidence["scale"]) == ("loop.step-unscaled", "error", 65536.0)
    assert said(second_optimizer_past_the_scaler, "first.step()") == ("loop.step-unscaled", "error", True)


def test_one_norm_over_gradients_of_which_some_carry_the_scale_is_told() -> None:
    def run() -> None:
        model = Model()
        first = torch.optim.SGD([model.embed.weight], lr=0.1)
        second = torch.optim.Adam([*model.body.parameters(), *model.head.parameters()])
        scaler = torch.amp.GradScaler("cpu")
        for _ in range(2):
            scaler.scale(loss_of(model, ids())).backward()
            scaler.unscale_(second)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(first)
            scaler.step(second)
            scaler.update()
            model.zero_grad()

    assert [(f.probe, f.severity) for f in found(run)][:1] == [("loop.unscale-before-clip", "error")]


def unscaled_by_hand() -> None:
    model, optimizer = made()
    scaler = torch.amp.GradScaler("cpu")
    for number in range(4):
        scaler.scale(loss_of(model, ids())).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if number % 2:
            torch._foreach_div_(grads, scaler.get_scale())  # type: ignore[call-overload]
        else:
            for grad in grads:
                grad.div_(scaler.get_scale())
        optimizer.step()
        optimizer.zero_grad()


def one_loss_of_two_is_scaled() -> None:
    left, right = Model(), Model()
    first, second = torch.optim.Adam(left.parameters()), torch.optim.Adam(right.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(3):
        scaler.scale(loss_of(left, ids())).backward()
        loss_of(right, ids()).backward()
        second.step()
        scaler.step(first)
        scaler.update()
        first.zero_grad()
        second.zero_grad()


def test_a_scaler_that_is_never_updated_is_explained() -> None:
    def run() -> None:
        model, optimizer = made()
        scaler = torch.amp.GradScaler("cpu")
        for _ in range(2):
            scaler.scale(loss_of(model, ids())).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            optimizer.zero_grad()

    assert said(run, "scaler.unscale_(") == ("loop.scaler-in-order", "error", True)


# Added up


def summed() -> None:
    model, optimizer = made()
    for _ in range(3):
        for _ in range(4):
            loss_of(model, ids()).backward()
        clip(model)
        optimizer.step()
        optimizer.zero_grad()


def summed_under_a_scaler() -> None:
    model, optimizer = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for _ in range(3):
        for _ in range(4):
            scaler.scale(loss_of(model, ids())).backward()
        scaler.unscale_(optimizer)
        clip(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@pytest.mark.parametrize("fault", [summed, summed_under_a_scaler])
def test_micro_batches_that_are_added_up_are_a_note(fault: Callable[[], None]) -> None:
    (finding,) = found(fault)
    assert (finding.probe, finding.severity) == ("loop.accumulation-divided", "note")
    assert "sum of 4" in finding.message


def divided_afterwards() -> None:
    model, optimizer = made()
    for number in range(6):
        for _ in range(3):
            loss_of(model, ids()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if number % 2:
            torch._foreach_div_(grads, 3.0)  # type: ignore[call-overload]
        else:
            for grad in grads:
                grad /= 3
        clip(model)
        optimizer.step()
        optimizer.zero_grad()


# Rates


@pytest.mark.parametrize(
    ("schedule", "severity"), [(lambda step: float("nan"), "error"), (lambda step: step // 100, "warning"), (lambda step: step / 100, "")]
)
def test_a_rate_that_cannot_train_is_told_once(schedule: Callable[[int], float], severity: str) -> None:
    def run() -> None:
        model, optimizer = made()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        for _ in range(10):
            loss_of(model, ids()).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    assert [(f.probe, f.severity) for f in found(run)] == ([("loop.learning-rate", severity)] if severity else [])


# Weights that nobody filled


@pytest.fixture
def filled_with_nan() -> Iterator[None]:
    """Fresh memory holds nan, so that a test does not depend on what lay there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("forgotten", [True, False])
def test_weights_that_to_empty_left_uninitialised_are_told_and_their_nan_is_no_second_finding(
    filled_with_nan: None, forgotten: bool
) -> None:
    def run() -> None:
        with torch.device("meta"):
            model = Model()
        model.to_empty(device="cpu")
        model.embed.weight.data.copy_(torch.randn(VOCAB, 16))
        model.head.load_state_dict({"weight": torch.randn(VOCAB, 16), "bias": torch.zeros(VOCAB)}, assign=True)
        if not forgotten:
            model.body.weight.data.normal_()
        model.body.bias.data.zero_()
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            loss_of(model, ids()).backward()
            optimizer.step()
            optimizer.zero_grad()

    if not forgotten:
        assert not found(run)
        return
    assert said(run, "model.to_empty(") == ("loop.weights-filled", "error", True)
    assert "body.weight" in found(run)[0].message


# A graph that is gone


class Carrying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(VOCAB, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, VOCAB)

    def forward(self, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        out, state = self.cell(self.embed(tokens), state)
        return self.head(out), state


def test_a_state_that_is_carried_with_its_graph_is_told_where_it_is_read() -> None:
    def run() -> None:
        model, state = Carrying(), None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            tokens = ids()
            logits, state = model(tokens, state)
            F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

    (finding,) = found(run)
    lines, first = inspect.getsourcelines(Carrying.forward)
    assert (finding.probe, finding.severity) == ("loop.backward-runs", "error")
    assert finding.where.line == first + next(n for n, line in enumerate(lines) if "self.cell(" in line)
    assert "detach()" in (finding.fix or "")


def test_two_losses_of_one_graph_are_told_apart_from_a_state_that_is_carried() -> None:
    def run() -> None:
        model = Model()
        logits = model(ids())
        left, right = logits.pow(2).mean(), logits.mean()
        left.backward()
        right.backward()

    (finding,) = found(run)
    assert (finding.probe, finding.where.op) == ("loop.backward-runs", None)
    assert "shares its graph" in (finding.cause or "") and "retain_graph" in (finding.fix or "")


def shared_and_another_between() -> None:
    model, other = Model(), Model()
    logits = model(ids())
    left, right = logits.pow(2).mean(), logits.mean()
    left.backward()  # frees it
    apart = other(ids()).mean()
    apart.backward()
    right.backward()


def carried_and_another_between() -> None:
    cell, other = nn.Linear(4, 4), Model()
    state = torch.zeros(1, 4)
    for _ in range(2):
        state = cell(state).tanh()
        loss = state.sum()
        other(ids()).mean().backward()
        loss.backward()


def overwritten_and_a_step_between() -> None:
    model, optimizer = made()
    other = nn.Linear(4, 4)
    for _ in range(2):
        loss_of(model, ids()).backward()
        hidden = other(torch.ones(2, 4)).exp()
        loss = hidden.sum()
        hidden.add_(1)
        optimizer.step()
        loss.backward()


def test_a_backward_or_a_step_that_only_came_between_is_not_blamed() -> None:
    (shared,), (carried,), (overwritten,) = map(
        found, (shared_and_another_between, carried_and_another_between, overwritten_and_a_step_between)
    )
    lines, first = inspect.getsourcelines(shared_and_another_between)
    frees = first + next(n for n, line in enumerate(lines) if "frees it" in line)
    assert f":{frees}, and shares its graph" in (shared.cause or "")
    assert "reads a tensor of an earlier step" in (carried.cause or "") and overwritten.cause is None
    assert {f.probe for f in (shared, carried, overwritten)} == {"loop.backward-runs"}


@pytest.mark.parametrize("scaled", [True, False])
def test_losses_in_a_list_of_an_object_are_told_also_where_their_backward_is_of_a_part(scaled: bool) -> None:
    def run() -> None:
        model, optimizer = made()
        logs: dict[str, list[Tensor]] = {"loss": []}
        for _ in range(8):
            loss = loss_of(model, ids())
            (loss / 2 if scaled else loss).backward()
            logs["loss"].append(loss)
            optimizer.step()
            optimizer.zero_grad()

    assert said(run, "].append(loss)") == ("loop.graph-released", "error", True)


def test_losses_that_are_kept_in_a_loop_without_an_optimizer_are_told() -> None:
    def run() -> None:
        model = Model()
        total: Any = 0.0
        for _ in range(8):
            loss = loss_of(model, ids())
            loss.backward()
            total += loss
            for p in model.parameters():
                p.data -= 0.1 * p.grad  # type: ignore[operator]
                p.grad = None

    assert said(run, "total += loss") == ("loop.graph-released", "error", True)


# Sampling


@pytest.mark.parametrize("careful", [True, False])
def test_tokens_that_are_sampled_with_dropout_are_told(careful: bool) -> None:
    model = Model(0.2)

    def run() -> None:
        model.train(not careful)
        with torch.no_grad():
            torch.multinomial(model(ids())[:, -1].softmax(-1), 1)

    assert [(f.probe, f.severity) for f in found(run)] == ([] if careful else [("loop.evaluates-in-eval-mode", "warning")])


def a_router_draws_inside_a_checkpointed_block() -> None:
    model, optimizer = made()
    model.dropout.p = 0.1

    def block(x: Tensor) -> Tensor:
        chosen = torch.multinomial(model.dropout(x).detach().flatten(0, 1).softmax(-1), 1)
        return model.body(x) * chosen.view(*x.shape[:2], 1)

    class Routed(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return model.head(checkpoint(block, model.embed(tokens), use_reentrant=True))

    routed = Routed()
    for _ in range(3):
        loss_of(routed, ids()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("weighted", [True, False])
def test_padding_in_a_loss_by_token_is_known_by_its_backward(weighted: bool) -> None:
    def run() -> None:
        model, optimizer = made()
        for _ in range(3):
            tokens = torch.where(torch.arange(20) < torch.tensor([[9], [12], [20], [15]]), torch.randint(2, VOCAB, (4, 20)), 1)
            losses = F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
            (losses * (tokens[:, 1:] != 1) if weighted else losses).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert [f.probe for f in found(run)[:1]] == ([] if weighted else ["loop.padding-unlabelled"])


@pytest.mark.parametrize("fault", ["", "twice", "padding"])
def test_labels_of_packed_rows_are_followed_beside_their_positions(fault: str) -> None:
    """Prompts are not asked, rows end in padding, and positions begin anew in every document."""

    class Packed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.places = nn.Embedding(VOCAB, 16, padding_idx=0), nn.Embedding(12, 16)

        def forward(self, tokens: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
            return self.head(self.embed(tokens) + self.places(places))

    def run() -> None:
        model = Packed()
        optimizer = torch.optim.AdamW(model.parameters())
        places = torch.tensor([*range(12), *range(9), 0, 0, 0]).expand(4, 24)
        for _ in range(2):
            tokens = torch.randint(1, VOCAB, (4, 24)).masked_fill(torch.arange(24) > 20, 0)
            labels = tokens.masked_fill((torch.arange(24) % 12 < 3) & (tokens != 0), -100)
            labels = labels if fault == "padding" else labels.masked_fill(tokens == 0, -100)
            cut = 2 if fault == "twice" else 1
            F.cross_entropy(model(tokens, places)[:, :-cut].flatten(0, 1), labels[:, cut:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

    expected = {"twice": ["loop.labels-shifted-once"], "padding": ["loop.padding-unlabelled"]}
    assert [f.probe for f in found(run)[:1]] == expected.get(fault, [])


class Fused(torch.autograd.Function):
    """A head with its loss, as compiled code is one: autograd turns gradients off for the forward of a Function."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        dropped = F.dropout(hidden, 0.1)
        ctx.save_for_backward(torch.zeros_like(hidden))
        return F.cross_entropy(dropped, labels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.saved_tensors[0], None


def a_loss_inside_of_a_function() -> None:
    class Whole(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            return Fused.apply(super().forward(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())  # type: ignore[no-untyped-call, no-any-return]

    model = Whole(0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(ids()).backward()
        optimizer.step()
        optimizer.zero_grad()


# Padding that only the rows show


@pytest.mark.parametrize("way", ["learned", "masked", "also elsewhere"])
def test_rows_that_are_filled_up_with_one_token_are_padding_also_without_a_mask(way: str) -> None:
    def loss(model: Model) -> Tensor:
        tokens = torch.randint(2 if way != "also elsewhere" else 0, VOCAB, (4, 20))
        tokens = torch.where(torch.arange(20) < torch.tensor([[9], [12], [20], [15]]), tokens, 1)
        if way == "also elsewhere":
            tokens[2, 3] = 1
        labels = tokens.masked_fill(tokens == 1, -100) if way == "masked" else tokens
        return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def run() -> None:
        model, optimizer = made()
        for _ in range(3):
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    expected = [("loop.padding-unlabelled", "warning")] if way == "learned" else []
    assert [(f.probe, f.severity) for f in found(run)[:1]] == expected


def test_an_id_that_fills_the_ends_of_rows_is_told_as_padding_and_one_that_does_not_is_not() -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [5, VOCAB, VOCAB, VOCAB]])
    (finding,) = found(lambda: Model()(tokens))
    assert "fills the ends of rows" in (finding.cause or "") and f"at least {VOCAB + 1} rows" in (finding.fix or "")
    (finding,) = found(lambda: Model()(tokens.flip(1)))
    assert "fills the ends" not in (finding.cause or "")


def test_a_label_beyond_the_classes_is_mended_with_the_number_that_this_loss_ignores() -> None:
    (finding,) = found(lambda: F.cross_entropy(torch.randn(3, 5), torch.tensor([1, -1, 7]), ignore_index=-1))
    assert "give -1 where nothing is asked" in (finding.fix or "")


def test_logits_whose_classes_stand_last_are_told() -> None:
    (finding,) = found(lambda: F.cross_entropy(torch.randn(2, 5, 7), torch.zeros(2, 5, dtype=torch.long)))
    assert finding.cause == "cross_entropy takes dimension 1 for the classes, which stand last in the logits (2, 5, 7)"


def test_a_weight_of_another_number_of_classes_is_no_matter_of_where_they_stand() -> None:
    logits, labels = torch.randn(2, 6, 6), torch.zeros(2, 6, dtype=torch.long)
    findings = found(lambda: F.cross_entropy(logits, labels, weight=torch.ones(5)))
    assert not any("stand last" in (f.cause or "") for f in findings)


def test_token_ids_that_count_are_no_positions() -> None:
    (finding,) = found(lambda: Model()((torch.arange(20) + torch.tensor([[VOCAB - 18], [VOCAB - 12]])) % (VOCAB + 5)))
    assert "position" not in (finding.cause or "")


def test_a_backward_that_kept_its_graph_freed_none() -> None:
    def run() -> None:
        model = Model()
        out = model(ids())
        first, second = out.pow(2).mean(), out.abs().mean()
        first.backward(retain_graph=True)
        torch.autograd.grad(first, [model.embed.weight])  # it is this one
        second.backward()

    (finding,) = found(run)
    assert "retain_graph=True on the first" not in (finding.fix or "")


def test_a_scaler_that_scaled_no_loss_is_explained() -> None:
    def run() -> None:
        model, optimizer = made()
        scaler = torch.amp.GradScaler("cpu")
        loss_of(model, ids()).backward()
        scaler.unscale_(optimizer)

    assert said(run, "scaler.unscale_(") == ("loop.scaler-in-order", "error", True)


def test_blocks_in_a_plain_list_are_told_as_such() -> None:
    class Listed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [nn.Linear(16, 16)]

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.blocks[0](self.embed(tokens)))

    gone = nn.Linear(2, 2)
    proxy = weakref.proxy(gone)  # raises when it is asked for its class
    del gone

    def run() -> None:
        model = Listed()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            loss_of(model, ids()).backward()
            optimizer.step()
            model.zero_grad()

    (finding,) = found(run)
    assert type(proxy) is weakref.CallableProxyType
    assert finding.cause == "`blocks` of Listed is a plain list, whose modules are not registered as those of an nn.ModuleList are"


def test_what_torch_refuses_for_another_reason_than_sizes_is_not_called_a_shape() -> None:
    assert said(lambda: torch.ones(2, dtype=torch.complex64).to_mkldnn(), "to_mkldnn") == ("process.survives", "error", True)
    assert said(lambda: torch.ones(2, 3).view(4), ".view(4)")[0] == "shape.fits"


LEGAL = (
    bad_steps_are_dropped, one_of_two_players_waits, closure_after_a_reset, clipped_before_and_after, measured_after_the_step,
    measured_with_the_loss_scale,
    each_optimizer_clipped_before_its_step, unscaled_by_hand, one_loss_of_two_is_scaled, divided_afterwards,
    a_router_draws_inside_a_checkpointed_block, gathered_by_hand, sharpness_aware, a_schedule_is_looked_at, updates_by_hand_beside_an_optimizer,
    a_loss_inside_of_a_function,
)  # fmt: skip


@pytest.mark.parametrize("legal", LEGAL, ids=lambda legal: legal.__name__)
def test_a_legal_way_to_step_is_silent(legal: Callable[[], None]) -> None:
    assert not found(legal)
