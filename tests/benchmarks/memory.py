"""What a prediction costs and says, beside others: `python -m tests.benchmarks.memory [--memtracker 4M 1B] [--accelerate]`.

Each tool runs in a process of its own; its CPU seconds and highest resident memory are those of that process, imports
included. One AdamW (foreach) step of bfloat16 autocast, batch 1 x 2048 (4M: batch 8). MemTracker takes minutes on the larger
models and runs where it is asked for; accelerate has to be installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

MODELS = {"4M": ("olmo1-4M", 8), "1B": ("olmo1-1B", 1), "7B": ("olmo1-7B", 1)}
SEQ_LEN = 2048
GIB = 1 << 30

HEAD = """
import json, resource, sys, time
started = time.perf_counter()
spec, batch, seq_len = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def told(**figures):
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({**figures, "wall": time.perf_counter() - started, "cpu": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss * 1024}))
"""
OURS = """
import olmodebug
found = olmodebug.memory(spec, batch_size=batch, seq_len=seq_len, precision="bf16-amp", gpu="H100")
told(tensors=found.tensors.expected, reserved=found.reserved.expected)
"""
MEMTRACKER = """
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from olmodebug.footprint.dry_run import Prepared, token_ids
from olmodebug.spec import Job
from olmodebug.footprint.training_step import StepPlan, make_optimizer, step
plan = StepPlan(batch_size=batch, seq_len=seq_len, precision="bf16-amp")
ready = Prepared(Job(spec=spec), torch.float32)
peak = 0
with ready.mode:
    optimizer = make_optimizer(ready.subject.model, plan.optimizer)
    tracker = MemTracker()
    tracker.track_external(ready.subject.model, optimizer)
    for _ in range(2):
        with tracker:
            step(ready.subject, plan, optimizer, None, [token_ids(ready.subject, plan)], lambda name: None)
        peak = max(peak, tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
        tracker.reset_mod_stats()
told(tensors=peak)
"""
ACCELERATE = """
import torch
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes
from olmodebug.spec import Job, resolve
size, _ = calculate_maximum_sizes(resolve(Job(spec=spec, meta=True)).model)
told(tensors=max(estimate_training_usage(size, "float16").values()))
"""
# Activations s b h (34 + 5 a s / h) bytes a layer (arXiv:2205.05198, equation 2), and 18 bytes a parameter: 6 for weights in
# two precisions, 8 for AdamW, 4 for gradients, as calculators count them. Logits are in no such formula.
FORMULA = """
from olmodebug.presets import PRESETS
entry = PRESETS[spec]; c = entry.config
layer = seq_len * batch * c.hidden_size * (34 + 5 * c.num_attention_heads * seq_len / c.hidden_size)
told(tensors=round(18 * entry.parameters + layer * c.num_hidden_layers))
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=__doc__)
    parser.add_argument("--memtracker", nargs="*", default=[], metavar="SIZE", help="sizes that MemTracker runs on: 4M 1B 7B")
    parser.add_argument("--accelerate", action="store_true", help="accelerate's estimate too")
    arguments = parser.parse_args()
    print(f"| {'model':5s} | {'tool':26s} | tensors GiB | reserved GiB | CPU s | wall s | RSS MiB |")
    print("|---|---|---|---|---|---|---|")
    for size, (spec, batch) in MODELS.items():
        tools = {"olmodebug": OURS, "formula (arXiv:2205.05198)": FORMULA}
        tools |= {"MemTracker, fake CPU": MEMTRACKER} if size in arguments.memtracker else {}
        tools |= {"accelerate, training": ACCELERATE} if arguments.accelerate else {}
        for name, code in tools.items():
            print(_row(size, name, _run(code, spec, batch)), flush=True)


def _run(code: str, spec: str, batch: int) -> dict[str, float] | str:
    line = [sys.executable, "-c", HEAD + code, spec, str(batch), str(SEQ_LEN)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:80]
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def _row(size: str, name: str, found: dict[str, float] | str) -> str:
    if isinstance(found, str):
        return f"| {size:5s} | {name:26s} | {found} |"
    reserved = f"{found['reserved'] / GIB:.2f}" if "reserved" in found else ""
    figures = (
        f"{found['tensors'] / GIB:11.2f} | {reserved:>12s} | {found['cpu']:5.1f} | {found['wall']:6.1f} | {found['rss'] / 2**20:7.0f} |"
    )
    return f"| {size:5s} | {name:26s} | {figures}"


if __name__ == "__main__":
    main()
