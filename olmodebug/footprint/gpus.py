"""What a GPU's name decides about memory: its size, and which attention kernels and workspaces torch uses on it.

Totals are those that `nvidia-smi` shows for the card; compute capabilities are NVIDIA's table
(https://developer.nvidia.com/cuda-gpus).
"""

import difflib
import math
import re
from dataclasses import dataclass

from ..errors import UsageError

MIB = 1 << 20
SUFFIXES = {"b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}

# aten/src/ATen/cuda/CUDABlas.cpp: 4096 KiB x 2 + 16 KiB x 8 before Hopper, 32 MiB from it on.
WORKSPACE_BEFORE_HOPPER_BYTES = (4096 * 2 + 16 * 8) * 1024
WORKSPACE_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A card: its name, compute capability as (major, minor), and total memory."""

    name: str
    capability: tuple[int, int]
    total_bytes: int

    @property
    def cublas_workspace_bytes(self) -> int:
        """What the first matrix product takes from the allocator, for each handle and stream, and never gives back."""
        return WORKSPACE_BYTES if self.capability in ((9, 0), (10, 0), (12, 0)) else WORKSPACE_BEFORE_HOPPER_BYTES


GPUS: dict[str, Gpu] = {
    name: Gpu(name=name, capability=capability, total_bytes=mib * MIB)
    for name, capability, mib in (
        ("T4", (7, 5), 15360),
        ("V100", (7, 0), 32768),
        ("V100-16GB", (7, 0), 16384),
        ("A10", (8, 6), 23028),
        ("A100", (8, 0), 81920),
        ("A100-40GB", (8, 0), 40960),
        ("RTX3090", (8, 6), 24576),
        ("RTX4090", (8, 9), 24564),
        ("L4", (8, 9), 23034),
        ("L40S", (8, 9), 46068),
        ("H100", (9, 0), 81559),
        ("H200", (9, 0), 143771),
        ("B200", (10, 0), 183359),
    )
}
DEFAULT_GPU = "A100"


def gpu_named(name: str) -> Gpu:
    """The card of that name, however it is written; UsageError with the nearest names where there is none."""
    wanted = re.sub(r"[\s_-]", "", name).lower().removeprefix("nvidia").removeprefix("tesla").removeprefix("geforce")
    for known, gpu in GPUS.items():
        if known.replace("-", "").lower() == wanted:
            return gpu
    near = difflib.get_close_matches(name.upper(), GPUS, n=3, cutoff=0.4)
    told = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(GPUS)}"
    raise UsageError(f"--gpu {name}: not in the table; {told} Or give --budget, the memory of your card")


def bytes_from(text: str) -> int:
    """`8GiB`, `512 MiB`, `24GB` or a plain number of bytes as bytes; UsageError where it is none."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = SUFFIXES.get((match[2] or "b").lower()) if match else None
    if match is None or unit is None or not math.isfinite(float(match[1])) or float(match[1]) <= 0:
        raise UsageError(f"{text!r} is no size of memory: expected a number with a unit, such as 8GiB, 512MiB or 24GB")
    return round(float(match[1]) * unit)
