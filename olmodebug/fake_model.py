"""A subject whose tensors are fake: shapes, dtypes and strides on a pretended CPU, and no memory behind them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # the documented FakeTensor; its module has no public name

from .load import SubjectCodeError
from .spec import Job, resolve
from .subject import Subject


def fake_mode() -> FakeTensorMode:
    """The mode that a fake subject lives in; constants of the model's own code may be real tensors."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_subject(job: Job, mode: FakeTensorMode, *, dtype: torch.dtype) -> Subject:
    """The subject of a job, whole, in training mode, every parameter and buffer fake and of this floating dtype.

    It is built on the meta device. One whose own code does not run there is built as usual first, with its memory.
    """
    try:
        subject = resolve(replace(job, meta=True))
    except SubjectCodeError:
        subject = resolve(replace(job, whole=True))
        subject.assumptions.append("built with its memory, because it does not run on the meta device")
    subject.model.to(dtype)  # as the model does it: some keep their tables in float32
    return faked(subject, mode)


def faked(subject: Subject, mode: FakeTensorMode) -> Subject:
    """The same subject with every tensor that its modules hold replaced by a fake one; tied weights stay tied."""
    known: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            with mode:
                empty: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            known[id(tensor)] = empty
        return known[id(tensor)]

    kept: list[Any] = []  # the replaced tensors, so that no id is used twice
    for module in subject.model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))  # type: ignore[assignment]
        for holder in holders:
            for name, value in list(holder.items()):
                if isinstance(value, Tensor):
                    kept.append(value)
                    holder[name] = fake(value)
    subject.model.train()
    return subject
