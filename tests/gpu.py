"""Every check that needs a card: `python -m tests.gpu [--only REGEX]` writes `reports/gpu/*.json`, a few minutes in all.

Each entry is a command line of olmodebug; its report carries the device, the versions and the command. Nothing is written
on a machine without CUDA.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from .gpu_memory import commands as memory_commands

REPORTS = Path(__file__).parents[1] / "reports" / "gpu"
BUGS = "tests/mutants/bugs"

COMMANDS: dict[str, list[str]] = {
    "parity-olmo1-4M": ["parity", "olmo1-4M", "--device", "cuda"],
    "parity-olmo3-tiny": ["parity", "olmo3-tiny", "--device", "cuda"],
    "parity-transformers-olmo2": ["parity", "transformers:Olmo2ForCausalLM", "--device", "cuda"],
    "parity-eager-sdpa": ["parity", "olmo2-tiny", "--left", "cuda,bfloat16,eager", "--right", "cuda,bfloat16,sdpa"],
    "parity-device-assert": ["parity", f"{BUGS}/short_rope_table.py:build", "--device", "cuda", "--dtype", "float32"],
    "check-olmo1-4M": ["check", "olmo1-4M", "--device", "cuda"],
    "check-olmo2-tiny": ["check", "olmo2-tiny", "--device", "cuda"],
    "check-olmo3-tiny": ["check", "olmo3-tiny", "--device", "cuda"],
    "check-llama": ["check", "transformers:LlamaForCausalLM", "--device", "cuda"],
    "bug-mask": ["check", f"{BUGS}/mask_added.py:build_repaired", "--device", "cuda"],
    "bug-short-table": ["check", f"{BUGS}/short_rope_table.py:build", "--device", "cuda"],
    **memory_commands(),
    **{
        f"guard-{name}": ["run", "--", sys.executable, "-m", "tests.scripts.cuda_faults", name]
        for name in ("embedding", "rotary-table", "label", "gather", "multinomial", "born-nan", "memory")
    },
    "train-float16": ["train", "olmo1-4M", "--device", "cuda", "--seq-len", "2048", "--config", "vocab_size=50277"],
    "train-compare": ["train", "--compare", "--device", "cuda", "--config", "vocab_size=50277"],
    "train-ladder-4M": [
        "train",
        "datadecide-4M",
        "--device",
        "cuda",
        "--recipe",
        "datadecide-4M",
        "--steps",
        "40",
        "--config",
        "vocab_size=50304",
    ],
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--only", default="", help="entries whose name matches this regular expression")
    arguments = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run and nothing was written", file=sys.stderr)
        return 2
    REPORTS.mkdir(parents=True, exist_ok=True)
    for name, command in COMMANDS.items():
        if not re.search(arguments.only, name):
            continue
        started = time.perf_counter()
        options = ["--json", str(REPORTS / f"{name}.json"), *([] if command[0] == "run" else ["--timeout", "120"])]
        line = [sys.executable, "-m", "olmodebug", command[0], *options, *command[1:]]
        done = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=540, check=False)
        print(
            f"{name:24s} exit {done.returncode}  {time.perf_counter() - started:6.1f} s  {done.stderr.strip().splitlines()[-1:]}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
