"""Whatever a run may disturb in torch or in the model, put back as it was, also after an exception."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch._subclasses import FakeTensor  # a fake tensor has no values to put back, and no public name


@contextmanager
def settled(model: nn.Module | None = None, *, seed: int | None = None) -> Iterator[None]:
    """Restore the random state, the default dtype, grad mode and flags of torch, and the model's modes, gradients and
    buffers.

    With `seed` the block starts from that random state.
    """
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    deterministic = _deterministic()
    modes = [(module, module.training) for module in model.modules()] if model else []
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()] if model else []
    for parameter, _ in gradients:
        parameter.grad = None  # a backward would add to the caller's, in place
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers] if model else []
    values = [
        (buffer, buffer.clone())
        for _, known in buffers
        for buffer in known.values()
        if buffer is not None and buffer.device.type != "meta" and not isinstance(buffer, FakeTensor)
    ]
    with random_state_kept():
        if seed is not None:
            set_seed(seed)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(grad)
            if _deterministic() != deterministic:  # the setter imports torch's compiler, two seconds of it
                torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
            for module, training in modes:
                module.training = training
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, known in buffers:  # a forward may write into a buffer, or put another in its place
                module._buffers.clear()
                module._buffers.update(known)
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.data.copy_(value)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """The random state of torch on the CPU, of numpy and of Python is afterwards what it was."""
    plain, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)


def set_seed(seed: int) -> None:
    """Seed every global generator of torch, numpy and Python: models draw from any of them.

    Without an accelerator torch's is the CPU's alone, and torch.manual_seed would spend most of its time on a stack trace
    for the devices that are not there.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
