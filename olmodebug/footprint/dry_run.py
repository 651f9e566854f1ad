"""Training steps, or an inference, under the storage tracer: on fake tensors for a prediction, on real ones to compare."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..own_code import quiet
from ..spec import Job
from ..subject import Subject
from .cuda_policy import cuda_policies, no_packed_sequences, values_unread
from .fake_model import fake_copy, fake_mode, fake_subject
from .gpus import Gpu
from .kv_cache import cache_tensors
from .storage_trace import BUFFERS, INPUTS, KV_CACHE, StorageTrace, StorageTracer
from .training_step import AUTOCAST, StepPlan, autocast_of, call_arguments, checkpointed, make_optimizer, make_scaler, run, step

DEFAULT_SEQ_LEN = 2048
STEPS = 3  # AdamW's state arrives in the first, the second is the first with it, the third shows that nothing grows


class Prepared:
    """A fake subject, ready to be traced under several plans: building it is a good part of the work.

    From a job it is built without memory; of a live subject it is a copy without memory.
    """

    def __init__(self, source: Job | Subject, dtype: torch.dtype) -> None:
        self.mode = fake_mode()
        with quiet():
            if isinstance(source, Subject):
                self.subject = fake_copy(source, self.mode, dtype=dtype)
            else:
                self.subject = fake_subject(source, self.mode, dtype=dtype)


def trace_fake(prepared: Prepared, plan: StepPlan, gpu: Gpu | None, *, steps: int = STEPS, lines: bool = True) -> StorageTrace:
    """The storages of a plan on fake tensors; with a GPU its policies are emulated, without one it is the CPU itself."""
    subject = prepared.subject
    _must_fit_positions(subject, plan)
    policies: AbstractContextManager[Any] = values_unread()
    if gpu is not None:
        policies = cuda_policies(gpu, autocast=plan.precision in AUTOCAST)
    with prepared.mode, quiet(), policies:
        return trace_steps(subject, plan, steps=steps, scratch=gpu is not None, lines=lines)


def trace_real(
    subject: Subject, plan: StepPlan, *, steps: int = STEPS, started: Callable[[StorageTrace], object] | None = None
) -> StorageTrace:
    """The storages of a plan on the subject's real tensors, on the CPU, without emulation.

    `started` gets the trace as it begins, so that what was alive is known when the run fails.
    """
    _must_fit_positions(subject, plan)
    with no_packed_sequences(), quiet():
        return trace_steps(subject, plan, steps=steps, scratch=False, lines=True, started=started)


def trace_steps(
    subject: Subject,
    plan: StepPlan,
    *,
    steps: int,
    scratch: bool,
    lines: bool,
    started: Callable[[StorageTrace], object] | None = None,
) -> StorageTrace:
    """The trace of a plan on a subject as it is; the model is left without gradients."""
    model = subject.model
    rows = {subject.vocab_size, subject.embedding_rows or subject.vocab_size}
    tracer = StorageTracer(model, vocab_rows=rows, scratch=scratch, lines=lines)
    if started is not None:
        started(tracer.trace)
    batches = [token_ids(subject, plan) for _ in range(plan.accumulation)]
    optimizer = None if plan.inference else make_optimizer(model, plan.optimizer)
    with ExitStack() as stack:
        stack.enter_context(checkpointed(model, plan.checkpointing and not plan.inference))
        stack.enter_context(tracer)
        tracer.track_parameters(model.parameters())
        tracer.track(model.buffers(), BUFFERS)
        tracer.track(batches, INPUTS)
        if plan.inference:
            infer(subject, plan, batches[0], tracer)
            return tracer.finish()
        assert optimizer is not None
        scaler = make_scaler(plan.precision)

        def begin(name: str) -> None:
            if name in ("optimizer", "forward"):
                tracer.track_gradients(model.parameters())
            tracer.phase(name)

        for number in range(1, steps + 1):
            tracer.step = number
            step(subject, plan, optimizer, scaler, batches, begin)
            tracer.track_optimizer(optimizer)
        tracer.phase("end")
    return tracer.finish()


def infer(subject: Subject, plan: StepPlan, input_ids: Tensor, tracer: StorageTracer) -> None:
    """A prompt, then `new_tokens` single tokens from the cache; without a cache in the model, the prompt alone."""
    form = subject.convention
    subject.model.eval()
    cached = bool(form.use_cache and form.cache)
    try:
        with torch.no_grad(), autocast_of(plan.precision):
            tracer.step = 1
            tracer.phase("prefill")
            result, cache = _call(subject, input_ids, None, cached)
            del result
            tracer.track(cache_tensors(cache), KV_CACHE)
            for number in range(plan.new_tokens if cached else 0):
                tracer.step = number + 2
                tracer.phase("decode")
                token = input_ids[:, :1].clone()
                result, cache = _call(subject, token, cache, cached)
                del result
                tracer.track(cache_tensors(cache), KV_CACHE)
            tracer.phase("end")
    finally:
        subject.model.train()


def token_ids(subject: Subject, plan: StepPlan, *, generator: torch.Generator | None = None) -> Tensor:
    """Token ids `[batch, seq_len]` inside the vocabulary; zeros without a generator."""
    shape = (plan.batch_size, plan.seq_len)
    if generator is None:
        return torch.zeros(shape, dtype=torch.long, device=subject.device)
    return torch.randint(subject.vocab_size, shape, generator=generator).to(subject.device)


def default_length(subject: Subject, plan: StepPlan) -> int:
    """2048 tokens, or as many as the model declares positions for."""
    longest = subject.max_positions or DEFAULT_SEQ_LEN
    return max(1, min(DEFAULT_SEQ_LEN, longest - plan.new_tokens))


def _call(subject: Subject, input_ids: Tensor, cache: Any, cached: bool) -> tuple[Any, Any]:
    form = subject.convention
    arguments = call_arguments(subject, input_ids)
    if cached:
        assert form.use_cache and form.cache
        arguments[form.use_cache] = True
        if cache is not None:
            arguments[form.cache] = cache
    result = run(subject, arguments)
    if not cached:
        return result, None
    for name in (form.cache, "past_key_values", "past_key_value", "kv_cache", "cache_params"):
        found = result.get(name) if isinstance(result, dict) else getattr(result, name or "", None)
        if found is not None:
            return result, found
    return result, None


def _must_fit_positions(subject: Subject, plan: StepPlan) -> None:
    longest = subject.max_positions
    length = plan.seq_len + (plan.new_tokens if plan.inference else 0)
    if longest is not None and length > longest:
        raise UsageError(f"--seq-len {length}: the model declares {longest} positions; give at most that")
