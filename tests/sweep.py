"""Runs every probe on every causal language-model class that transformers ships, and prints what was flagged.

`python -m tests.sweep [--only REGEX] [-k EXPR] [--json FILE]`. Each class is built tiny with random weights, in a child
process of its own. A correct model must show no error; what is shown is either a fault of that class or of ours.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from tests import zoo

zoo.LIMIT_SECONDS = 300  # every probe, on two busy cores


def check_type(expression: str | None, model_type: str) -> dict[str, Any]:
    """Every probe's outcome and finding on one model type."""
    model, config = zoo.build(model_type)
    return examine(model, config, spec=f"transformers:{type(model).__name__}", expression=expression)


def examine(model: Any, config: Any, *, spec: str, expression: str | None = None) -> dict[str, Any]:
    """The class, every probe's outcome and finding, what was assumed, and the seconds of wall clock and of this process."""
    import torch

    from olmodebug.examine import run_probe
    from olmodebug.explain import explain
    from olmodebug.first_run import from_model
    from olmodebug.load import SubjectCodeError
    from olmodebug.probe import select, shipped_probes
    from olmodebug.report import plain

    torch.set_num_threads(1)
    started, busy = time.perf_counter(), time.process_time()
    row: dict[str, Any] = {"class": type(model).__name__, "outcomes": [], "findings": []}

    def seconds() -> dict[str, Any]:
        return {"seconds": round(time.perf_counter() - started, 1), "cpu_seconds": round(time.process_time() - busy, 1)}

    try:
        subject = from_model(model, spec=spec, config=config)
    except SubjectCodeError as error:
        return row | {"findings": [plain(explain(error).finding()) | {"probe": "build.runs"}], **seconds()}
    failed: dict[str, str] = {}
    for probe in select(shipped_probes(), expression):
        if probe.cost == "slow":
            continue
        result = run_probe(probe, subject, failed=failed)
        if result.root is not None:
            failed[probe.name] = result.root
        row["outcomes"].append(plain(result.outcome))
        row["findings"] += [plain(finding) for finding in result.findings]
    return row | {**seconds(), "assumptions": list(subject.assumptions)}


def print_row(row: dict[str, Any]) -> None:
    """One type as lines: a word, and each error finding with its place."""
    errors = [f for f in row.get("findings", []) if f["severity"] == "error"]
    broke = [o for o in row.get("outcomes", []) if o["status"] == "error"]
    word = "none" if "outcomes" not in row else "ERROR" if errors else "BROKE" if broke else "clean"
    seconds = f"{row.get('seconds', 0):6.1f} s, {row.get('cpu_seconds', 0):6.1f} s of CPU"
    print(f"{word:6s}{row['type']:36s}{seconds}  {str(row.get('reason') or row.get('error') or '')[:120]}")
    for finding in errors:
        where = finding["where"]
        print(f"        {finding['probe']}: {finding['message']}  [{where['function']}:{where['line']} {where['op']}] {finding['cause']}")
    for outcome in broke:
        print(f"        {outcome['probe']} broke: {outcome['reason'].strip().splitlines()[-1]}")
    sys.stdout.flush()


def line_of(row: dict[str, Any], finding: dict[str, Any]) -> str:
    """A finding as a row of a Markdown table."""
    where = finding["where"]
    what = finding["message"].replace("|", "/")
    cause = f" Cause: {finding['cause']}." if finding["cause"] else ""
    place = f"{where['function'] or where['module'] or ''} {where['line'] or ''}"
    return f"| {row['type']} | {finding['severity']} | `{finding['probe']}` | {what}.{cause} | {place} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--only", default="", help="model types that match this regular expression")
    parser.add_argument("-k", dest="select", help="only probes whose name fits")
    parser.add_argument("--json", type=Path, help="write every row here")
    arguments = parser.parse_args(argv)
    types = [name for name in zoo.model_types() if re.search(arguments.only, name)]
    rows = []
    for row in zoo.walk(functools.partial(check_type, arguments.select), types):
        rows.append(row)
        print_row(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    checked = [row for row in rows if "outcomes" in row]
    flagged = [row for row in checked if any(f["severity"] == "error" for f in row["findings"])]
    print(f"{len(checked)} of {len(rows)} types checked, {len(checked) - len(flagged)} without an error finding, {len(flagged)} with one")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
