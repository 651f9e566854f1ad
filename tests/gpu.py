"""Every check that needs a card: `python -m tests.gpu [--only REGEX] [--jobs N]` writes `reports/gpu/*.json`.

Each entry is a command line; its report carries the device, the versions and the command, and the terminal's text stands
beside it. Nothing is written on a machine without CUDA. Times and the process's memory mean something with one job only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .gpu_memory import commands as memory_commands

REPORTS = Path(__file__).parents[1] / "reports" / "gpu"
BUGS = "tests/mutants/bugs"
CLASSES = (
    "Llama GPT2 GPTNeoX Mistral Qwen2 Qwen3 Gemma Gemma2 Phi3 Olmo Olmo2 Olmo3 Falcon Bloom OPT GPTJ StableLm Mixtral Qwen3Moe DeepseekV3 "
    "Mamba Cohere"
).split()

ALONE = ("ops", "scratch")  # programs of their own

COMMANDS: dict[str, list[str]] = {
    "parity-device-assert": ["parity", f"{BUGS}/short_rope_table.py:build", "--device", "cuda", "--dtype", "float32"],
    "parity-eager-sdpa": ["parity", "olmo2-tiny", "--left", "cuda,bfloat16,eager", "--right", "cuda,bfloat16,sdpa"],
    "parity-compiled-float32": ["parity", "olmo2-tiny", "--left", "cpu,float64", "--right", "cuda,float32,compile"],
    "parity-compiled-bfloat16": ["parity", "olmo2-tiny", "--left", "cpu,float64", "--right", "cuda,bfloat16,compile"],
    **{f"parity-{name}": ["parity", name, "--device", "cuda"] for name in ("olmo1-4M", "olmo2-tiny", "olmo3-tiny")},
    **{f"guard-{name}": ["run", "--", sys.executable, "-m", "tests.scripts.cuda_faults", name]
       for name in ("embedding", "rotary-table", "label", "gather", "multinomial", "born-nan", "memory")},
    **{f"check-{name}": ["check", name, "--device", "cuda"] for name in ("olmo1-4M", "olmo2-tiny", "olmo3-tiny")},
    "bug-mask": ["check", f"{BUGS}/mask_added.py:build_repaired", "--device", "cuda"],
    "bug-short-table": ["check", f"{BUGS}/short_rope_table.py:build", "--device", "cuda"],
    **{f"parity-transformers-{name}": ["parity", f"transformers:{name}ForCausalLM" if name != "GPT2" else "transformers:GPT2LMHeadModel",
                                       "--device", "cuda"] for name in CLASSES},
    **{f"check-transformers-{name}": ["check", f"transformers:{name}ForCausalLM" if name != "GPT2" else "transformers:GPT2LMHeadModel",
                                      "--device", "cuda"] for name in CLASSES},
    **memory_commands(),
    "train-float16": ["train", "olmo1-4M", "--device", "cuda", "--seq-len", "2048", "--config", "vocab_size=50277"],
    "train-compare": ["train", "--compare", "--device", "cuda", "--config", "vocab_size=50277"],
    "train-ladder-4M": ["train", "datadecide-4M", "--device", "cuda", "--recipe", "datadecide-4M", "--steps", "40",
                        "--config", "vocab_size=50304"],
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--only", default="", help="entries whose name matches this regular expression")
    parser.add_argument("--jobs", type=int, default=1, help="entries at a time (default 1)")
    parser.add_argument("--seconds", type=float, default=540.0, help="no entry starts later, and none runs longer (default 540)")
    parser.add_argument("--train", nargs="*", default=[], help="more options for the trainings, such as --train=--data=FILE")
    parser.add_argument("--to", type=Path, default=REPORTS, help="the folder of the reports (default reports/gpu)")
    arguments = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run and nothing was written", file=sys.stderr)
        return 2
    arguments.to.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    names = [name for name in (*ALONE, *COMMANDS) if re.search(arguments.only, name)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(lambda name: run(name, arguments, end), names))
    print(f"{len(rows)} entries, {sum(row is None for row in rows)} not run for want of time")
    return 0


PRINTING = threading.Lock()


def run(name: str, arguments: argparse.Namespace, end: float) -> int | None:
    """One entry: its exit code, and one line that says what came out; None where there was no time for it."""
    left = end - time.monotonic()
    if left < 5:
        return None
    report = arguments.to / f"{name}.json"
    started = time.perf_counter()
    try:
        done = subprocess.run(line_of(name, report, arguments.train), capture_output=True, text=True, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        print(f"{name:32s} cut off after {left:.0f} s", flush=True)
        return None
    (arguments.to / f"{name}.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    with PRINTING:
        print(f"{name:32s} exit {done.returncode}  {time.perf_counter() - started:6.1f} s  {said(report, done)}", flush=True)
    return done.returncode


def line_of(name: str, report: Path, train: list[str]) -> list[str]:
    """The command line of an entry."""
    if name in ALONE:
        return [sys.executable, "-m", f"tests.gpu_{name}", "--json", str(report)]
    verb, *rest = COMMANDS[name]
    options = ["--json", str(report), *([] if verb == "run" else ["--timeout", "120"]), *(train if verb == "train" else [])]
    return [sys.executable, "-m", "olmodebug", verb, *options, *rest]


def said(report: Path, done: subprocess.CompletedProcess[str]) -> str:
    """The findings of a report in short, or the last line of what was printed."""
    try:
        body: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        found = [f"{f['severity']} {f['probe']}: {f['message']}" for f in body["findings"]]
        broke = [f"{o['probe']} broke: {o['reason']}" for o in body["outcomes"] if o["status"] == "error"]
        return " | ".join(text[:160] for text in (*found, *broke)) or "nothing found"
    except (OSError, ValueError, KeyError, TypeError):
        return " ".join(done.stderr.strip().splitlines()[-1:])[:200]


if __name__ == "__main__":
    raise SystemExit(main())
