"""The loop: it trains a subject by a recipe, watches what goes wrong in training, and tells every step.

Forward under autocast, parameters in float32, backward outside of it; with float16 the gradients are unscaled before they are
clipped, and a step whose gradients overflow is left out and counted. Every step is told before the next begins. On several
ranks every rank runs this loop, and what a step shows is that of the whole batch.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..convention import find_logits
from ..errors import UsageError
from ..model import at_least_float32
from ..subject import Subject
from .checkpoint import STATE, load_state, save_state
from .dataset import Dataset
from .head import Head, find_head, run_on
from .loss import linear_cross_entropy
from .optimizer import Optimizers, make_optimizers
from .packing import Packing, train_windows
from .recipe import Recipe
from .world import World, gathered, load_weights, whole

LOOKED_AT_EVERY = 10  # steps between the watches that cost: the update, the largest logit
SPIKE_NATS = 1.0  # above the median of the last ten losses
MOST_SKIPPED_IN_A_ROW = 30  # from 65,536 a loss scale halves to below 1e-4: no scale helps

Tell = Callable[..., None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run is told beside its recipe. `folder` keeps the state for `resume`."""

    dtype: str
    seed: int
    folder: Path
    save_every: int = 50
    resume: bool = False
    should_stop: Callable[[], bool] = lambda: False
    world: World = field(default_factory=World)


@dataclass(slots=True)
class Watch:
    """What was seen over the steps: the curves, and what is worth saying."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    spikes: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    untouched: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a run ended. `stopped` is None after the last step; `batch` is the one at which it could not go on."""

    stopped: str | None
    watch: Watch
    seconds: float
    steps: int
    batch: Tensor | None = None


class StepFailed(Exception):
    """The subject's own code raised in a step; `__cause__` is what it raised."""

    def __init__(self, step: int, batch: Tensor) -> None:
        super().__init__(f"step {step}")
        self.step, self.batch = step, batch


def train(subject: Subject, dataset: Dataset, recipe: Recipe, options: Options, tell: Tell) -> Ending:
    """Train the subject's model in place. StepFailed where its code raises."""
    model, device, world = subject.model, subject.device, options.world
    if recipe.batch_size < world.size:
        raise UsageError(f"--batch-size {recipe.batch_size}: {world.size} ranks need at least a window each")
    head = find_head(subject)
    model.train()
    loss_of = world.spread(LossOf(subject, head, options.dtype))
    optimizers = make_optimizers(model, recipe, head=head.module if head else None)
    scaler = torch.amp.GradScaler(device.type, enabled=options.dtype == "float16")
    watch = Watch(untouched={name for name, parameter in model.named_parameters() if parameter.requires_grad})
    torch.manual_seed(options.seed + world.rank)  # of dropout: ranks draw masks of their own
    first, before = _resumed(subject, optimizers, scaler, watch, recipe, options)
    packing = Packing(seq_len=recipe.seq_len, seed=options.seed, document_tokens=recipe.document_tokens, aligned=recipe.aligned)
    stream = train_windows(
        dataset.train_texts,
        dataset.encoder,
        packing,
        count=recipe.steps * recipe.batch_size,
        starts=recipe.starts(),
        skip=first * recipe.batch_size,
    )
    started = time.perf_counter()
    row = 0
    for step in range(first, recipe.steps):
        world.watch()
        if world.any(options.should_stop()):
            _save(subject, optimizers, scaler, watch, recipe, options, step, before + time.perf_counter() - started)
            return Ending(stopped="interrupted", watch=watch, seconds=before + time.perf_counter() - started, steps=step)
        batch = _next_batch(stream, recipe.batch_size, device)
        optimizers.set_rates(recipe.rate_share(step))
        begun = time.perf_counter()
        seen = _step(subject, loss_of, batch, optimizers, scaler, recipe, options, watch, step)
        seen["seconds"] = time.perf_counter() - begun
        if not seen["finite"] and not world.any(_has_bad_weights(model)):  # nothing was applied: weights are those before the step
            _save(subject, optimizers, scaler, watch, recipe, options, step, before + begun - started)
        watch.steps.append(seen)
        tell("step", value=seen)
        row = row + 1 if seen["skipped"] else 0
        if not seen["finite"] or row == MOST_SKIPPED_IN_A_ROW:
            why = "nan" if not seen["finite"] else "overflow"
            return Ending(stopped=why, watch=watch, seconds=before + time.perf_counter() - started, steps=step, batch=batch)
        if (step + 1) % options.save_every == 0 and step + 1 < recipe.steps:
            _save(subject, optimizers, scaler, watch, recipe, options, step + 1, before + time.perf_counter() - started)
    seconds = before + time.perf_counter() - started
    _save(subject, optimizers, scaler, watch, recipe, options, recipe.steps, seconds)
    return Ending(stopped=None, watch=watch, seconds=seconds, steps=recipe.steps)


class LossOf(nn.Module):
    """The subject's model as a module that returns the loss of a batch: what spreads a model over ranks acts around a forward.

    The mean loss of the next tokens in a batch of windows, each of which predicts all of its own but the first.
    """

    def __init__(self, subject: Subject, head: Head | None, dtype: str) -> None:
        super().__init__()
        self.model, self.subject, self.head, self.dtype = subject.model, subject, head, dtype
        self.largest_logit: float | None = None  # of the first window, where `look` asked for it

    def forward(self, batch: Tensor, look: bool = False) -> Tensor:
        device = batch.device.type
        low = getattr(torch, self.dtype)
        autocast: AbstractContextManager[Any] = torch.autocast(device, dtype=low) if self.dtype != "float32" else nullcontext()
        targets = batch[:, 1:].flatten()
        with autocast:
            if self.head is not None:
                states = self.head.hidden_states(lambda: run_on(self.subject, batch))[:, :-1].flatten(0, 1)
                weight = self.head.module.weight
                self.largest_logit = _largest_logit(states[: batch.shape[1] - 1].detach(), weight) if look else None
                return linear_cross_entropy(states, weight, targets, dtype=low)
            called = run_on(self.subject, batch)
            logits = find_logits(called, batch_size=batch.shape[0], seq_len=batch.shape[1]).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits.to(at_least_float32(logits.dtype)), targets)


def _step(
    subject: Subject,
    loss_of: nn.Module,
    batch: Tensor,
    optimizers: Optimizers,
    scaler: torch.amp.GradScaler,
    recipe: Recipe,
    options: Options,
    watch: Watch,
    step: int,
) -> dict[str, Any]:
    """One step, and what it showed."""
    parameters = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
    look = step % LOOKED_AT_EVERY == 0 or step == recipe.steps - 1
    world = options.world
    share = world.share(batch)
    try:
        loss = loss_of(world.rows(batch), look)
        # The ranks' gradients are averaged, so that each rank's loss counts `size` times its share.
        scaler.scale(loss * (share * world.size) if world.size > 1 else loss).backward()
        value = world.sum(float(loss.detach()) * share)
    except Exception as error:
        raise StepFailed(step, batch) from error
    for optimizer in optimizers.each:
        scaler.unscale_(optimizer)
    norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)))
    overflowed = not math.isfinite(norm)
    finite = math.isfinite(value) and (not overflowed or scaler.is_enabled())
    seen: dict[str, Any] = {
        "step": step + 1,
        "loss": value if math.isfinite(value) else None,
        "rate": recipe.learning_rate * recipe.rate_share(step),
        "grad_norm": norm if not overflowed else None,
        "update_ratio": None,
        "largest_logit": _looked(loss_of),
        "loss_scale": scaler.get_scale() if scaler.is_enabled() else None,
        "tokens": batch.numel(),
        "skipped": overflowed,
        "finite": finite,
    }
    if finite and not overflowed:
        _touch(subject, watch)
        old = [parameter.detach().clone() for parameter in parameters] if look else []
        for optimizer in optimizers.each:
            optimizer.step()
        if look:
            seen["update_ratio"] = _ratio(old, parameters)
    elif finite:
        watch.skipped.append(step + 1)
    if scaler.is_enabled():
        scaler.update()
    if finite:
        optimizers.zero_grad()
    if is_spike([s["loss"] for s in watch.steps], value, first=recipe.first_of_kind(step)):
        watch.spikes.append(step + 1)
    return seen


def _has_bad_weights(model: nn.Module) -> bool:
    """Whether a weight, or this rank's part of one, is not finite."""
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return any(not bool(torch.isfinite(part).all()) for part in parts)


def is_spike(losses: Sequence[float | None], value: float, *, first: int) -> bool:
    """Whether a step's loss lies far over the last ones, none of them before step `first`, where other data began."""
    recent = [loss for loss in losses[first:][-LOOKED_AT_EVERY:] if loss is not None]
    return len(recent) == LOOKED_AT_EVERY and math.isfinite(value) and value > statistics.median(recent) + SPIKE_NATS


def _touch(subject: Subject, watch: Watch) -> None:
    """Take the parameters that got a gradient other than zero off the list."""
    if watch.untouched:
        for name, parameter in subject.model.named_parameters():
            if name in watch.untouched and parameter.grad is not None and bool(whole(parameter.grad).count_nonzero()):
                watch.untouched.discard(name)


def _ratio(old: Sequence[Tensor], new: Sequence[Tensor]) -> float:
    """The norm of the last update as a share of the parameters' norm before it."""
    change = math.sqrt(sum(float(whole((b.detach() - a).double().pow(2).sum())) for a, b in zip(old, new, strict=True)))
    size = math.sqrt(sum(float(whole(a.double().pow(2).sum())) for a in old))
    return change / size if size else math.inf


def _looked(loss_of: nn.Module) -> float | None:
    """The largest logit that the last look of a module, wrapped or not, has seen."""
    found = next(module for module in loss_of.modules() if isinstance(module, LossOf))
    return found.largest_logit


@torch.no_grad()
def _largest_logit(states: Tensor, weight: Tensor) -> float | None:
    """The largest magnitude among the logits of these hidden states; None where it is not finite."""
    with torch.autocast(states.device.type, enabled=False):
        largest = max(float((part.float() @ weight.T.float()).abs().max()) for part in states.split(128))
    return largest if math.isfinite(largest) else None


def _next_batch(stream: Iterator[list[int]], size: int, device: torch.device) -> Tensor:
    return torch.tensor(list(islice(stream, size)), dtype=torch.long).to(device)


# The state of a run


def _save(
    subject: Subject,
    optimizers: Optimizers,
    scaler: torch.amp.GradScaler,
    watch: Watch,
    recipe: Recipe,
    options: Options,
    step: int,
    seconds: float,
) -> None:
    model, moments = gathered(subject.model.state_dict()), gathered(optimizers.state_dict())
    if not options.world.leads:
        return
    save_state(
        options.folder / STATE,
        {
            "step": step,
            "seconds": seconds,
            "model": model,
            "optimizers": moments,
            "scaler": scaler.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "recipe": recipe.to_dict(),
            "dtype": options.dtype,
            "seed": options.seed,
            "steps": watch.steps,
            "spikes": watch.spikes,
            "skipped": watch.skipped,
            "untouched": sorted(watch.untouched),
        },
    )


def _resumed(
    subject: Subject, optimizers: Optimizers, scaler: torch.amp.GradScaler, watch: Watch, recipe: Recipe, options: Options
) -> tuple[int, float]:
    """The step to go on from and the seconds used before; (0, 0) for a fresh run."""
    if not options.resume:
        return 0, 0.0
    state = load_state(options.folder / STATE)
    for name, asked in (("recipe", recipe.to_dict()), ("dtype", options.dtype), ("seed", options.seed)):
        if state[name] != asked:
            raise UsageError(f"--resume: the run was begun with another {name} ({_difference(state[name], asked)})")
    load_weights(subject.model, state["model"])
    optimizers.load_state_dict(state["optimizers"])
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["random"])
    if state["cuda_random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_random"])
    watch.steps, watch.spikes, watch.skipped = state["steps"], state["spikes"], state["skipped"]
    watch.untouched = set(state["untouched"])
    return int(state["step"]), float(state["seconds"])


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        return ", ".join(f"{key} {old.get(key)}, now {value}" for key, value in new.items() if old.get(key) != value)
    return f"{old}, now {new}"
