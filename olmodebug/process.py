"""A child process that works on the subject: it may die, hang or fill a pipe, and the parent keeps what it had told.

The parent starts `python -m MODULE`, hands it a message on standard input, and reads its journal: one JSON line an event,
written before the next step starts (the child's side is `serve`). It loads no torch.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .forks import REFUSED, Forked, Forks, child_environment
from .records import Where

SECONDS_TO_LOAD = 120.0  # torch and the probes, before the subject's own time begins; cold disks are slow
SECONDS_TO_LEAVE = 20.0  # from the journal's end to the process's end

HOST = ("cpu", "meta")  # devices without a context that could be lost

Event = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """What to start. `folder` takes its `output.txt` and `stacks.txt`; `environment` is added to the parent's.

    `timeout_seconds` is the longest silence of the journal; until the first event more is allowed, for loading torch.
    """

    module: str
    folder: Path
    timeout_seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return self.folder / "output.txt"

    @property
    def stacks(self) -> Path:
        return self.folder / "stacks.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """How a child ended that did not tell its end: in words, and whether it hung."""

    text: str
    hung: bool = False
    signal: int | None = None
    exit_status: int | None = None


def launched(device: str) -> dict[str, str]:
    """What must stand in a process's environment before this device starts: kernels one at a time, so that an error is
    raised at the op that made it."""
    return {} if device.partition(":")[0] in HOST else {"CUDA_LAUNCH_BLOCKING": "1"}


def run_child(
    child: Child, message: Mapping[str, Any], note: Callable[[Event], None], tick: Callable[[], None], *, forks: Forks | None = None
) -> Death | None:
    """Run one child to its end; None when it told its end, else how it died.

    `note` gets every event but the last, `end`, and `tick` is called about five times a second. KeyboardInterrupt kills
    the child and its whole process group. With `forks` the child is a fork of a process that has torch already, where
    that can be.
    """
    read, write = os.pipe()
    sent = {"events": write, "stacks": str(child.stacks), "path": [str(Path.cwd()), *[p for p in sys.path if p]], **message}
    forked: Forked | None = None
    try:
        with child.output.open("ab") as output:
            if forks is not None:
                forked = forks.start(child.module, sent, child.environment, events=write, output=output.fileno(), tick=tick)
            process = forked or _fresh(child, write, output.fileno())
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    ended = hung = False
    try:
        if isinstance(process, subprocess.Popen):
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(sent).encode())
                process.stdin.close()
        ended, hung = _follow(child, read, process, note, tick)
        if not hung:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SECONDS_TO_LEAVE)
    finally:
        os.close(read)
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    if forks is not None and forked is not None and code == REFUSED:
        forks.able = False
        return run_child(child, message, note, tick)
    if hung:
        return Death(text=f"gave no answer for {child.timeout_seconds:g} s", hung=True)
    if ended:
        return None
    if code < 0:
        return Death(text=f"died of {signal_name(-code)}", signal=-code)
    return Death(text=f"ended with exit status {code}", exit_status=code)


def _fresh(child: Child, write: int, output: int) -> "subprocess.Popen[bytes]":
    """A child in an interpreter of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", child.module],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=(write,),
        start_new_session=True,
        env={**child_environment(), **child.environment},
    )


def signal_name(number: int) -> str:
    """`SIGKILL`; by its number where it has no name, as those for real time."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def innermost(stacks: Path) -> Where:
    """The innermost frame of a faulthandler dump that is the subject's own; faulthandler prints innermost first."""
    try:
        lines = stacks.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Where()
    package, probes = str(Path(__file__).parent), str(Path(__file__).parents[1] / "probes")
    for text in lines:
        if not text.lstrip().startswith('File "'):
            continue
        file, _, rest = text.strip().removeprefix('File "').partition('", line ')
        line, _, function = rest.partition(" in ")
        ours = file.startswith((package, probes)) and not file.endswith("model.py")
        if not (ours or file.startswith("<") or f"{os.sep}lib{os.sep}python" in file) and line.isdigit():
            with contextlib.suppress(ValueError):
                file = str(Path(file).relative_to(Path.cwd()))
            return Where(function=function, file=file, line=int(line))
    return Where()


def last_line(output: Path) -> str | None:
    """The last line with text in it of what a child printed, cut to 160 characters; None without one."""
    try:
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    last = next((text.strip() for text in reversed(lines) if text.strip()), None)
    return last if last is None or len(last) <= 160 else f"{last[:160]} ..."


def _follow(
    child: Child, read: int, process: "subprocess.Popen[bytes] | Forked", note: Callable[[Event], None], tick: Callable[[], None]
) -> tuple[bool, bool]:
    """Read the child's journal until it ends: (it told its end, it hangs)."""
    rest, last, started = b"", time.monotonic(), False
    with selectors.DefaultSelector() as selector:
        selector.register(read, selectors.EVENT_READ)
        while True:
            ready = selector.select(timeout=0.2)
            now = time.monotonic()
            tick()
            if ready:
                chunk = os.read(read, 1 << 16)
                if not chunk:
                    return False, False
                *lines, rest = (rest + chunk).split(b"\n")
                for text in lines:
                    event = json.loads(text)
                    if event["event"] == "end":
                        return True, False
                    started = started or event["event"] == "start"
                    note(event)
                last = now
            elif now - last > (child.timeout_seconds if started else max(child.timeout_seconds, SECONDS_TO_LOAD)):
                with contextlib.suppress(ProcessLookupError, AttributeError):
                    os.kill(process.pid, signal.SIGUSR1)  # faulthandler writes the stack
                    _wait_for(child.stacks)
                return False, True


def _wait_for(stacks: Path, seconds: float = 1.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not (stacks.exists() and stacks.stat().st_size):
        time.sleep(0.05)
