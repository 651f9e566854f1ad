"""What a GPU's driver says that this process and the whole device hold, and how it was found out.

NVML counts a process; under WDDM it does not, with MIG it counts an instance, and in a container the process has another
number outside. The fallback is the device's used memory, which holds other processes too, as the difference to a mark.
"""

import contextlib
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes of this process and of the device; `process` is None where the driver does not say. `source` says how."""

    process_bytes: int | None
    device_bytes: int | None
    source: str


def device_memory(index: int, *, uuid: str | None = None, nvml: Any = None, processes: frozenset[int] | None = None) -> DeviceMemory:
    """The memory of a device as NVML counts it; `nvml` stands in for pynvml, `processes` for the numbers this one may have.

    The card is found by its UUID where it is known: CUDA_VISIBLE_DEVICES renumbers cards for CUDA alone.
    """
    if nvml is None:
        try:
            nvml = import_module("pynvml")
        except ImportError:
            return DeviceMemory(process_bytes=None, device_bytes=None, source="nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return DeviceMemory(process_bytes=None, device_bytes=None, source=f"no NVML: {error}")
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else nvml.nvmlDeviceGetHandleByIndex(index)
        used = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
        own, source = _process(nvml, handle, processes or own_numbers())
        return DeviceMemory(process_bytes=own, device_bytes=used, source=source)
    except nvml.NVMLError as error:
        return DeviceMemory(process_bytes=None, device_bytes=None, source=f"NVML does not say: {error}")
    finally:
        nvml.nvmlShutdown()


def own_numbers() -> frozenset[int]:
    """The numbers that this process may have: its own, and with namespaces those outside (Linux tells them as NSpid)."""
    numbers = {os.getpid()}
    with contextlib.suppress(OSError):
        for text in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if text.startswith("NSpid:"):
                numbers |= {int(number) for number in text.split()[1:]}
    return frozenset(numbers)


def _process(nvml: Any, handle: Any, numbers: frozenset[int]) -> tuple[int | None, str]:
    listed = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    mine = [item for item in listed if item.pid in numbers]
    if not mine and len(listed) == 1:
        mine, how = listed, "NVML, the one process on the device (another number in this container)"
    else:
        how = "NVML, this process"
    if not mine:
        return None, "NVML lists this process under no number that it knows (a container?)"
    if any(item.usedGpuMemory is None for item in mine):
        return None, "NVML does not count processes here (WDDM or an instance of MIG)"
    return sum(int(item.usedGpuMemory) for item in mine), how
