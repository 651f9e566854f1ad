"""The chunked loss beside the plain one and torch's own: `python -m tests.benchmarks.loss [--rows 4096] [--hidden-size 64]`.

Loss and both gradients of a linear head with 50,277 rows. Each way runs in a process of its own, so that its peak memory is its
own: what the process held before is taken off. The first call is left out of the times; the median of the others is shown.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from olmodebug.training.loss import linear_cross_entropy

WAYS = ("plain", "torch", "torch-chunked", "olmodebug")
VOCABULARY = 50277


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.loss", description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measured(arguments)))
        return 0
    print(
        f"{arguments.rows} rows x {arguments.hidden_size}, {VOCABULARY} classes, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{'dtype':10s}{'way':15s}{'seconds':>9s}{'of plain':>10s}{'peak MiB':>10s}{'loss':>10s}")
    for dtype in ("float32", "bfloat16"):
        plain = None
        for way in WAYS:
            if way.startswith("torch") and not hasattr(F, "linear_cross_entropy"):
                print(f"{dtype:10s}{way:15s}  torch {torch.__version__} has no linear_cross_entropy")
                continue
            sizes = [f"--rows={arguments.rows}", f"--hidden-size={arguments.hidden_size}", f"--calls={arguments.calls}"]
            command = [sys.executable, "-m", "tests.benchmarks.loss", "--way", way, "--dtype", dtype, *sizes]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            plain = plain or found["seconds"]
            share, peak = found["seconds"] / plain, found["peak_bytes"] / 2**20
            print(f"{dtype:10s}{way:15s}{found['seconds']:9.2f}{share:10.2f}{peak:10,.0f}{found['loss']:10.4f}")
    return 0


def measured(arguments: argparse.Namespace) -> dict[str, float]:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(arguments.rows, arguments.hidden_size, generator=draw).requires_grad_()
    weight = (torch.randn(VOCABULARY, arguments.hidden_size, generator=draw) * 0.05).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (arguments.rows,), generator=draw)
    before = _peak_bytes()
    seconds = []
    for _ in range(arguments.calls + 1):
        states.grad = weight.grad = None
        begun = time.perf_counter()
        loss = value(arguments.way, states, weight, targets, getattr(torch, arguments.dtype))
        loss.backward()
        seconds.append(time.perf_counter() - begun)
    return {"seconds": statistics.median(seconds[1:]), "peak_bytes": _peak_bytes() - before, "loss": float(loss.detach())}


def value(way: str, states: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    if way == "olmodebug":
        return linear_cross_entropy(states, weight, targets, dtype=dtype)
    low_states, low_weight = states.to(dtype), weight.to(dtype)
    if way == "torch-chunked":
        return F.linear_cross_entropy(low_states, low_weight, targets, options=torch.nn.LinearCrossEntropyOptions())
    if way == "torch":
        return F.linear_cross_entropy(low_states, low_weight, targets)
    return F.cross_entropy((low_states @ low_weight.T).float(), targets)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
