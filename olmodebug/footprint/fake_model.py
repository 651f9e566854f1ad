"""A subject whose tensors are fake: shapes, dtypes and strides on a pretended CPU, and no memory behind them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # the documented FakeTensor; its module has no public name

from ..deep_copies import deep_copy
from ..load import SubjectCodeError
from ..spec import Job, resolve
from ..subject import Subject


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
    fakes: dict[int, Tensor] = {}
    kept: list[Tensor] = []  # the replaced tensors, so that no id is used twice
    for module in subject.model.modules():
        for holder in _holders(module):
            for name, value in list(holder.items()):
                if isinstance(value, Tensor):
                    kept.append(value)
                    if id(value) not in fakes:
                        fakes[id(value)] = _fake(value, mode, value.dtype)
                    holder[name] = fakes[id(value)]
    subject.model.train()
    return subject


def fake_copy(subject: Subject, mode: FakeTensorMode, *, dtype: torch.dtype) -> Subject:
    """A copy of a live subject whose tensors are fake, in this floating dtype; the live one is left as it is."""
    memo: dict[int, Any] = {}
    for module in subject.model.modules():
        for holder in _holders(module):
            for value in holder.values():
                if isinstance(value, Tensor) and id(value) not in memo:
                    memo[id(value)] = _fake(value, mode, dtype if value.is_floating_point() else value.dtype)
    model = deep_copy(subject.model, memo)
    model.train()
    return replace(subject.around(model), assumptions=list(subject.assumptions))


def _holders(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return (module._parameters, module._buffers, vars(module))  # type: ignore[return-value]


def _fake(tensor: Tensor, mode: FakeTensorMode, dtype: torch.dtype) -> Tensor:
    with mode:
        empty: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")
        return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
