"""Children that start at once: one process has imported what all of them need, and each of them is a fork of it.

Importing torch and transformers takes seconds, and a comparison of several executions needs a process for each, so that
none dies of another. The process that forks has only imported: it never asked for a device, ran no op and started no
thread of torch's, for neither survives a fork. Where a fork finds a device touched all the same, it says so, and `process`
starts a fresh interpreter. The server's side is `fork_server`.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS_TO_IMPORT = 120.0  # cold disks are slow
REFUSED = 119  # the exit status of a fork in which the device cannot start
SPINS = "3000"  # turns that a waiting thread of libgomp makes before it sleeps; by itself it makes 300,000 and more


class Forked:
    """A child that another process is the parent of, looked at as one's own: `pid`, `poll`, `wait`."""

    def __init__(self, pid: int, server: "Forks") -> None:
        self.pid, self.server = pid, server
        self.code: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended. TimeoutExpired while it has not."""
        if self.code is None:
            answer = self.server.answer(timeout)
            if answer is None:
                raise subprocess.TimeoutExpired("a forked child", timeout or 0.0)
            if "status" not in answer:  # the server is gone: nobody can say any more how its child ends, so it ends here
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            self.code = int(answer.get("status", -signal.SIGKILL))
        return self.code


class Forks:
    """The process that forks; it starts with the first child, which may refuse to be one: then `able` is off."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self.modules, self.able = modules, sys.platform == "linux"
        self.process: subprocess.Popen[bytes] | None = None
        self.socket: socket.socket | None = None
        self.rest = b""

    def start(
        self, module: str, message: Mapping[str, Any], environment: Mapping[str, str], *, events: int, output: int, tick: Callable[[], None]
    ) -> Forked | None:
        """Fork a child that runs `module.run` on a message; None where no child came of it. `tick` is called while it imports."""
        if not self.able:
            return None
        try:
            self._serve(output)
            assert self.socket is not None
            body = json.dumps({"module": module, "message": dict(message), "environment": dict(environment)}).encode()
            socket.send_fds(self.socket, [len(body).to_bytes(8, "big")], [events, output])
            self.socket.sendall(body)
            answer, deadline = None, time.monotonic() + SECONDS_TO_IMPORT
            while answer is None and time.monotonic() < deadline:
                answer = self.answer(0.2)
                tick()
        except OSError:
            answer = {}
        if not answer or "pid" not in answer:
            self.able = False
            self.close()
            return None
        return Forked(int(answer["pid"]), self)

    def answer(self, timeout: float | None) -> dict[str, Any] | None:
        """The next line of the server; None where none comes in time, and nothing in it where the server is gone."""
        assert self.socket is not None
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self.rest:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self.socket], [], [], left)[0]:
                return None
            try:
                chunk = self.socket.recv(4096)
            except ConnectionResetError:  # it ended with an order unread
                chunk = b""
            if not chunk:
                return {}
            self.rest += chunk
        line, _, self.rest = self.rest.partition(b"\n")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the server; children end by themselves or are killed by `process`."""
        if self.socket is not None:
            self.socket.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = self.socket = None

    def _serve(self, output: int) -> None:
        if self.process is not None:
            return
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "olmodebug.fork_server", str(theirs.fileno()), *self.modules],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=child_environment(),
            )
        self.rest = b""


@contextmanager
def forks(*modules: str) -> Iterator[Forks]:
    """A server of forks that has imported these modules, for the length of the block."""
    server = Forks(modules)
    try:
        yield server
    finally:
        server.close()


def child_environment() -> dict[str, str]:
    """This process's environment, with the path on which a child finds olmodebug where this process did, installed or not.

    Threads of torch's OpenMP that wait for each other spin for a moment and then sleep, unless it is said otherwise. On two
    busy cores it took 12.9 s for what takes 9.7 s if they sleep at once and 29.6 s if they spin all the time; on two quiet
    ones 9.0 s, and 11.5 and 9.2.
    """
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join(dict.fromkeys([here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
    waits = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": SPINS}
    return {**waits, **os.environ, "PYTHONPATH": path}
