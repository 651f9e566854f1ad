"""Ten training scripts under all guards, clean and with each fault: `python -m tests.benchmarks.guard_matrix --page reports/guard.md`.

Scripts that need processes of their own (torchrun, loader workers, the transformers Trainer) run under `olmodebug run`; the others
run in this process under the same guards, which saves an import of torch each; `--all-processes` gives each a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import platform
import tempfile
import time
from pathlib import Path

import torch

from olmodebug.report import Finding
from tests.scripts.catalog import ELSEWHERE, FAULTS, FOLDER, SCRIPTS, Fault, line_number, source
from tests.test_guard_scripts import run_elsewhere, run_here


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.guard_matrix", description=__doc__)
    parser.add_argument("--all-processes", action="store_true", help="every script in a process of its own")
    parser.add_argument("--page", type=Path, help="write into this page; its sections below the tables stay")
    options = parser.parse_args(argv)
    if options.page is None:
        return _measure(options.all_processes)
    rest = options.page.read_text().partition("\n## ") if options.page.exists() else ("", "", "")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = _measure(options.all_processes)
    options.page.write_text(out.getvalue() + rest[1] + rest[2])
    return code


def _measure(everywhere: bool) -> int:
    """Run every script and every fault, and print the tables."""
    print("# Training scripts under the guards\n")
    print(f"`python -m tests.benchmarks.guard_matrix`, torch {torch.__version__}, Python {platform.python_version()}, CPU.\n")
    print("| script | | findings | |\n|---|---|---|---|")
    silent = 0
    for name, what in SCRIPTS.items():
        findings, where = _run(name, (FOLDER / f"{name}.py").read_text(), everywhere)
        silent += not findings
        print(f"| {name} | {what} | {_listed(findings)} | {where} |", flush=True)
    print(f"\n{silent} of {len(SCRIPTS)} clean scripts without a finding.\n")
    print("| fault | expected | line | named | also said | |\n|---|---|---|---|---|---|")
    right = 0
    for fault in FAULTS:
        findings, where = _run(fault.script, source(fault), everywhere)
        named, line, others = _judged(fault, findings)
        right += named and line
        verdict = "yes" if named and line else "other line" if named else "**no**"
        print(
            f"| {fault.name} | {fault.severity} {fault.probe} | {line_number(fault) or '-'} | {verdict} | {others} | {where} |", flush=True
        )
    print(f"\n{right} of {len(FAULTS)} faults named with their line.")
    return 0 if right == len(FAULTS) and silent == len(SCRIPTS) else 1


def _run(script: str, text: str, everywhere: bool) -> tuple[list[Finding], str]:
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{script}.py"
        path.write_text(text)
        if everywhere or script in ELSEWHERE:
            return run_elsewhere(Path(folder), script)[1], "own process"
        findings = run_here(path)[0]
    return findings, f"{time.process_time() - started:.1f} CPU s"


def _judged(fault: Fault, findings: list[Finding]) -> tuple[bool, bool, str]:
    named = [f for f in findings if f.probe == fault.probe and f.severity == fault.severity and fault.words in f"{f.message} {f.cause}"]
    line = not fault.line or any(f.where.line == line_number(fault) for f in named)
    others = ", ".join(dict.fromkeys(f.probe for f in findings if f.probe != fault.probe))
    return bool(named), line, others or "nothing"


def _listed(findings: list[Finding]) -> str:
    return ", ".join(f.probe for f in findings) or "none"


if __name__ == "__main__":
    raise SystemExit(main())
