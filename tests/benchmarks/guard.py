"""What the guards cost: one training step of datadecide-150M on the CPU, plain and under each guard, beside other tools.

`python -m tests.benchmarks.guard [--seq 32] [--repeats 5] [--sherlorch FOLDER]`. The step is forward, cross-entropy, backward
and AdamW on one row. CPU seconds of the process are taken, and every variant in turn in each repeat, so a busy machine meets all alike; the
median of the repeats is printed, with the load of the machine; then two steps under all guards are held against two without. glibc is told to keep freed memory: handed back and taken anew, its pages cost a step up to its own
time again, guarded or not, as the heap happens to lie. FOLDER is where `pip install --target FOLDER --no-deps sherlorch` put that package.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from olmodebug.guards.journal import Journal
from olmodebug.guards.watch import Watch
from olmodebug.model import Olmo
from olmodebug.presets import preset


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.guard", description=__doc__)
    parser.add_argument("--model", default="datadecide-150M")
    parser.add_argument("--seq", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sherlorch", metavar="FOLDER", help="where sherlorch was installed")
    arguments = parser.parse_args(argv)
    _keep_freed_memory()
    model, step = _training(arguments.model, arguments.seq)
    size = sum(parameter.numel() for parameter in model.parameters())
    contexts = _contexts(model, arguments.sherlorch)
    step()
    times: dict[str, list[float]] = {name: [] for name in contexts}
    for _ in range(arguments.repeats):
        for name, make in contexts.items():
            with make():
                started = time.process_time()
                step()
                times[name].append(time.process_time() - started)
    plain = statistics.median(times["plain"])
    print(
        f"{arguments.model} ({size / 1e6:.0f}M parameters), 1 x {arguments.seq} tokens, torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, "
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"{name:28s} {middle * 1000:8.0f} ms  {middle / plain:5.2f}x   ({min(values) * 1000:.0f} .. {max(values) * 1000:.0f} ms)")
    del model, step, contexts
    plain_run, guarded_run = (_run(arguments.model, arguments.seq, guards) for guards in ("", "index,nan,shape,oom,loop"))
    same = plain_run == guarded_run
    print(f"two steps, plain and under all guards: losses {', '.join(map(repr, plain_run[0]))}; "
          f"losses, weights and random state {'equal bit for bit' if same else 'DIFFER'}")  # fmt: skip
    return 0 if same else 1


def _training(name: str, length: int) -> tuple[torch.nn.Module, Callable[[], float]]:
    """A model, and one step of its training; the same bits in every call."""
    torch.manual_seed(0)
    config = preset(name)
    model = Olmo(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(0, config.vocab_size, (1, length))

    def step() -> float:
        optimizer.zero_grad()
        output = model(ids)
        logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", output[0])
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return model, step


def _run(name: str, length: int, guards: str) -> tuple[list[float], str, bytes]:
    """The losses of two steps, a digest of the weights after them, and the state of the random numbers."""
    model, step = _training(name, length)
    with Watch(tuple(guards.split(",")), Journal(None)) if guards else contextlib.nullcontext():
        losses = [step(), step()]
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return losses, digest.hexdigest(), torch.get_rng_state().numpy().tobytes()


def _keep_freed_memory() -> None:
    """glibc's M_TRIM_THRESHOLD (-1) and M_MMAP_THRESHOLD (-3) beyond any tensor; another C library has no such call."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)
        mallopt(-3, 2**30)


def _contexts(model: torch.nn.Module, sherlorch: str | None) -> dict[str, Callable[[], Any]]:
    contexts: dict[str, Callable[[], Any]] = {"plain": contextlib.nullcontext}
    for guards in ("index,shape", "index,nan,shape", "index,shape,oom,loop", "index,nan,shape,oom,loop"):
        contexts[guards] = lambda guards=guards: Watch(tuple(guards.split(",")), Journal(None))  # type: ignore[misc]
    contexts["detect_anomaly"] = torch.autograd.detect_anomaly
    contexts["DebugUnderflowOverflow"] = lambda: _underflow_overflow(model)
    if sherlorch:
        sys.path.append(sherlorch)
        contexts.update(_sherlorch())
    return contexts


@contextlib.contextmanager
def _underflow_overflow(model: torch.nn.Module) -> Any:
    """transformers' hooks, taken off again; they print nothing while all is finite."""
    from transformers.debug_utils import DebugUnderflowOverflow

    before = {module: dict(module._forward_hooks) for module in model.modules()}
    with contextlib.redirect_stdout(None):
        DebugUnderflowOverflow(model)
        try:
            yield
        finally:
            for module, hooks in before.items():
                module._forward_hooks.clear()
                module._forward_hooks.update(hooks)


def _sherlorch() -> dict[str, Callable[[], Any]]:
    import sherlorch  # type: ignore[import-not-found]

    return {f"sherlorch {sherlorch.__version__}": sherlorch.trace}


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
    raise SystemExit(main())
