"""What tracing costs beside a plain forward, in one run: `python -m tests.benchmarks.tracer [PRESET] [SEQ_LEN]`.

Each way runs in turn, several rounds; the least CPU time of each is compared, since other load only ever adds. Beside
ours: torch's DebugMode, transformers' debugger (shapes and printed strings of every module, as it comes; it writes its
JSON files to a temporary folder), and TorchLens where it is installed, as it comes.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from olmodebug.model import Olmo
from olmodebug.presets import preset
from olmodebug.tracing.tracer import record

ROUNDS = 3


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "datadecide-150M"
    seq_len = int(sys.argv[2]) if len(sys.argv) > 2 else 256
    model = Olmo(preset(name)).eval()
    ids = torch.randint(0, 50000, (1, seq_len))

    def forward() -> Any:
        with torch.no_grad():
            return model(ids).logits

    ways: dict[str, Callable[[], Any]] = {
        "plain forward": forward,
        "olmodebug, shapes and lines": lambda: record(model, forward),
        "olmodebug, every statistic": lambda: record(model, forward, statistics=True),
        "olmodebug, every digest": lambda: record(model, forward, digests=True),
        "olmodebug, a consumer": lambda: record(model, forward, on_event=lambda moment: None, log=False),
        "olmodebug, every tensor kept": lambda: record(model, forward, keep=True),
    }
    with contextlib.suppress(ImportError):
        from torch.utils._debug_mode import DebugMode

        def debug_mode() -> Any:
            with DebugMode(record_torchfunction=False):
                return forward()

        ways["torch DebugMode"] = debug_mode
    with contextlib.suppress(ImportError):
        from transformers.model_debugging_utils import model_addition_debugger_context

        def debugger() -> Any:
            with tempfile.TemporaryDirectory() as folder, model_addition_debugger_context(model, debug_path=folder):
                return forward()

        ways["transformers' debugger"] = debugger
    with contextlib.suppress(ImportError):
        import torchlens

        ways["TorchLens"] = lambda: torchlens.trace(model, ids)
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for label, way in list(ways.items()):
            started = time.process_time()
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    way()
            except Exception as error:  # a peer that does not take this model or this torch is told, and left out
                print(f"{label}: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}")
                del ways[label], least[label]
                continue
            least[label] = min(least[label], time.process_time() - started)
    events = len(record(model, forward))
    print(f"{name}, batch 1 x {seq_len}, {events} ops, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for label, seconds in least.items():
        print(f"    {label:32s}{seconds * 1000:10.1f} ms   x {seconds / least['plain forward']:.2f}")


if __name__ == "__main__":
    main()
