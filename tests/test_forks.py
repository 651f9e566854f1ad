"""Children that are forks: each lives and dies alone, the imports are made once, and where forking cannot be, a fresh process does it."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from olmodebug.executions.check import ParityOrder, Side, check_parity
from olmodebug.executions.execution import parse
from olmodebug.forks import SPINS, Forks, forks
from olmodebug.process import Child, Death, run_child
from olmodebug.store import Run

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks"), pytest.mark.fresh]


def run(
    folder: Path, server: Forks | None, action: str, timeout: float = 60.0, environment: dict[str, str] | None = None
) -> tuple[Death | None, dict[str, Any]]:
    told: dict[str, Any] = {}
    child = Child(module="tests.samples.forked", folder=folder, timeout_seconds=timeout, environment=environment or {})
    death = run_child(child, {"action": action}, lambda event: told.update(event), lambda: None, forks=server)
    return death, told


def test_children_are_forks_of_one_process_that_has_the_imports_and_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # numpy's, which survive a fork; torch may have none
    with forks("torch") as server:
        first, second = (run(tmp_path, server, "tell", environment={"CUDA_LAUNCH_BLOCKING": "1"}) for _ in range(2))
    assert first == second
    assert first[0] is None
    known = {name: first[1][name] for name in ("forked", "torch", "threads", "variable")}
    assert known == {"forked": True, "torch": True, "threads": 1, "variable": "1"}
    assert first[1]["parent"] != os.getpid()
    assert "CUDA_LAUNCH_BLOCKING" not in os.environ


def test_threads_of_children_soon_sleep_while_they_wait_unless_it_is_said_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    with forks() as server:
        assert [run(tmp_path, each, "tell")[1]["waits"] for each in (server, None)] == [SPINS, SPINS]
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert run(tmp_path, None, "tell")[1]["waits"] is None


def test_a_fork_that_dies_or_hangs_takes_no_other_along(tmp_path: Path) -> None:
    with forks() as server:
        died = run(tmp_path, server, "abort")[0]
        assert died is not None
        assert died.signal == signal.SIGABRT
        hung = run(tmp_path, server, "hang", timeout=1.0)[0]
        assert hung is not None
        assert hung.hung
        death, told = run(tmp_path, server, "tell")
        assert (death, told["forked"]) == (None, True)


def test_where_a_device_cannot_start_in_a_fork_a_fresh_process_does_it(tmp_path: Path) -> None:
    with forks() as server:
        death, told = run(tmp_path, server, "refuse")
        assert (death, told["forked"], server.able) == (None, False, False)
        assert run(tmp_path, server, "tell")[1]["forked"] is False


def test_without_the_server_a_fresh_process_does_it(tmp_path: Path) -> None:
    with forks() as server:
        assert run(tmp_path, server, "tell")[1]["forked"] is True
        assert server.process is not None
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        death, told = run(tmp_path, server, "tell")
        assert (death, told["forked"]) == (None, False)


def test_a_child_whose_server_is_gone_is_not_left_behind(tmp_path: Path) -> None:
    told: dict[str, Any] = {}
    child = Child(module="tests.samples.forked", folder=tmp_path, timeout_seconds=1.0)

    def note(event: dict[str, Any]) -> None:
        told.update(event)
        if "pid" in event and server.process is not None:
            server.process.kill()

    with forks() as server:
        death = run_child(child, {"action": "hang"}, note, lambda: None, forks=server)
    assert death is not None
    assert death.hung
    deadline = time.monotonic() + 5
    while _lives(told["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(told["pid"])


def _lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its new parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_signal_without_a_name_is_told_by_its_number(tmp_path: Path) -> None:
    death = run(tmp_path, None, "signal")[0]
    assert death is not None
    assert death.text == f"died of signal {signal.SIGRTMIN + 1}"


def test_a_child_that_cannot_be_started_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "absent", None, "tell")
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_nothing_is_left_when_the_block_ends(tmp_path: Path) -> None:
    with forks() as server:
        run(tmp_path, server, "tell")
        process = server.process
    assert process is not None
    deadline = time.monotonic() + 5
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is not None


def test_both_sides_of_a_parity_run_are_forks_of_one_process(tmp_path: Path) -> None:
    subject = tmp_path / "told.py"
    noted = tmp_path / "parents"
    text = "import os\nfrom pathlib import Path\nfrom tests.mutants.clean.nanogpt_style import build as built\n\n\ndef build():\n"
    subject.write_text(
        f"{text}    with Path({str(noted)!r}).open('a') as file:\n        file.write(f'{{os.getppid()}}\\n')\n    return built()\n"
    )
    sides = [Side(job={"spec": f"{subject}:build", "seed": 0}, execution=parse(text)) for text in ("cpu,float64", "cpu,float32")]
    report = check_parity(ParityOrder(pairs=[(sides[0], sides[1])], only=("long",)), Run(id="here", folder=None), lambda *_: None)
    assert report.verdict == "pass"
    parents = noted.read_text().split()
    assert len(parents) >= 2
    assert len(set(parents)) == 1
    assert str(os.getpid()) not in parents
