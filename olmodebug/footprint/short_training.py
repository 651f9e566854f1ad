"""A short training on a few sentences, end to end: the loss, the steps that overflowed, and what the model then writes."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..convention import find_logits
from ..own_code import quiet
from ..subject import Subject
from .training_step import StepPlan, call_arguments, checkpointed, make_optimizer, run, step

TEXT = (
    "A model that learns reads the same few lines again and again, until it knows which letter follows which. "
    "First it learns how often each letter comes, then which letters stand together, then the words. "
    "What it has learned shows when it writes: a line that was never true may still read well. "
)
BYTES = 256
STEPS = 40
STEPS_IN_FLOAT16_ON_THE_CPU = 20  # products in float16 have no fast kernel on most CPUs
AVERAGED = 5  # losses at either end that make up the first and the last
FELL_BY = 0.95  # of the first loss: random weights start near ln(vocabulary), and 20 steps of letters take a third off it
LARGEST_RATE = 1e-2
WARMUP_STEPS = 5
PROMPT, NEW_TOKENS = 24, 24
FLOAT16_LARGEST = 65504


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortTraining:
    """How a short training went; `sample` is the text, or the ids where the vocabulary is smaller than a byte."""

    steps: int
    losses: tuple[float, ...]
    first_loss: float
    last_loss: float
    fell: bool
    overflow_steps: int
    overflow_at: tuple[int, ...]
    scales: tuple[float, ...]
    overflow_text: str
    sample: str
    seconds: float


def short_training(subject: Subject, plan: StepPlan, *, steps: int = STEPS, seed: int = 0, device: str = "cpu") -> ShortTraining:
    """Train the subject, in place, on windows of a short text; its own GradScaler decides which steps are taken."""
    started = time.perf_counter()
    model = subject.model.train()
    rate = LARGEST_RATE if plan.optimizer.startswith("sgd") else rate_of(sum(p.numel() for p in model.parameters()))
    optimizer = make_optimizer(model, plan.optimizer, learning_rate=rate)
    scaler = torch.amp.GradScaler(device) if plan.precision == "fp16-amp" else None
    generator = torch.Generator().manual_seed(seed)
    ids = text_ids(subject.vocab_size)
    losses: list[float] = []
    scales: list[float] = []
    overflowed: list[int] = []
    with checkpointed(model, plan.checkpointing, preserve_random_state=True), quiet():
        for number in range(1, steps + 1):
            batches = [windows(ids, plan, generator).to(subject.device) for _ in range(plan.accumulation)]
            before = scaler.get_scale() if scaler is not None else 1.0
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, number / WARMUP_STEPS)
            found = step(subject, plan, optimizer, scaler, batches, lambda name: None, device=device)
            losses.append(float(sum(float(loss) for loss in found)))
            if scaler is not None:
                scales.append(scaler.get_scale())
                if scales[-1] < before:
                    overflowed.append(number)
        sample = written(subject, ids)
    averaged = max(1, min(AVERAGED, steps // 2))
    first, last = sum(losses[:averaged]) / averaged, sum(losses[-averaged:]) / averaged
    return ShortTraining(
        steps=steps,
        losses=tuple(losses),
        first_loss=first,
        last_loss=last,
        fell=math.isfinite(last) and last < FELL_BY * first,
        overflow_steps=len(overflowed),
        overflow_at=tuple(overflowed),
        scales=tuple(scales),
        overflow_text=overflow_text(steps, overflowed, scales, scaled=scaler is not None),
        sample=sample,
        seconds=time.perf_counter() - started,
    )


def rate_of(parameters: int) -> float:
    """The learning rate: half of what the DataDecide ladder takes for so many parameters, 0.0047 (N / 108e6)^(-1/3), and no
    more than 1e-2. A wide model diverges at a narrow one's rate."""
    return min(LARGEST_RATE, 0.5 * 0.0047 * (max(1, parameters) / 108e6) ** (-1 / 3))


def overflow_text(steps: int, overflowed: list[int], scales: list[float], *, scaled: bool) -> str:
    """What the steps that the GradScaler left out mean."""
    if not scaled:
        return "no GradScaler: this precision has the exponents of float32"
    if not overflowed:
        return f"none of {steps} steps: no gradient times the loss scale ({scales[-1]:g}) exceeded float16's {FLOAT16_LARGEST}"
    listed = ", ".join(map(str, overflowed[:8])) + (", ..." if len(overflowed) > 8 else "")
    left_out = (
        f"{len(overflowed)} of {steps} steps left out ({listed}): a gradient times the loss scale exceeded float16's {FLOAT16_LARGEST}"
    )
    if len(overflowed) == steps:
        return f"{left_out}, at every scale down to {scales[-1]:g}: the gradients themselves are infinite or NaN, not too large a scale"
    if overflowed == list(range(1, len(overflowed) + 1)):
        return f"{left_out}; each halved the scale, to {scales[-1]:g}, which is how the scaler finds the first one that fits"
    return f"{left_out}; each halved the scale, which stands at {scales[-1]:g}"


def text_ids(vocab_size: int) -> Tensor:
    """The text as bytes, folded into a vocabulary that is smaller than a byte."""
    return torch.tensor([byte % vocab_size for byte in TEXT.encode()], dtype=torch.long)


def windows(ids: Tensor, plan: StepPlan, generator: torch.Generator) -> Tensor:
    """Rows of the text, `[batch, seq_len]`, each from a random place; the text goes round."""
    starts = torch.randint(len(ids), (plan.batch_size, 1), generator=generator)
    return ids[(starts + torch.arange(plan.seq_len)) % len(ids)]


def written(subject: Subject, ids: Tensor) -> str:
    """The beginning of the text and what the model adds to it, the likeliest token each time."""
    longest = subject.max_positions or PROMPT + NEW_TOKENS
    prompt = min(PROMPT, max(1, longest // 2))
    row = ids[:prompt][None].to(subject.device)
    subject.model.eval()
    with torch.no_grad():
        for _ in range(min(NEW_TOKENS, longest - prompt)):
            result = run(subject, call_arguments(subject, row))
            logits = find_logits(result, batch_size=1, seq_len=row.shape[1]).logits
            row = torch.cat([row, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    subject.model.train()
    made = row[0].tolist()
    if subject.vocab_size < BYTES:
        return f"ids {made[:prompt]} -> {made[prompt:]}"
    begin, rest = (bytes(i for i in part if i < BYTES).decode("utf-8", "replace") for part in (made[:prompt], made[prompt:]))
    return f"{begin!r} -> {rest!r}"
