"""Time to a verdict and peak memory on a subject: `python -m tests.benchmarks.verdict [SUBJECT]`."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    subject = sys.argv[1] if len(sys.argv) > 1 else "olmo1-4M"
    print(f"{'subject':24s}{'seconds':>10s}{'CPU s':>10s}{'peak MiB':>10s}  verdict")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        started = time.perf_counter()
        command = [sys.executable, "-m", "olmodebug", "check", subject, "--json", str(report)]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        seconds = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        verdict = json.loads(report.read_text())
    ran = verdict["counts"]["passed"] + verdict["counts"]["failed"]
    cpu = used.ru_utime + used.ru_stime
    print(f"{subject:24s}{seconds:10.1f}{cpu:10.1f}{used.ru_maxrss / 1024:10.0f}  {verdict['verdict']}, {ran} probes ran")
    slowest = sorted(verdict["outcomes"], key=lambda outcome: -outcome["seconds"])[:8]
    for outcome in slowest:
        print(f"    {outcome['probe']:44s}{outcome['seconds']:8.2f} s")


if __name__ == "__main__":
    main()
