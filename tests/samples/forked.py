"""What a forked child does in `tests/test_forks.py`, by the action that its message names."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from olmodebug.serve import Tell, serve


def run(message: dict[str, Any], tell: Tell) -> None:
    forked = Path(getattr(sys.modules["__main__"], "__file__", "")).name == "fork_server.py"
    tell("start", step="acting")
    if message["action"] == "abort":
        os.abort()
    if message["action"] == "signal":
        os.kill(os.getpid(), signal.SIGRTMIN + 1)
    if message["action"] == "hang":
        tell("hangs", pid=os.getpid())
        time.sleep(60)
    if message["action"] == "refuse" and forked:
        os._exit(119)
    parent = os.getppid()
    threads = len(list(Path(f"/proc/{parent}/task").iterdir()))
    variable, waits = os.environ.get("CUDA_LAUNCH_BLOCKING"), os.environ.get("GOMP_SPINCOUNT")
    tell("told", forked=forked, torch="torch" in sys.modules, parent=parent, threads=threads, variable=variable, waits=waits)


if __name__ == "__main__":
    serve(run)
