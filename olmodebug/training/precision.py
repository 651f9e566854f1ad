"""Which dtype to train in where none was asked for, by measurement and not by a table of processors."""

import time

import torch

MEASURED_SIZE = 512  # a matrix product large enough to be bound by arithmetic, a few milliseconds
MEASURED_SECONDS = 0.2  # the first product loads the kernel, and a busy machine disturbs many
ABSURDLY_SLOW = 1.5  # times float32's time


def default_dtype(device: torch.device) -> tuple[str, str]:
    """The dtype and one line that says why: float16 on CUDA, on the CPU bfloat16 where it is not slower than float32."""
    if device.type == "cuda":
        return "float16", "dtype float16 with a loss scale, the default on CUDA"
    base = product_seconds(torch.float32)
    ratios = {name: product_seconds(getattr(torch, name)) / base for name in ("bfloat16", "float16")}
    measured = ", ".join(f"{name} takes {ratio:.2g} times as long as float32" for name, ratio in ratios.items())
    name = "bfloat16" if ratios["bfloat16"] <= ABSURDLY_SLOW else "float32"
    return name, f"dtype {name} on this CPU: in a matrix product {measured}"


def product_seconds(dtype: torch.dtype, device: torch.device | None = None) -> float:
    """The shortest of a few times that one square matrix product takes."""
    a = torch.ones(MEASURED_SIZE, MEASURED_SIZE, dtype=dtype, device=device)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 6 or (time.perf_counter() - begun < MEASURED_SECONDS and len(times) < 100):
        started = time.perf_counter()
        product = a @ a
        if product.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def reachable_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second in a large matrix product on this machine: what utilisation is a share of."""
    return 2 * MEASURED_SIZE**3 / product_seconds(dtype, device)
