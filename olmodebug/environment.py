"""The machine and the versions that a result depends on.

Nothing here fails: what cannot be asked answers with the reason why not.
"""

import os
import platform
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .report import Environment, Scalar

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "hypothesis", "pytest", "rich")

# The variables that change what torch computes, where it runs or how it allocates.
VARIABLES = (
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
)

GPUS_SHOWN = 8  # a line each: `olmodebug env` is for an issue's first screen

NO_DRIVER = ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded")

Facts = dict[str, Scalar]


def environment(*, seed: int, command: str, device: str = "cpu", nvml: Any = None) -> Environment:
    """What a report records of the machine; `device` is where the subject runs, `nvml` stands in for pynvml."""
    driver = _driver(nvml)
    return Environment(
        olmodebug=olmodebug_version(),
        python=platform.python_version(),
        platform=platform.platform(),
        torch=package_version("torch"),
        transformers=package_version("transformers"),
        cuda=_text(_ask(_cuda_build)),
        device=device,
        driver=_text(driver.get("version")) if isinstance(driver, dict) else None,
        gpu=_text(_ask(lambda: _card(device))),
        seed=seed,
        command=command,
    )


def machine(*, environ: Mapping[str, str] | None = None, nvml: Any = None) -> dict[str, Scalar | Facts]:
    """What `olmodebug env` shows beyond the Environment: a topic's facts, or one line that says why there are none."""
    variables = os.environ if environ is None else environ
    packages: Facts = {"python": platform.python_version()}
    packages |= {name: package_version(name) or "not installed" for name in PACKAGES}
    known: dict[str, Scalar | Facts] = {"packages": packages, "cpu": _cpu(), "memory": _memory(), **_torch_topics()}
    known["variables"] = {name: variables[name] for name in VARIABLES if name in variables} or "none set"
    driver = _driver(nvml)
    if not isinstance(driver, dict):
        return known | {"gpu": driver}
    return known | {"driver": driver, **_gpus(nvml)}


def olmodebug_version() -> str:
    """The installed version, or the one that a checkout's pyproject.toml states; `unknown` without either."""
    return package_version("olmodebug") or stated_version(Path(__file__).parents[1] / "pyproject.toml")


def package_version(name: str) -> str | None:
    """The version of an installed package, which is not imported; None when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def stated_version(pyproject: Path) -> str:
    """The version that a pyproject.toml states, `unknown` where it states none."""
    try:
        return str(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"])
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return "unknown"


def _ask(question: Callable[[], Scalar]) -> Scalar:
    """The answer, or in one line why there is none: a broken machine is what people run `olmodebug env` on."""
    try:
        return question()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())


def _ask_all(questions: Mapping[str, Callable[[], Scalar]]) -> Facts:
    return {name: _ask(question) for name, question in questions.items()}


def _card(device: str) -> str | None:
    """The name of the card in use; None on another device, and where a card is only predicted for."""
    cuda = _torch().cuda if device.startswith("cuda") else None
    return str(cuda.get_device_name(device)) if cuda is not None and cuda.is_available() else None


def _text(value: Scalar) -> str | None:
    return None if value is None else str(value)


# The CPU and the memory


def _cpu() -> Facts:
    return _ask_all({"model": _cpu_model, "cores": os.cpu_count, "usable_cores": _usable_cores})


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def _memory() -> Facts:
    questions: dict[str, Callable[[], Scalar]] = {
        "total_bytes": lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "available_bytes": _available_bytes,
    }
    return _ask_all(questions)


def _available_bytes() -> int:
    """Linux's own estimate of what can be allocated without swapping; free pages alone leave out the caches."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


# What torch was built with and how it is set


def _torch() -> Any:
    import torch

    return torch


def _cuda_build() -> str | None:
    build = _torch().version
    return f"rocm {build.hip}" if build.hip else build.cuda


def _torch_topics() -> dict[str, Scalar | Facts]:
    try:
        torch = _torch()
    except Exception as error:
        return {"torch": f"cannot be imported: {type(error).__name__}: {error}"}
    topics: dict[str, dict[str, Callable[[], Scalar]]] = {
        "torch": {
            "cuda": lambda: torch.version.cuda,
            "rocm": lambda: torch.version.hip,
            "cudnn": lambda: torch.backends.cudnn.version(),
            "mkl": lambda: torch.backends.mkl.is_available(),
            "cpu_capability": lambda: torch.backends.cpu.get_cpu_capability(),
            "cuda_usable": lambda: torch.cuda.is_available(),
        },
        "numerics": {
            "default_dtype": lambda: str(torch.get_default_dtype()).removeprefix("torch."),
            "float32_matmul": lambda: torch.get_float32_matmul_precision(),
            "tf32_matmul": lambda: torch.backends.cuda.matmul.allow_tf32,
            "tf32_cudnn": lambda: torch.backends.cudnn.allow_tf32,
            "deterministic": lambda: torch.are_deterministic_algorithms_enabled(),
            "cudnn_benchmark": lambda: torch.backends.cudnn.benchmark,
        },
        "threads": {
            "intra_op": lambda: torch.get_num_threads(),
            "inter_op": lambda: torch.get_num_interop_threads(),
        },
        "sdpa": {
            "flash": lambda: torch.backends.cuda.flash_sdp_enabled(),
            "mem_efficient": lambda: torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cudnn": lambda: torch.backends.cuda.cudnn_sdp_enabled(),
            "math": lambda: torch.backends.cuda.math_sdp_enabled(),
        },
    }
    return {topic: _ask_all(questions) for topic, questions in topics.items()}


# The GPUs, asked of the driver and not of torch, which may not be able to use them


@contextmanager
def _session(nvml: Any) -> Iterator[Any]:
    library = nvml or import_module("pynvml")
    library.nvmlInit()
    try:
        yield library
    finally:
        library.nvmlShutdown()


def _driver(nvml: Any) -> Scalar | Facts:
    """The driver's version and CUDA version, or in one line why there is none."""
    try:
        with _session(nvml) as library:
            cuda = _ask(lambda: _cuda_version(library.nvmlSystemGetCudaDriverVersion_v2()))
            return {"version": _ask(lambda: _name(library.nvmlSystemGetDriverVersion())), "cuda": cuda}
    except ModuleNotFoundError:
        return "unknown: nvidia-ml-py is not installed"
    except Exception as error:
        absent = type(error).__name__ in NO_DRIVER
        return f"{'no NVIDIA driver' if absent else 'the NVIDIA driver does not answer'}: {error}"


def _gpus(nvml: Any) -> dict[str, Scalar | Facts]:
    try:
        with _session(nvml) as library:
            count = int(library.nvmlDeviceGetCount())
            gpus: dict[str, Scalar | Facts] = {f"gpu {i}": _gpu(library, i) for i in range(min(count, GPUS_SHOWN))}
            if count > GPUS_SHOWN:
                gpus["gpus"] = f"{count - GPUS_SHOWN} more"
            return gpus
    except Exception as error:
        return {"gpu": f"{type(error).__name__}: {error}"}


def _gpu(library: Any, index: int) -> Scalar | Facts:
    try:
        handle = library.nvmlDeviceGetHandleByIndex(index)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    questions: dict[str, Callable[[], Scalar]] = {
        "name": lambda: _name(library.nvmlDeviceGetName(handle)),
        "total_bytes": lambda: int(library.nvmlDeviceGetMemoryInfo(handle).total),
        "free_bytes": lambda: int(library.nvmlDeviceGetMemoryInfo(handle).free),
        "capability": lambda: ".".join(map(str, library.nvmlDeviceGetCudaComputeCapability(handle))),
        "mig": lambda: "on" if library.nvmlDeviceGetMigMode(handle)[0] else "off",
        "processes": lambda: " ".join(str(p.pid) for p in library.nvmlDeviceGetComputeRunningProcesses(handle)) or 0,
    }
    return _ask_all(questions)


def _name(value: str | bytes) -> str:
    """Older NVML bindings return bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _cuda_version(number: int) -> str:
    """NVML's 12080 as `12.8`."""
    return f"{number // 1000}.{number % 1000 // 10}"
