"""`olmodebug.memory`: the prediction from Python, on a spec or on a live model."""

from dataclasses import replace

from torch import nn

from ..first_run import from_model
from ..spec import Job
from .allocator import settings_from
from .dry_run import Prepared, default_length, trace_fake
from .estimate import estimate
from .gpus import DEFAULT_GPU, gpu_named
from .records import MemoryEstimate
from .training_step import LossKind, OptimizerKind, Precision, StepPlan


def memory(
    model: nn.Module | str,
    *,
    batch_size: int = 8,
    seq_len: int | None = None,
    precision: Precision = "fp16-amp",
    optimizer: OptimizerKind = "adamw",
    loss: LossKind = "model",
    checkpointing: bool = False,
    accumulation: int = 1,
    keep_outputs: bool = False,
    inference: bool = False,
    new_tokens: int = 0,
    gpu: str | None = DEFAULT_GPU,
    allocator: str = "",
) -> MemoryEstimate:
    """What a training step, or an inference, takes on a GPU: tensors, reserved, process, and who holds the peak.

    Nothing of the model's size is allocated and no GPU is needed; a live model is left exactly as it was. `gpu=None` gives
    the tensors on the CPU, `allocator` is the text of PYTORCH_ALLOC_CONF. `seq_len` is 2048 where it is not given, or what
    the model declares.
    """
    wanted = StepPlan(
        batch_size=batch_size,
        seq_len=seq_len or 1,
        precision=precision,
        optimizer=optimizer,
        loss=loss,
        checkpointing=checkpointing,
        accumulation=accumulation,
        keep_outputs=keep_outputs,
        inference=inference,
        new_tokens=new_tokens,
    )
    prepared = Prepared(Job(spec=model) if isinstance(model, str) else from_model(model), wanted.weight_dtype)
    if seq_len is None:
        wanted = replace(wanted, seq_len=default_length(prepared.subject, wanted))
    card = gpu_named(gpu) if gpu else None
    return estimate(trace_fake(prepared, wanted, card), card, settings_from(allocator))
