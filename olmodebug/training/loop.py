"""The loop: it trains a subject by a recipe, watches what goes wrong in training, and tells every step.

Forward under autocast, parameters in float32, backward outside of it; with float16 the gradients are unscaled before they are
clipped, and a step whose gradients overflow is left out and counted. Every step is told before the next begins.
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
from torch import Tensor

from ..convention import find_logits
from ..errors import UsageError
from ..model import at_least_float32
from ..subject import Subject
from .checkpoint import load_state, save_state
from .dataset import Dataset
from .head import Head, find_head, run_on
from .loss import linear_cross_entropy
from .optimizer import Optimizers, make_optimizers
from .packing import Packing, windows
from .recipe import Recipe

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
    model, device = subject.model, subject.device
    head = find_head(subject)
    model.train()
    optimizers = make_optimizers(model, recipe, head=head.module if head else None)
    scaler = torch.amp.GradScaler(device.type, enabled=options.dtype == "float16")
    watch = Watch(untouched={name for name, parameter in model.named_parameters() if parameter.requires_grad})
    torch.manual_seed(options.seed)
    first, before = _resumed(subject, optimizers, scaler, watch, recipe, options)
    packing = Packing(seq_len=recipe.seq_len, seed=options.seed, document_tokens=recipe.document_tokens, aligned=recipe.aligned)
    stream = windows(dataset.train_texts, dataset.encoder, packing, skip=first * recipe.batch_size)
    started = time.perf_counter()
    row = 0
    for step in range(first, recipe.steps):
        if options.should_stop():
            _save(subject, optimizers, scaler, watch, recipe, options, step, before + time.perf_counter() - started)
            return Ending(stopped="interrupted", watch=watch, seconds=before + time.perf_counter() - started, steps=step)
        batch = _next_batch(stream, recipe.batch_size, device)
        optimizers.set_rates(recipe.rate_share(step))
        begun = time.perf_counter()
        seen = _step(subject, head, batch, optimizers, scaler, recipe, options, watch, step)
        seen["seconds"] = time.perf_counter() - begun
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


def batch_loss(subject: Subject, head: Head | None, batch: Tensor, dtype: str, *, kept: list[Tensor] | None = None) -> Tensor:
    """The mean loss of the next tokens in a batch of windows, each of which predicts all of its own but the first.

    `kept` gets the first window's hidden states, where the loss is taken from them.
    """
    device = batch.device.type
    low = getattr(torch, dtype)
    autocast: AbstractContextManager[Any] = torch.autocast(device, dtype=low) if dtype != "float32" else nullcontext()
    targets = batch[:, 1:].flatten()
    with autocast:
        if head is not None:
            states = head.hidden_states(lambda: run_on(subject, batch))[:, :-1].flatten(0, 1)
            if kept is not None:
                kept.append(states[: batch.shape[1] - 1].detach())
            return linear_cross_entropy(states, head.module.weight, targets, dtype=low)
        logits = find_logits(run_on(subject, batch), batch_size=batch.shape[0], seq_len=batch.shape[1]).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.to(at_least_float32(logits.dtype)), targets)


def _step(
    subject: Subject,
    head: Head | None,
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
    kept: list[Tensor] = []
    try:
        loss = batch_loss(subject, head, batch, options.dtype, kept=kept if look else None)
        scaler.scale(loss).backward()
    except Exception as error:
        raise StepFailed(step, batch) from error
    value = float(loss.detach())
    for optimizer in optimizers.each:
        scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm))
    overflowed = not math.isfinite(norm)
    finite = math.isfinite(value) and (not overflowed or scaler.is_enabled())
    seen: dict[str, Any] = {
        "step": step + 1,
        "loss": value if math.isfinite(value) else None,
        "rate": recipe.learning_rate * recipe.rate_share(step),
        "grad_norm": norm if not overflowed else None,
        "update_ratio": None,
        "largest_logit": _largest_logit(head, kept),
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
    recent = [s["loss"] for s in watch.steps[-LOOKED_AT_EVERY:] if s["loss"] is not None]
    if len(recent) == LOOKED_AT_EVERY and math.isfinite(value) and value > statistics.median(recent) + SPIKE_NATS:
        watch.spikes.append(step + 1)
    return seen


def _touch(subject: Subject, watch: Watch) -> None:
    """Take the parameters that got a gradient other than zero off the list."""
    if watch.untouched:
        for name, parameter in subject.model.named_parameters():
            if name in watch.untouched and parameter.grad is not None and bool(parameter.grad.count_nonzero()):
                watch.untouched.discard(name)


def _ratio(old: Sequence[Tensor], new: Sequence[Tensor]) -> float:
    """The norm of the last update as a share of the parameters' norm before it."""
    change = math.sqrt(sum(float((b.detach() - a).double().pow(2).sum()) for a, b in zip(old, new, strict=True)))
    size = math.sqrt(sum(float(a.double().pow(2).sum()) for a in old))
    return change / size if size else math.inf


@torch.no_grad()
def _largest_logit(head: Head | None, kept: list[Tensor]) -> float | None:
    """The largest magnitude among the logits of these hidden states; None where there are none or it is not finite."""
    if head is None or not kept:
        return None
    largest = max(float((part.float() @ head.module.weight.T.float()).abs().max()) for part in kept[0].split(128))
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
    save_state(
        options.folder / "resume.pt",
        {
            "step": step,
            "seconds": seconds,
            "model": subject.model.state_dict(),
            "optimizers": optimizers.state_dict(),
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
    state = load_state(options.folder / "resume.pt")
    for name, asked in (("recipe", recipe.to_dict()), ("dtype", options.dtype), ("seed", options.seed)):
        if state[name] != asked:
            raise UsageError(f"--resume: the run was begun with another {name} ({_difference(state[name], asked)})")
    subject.model.load_state_dict(state["model"])
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
