"""A command run under the guards, and the report on it: the child keeps the terminal, its signals and its exit status.

Loads no torch: everything comes from the journals that the watched processes left.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..process import signal_name
from .settings import Settings, child_environment

FORWARDED = ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How the command ended: its exit status, or the signal that killed it."""

    status: int | None
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """As a shell gives it: 128 + the signal."""
        return self.status if self.status is not None else 128 + (self.signal or 0)

    @property
    def text(self) -> str:
        if self.signal is not None:
            return f"died of {signal_name(self.signal)}"
        return f"exit status {self.status}"


def run_guarded(command: Sequence[str], settings: Settings, environ: Mapping[str, str]) -> Ended:
    """Run a command with the guards in its environment; it inherits the terminal and every open file."""
    try:
        process = subprocess.Popen(list(command), env=child_environment(settings, environ), close_fds=False)
    except OSError as error:
        raise UsageError(f"cannot start {command[0]}: {error.strerror or error}") from None
    with _signals_for(process):
        code = process.wait()
    return Ended(status=code) if code >= 0 else Ended(status=None, signal=-code)


@contextlib.contextmanager
def _signals_for(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """The child decides what a signal means: Ctrl-C reaches it from the terminal itself, the others are handed on."""

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)

    before = {}
    try:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
        for name in FORWARDED:
            number = getattr(signal, name, None)
            if number is not None:
                before[number] = signal.signal(number, forward)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stacks_of(folder: Path) -> list[Path]:
    """The faulthandler files that a process wrote into when it died."""
    return [path for path in sorted(folder.glob("stacks-*.txt")) if path.stat().st_size]
