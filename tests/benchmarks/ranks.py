"""Parallel training steps, clean and broken, and how the comparison of records grows with the number of ranks.

`python -m tests.benchmarks.ranks [--only REGEX] [--scaling]`. The matrix starts two processes a row; `--scaling` compares
synthetic records of 2 to 1,024 ranks by digest.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from olmodebug.errors import UsageError
from olmodebug.ranks.calls import Collective
from olmodebug.ranks.parallel import STRATEGIES
from olmodebug.ranks.record import RankWriter, read_records
from olmodebug.ranks.replicas import first_unlike_collectives, unlike_replicas
from olmodebug.report import Report
from tests.mutants import mixed, parallel, pipeline
from tests.test_ranks import MODEL, mingled, piped, step_on

SPECS = (
    "olmo1-tiny",
    "olmo2-tiny",
    "datadecide-tiny",
    "transformers:OlmoForCausalLM",
    "transformers:Olmo2ForCausalLM",
    "transformers:LlamaForCausalLM",
)
RANKS = (2, 8, 32, 128, 512, 1024)
TENSORS = 300  # about the weights of a 32-layer model


KINDS: tuple[tuple[Any, Callable[[str], Report]], ...] = (
    (parallel, lambda wrap: step_on(MODEL, wrap=wrap)),
    (pipeline, piped),
    (mixed, mingled),
)


def matrix(only: str) -> None:
    found = placed = explained = total = alarms = clean = 0
    print("| step | row | found | place | cause | seconds |\n|---|---|---|---|---|---|")
    for mutant, run in ((mutant, run) for kind, run in KINDS for mutant in kind.MUTANTS):
        if not re.search(only, mutant.wrap):
            continue
        started = time.perf_counter()
        errors = run(mutant.wrap).of("error")
        first = errors[0] if errors else None
        is_found = first is not None and first.probe == mutant.probe
        is_placed = is_found and first is not None and mutant.place in f"{first.where.module} {first.where.function} {first.where.op}"
        is_explained = is_found and first is not None and any(word in f"{first.message} {first.cause}" for word in mutant.words)
        found, placed, explained, total = found + is_found, placed + is_placed, explained + is_explained, total + 1
        words = ["yes" if mark else "no" for mark in (is_found, is_placed, is_explained)]
        print(f"| {mutant.wrap} | {mutant.row} | {' | '.join(words)} | {time.perf_counter() - started:.1f} |", flush=True)
    print("\n| clean step | finding | seconds |\n|---|---|---|")
    rows: list[tuple[str, Callable[[], Report]]] = [
        (f"{spec} {strategy}", partial(step_on, spec, strategy=strategy)) for spec in SPECS for strategy in STRATEGIES
    ]
    rows += [(wrap, partial(run, wrap)) for kind, run in KINDS for wrap in kind.CLEAN]
    for name, step in rows:
        if not re.search(only, name):
            continue
        started = time.perf_counter()
        try:
            findings = step().findings
        except UsageError as error:
            print(f"| {name} | refused: {error} | {time.perf_counter() - started:.1f} |", flush=True)
            continue
        clean, alarms = clean + 1, alarms + bool(findings)
        words_ = "; ".join(finding.message for finding in findings) or "clean"
        print(f"| {name} | {words_} | {time.perf_counter() - started:.1f} |", flush=True)
    print(f"\nbroken: {found} of {total} found, {placed} at the right place, {explained} with the right words")
    print(f"clean: {alarms} of {clean} with a finding")


def one_scale(world: int) -> None:
    """Write synthetic records of `world` ranks, one of them with a weight of its own, and compare them by digest."""
    value = torch.arange(64.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank in range(world):
            writer = RankWriter(folder, rank=rank, world=world, coordinate=(rank,), mesh=(world,))
            for number in range(TENSORS):
                writer.collective(Collective(op="allreduce", shape=(64,)))
                writer.tensor("start", f"w{number}", value + (rank == world - 1 and number == TENSORS // 2))
            writer.close()
        size = sum(file.stat().st_size for file in folder.glob("*.jsonl"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        records = read_records(folder)
        wrong = list(unlike_replicas(records))
        assert first_unlike_collectives(records) is None
        seconds = time.perf_counter() - started
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert wrong == [("start", f"w{TENSORS // 2}", [world - 1])], wrong
        print(f"| {world} | {size / 2**20:.1f} | {seconds:.2f} | {grown / 1024:.1f} |", flush=True)


def scaling() -> None:
    print(f"{TENSORS} tensors and collectives a rank, one rank with one weight of its own\n")
    print("| ranks | records, MiB | seconds to compare | memory added, MiB |\n|---|---|---|---|", flush=True)
    for world in RANKS:  # a process each, so that the memory is that of one comparison
        subprocess.run([sys.executable, "-m", "tests.benchmarks.ranks", "--world", str(world)], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ranks", description=__doc__)
    parser.add_argument("--only", default="", help="rows that match this regular expression")
    parser.add_argument("--scaling", action="store_true", help="the comparison of many ranks' records")
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.world:
        one_scale(arguments.world)
    elif arguments.scaling:
        scaling()
    else:
        matrix(arguments.only)
