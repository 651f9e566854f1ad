"""One training step as people write it, described by a value and run on fake or real tensors alike."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..convention import find_logits, find_loss
from ..errors import UsageError
from ..subject import Subject
from ..training.head import Head, HeadNotCalled
from .blocks import blocks_of

Precision = Literal["fp32", "fp16-amp", "bf16-amp", "bf16", "fp16"]
OptimizerKind = Literal["adamw", "adamw-fused", "adamw-for-loop", "sgd", "sgd-momentum"]
LossKind = Literal["model", "chunked"]

PURE: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
AUTOCAST: dict[str, torch.dtype] = {"fp16-amp": torch.float16, "bf16-amp": torch.bfloat16}
CHUNK_TOKENS = 1024  # of chunked cross-entropy: 1024 x 50304 float32 logits are 196 MiB
LEARNING_RATE = 1e-3
IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What a training step does: sizes of a micro-batch, precision, optimizer, and what saves memory.

    `fp16-amp` and `bf16-amp` keep float32 weights and compute under autocast, the first with a GradScaler; `bf16` has
    bfloat16 weights, gradients and optimizer state; `fp16` is for inference. `chunked` computes the head and the loss over chunks of tokens that
    are recomputed in the backward pass. `keep_outputs` is what `out = model(...); out.loss.backward()` does: the logits live until
    the next forward has made others. `new_tokens` is used by inference alone.
    """

    batch_size: int = 8
    seq_len: int = 2048
    precision: Precision = "fp16-amp"
    optimizer: OptimizerKind = "adamw"
    loss: LossKind = "model"
    checkpointing: bool = False
    accumulation: int = 1
    keep_outputs: bool = False
    inference: bool = False
    new_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "accumulation"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')}: expected at least 1, observed {getattr(self, name)}")
        if self.precision == "fp16" and not self.inference:
            raise UsageError("pure float16 weights cannot be trained (updates below 6e-8 vanish): use fp16-amp, or bf16")
        for name, choice in (("precision", Precision), ("optimizer", OptimizerKind), ("loss", LossKind)):
            if getattr(self, name) not in get_args(choice):
                raise UsageError(f"{name}: expected {', '.join(get_args(choice))}, observed {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.batch_size * self.seq_len

    @property
    def weight_dtype(self) -> torch.dtype:
        return PURE.get(self.precision, torch.float32)

    def __str__(self) -> str:
        parts = [f"batch {self.batch_size} x {self.seq_len}", self.precision]
        if self.inference:
            return ", ".join([*parts, f"inference, {self.new_tokens} new tokens"])
        parts += [self.optimizer]
        parts += ["gradient checkpointing"] if self.checkpointing else []
        parts += ["chunked cross-entropy"] if self.loss == "chunked" else []
        parts += [f"{self.accumulation} micro-batches a step"] if self.accumulation > 1 else []
        parts += ["outputs held"] if self.keep_outputs else []
        return ", ".join(parts)


class Scaler(torch.amp.GradScaler):
    """The GradScaler of a step whose values nobody can read: it never asks whether a gradient overflowed, so a step is
    always taken. On real tensors it serves the comparison of both runs only."""

    def _maybe_opt_step(self, optimizer: torch.optim.Optimizer, optimizer_state: Any, *args: Any, **kwargs: Any) -> Any:
        return optimizer.step(*args, **kwargs)


def make_optimizer(model: nn.Module, kind: OptimizerKind, *, learning_rate: float = LEARNING_RATE) -> torch.optim.Optimizer:
    """The optimizer as it runs on CUDA, where foreach is the default; on the CPU torch would take the loop."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind.startswith("sgd"):
        return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9 if kind == "sgd-momentum" else 0.0, foreach=True)
    fused, foreach = kind == "adamw-fused", kind == "adamw"
    return torch.optim.AdamW(parameters, lr=learning_rate, fused=fused, foreach=foreach)


def make_scaler(precision: Precision, device: str = "cpu") -> torch.amp.GradScaler | None:
    """The scaler that a prediction uses; None where no precision needs one."""
    return Scaler(device) if precision == "fp16-amp" else None


def autocast_of(precision: Precision, device: str = "cpu") -> AbstractContextManager[Any]:
    """The autocast context of a precision, or one that does nothing."""
    dtype = AUTOCAST.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)


def step(
    subject: Subject,
    plan: StepPlan,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    batches: list[Tensor],
    phase: Callable[[str], None],
    *,
    device: str = "cpu",
) -> list[Tensor]:
    """One step: forward and backward of each micro-batch, the optimizer, gradients set to None; the detached losses.

    `phase(name)` is called as each part begins: forward, backward, optimizer.
    """
    losses = []
    held = None
    for input_ids in batches:
        phase("forward")
        with autocast_of(plan.precision, device):
            loss, outputs = loss_and_outputs(subject, plan, input_ids)
        held = outputs if plan.keep_outputs else None
        del outputs
        if plan.accumulation > 1:
            loss = loss / plan.accumulation
        losses.append(loss.detach())
        phase("backward")
        (loss if scaler is None else scaler.scale(loss)).backward()
        del loss
    phase("optimizer")
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    del held
    return losses


def loss_of(subject: Subject, plan: StepPlan, input_ids: Tensor) -> Tensor:
    """The next-token loss: the model's own where it takes labels, else cross-entropy of its logits in float32."""
    return loss_and_outputs(subject, plan, input_ids)[0]


def loss_and_outputs(subject: Subject, plan: StepPlan, input_ids: Tensor) -> tuple[Tensor, Any]:
    """The loss, and what the model returned with it."""
    if plan.loss == "chunked":
        return chunked_loss(subject, input_ids), None
    form = subject.convention
    arguments = call_arguments(subject, input_ids)
    if form.labels:
        # Rolled, with no label that does not count: what that is called (-100, -1) is the model's own affair.
        arguments[form.labels] = input_ids.roll(-1, 1) if form.labels_aligned else input_ids
    result = run(subject, arguments)
    loss = find_loss(result)
    if loss is None and form.labels:
        loss = kept_loss(subject.model)
    if loss is not None:
        return loss, result
    logits = find_logits(result, batch_size=len(input_ids), seq_len=input_ids.shape[1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), next_tokens(input_ids).flatten(), ignore_index=IGNORE_INDEX), result


def kept_loss(model: nn.Module) -> Tensor | None:
    """The loss that a model which returns its logits alone keeps for its caller (`self.last_loss = ...`); None where it is unclear."""
    scalars = [value for value in vars(model).values() if isinstance(value, Tensor) and value.ndim == 0 and value.grad_fn is not None]
    return scalars[0] if len(scalars) == 1 else None


def chunked_loss(subject: Subject, input_ids: Tensor) -> Tensor:
    """The same loss without all logits at once: head and cross-entropy over chunks of tokens, each recomputed backward."""
    head = output_head(subject)
    if head is None:
        raise UsageError("chunked cross-entropy: this model has no output head (a Linear with a row for each token) that could be chunked")
    module = head[1]
    form, arguments = subject.convention, call_arguments(subject, input_ids)
    if form.labels and form.logits_need_labels:  # without them the head gets the last position only
        arguments[form.labels] = input_ids
    try:
        hidden = Head(module).hidden_states(lambda: run(subject, arguments)).flatten(0, -2)
    except HeadNotCalled:
        raise UsageError(f"chunked cross-entropy: the forward does not call {head[0]}, so it cannot be chunked") from None
    if len(hidden) != input_ids.numel():
        raise UsageError(f"chunked cross-entropy: {head[0]} gets {len(hidden)} rows for {input_ids.numel()} tokens")
    targets = next_tokens(input_ids).flatten()
    total = hidden.new_zeros((), dtype=torch.float32)
    # Without the early stop: the exception that ends a recomputation is lost inside torch 2.11's cross-entropy on CUDA.
    with set_checkpoint_early_stop(False):
        for states, labels in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
            total = total + checkpoint(_chunk_loss, module, states, labels, use_reentrant=False, preserve_rng_state=False)
    return total / (len(input_ids) * (input_ids.shape[1] - 1))


def _chunk_loss(head: nn.Module, states: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(states).float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")


def next_tokens(input_ids: Tensor) -> Tensor:
    """For each position the token after it; -100 at the last."""
    return F.pad(input_ids, (0, 1), value=IGNORE_INDEX)[:, 1:]


def call_arguments(subject: Subject, input_ids: Tensor) -> dict[str, Any]:
    """The arguments of a training forward: the ids, no cache."""
    form = subject.convention
    arguments: dict[str, Any] = {form.ids: input_ids}
    if form.use_cache:
        arguments[form.use_cache] = False
    return arguments


def run(subject: Subject, arguments: dict[str, Any]) -> Any:
    """The model's raw result."""
    return subject.forward(arguments)


def output_head(subject: Subject) -> tuple[str, nn.Linear] | None:
    """(path, module) of the last Linear with a row for each token; None where there is none, or logits are changed after
    it (a final softcap or scale), which the chunks would leave out."""
    if any(subject.setting(name) for name in ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling")):
        return None
    rows = {subject.vocab_size, subject.embedding_rows}
    heads = [(name, m) for name, m in subject.model.named_modules() if isinstance(m, nn.Linear) and m.out_features in rows]
    return heads[-1] if heads and heads[-1][0] else None


@contextmanager
def checkpointed(model: nn.Module, on: bool, *, preserve_random_state: bool = False) -> Iterator[None]:
    """Each repeated block recomputed in the backward pass, as `torch.utils.checkpoint` without reentrance does it.

    UsageError where the model has no list of blocks.
    """
    if not on:
        yield
        return
    blocks = [block for _, block in blocks_of(model, alike=False)]
    if len(blocks) < 2:
        raise UsageError("gradient checkpointing: this model has no list of blocks that could be recomputed")
    try:
        for block in blocks:
            block.forward = partial(  # type: ignore[method-assign]
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=preserve_random_state
            )
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
