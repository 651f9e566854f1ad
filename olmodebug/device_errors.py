"""What errors of a device mean: its context is lost, or it has no memory left."""

import torch

from .units import bytes_text

LOST = ("CUDA error", "HIP error", "device-side assert", "illegal memory access", "AcceleratorError")


def is_lost(error: BaseException) -> bool:
    """Whether an error says that the device's context is gone, so that nothing more can run there in this process."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, BaseExceptionGroup):  # hypothesis raises one where a case fails otherwise when it is run again
        return any(is_lost(part) for part in error.exceptions)
    text = f"{type(error).__name__}: {error}"
    return any(word in text for word in LOST) or (error.__cause__ is not None and is_lost(error.__cause__))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or ("CUDA error" in str(error) and "out of memory" in str(error))


def memory_left(device: torch.device) -> str:
    """`1.2 GiB of 79.2 GiB are free`; empty where the device does not say."""
    try:
        free, total = torch.cuda.mem_get_info(device)
    except (RuntimeError, ValueError, AssertionError):  # AssertionError: torch was built without CUDA
        return ""
    return f"{bytes_text(free)} of {bytes_text(total)} are free"
