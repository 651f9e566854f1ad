"""`python -m olmodebug.fork_server`: the process behind `forks`, which imports, and forks a child for every order; it runs nothing itself."""

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
from typing import Any

from .forks import REFUSED
from .serve import serve_message

# While it stands, torch counts GPUs through the driver's management library, which leaves CUDA itself untouched.
COUNT_WITHOUT_CUDA = "PYTORCH_NVML_BASED_CUDA_CHECK"


def main(number: int, modules: list[str]) -> None:
    """Serve the socket with this number until the other side closes it."""
    known = os.environ.get(COUNT_WITHOUT_CUDA)
    os.environ[COUNT_WITHOUT_CUDA] = "1"
    for name in modules:
        with contextlib.suppress(Exception):  # the child that needs it will say it better
            importlib.import_module(name)
    os.environ.pop(COUNT_WITHOUT_CUDA)
    os.environ.update({} if known is None else {COUNT_WITHOUT_CUDA: known})
    with socket.socket(fileno=number) as channel:
        while order := _order(channel):
            body, (events, output) = order
            child = os.fork()
            if child == 0:
                _be_child(channel, json.loads(body), events, output)
            os.close(events)
            os.close(output)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            channel.sendall(json.dumps({"status": status}).encode() + b"\n")


def _order(channel: socket.socket) -> tuple[bytes, tuple[int, int]] | None:
    head, passed, _, _ = socket.recv_fds(channel, 8, 2)
    if len(head) < 8 or len(passed) < 2:
        return None
    left, body = int.from_bytes(head, "big"), b""
    while len(body) < left:
        chunk = channel.recv(left - len(body))
        if not chunk:
            return None
        body += chunk
    return body, (passed[0], passed[1])


def _be_child(channel: socket.socket, order: dict[str, Any], events: int, output: int) -> None:
    """What the fork does; it does not return."""
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        channel.sendall(json.dumps({"pid": os.getpid()}).encode() + b"\n")
        channel.close()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.environ.update(order["environment"])
        if order["environment"] and _spoilt():
            os._exit(REFUSED)
        module = importlib.import_module(order["module"])
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    serve_message(module.run, {**order["message"], "events": events})


def _spoilt() -> bool:
    """Whether CUDA was touched before the fork, so that it cannot start here."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return "forked subprocess" in str(error)
    return False


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
