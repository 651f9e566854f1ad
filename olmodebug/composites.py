"""Ops made of others, which only inference mode hands to a dispatch mode whole, in the parts that it sees everywhere else."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private


def in_parts(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """What the op returns when its parts run under the mode, each seen by it; NotImplemented where it is one piece already.

    Elsewhere autograd takes such ops apart before a mode sees them, and inference mode leaves autograd out.
    """
    if not torch.is_inference_mode_enabled() or not isinstance(func, torch._ops.OpOverload):
        return NotImplemented
    # What torch's own modes ask and call for the same purpose; there is no public name.
    if not func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)
