"""Holds the predicted events of memory against the real ones, over every causal language-model class that transformers ships.

`python -m tests.event_sweep [--only REGEX] [--json FILE]`. Each class is built tiny, in a child process of its own, and takes
three training steps on fake and on real tensors, in float32 and in bfloat16 autocast. `python -m tests.summaries events FILE@COMMIT`
makes `reports/memory-events.md` of the rows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from tests import zoo

PRECISIONS = ("fp32", "bf16-amp")

zoo.LIMIT_SECONDS = 300  # three steps twice, on two busy cores


def model_classes() -> list[str]:
    """Every causal language-model class of transformers once, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def compare(name: str) -> dict[str, Any]:
    """By precision: whether the events are the same, how many there are on each side, and the first that differs."""
    import torch

    from olmodebug.footprint.confirm import compared, real_subject
    from olmodebug.footprint.dry_run import Prepared, trace_fake, trace_real
    from olmodebug.footprint.training_step import StepPlan
    from olmodebug.spec import Job

    torch.set_num_threads(1)
    job = Job(spec=f"transformers:{name}")
    row: dict[str, Any] = {}
    for precision in PRECISIONS:
        plan = StepPlan(batch_size=2, seq_len=16, precision=precision)
        torch.manual_seed(0)
        row[precision] = compared(trace_fake(Prepared(job, plan.weight_dtype), plan, None), trace_real(real_subject(job, plan), plan))
    return row


def print_row(row: dict[str, Any]) -> None:
    if not row["ok"]:
        print(f"not asked  {row['type']:44s} {row['error'][:150]}")
    for precision in PRECISIONS if row["ok"] else ():
        result = row[precision]
        word = "identical" if result["identical"] else "differs"
        print(f"{word:10s} {row['type']:44s} {precision:9s} {result['measured']:6d} events  {result['first_difference'] or ''}")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.event_sweep", description=__doc__)
    parser.add_argument("--only", default="", help="classes that match this regular expression")
    parser.add_argument("--json", type=Path, help="write every row here")
    arguments = parser.parse_args(argv)
    rows = []
    for row in zoo.walk(compare, [name for name in model_classes() if re.search(arguments.only, name)]):
        rows.append(row)
        print_row(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    asked = [row for row in rows if row["ok"]]
    same = [row for row in asked if all(row[precision]["identical"] for precision in PRECISIONS)]
    print(f"{len(asked)} of {len(rows)} classes compared, {len(same)} identical, {len(asked) - len(same)} with a difference")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
