"""A model in another dtype, with its complex tables left complex.

`nn.Module.to(torch.float64)` turns a complex buffer into a real one and throws its imaginary part away, which would make
a rotary table of cosines and sines into one of cosines: the twin would be another model.
"""

import warnings

import torch
from torch import nn

from .device_errors import is_out_of_memory, memory_left
from .errors import SubjectError


def cast(model: nn.Module, dtype: torch.dtype | None, *, device: torch.device | None = None) -> nn.Module:
    """The model itself, its floating tensors in `dtype` and on `device`, its complex buffers in as much precision.

    SubjectError where the device has no memory for it.
    """
    tables = [(module, name, b) for module in model.modules() for name, b in module._buffers.items() if b is not None and b.is_complex()]
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64  # torch has no narrower one that it computes in
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Casting complex values to real")
        try:
            # One at a time and by place, since a model's own to() may know no keywords; cast before it is moved, so that the
            # device never holds the wider weights.
            for target in (dtype, device):
                if target is not None:
                    model.to(target)
        except RuntimeError as error:
            if device is None or not is_out_of_memory(error):
                raise
            left = memory_left(device)
            raise SubjectError(f"--device {device}: no memory for the model there{f' ({left})' if left else ''}") from None
    for module, name, table in tables:
        module._buffers[name] = table.to(device=device, dtype=wide if dtype is not None else table.dtype)
    return model
