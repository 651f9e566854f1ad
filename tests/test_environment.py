"""What is said of the machine, with a GPU, without one, and with everything broken."""

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from olmodebug import environment as subject
from olmodebug.environment import environment, machine, olmodebug_version, package_version, stated_version
from olmodebug.render.terminal import console, environment_view
from olmodebug.units import facts_text


class NVMLError_LibraryNotFound(Exception):
    """Named as in pynvml: the library is told from other failures by this name."""


class NVMLError_NotSupported(Exception):
    """Named as in pynvml."""


class FakeNvml:
    """pynvml on a machine with `count` H200s, one of them in MIG mode; counts the sessions that are open."""

    def __init__(self, *, count: int = 2) -> None:
        self.count = count
        self.open = 0
        self.sessions = 0

    def nvmlInit(self) -> None:
        self.open += 1
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.65.06"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13010

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=150754820096, free=150754820096 - handle * 1024**3)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (9, 0)

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        if handle == 0:
            raise NVMLError_NotSupported("Not Supported")
        return [1, 1]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid) for pid in (4242, 77)[: 2 * handle]]


class NoDriver(FakeNvml):
    """pynvml on a machine without a driver."""

    def nvmlInit(self) -> None:
        raise NVMLError_LibraryNotFound("NVML Shared Library Not Found")


class OldDriver(FakeNvml):
    """pynvml after an update of the driver without a reboot."""

    def nvmlInit(self) -> None:
        raise RuntimeError("Driver/library version mismatch")


class EveryCallFails:
    """A library of which only the session works."""

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def text(nvml: object, **environ: str) -> str:
    """What `olmodebug env` prints."""
    stream = io.StringIO()
    known = environment(seed=0, command="olmodebug env", nvml=nvml)
    console(stream, width=100).print(environment_view(known, machine(environ=environ, nvml=nvml)))
    return stream.getvalue()


def test_each_gpu_is_a_topic() -> None:
    nvml = FakeNvml()
    known = machine(environ={}, nvml=nvml)
    assert known["driver"] == {"version": "580.65.06", "cuda": "13.1"}
    assert known["gpu 0"] == {
        "name": "NVIDIA H200",
        "total_bytes": 150754820096,
        "free_bytes": 150754820096,
        "capability": "9.0",
        "mig": "NVMLError_NotSupported: Not Supported",
        "processes": 0,
    }
    second = known["gpu 1"]
    assert isinstance(second, dict)
    assert (second["mig"], second["processes"], second["free_bytes"]) == ("on", "4242 77", 149681078272)
    assert (nvml.open, nvml.sessions) == (0, 2)


def test_gpus_beyond_eight_are_counted() -> None:
    known = machine(environ={}, nvml=FakeNvml(count=16))
    assert [name for name in known if name.startswith("gpu")] == [*(f"gpu {i}" for i in range(8)), "gpus"]
    assert known["gpus"] == "8 more"


def test_without_a_driver_one_line_says_so() -> None:
    assert "  gpu        no NVIDIA driver: NVML Shared Library Not Found\n" in text(NoDriver())
    assert environment(seed=0, command="", nvml=NoDriver()).driver is None


def test_a_driver_that_does_not_answer_is_not_called_absent() -> None:
    known = machine(environ={}, nvml=OldDriver())
    assert known["gpu"] == "the NVIDIA driver does not answer: Driver/library version mismatch"


def test_every_question_that_fails_is_a_reason() -> None:
    known = machine(environ={}, nvml=EveryCallFails())
    assert known["driver"] == {
        "version": "AttributeError: nvmlSystemGetDriverVersion",
        "cuda": "AttributeError: nvmlSystemGetCudaDriverVersion_v2",
    }
    assert known["gpu"] == "AttributeError: nvmlDeviceGetCount"


def test_a_torch_that_does_not_import_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(subject, "_torch", broken)
    reason = "libcudart.so.13: cannot open shared object file"
    assert machine(environ={}, nvml=NoDriver())["torch"] == f"cannot be imported: ImportError: {reason}"
    assert environment(seed=0, command="", nvml=NoDriver()).cuda == f"ImportError: {reason}"


def test_the_real_machine_answers_every_question_within_a_screen() -> None:
    known = machine()
    assert {"packages", "cpu", "memory", "torch", "numerics", "threads", "sdpa", "variables"} <= set(known)
    linux_only = ("memory",) if sys.platform == "linux" else ()
    for name in ("cpu", "numerics", "threads", "sdpa", *linux_only):
        facts = known[name]
        assert isinstance(facts, dict)
        assert "Error" not in facts_text(facts), facts
    assert len(text(NoDriver()).splitlines()) <= 20
    assert len(text(FakeNvml()).splitlines()) <= 25


def test_only_the_variables_that_are_set_are_shown() -> None:
    assert machine(environ={"HOME": "/root"}, nvml=NoDriver())["variables"] == "none set"
    environ = {"CUDA_LAUNCH_BLOCKING": "1", "HOME": "/root", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert machine(environ=environ, nvml=NoDriver())["variables"] == {
        "CUDA_LAUNCH_BLOCKING": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


def test_the_environment_of_a_report() -> None:
    torch = pytest.importorskip("torch")
    known = environment(seed=7, command="olmodebug check", nvml=FakeNvml())
    assert (known.seed, known.command, known.device, known.driver) == (7, "olmodebug check", "cpu", "580.65.06")
    assert known.torch == package_version("torch") in (torch.__version__, torch.__version__.partition("+")[0])
    assert known.cuda in (torch.version.cuda, f"rocm {torch.version.hip}")
    assert known.python.startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert known.gpu is None


def test_the_gpu_is_named_when_the_subject_runs_on_it_and_not_where_it_is_only_predicted_for() -> None:
    torch = pytest.importorskip("torch")
    gpu = environment(seed=0, command="", device="cuda", nvml=NoDriver()).gpu
    assert gpu == (torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def test_the_version_comes_from_the_package_or_the_checkout(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    assert stated_version(pyproject) == "unknown"
    pyproject.write_text("[project]\n")
    assert stated_version(pyproject) == "unknown"
    pyproject.write_text("[project\n")
    assert stated_version(pyproject) == "unknown"
    pyproject.write_text('[project]\nversion = "1.2.3"\n')
    assert stated_version(pyproject) == "1.2.3"
    assert olmodebug_version() in (package_version("olmodebug"), stated_version(Path(subject.__file__).parents[1] / "pyproject.toml"))


def test_a_version_is_told_without_importing_torch() -> None:
    code = "import sys; from olmodebug.environment import olmodebug_version as v; v(); print('torch' in sys.modules)"
    root = Path(subject.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "False"
