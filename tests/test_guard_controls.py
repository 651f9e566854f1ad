"""Legal designs of training loops, on which every guard must be silent."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader

from olmodebug.guards.journal import Journal
from olmodebug.guards.settings import GUARDS
from olmodebug.guards.watch import Watch
from olmodebug.report import Finding

pytestmark = pytest.mark.usefixtures("_only_young_objects")

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


def wrapper_in_eval_mode_around_a_model_in_train_mode() -> None:
    model = Model(0.1)
    wrapper = nn.Sequential(model)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(4):
        train(wrapper, optimizer, 1)
        wrapper.eval()
        model.train()


def two_tasks_of_different_sizes() -> None:
    model, other = Model(), nn.Linear(16, 5)
    optimizer = torch.optim.Adam([*model.parameters(), *other.parameters()])
    for _ in range(3):
        loss_of(model, ids()).backward()
        F.cross_entropy(other(model.embed(ids()).mean(1)), torch.randint(0, 5, (3,))).backward()
        optimizer.step()
        optimizer.zero_grad()


def monte_carlo_dropout() -> None:
    model = Model(0.2)
    train(model, torch.optim.Adam(model.parameters()), 3)
    model.eval()
    model.dropout.train()
    with torch.no_grad():
        loss_of(model, ids())


def hard_examples_chosen_without_gradients() -> None:
    model = Model(0.1)

    def loss() -> Tensor:
        pool = ids()
        with torch.no_grad():
            scores = loss_of(model, pool, reduction="none").view(3, -1).mean(1)
        return loss_of(model, pool[scores.topk(2).indices])

    train(model, torch.optim.Adam(model.parameters()), 4, loss)


class Kahan(torch.optim.AdamW):
    """Keeps what rounding takes from bfloat16 weights, and adds it later."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                wanted = p.float() + state.get("lost", 0.0) - group["lr"] * p.grad.float().sign()
                p.copy_(wanted)
                state["lost"] = wanted - p.float()


def bfloat16_weights_with_compensation() -> None:
    model = Model().bfloat16()
    train(model, Kahan(model.parameters(), lr=1e-6), 9)


def one_part_updated_by_hand() -> None:
    model = Model()
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if name != "embed.weight"])
    for _ in range(5):
        loss_of(model, ids()).backward()
        optimizer.step()
        assert model.embed.weight.grad is not None
        model.embed.weight.data.add_(model.embed.weight.grad, alpha=-0.1)
        model.zero_grad()


def one_scaler_for_two_optimizers() -> None:
    left, right = Model(), Model()
    first, second = torch.optim.Adam(left.parameters()), torch.optim.Adam(right.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(3):
        scaler.scale(loss_of(left, ids())).backward()
        scaler.unscale_(first)
        scaler.scale(loss_of(right, ids())).backward()
        nn.utils.clip_grad_norm_(left.parameters(), 1.0)
        scaler.step(first)
        scaler.unscale_(second)
        scaler.step(second)
        scaler.update()
        first.zero_grad()
        second.zero_grad()


def loss_scaled_by_hand() -> None:
    model, scale = Model(), 2.0**127
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(4):
        optimizer.zero_grad()
        (loss_of(model, ids()) * scale).backward()
        if any(p.grad is None or not bool(torch.isfinite(p.grad).all()) for p in model.parameters()):
            scale /= 2.0**60
            continue
        for p in model.parameters():
            p.grad /= scale  # type: ignore[operator]
        optimizer.step()


def low_precision_copy_and_master_weights() -> None:
    model = Model()
    low = copy.deepcopy(model).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for _ in range(5):
        for copied, master in zip(low.parameters(), model.parameters(), strict=True):
            copied.data.copy_(master.data)
        loss_of(low, ids()).backward()
        for copied, master in zip(low.parameters(), model.parameters(), strict=True):
            assert copied.grad is not None
            master.grad = copied.grad.float()
        low.zero_grad()
        optimizer.step()


def rolled_by_a_negative_index() -> None:
    model = Model()
    train(model, torch.optim.Adam(model.parameters()), 3, lambda: model.embed(ids())[0][torch.arange(11) - 3].pow(2).mean())


def a_padded_batch_through_the_fast_path_of_an_encoder() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="nested tensors"):
        encoder(torch.randn(2, 5, 16), src_key_padding_mask=torch.arange(5).expand(2, 5) > torch.tensor([[4], [2]]))


def gradients_that_are_distributed_tensors() -> None:
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Replicate()]))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(3):
            kept = torch.full((3,), float("-inf"))  # a mask; it must not lead to a look into the gradient's memory
            (weight.to_local() * torch.exp(kept).add(1)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.distributed.destroy_process_group()


def updates_by_hand(*, reset: str) -> None:
    model = Model()
    for number in range(9):
        loss_of(model, ids()).backward()
        if reset == "accumulate" and number % 3 != 2:
            continue
        with torch.no_grad():
            for p in model.parameters():
                p.data -= 0.1 * p.grad  # type: ignore[operator]
                if reset in ("none", "accumulate"):
                    p.grad = None
                elif reset == "data":
                    p.grad.data.zero_()  # type: ignore[union-attr]
                elif reset == "momentum":
                    p.grad.mul_(0.9)  # type: ignore[union-attr]


def scaler_that_comes_down_from_far() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-40)
    scaling = torch.amp.GradScaler("cpu", init_scale=2.0**64)
    for _ in range(50):
        scaling.scale(loss_of(model, ids()) * 1e30).backward()
        scaling.step(optimizer)
        scaling.update()
        optimizer.zero_grad()
    assert 1 < scaling.get_scale() < 2.0**34


def _grouped(decayed: Callable[[str], bool], *, tied: bool = False) -> list[Finding]:
    """What is said of weight decay on the parameters of a model with two tables, by their names."""
    model = Model()
    model.positions = nn.Embedding(11, 16)
    tables = nn.ModuleDict({"model": model, "norm": nn.LayerNorm(16)})
    if tied:
        model.head.weight = model.embed.weight
    on = [p for n, p in tables.named_parameters() if decayed(n)]
    off = [p for n, p in tables.named_parameters() if not decayed(n)]
    optimizer = torch.optim.AdamW([{"params": on, "weight_decay": 0.1}, {"params": off, "weight_decay": 0.0}])
    journal = Journal(None)
    with Watch(GUARDS, journal) as watch:
        x = model.positions(torch.arange(11)) + model.embed(ids())
        F.cross_entropy(model.head(model.body(tables["norm"](x))).flatten(0, 1), ids().flatten()).backward()
        optimizer.step()
    assert not watch.faults
    return journal.findings


def test_one_table_with_decay_beside_another_without_is_a_note() -> None:
    (finding,) = _grouped(lambda name: name.endswith("weight") and "positions" not in name and "norm" not in name)
    assert (finding.probe, finding.severity) == ("loop.norms-undecayed", "note")
    assert finding.message.startswith("1 embedding table in a group with weight decay, beside a group without: model.embed.weight")
    (both,) = _grouped(lambda name: name.endswith("weight") and "positions" not in name)
    assert both.message.startswith("1 norm weight and 1 embedding table in a group")


def test_tables_that_are_all_decayed_or_tied_to_the_head_are_silent() -> None:
    assert not _grouped(lambda name: name.endswith("weight") and "norm" not in name)
    assert not _grouped(lambda name: name.endswith("weight") and "positions" not in name and "norm" not in name, tied=True)
    assert not _grouped(lambda name: name.endswith("weight") and not any(n in name for n in ("positions", "embed", "norm")))


def _scaled(steps: int, guards: tuple[str, ...]) -> list[Finding]:
    """A loss whose gradient is infinite at any scale, under a loss scaler."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling = torch.amp.GradScaler("cpu", init_scale=1024.0)
    journal = Journal(None)
    with Watch(guards, journal) as watch:
        for _ in range(steps):
            distance = model.embed.weight - model.embed.weight.detach()
            loss = loss_of(model, ids()) + distance.pow(2).sum().sqrt()
            scaling.scale(loss).backward()
            scaling.step(optimizer)
            scaling.update()
            optimizer.zero_grad()
    assert not watch.faults
    return journal.findings


def test_a_scaler_that_never_recovers_is_told_with_the_birth_behind_it() -> None:
    assert not _scaled(20, GUARDS)
    (finding,) = _scaled(26, GUARDS)
    assert (finding.probe, finding.severity) == ("loop.scaler-recovers", "error")
    assert finding.source and "scaling.step(optimizer)" in str(finding.source)
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "distance.pow(2).sum().sqrt()" in text)
    assert finding.cause is not None and f"test_guard_controls.py:{line} (SqrtBackward0)" in finding.cause
    assert finding.cause.endswith("the derivative of sqrt at 0 is infinite")
    (without,) = _scaled(26, ("loop",))
    assert without.cause is None


class Checkpointed(nn.Module):
    """A frozen embedding before a block that is run through `run`, which may see the module, the block, or a list."""

    def __init__(self, run: Callable[["Checkpointed", Tensor], Tensor], *, frozen: bool = True) -> None:
        super().__init__()
        self.embed, self.block, self.head, self.spare = nn.Embedding(VOCAB, 16), nn.Linear(16, 16), nn.Linear(16, VOCAB), nn.Linear(16, 16)
        self.blocks = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        self.scale = 0.5
        self.run = run
        self.embed.requires_grad_(not frozen)
        self.spare.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.run(self, self.embed(tokens)))


def _calls(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return module(x)

    return forward


REENTRANT: dict[str, Callable[[Checkpointed, Tensor], Tensor]] = {
    "named": lambda model, x: torch.utils.checkpoint.checkpoint(lambda y: model.block(y), x, use_reentrant=True),
    "closure": lambda model, x: torch.utils.checkpoint.checkpoint(_calls(model.block), x, use_reentrant=True),
    "method": lambda model, x: torch.utils.checkpoint.checkpoint(model.block.forward, x, use_reentrant=True),
    "partial": lambda model, x: torch.utils.checkpoint.checkpoint(functools.partial(model.block), x, use_reentrant=True),
    "imported before": lambda model, x: checkpoint(lambda y: model.block(y), x, use_reentrant=True),
    "sequential": lambda model, x: checkpoint_sequential(model.blocks, 2, x, use_reentrant=True),
}
UNTOUCHED: dict[str, Callable[[Checkpointed, Tensor], Tensor]] = {
    "no-weights": lambda model, x: model.block(torch.utils.checkpoint.checkpoint(lambda y: F.gelu(y) * model.scale, x, use_reentrant=True)),
    "frozen-block": lambda model, x: model.block(torch.utils.checkpoint.checkpoint(lambda y: model.spare(y), x, use_reentrant=True)),
    "not-reentrant": lambda model, x: torch.utils.checkpoint.checkpoint(lambda y: model.block(y), x, use_reentrant=False),
}


def _checkpointed(run: Callable[[Checkpointed, Tensor], Tensor], *, frozen: bool) -> list[Finding]:
    model, journal = Checkpointed(run, frozen=frozen), Journal(None)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    with Watch(GUARDS, journal) as watch:
        train(model, optimizer, 4)
    assert not watch.faults
    return journal.findings


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("way", REENTRANT)
def test_reentrant_checkpointing_over_frozen_inputs_is_told_however_the_block_is_called(way: str) -> None:
    (finding,) = _checkpointed(REENTRANT[way], frozen=True)
    assert (finding.probe, finding.severity) == ("loop.checkpoint-reaches-weights", "error")
    assert "2 parameters of Linear get no gradient" in finding.message or way == "sequential"
    assert not _checkpointed(REENTRANT[way], frozen=False)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("way", UNTOUCHED)
def test_checkpointing_that_loses_no_gradient_is_silent(way: str) -> None:
    assert not _checkpointed(UNTOUCHED[way], frozen=True)


MET_IN_SCRIPTS = (scaler_that_comes_down_from_far, a_padded_batch_through_the_fast_path_of_an_encoder, gradients_that_are_distributed_tensors, wrapper_in_eval_mode_around_a_model_in_train_mode, two_tasks_of_different_sizes, monte_carlo_dropout, hard_examples_chosen_without_gradients,
       bfloat16_weights_with_compensation, one_part_updated_by_hand, one_scaler_for_two_optimizers, loss_scaled_by_hand,
       low_precision_copy_and_master_weights, rolled_by_a_negative_index)  # fmt: skip


def weights_trained_as_their_gradients_come() -> None:
    """The optimizer holds the rate for a scheduler and never sees a gradient."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def take(p: Tensor) -> None:
        with torch.no_grad():
            p.sub_(p.grad, alpha=optimizer.param_groups[0]["lr"])
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(take)
    for _ in range(8):
        loss_of(model, ids()).backward()
        optimizer.step()


def weights_trained_by_hand_beside_an_optimizer() -> None:
    model = Model()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(8):
        gradients = torch.autograd.grad(loss_of(model, ids()), parameters)
        with torch.no_grad():
            for p, gradient in zip(parameters, gradients, strict=True):
                p.sub_(gradient, alpha=0.1)
        optimizer.step()


def sharpness_aware() -> None:
    """Two passes of one line at other weights, of which the bias before a softmax over its own dimension never moves."""
    model = Model()
    shift = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([shift, *model.parameters()], lr=1e-3)

    def gradients() -> None:
        tokens = ids()
        F.nll_loss((model(tokens)[:, :-1] + shift * 0.0).flatten(0, 1).log_softmax(-1), tokens[:, 1:].flatten()).backward()

    for _ in range(8):
        gradients()
        with torch.no_grad():
            moved = [(p, 0.05 * p.grad) for p in model.parameters()]  # type: ignore[operator]
            for p, way in moved:
                p.add_(way)
        optimizer.zero_grad()
        gradients()
        with torch.no_grad():
            for p, way in moved:
                p.sub_(way)
        optimizer.step()
        optimizer.zero_grad()


def two_losses_through_one_line() -> None:
    """A generator and what judges it, each with an optimizer: what the first pass leaves in the other is reset on purpose."""
    maker, judge = nn.Linear(8, 16), nn.Linear(16, 1)
    makes, judges = torch.optim.Adam(maker.parameters()), torch.optim.Adam(judge.parameters())
    for _ in range(8):
        made = maker(torch.randn(8, 8))
        for optimizer, loss in ((makes, lambda: -judge(made).mean()), (judges, lambda: judge(made.detach()).mean())):  # noqa: B023
            optimizer.zero_grad()
            loss().backward()
        judges.step()
        makes.step()


def a_recurrence_of_numbers() -> None:
    """x is read twice in every step: a walk that does not know where it has been takes 2 to the 60 of them."""
    rate = torch.tensor(2.7, requires_grad=True)
    optimizer = torch.optim.SGD([rate], lr=1e-2)
    for _ in range(3):
        x = torch.tensor(0.3, requires_grad=True)
        for _ in range(60):
            x = x + 0.1 * rate * (x - x * x)
        x.backward()
        optimizer.step()
        optimizer.zero_grad()


def a_loss_inside_a_checkpoint() -> None:
    """Autograd turns gradients off for a forward that it will run again: a loss in there, with dropout, is no evaluation."""
    model, anchor = Model(dropout=0.1), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(8):
        checkpoint(lambda zero, tokens: loss_of(model, tokens) + zero.sum(), anchor, ids(), use_reentrant=True).backward()
        optimizer.step()
        optimizer.zero_grad()


CONTROLS: list[Callable[[], None]] = [
    a_loss_inside_a_checkpoint,
    weights_trained_as_their_gradients_come,
    weights_trained_by_hand_beside_an_optimizer,
    sharpness_aware,
    two_losses_through_one_line,
    a_recurrence_of_numbers,
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
    functools.partial(updates_by_hand, reset="none"),
    functools.partial(updates_by_hand, reset="data"),
    functools.partial(updates_by_hand, reset="momentum"),
    functools.partial(updates_by_hand, reset="accumulate"),
]


def _name(control: Any) -> str:
    if isinstance(control, functools.partial):
        return f"{control.func.__name__}-{'-'.join(map(str, control.keywords.values()))}"
    return str(control.__name__)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("control", [*CONTROLS, *MET_IN_SCRIPTS], ids=_name)
def test_a_legal_design_is_silent(control: Callable[[], None]) -> None:
    torch.manual_seed(0)
    journal = Journal(None)
    with Watch(GUARDS, journal) as watch:
        control()
    assert not watch.faults
    assert not journal.findings, [(f.probe, f.message) for f in journal.findings]


def test_memory_that_ran_out_in_a_search_for_the_largest_batch_is_a_note() -> None:
    journal = Journal(None)
    with Watch(GUARDS, journal):
        with pytest.raises(RuntimeError):
            torch.empty(1 << 50)
        torch.empty(4)
    assert [(f.probe, f.severity) for f in journal.findings] == [("memory.fits", "note")]


def test_a_model_left_in_eval_mode_by_its_first_evaluation_is_told() -> None:
    model = Model(0.1)

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()
        loss_of(model, ids())

    journal = Journal(None)
    with Watch(GUARDS, journal):
        evaluate()
        train(model, torch.optim.Adam(model.parameters()), 3)
    assert [f.probe for f in journal.findings] == ["loop.trains-in-train-mode"]
    assert "eval() was called for an evaluation" in (journal.findings[0].cause or "")


def test_a_script_that_only_evaluates_with_dropout_is_told() -> None:
    model, journal = Model(0.1), Journal(None)
    with Watch(GUARDS, journal), torch.inference_mode():
        loss_of(model, ids())
        loss_of(model, ids())
    assert [f.probe for f in journal.findings] == ["loop.evaluates-in-eval-mode"]


def test_a_bad_index_that_the_script_catches_is_a_warning() -> None:
    model, journal = Model(), Journal(None)
    with Watch(GUARDS, journal), pytest.raises(IndexError):
        model(torch.full((1, 3), VOCAB))
    assert [(f.probe, f.severity) for f in journal.findings] == [("index.in-bounds", "warning")]
    journal = Journal(None)
    with pytest.raises(IndexError), Watch(GUARDS, journal):
        model(torch.full((1, 3), VOCAB))
    assert [(f.probe, f.severity) for f in journal.findings] == [("index.in-bounds", "error")]


class Recurrent(nn.Module):
    """Dropout that is no module of its own: between the layers of an LSTM, and as a function."""

    def __init__(self, layers: float, function: float) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = (
            nn.Embedding(VOCAB, 12),
            nn.LSTM(12, 12, 2, dropout=layers, batch_first=True),
            nn.Linear(12, VOCAB),
        )
        self.rate = function

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.dropout(self.lstm(self.embed(ids))[0], self.rate, self.training))


@pytest.mark.parametrize("rates", [(0.3, 0.0), (0.0, 0.3)], ids=["lstm", "function"])
@pytest.mark.parametrize("careful", [True, False])
def test_dropout_that_is_no_module_is_seen_in_an_evaluation(rates: tuple[float, float], careful: bool) -> None:
    model, journal = Recurrent(*rates), Journal(None)
    with Watch(GUARDS, journal):
        train(model, torch.optim.Adam(model.parameters()), 2)
        model.train(not careful)
        with torch.no_grad():
            loss_of(model, ids())
        model.train()
        train(model, torch.optim.Adam(model.parameters()), 2)
    assert [f.probe for f in journal.findings] == ([] if careful else ["loop.evaluates-in-eval-mode"])


def test_an_lstm_left_in_eval_mode_is_told() -> None:
    model, journal = Recurrent(0.3, 0.0), Journal(None)
    with Watch(GUARDS, journal):
        train(model, optimizer := torch.optim.Adam(model.parameters()), 2)
        model.eval()
        train(model, optimizer, 3)
    assert [f.probe for f in journal.findings] == ["loop.trains-in-train-mode"]


def test_updates_by_hand_that_never_reset_the_gradients_are_told() -> None:
    journal = Journal(None)
    with Watch(GUARDS, journal):
        updates_by_hand(reset="never")
    assert [(f.probe, f.where.op) for f in journal.findings] == [("loop.gradients-reset", "backward")]
    assert journal.findings[0].source and "loss_of(model, ids()).backward()" in str(journal.findings[0].source)


def test_storages_that_died_are_forgotten_at_the_end_of_a_step() -> None:
    model = nn.Sequential(nn.Embedding(VOCAB, 256), nn.Linear(256, VOCAB))
    optimizer = torch.optim.Adam(model.parameters())
    with Watch(("oom",), Journal(None)) as watch:
        train(model, optimizer, 2, lambda: loss_of(model, ids()))
        assert watch.memory is not None
        loss_of(model, ids()).backward()
        assert any(made.reference.expired() for made in watch.memory.made.values())
        optimizer.step()
        assert watch.memory.made
        assert not any(made.reference.expired() for made in watch.memory.made.values())
