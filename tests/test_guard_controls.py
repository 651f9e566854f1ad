"""Legal designs of training loops, on which every guard must be silent."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from olmodebug.guards.journal import Journal
from olmodebug.guards.settings import GUARDS
from olmodebug.guards.watch import Watch

VOCAB = 31


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.body, self.dropout, self.head = (
            nn.Embedding(VOCAB, 16),
            nn.Linear(16, 16),
            nn.Dropout(dropout),
            nn.Linear(16, VOCAB),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dropout(F.silu(self.body(self.embed(ids)))))


def ids(length: int = 11) -> Tensor:
    return torch.randint(0, VOCAB, (3, length))


def loss_of(model: Callable[[Tensor], Tensor], tokens: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), **options)


def train(model: nn.Module, optimizer: Any, steps: int = 8, loss: Callable[[], Tensor] | None = None) -> None:
    for _ in range(steps):
        (loss() if loss else loss_of(model, ids())).backward()
        optimizer.step()
        optimizer.zero_grad()


def adversarial() -> None:
    left, right = Model(), Model()
    first, second = torch.optim.Adam(left.parameters()), torch.optim.Adam(right.parameters())
    for _ in range(4):
        (loss_of(left, ids()) + loss_of(right, ids())).backward()  # leaves gradients in right
        first.step()
        first.zero_grad()
        second.zero_grad()
        loss_of(right, ids()).backward()
        second.step()


def gradients_set_to_none_by_hand() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        loss_of(model, ids()).backward()
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None


def gradients_zeroed_by_hand() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        loss_of(model, ids()).backward()
        optimizer.step()


def step_inside_backward() -> None:
    model = Model()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def apply(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(apply)
    for _ in range(4):
        loss_of(model, ids()).backward()


def closure() -> None:
    model = Model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    tokens = ids()

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(evaluate)


def equal_accumulation() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(4):
        for _ in range(3):
            (loss_of(model, ids()) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()


def frozen_backbone_and_teacher() -> None:
    model, teacher = Model(), Model(dropout=0.1)
    average = copy.deepcopy(model)
    model.embed.requires_grad_(False)
    model.body.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.head.parameters())
    for _ in range(5):
        tokens = ids()
        with torch.no_grad():
            target = teacher(tokens)
        (loss_of(model, tokens) + F.mse_loss(model(tokens), target)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.data.lerp_(new.data, 0.1)


def one_batch() -> None:
    model, tokens = Model(), ids()
    train(model, torch.optim.AdamW(model.parameters()), loss=lambda: loss_of(model, tokens))


def one_batch_a_epoch() -> None:
    model, loader = Model(), DataLoader(list(ids()), batch_size=3)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(6):
        for tokens in loader:
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()


def two_tokens_ahead() -> None:
    model, further = Model(), nn.Linear(16, VOCAB)
    optimizer = torch.optim.AdamW([*model.parameters(), *further.parameters()])

    def loss() -> Tensor:
        tokens = ids()
        ahead = further(model.embed(tokens))
        second = F.cross_entropy(ahead[:, :-2].flatten(0, 1), tokens[:, 2:].flatten())
        return second + loss_of(model, tokens)

    train(model, optimizer, loss=loss)


def masked_language_model() -> None:
    model = Model()

    def loss() -> Tensor:
        tokens = ids(40)
        hidden = torch.rand(tokens.shape) < 0.3
        labels = tokens.masked_fill(~hidden, -100)
        return F.cross_entropy(model(tokens.masked_fill(hidden, 0)).flatten(0, 1), labels.flatten())

    train(model, torch.optim.AdamW(model.parameters()), loss=loss)


def dropout_kept_for_uncertainty() -> None:
    model = Model(dropout=0.2)
    train(model, torch.optim.AdamW(model.parameters()), steps=2)
    with torch.no_grad():
        torch.stack([model(ids()).softmax(-1) for _ in range(3)]).var(0)


def checkpointed(*, reentrant: bool) -> None:
    model = Model(dropout=0.2)

    def forward(tokens: Tensor) -> Tensor:
        hidden = model.embed(tokens)
        return model.head(checkpoint(lambda x: model.dropout(F.silu(model.body(x))), hidden, use_reentrant=reentrant))

    train(model, torch.optim.AdamW(model.parameters()), loss=lambda: loss_of(forward, ids()))


def schedules() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=20)
    for _ in range(2):
        for _ in range(4):
            loss_of(model, ids()).backward()
            optimizer.step()
            cycle.step()
            optimizer.zero_grad()
        plateau.step(1.0)


def schedule_forward_to_a_resumed_step() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    for _ in range(3):
        scheduler.step()
    for _ in range(5):
        loss_of(model, ids()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def scaler(*, enabled: bool) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    scaling = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)
    for _ in range(4):
        for _ in range(2):
            scaling.scale(loss_of(model, ids()) / 2).backward()
        if enabled:
            scaling.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaling.step(optimizer)
        scaling.update()
        optimizer.zero_grad()


def bfloat16_with_large_steps() -> None:
    model = Model().bfloat16()
    train(model, torch.optim.SGD(model.parameters(), lr=10.0), loss=lambda: loss_of(lambda t: model(t).float(), ids()))


def two_backwards_of_one_graph() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(4):
        loss = loss_of(model, ids())
        loss.backward(retain_graph=True)
        (loss * 0.1).backward()
        optimizer.step()
        optimizer.zero_grad()


def losses_that_are_detached() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    history, total = [], torch.zeros(())
    for _ in range(8):
        loss = loss_of(model, ids())
        loss.backward()
        history.append(loss.detach())
        total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()


def second_derivatives() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(6):
        loss = loss_of(model, ids())
        slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        (loss + 0.01 * sum(slope.pow(2).sum() for slope in slopes)).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()


CONTROLS: list[Callable[[], None]] = [
    adversarial,
    gradients_set_to_none_by_hand,
    gradients_zeroed_by_hand,
    step_inside_backward,
    closure,
    equal_accumulation,
    frozen_backbone_and_teacher,
    one_batch,
    one_batch_a_epoch,
    two_tokens_ahead,
    masked_language_model,
    dropout_kept_for_uncertainty,
    functools.partial(checkpointed, reentrant=True),
    functools.partial(checkpointed, reentrant=False),
    schedules,
    schedule_forward_to_a_resumed_step,
    functools.partial(scaler, enabled=True),
    functools.partial(scaler, enabled=False),
    bfloat16_with_large_steps,
    two_backwards_of_one_graph,
    losses_that_are_detached,
    second_derivatives,
]


def _name(control: Any) -> str:
    if isinstance(control, functools.partial):
        return f"{control.func.__name__}-{'-'.join(map(str, control.keywords.values()))}"
    return str(control.__name__)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("control", CONTROLS, ids=_name)
def test_a_legal_design_is_silent(control: Callable[[], None]) -> None:
    torch.manual_seed(0)
    journal = Journal(None)
    with Watch(GUARDS, journal) as watch:
        control()
    assert not watch.faults
    assert not journal.findings, [(f.probe, f.message) for f in journal.findings]
