"""The recorded memory runs of a card beside what is predicted today: `python -m tests.gpu_table` prints a Markdown table.

`reports/gpu/memory-*.json` hold what the card took, and the prediction of the day on which it ran; here the prediction is
made anew, on the CPU, for the same card.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from olmodebug.footprint.dry_run import Prepared, trace_fake
from olmodebug.footprint.estimate import estimate
from olmodebug.footprint.gpus import GPUS
from olmodebug.footprint.records import MemoryEstimate
from olmodebug.footprint.storage_trace import PARAMETERS, StorageTrace
from olmodebug.footprint.training_step import StepPlan
from olmodebug.spec import Job

RECORDED = Path(__file__).parents[1] / "reports" / "gpu"
GPU = GPUS["H100"]
MIB = 1 << 20


def rows(only: str = "") -> Iterator[dict[str, Any]]:
    """One row a recorded run: its plan, what was measured and what is predicted, in bytes, and whether its optimizer's state came late."""
    for file in sorted(RECORDED.glob("memory-*.json")):
        if not re.search(only, file.stem):
            continue
        report = json.loads(file.read_text(encoding="utf-8"))
        section = report["sections"]["memory"]
        confirmation = section["confirmation"]
        figures = {row["name"]: row["measured_bytes"] for row in confirmation["figures"]}
        plan = StepPlan(**{name: value for name, value in section["plan"].items() if name in StepPlan.__dataclass_fields__})
        spec = report["subject"]["spec"]
        yield {
            "name": file.stem.removeprefix("memory-"),
            "spec": spec,
            "plan": str(plan),
            "predicted": predicted(spec, plan),
            "tensors": figures["tensors allocated"],
            "reserved": figures["reserved"],
            # The runs of 2026-11-27 used torch's own scaler, which leaves first steps out: no state until one is taken, but
            # for the fused optimizer, which is told of an overflow and makes its state all the same.
            "late_state": plan.precision == "fp16-amp" and plan.optimizer == "adamw",
            "cast": plan.weight_dtype != torch.float32,
        }


def predicted(spec: str, plan: StepPlan) -> MemoryEstimate:
    """The estimate for the card, as `olmodebug memory --gpu H100` makes it."""
    trace = trace_fake(Prepared(Job(spec=spec), plan.weight_dtype), plan, GPU, lines=False)
    return estimate(trace if plan.weight_dtype == torch.float32 else cast_on_the_card(trace), GPU)


def cast_on_the_card(trace: StorageTrace) -> StorageTrace:
    """The runs of 2026-11-27 put the weights on the card in float32 and cast them there, one after the other: what was float32
    is cached before the first step. Since then they are cast first."""
    allocations = list(trace.allocations)
    weights = [i for i, a in enumerate(allocations) if a.category == PARAMETERS]
    wide = range(len(allocations), len(allocations) + len(weights))
    allocations += [replace(allocations[i], bytes=allocations[i].bytes * 4 // torch.bfloat16.itemsize) for i in weights]
    first = [*wide, *(event for i, old in zip(weights, wide, strict=True) for event in (i, ~old))]
    known = set(weights)
    return replace(trace, allocations=allocations, events=[*first, *(e for e in trace.events if e not in known)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_table", description=__doc__)
    parser.add_argument("--only", default="", help="runs whose name matches this regular expression")
    arguments = parser.parse_args(argv)
    print("| model | plan | tensors MiB | measured | error | reserved MiB | measured | error | safe |")
    print("|---|---|---|---|---|---|---|---|---|")
    errors: list[tuple[float, float]] = []
    for row in rows(arguments.only):
        found = row["predicted"]
        assert found.reserved is not None
        off = [100 * (ours.expected - row[name]) / row[name] for name, ours in (("tensors", found.tensors), ("reserved", found.reserved))]
        mark = " (1)" if row["late_state"] else " (2)" if row["cast"] else ""
        if mark != " (1)":
            errors.append((off[0], off[1]))
        cells = [row["spec"], row["plan"] + mark]
        for name, ours, error in zip(("tensors", "reserved"), (found.tensors, found.reserved), off, strict=True):
            cells += [f"{ours.expected / MIB:,.0f}", f"{row[name] / MIB:,.0f}", f"{error:+.2f} %"]
        cells.append("holds" if found.reserved.safe >= row["reserved"] else "too low")
        print("| " + " | ".join(cells) + " |", flush=True)
    for name, values in zip(("tensors", "reserved"), zip(*errors, strict=True), strict=True):
        sizes = [abs(value) for value in values]
        print(f"\n{name}: median error {statistics.median(sizes):.2f} %, largest {max(sizes):.2f} %, of {len(sizes)} runs without (1)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
