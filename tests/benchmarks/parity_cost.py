"""What parity costs beside a plain forward: `python -m tests.benchmarks.parity_cost [SPEC] [--case NAME]`.

Both sides and the plain forward are processes of their own; peak memory is what the largest of them had resident.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLAIN = """
import sys, time, torch
from olmodebug.spec import Job, resolve
from olmodebug.executions.cases import cases_of
subject = resolve(Job(spec=sys.argv[1], whole=True))
subject.model.to(torch.bfloat16)
case = next(c for c in cases_of(subject) if c.name == sys.argv[2]).case
with torch.no_grad():
    least = min((lambda t: (subject.call(case), time.perf_counter() - t)[1])(time.perf_counter()) for _ in range(3))
import resource
print(least, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, sum(p.numel() for p in subject.model.parameters()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.parity_cost", description=__doc__)
    parser.add_argument("spec", nargs="?", default="datadecide-1B")
    parser.add_argument("--case", default="padded")
    arguments = parser.parse_args()
    plain = subprocess.run([sys.executable, "-c", PLAIN, arguments.spec, arguments.case], capture_output=True, text=True, check=True)
    seconds, peak, parameters = (float(part) for part in plain.stdout.split())
    print(f"{arguments.spec}, {parameters:,.0f} parameters, bfloat16 on the CPU, case {arguments.case}")
    print(f"    plain forward        {seconds:8.1f} s   peak {peak / 2**30:5.1f} GiB")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "olmodebug", "parity", arguments.spec, "--whole", "--dtype", "bfloat16", "--once"]
        command += ["--case", arguments.case, "--timeout", "1200", "--json", str(report)]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        taken = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        if not report.is_file():
            print(done.stderr)
            return
        run = json.loads(report.read_text())["sections"]["parity"]["runs"][0]
    print(f"    parity, both sides   {taken:8.1f} s   peak {used / 2**30:5.1f} GiB   x {taken / seconds:.0f} of one forward")
    counts = ", ".join(f"{count} {name}" for name, count in run["ops"].items() if count)
    print(f"    verdict {run['verdict']}; {counts}; {run['coverage']:.1%} judged; {run['left_out']} tensors left out by the budget")


if __name__ == "__main__":
    main()
