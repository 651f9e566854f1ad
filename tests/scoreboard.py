"""Judges the probes on the mutants: was each detected, in the right function, with the right words; are clean models clean?

`python -m tests.scoreboard [--only REGEX] [-k EXPR] [--json FILE] [--device cuda --workers 14]`. A mutant counts as detected when a probe of one of its
topics finds an error or a warning; it is placed when such a finding names the mutated function, and explained when one
of its words occurs in the message or the cause.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.mutants.catalog import MUTANTS, NEUTRAL, Mutant, materialize
from tests.mutants.courses import COURSES
from tests.mutants.courses import LEGAL as LEGAL_COURSES
from tests.mutants.ordinary import LEGAL as LEGAL_ORDINARY
from tests.mutants.ordinary import ORDINARY
from tests.mutants.public import LEGAL as LEGAL_PUBLIC
from tests.mutants.public import PUBLIC
from tests.mutants.serving import SERVING
from tests.mutants.strangers import LEGAL, STRANGERS

STYLES = "hf nanogpt llama litgpt titan jax flex moe heads compiled modded fast ahead registers recurrent gates course torchnn serving gpt2 postnorm plain".split()
CLEAN = tuple(f"{style}_style" for style in STYLES)
ALL = (*MUTANTS, *STRANGERS, *COURSES, *SERVING, *PUBLIC, *ORDINARY)
PRESETS = ("olmo1-tiny", "olmo2-tiny", "olmo3-tiny", "datadecide-tiny")
WORKERS = 2


def findings_on(spec: str, expression: str | None = None, device: str = "cpu") -> list[dict[str, Any]]:
    """Every finding, as plain values, of all probes but the slow ones on a subject; a probe that broke is one too."""
    import torch

    from olmodebug.examine import build, run_probe
    from olmodebug.probe import select, shipped_probes
    from olmodebug.report import plain
    from olmodebug.spec import Job

    torch.set_num_threads(1)
    job = Job(spec=spec, device=device)
    building = build(job)
    findings = [plain(finding) for result in building.results for finding in result.findings]
    if building.subject is None:
        return findings
    failed: dict[str, str] = {}
    for probe in select(shipped_probes(), expression):
        if probe.cost == "slow":
            continue
        result = run_probe(probe, building.subject, failed=failed)
        if result.root is not None:
            failed[probe.name] = result.root
        if result.outcome.status == "error":
            findings.append({"probe": probe.name, "severity": "broke", "message": result.outcome.reason, "where": {}, "cause": None})
        findings += [plain(finding) for finding in result.findings]
    return findings


def judge(mutant: Mutant, expression: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """One mutant's row: detected, placed, explained, and by which probes."""
    started, busy = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        findings = findings_on(f"{materialize(mutant, Path(folder))}:{mutant.build}", expression, device)
    loud = [f for f in findings if f["severity"] in ("error", "warning")]
    right = [f for f in loud if f["probe"].partition(".")[0] in (*mutant.topics, "build")]
    names = (mutant.function, *mutant.also)
    placed = [f for f in right if any(_is(f, each) for each in names)]
    explained = [f for f in right if any(word in f"{f['message']} {f['cause'] or ''}".lower() for word in mutant.words)]
    return {
        "name": mutant.name,
        "row": mutant.row,
        "detected": bool(right),
        "elsewhere": sorted({f["probe"] for f in loud}) if not right else [],
        "placed": bool(placed),
        "explained": bool(explained),
        "probes": sorted({f["probe"] for f in right}),
        "broke": [f["probe"] for f in findings if f["severity"] == "broke"],
        "places": sorted({str(f["where"].get("function")) for f in right}),
        "words": [f"{f['message'][:150]} | {f['cause']}" for f in right][:3],
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
    }


def silent(name: str, spec: str, expression: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """A clean model's row: the errors it was given, each of them a false alarm."""
    busy = time.process_time()
    findings = findings_on(spec, expression, device)
    return _clean_row(name, findings, time.process_time() - busy)


def silent_neutral(mutant: Mutant, expression: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """A legal variation's row."""
    with tempfile.TemporaryDirectory() as folder:
        return silent(mutant.name, f"{materialize(mutant, Path(folder))}:{mutant.build}", expression, device)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.scoreboard", description=__doc__)
    parser.add_argument("--only", default="", help="mutants and models whose name matches this regular expression")
    parser.add_argument("-k", dest="select", help="only probes whose name fits")
    parser.add_argument("--json", type=Path, help="write every row here")
    parser.add_argument("--device", default="cpu", help="where the models run (default cpu)")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"models at a time (default {WORKERS})")
    arguments = parser.parse_args(argv)
    asked: dict[str, Any] = {"expression": arguments.select, "device": arguments.device}
    mutants = [m for m in ALL if re.search(arguments.only, m.name)]
    neutral = [m for m in (*NEUTRAL, *LEGAL, *LEGAL_COURSES, *LEGAL_PUBLIC, *LEGAL_ORDINARY) if re.search(arguments.only, m.name)]
    here = Path(__file__).parent / "mutants" / "clean"
    models = [(f"clean/{name}", f"{here / name}.py:build") for name in CLEAN] + [(f"preset/{name}", name) for name in PRESETS]
    models = [(name, spec) for name, spec in models if re.search(arguments.only, name)]
    rows: list[dict[str, Any]] = []
    clean: list[dict[str, Any]] = []
    with ProcessPoolExecutor(arguments.workers) as pool:
        for row in pool.map(functools.partial(judge, **asked), mutants):
            rows.append(row)
            marks = "".join(letter if row[key] else "-" for letter, key in (("D", "detected"), ("P", "placed"), ("E", "explained")))
            print(f"{marks}  {row['name']:42s}{row['row']:10s}{row['seconds']:5.1f} s  {', '.join(row['probes'] or row['elsewhere'])}")
            if not (row["placed"] and row["explained"]):
                print(f"       {row['places']} {row['words']} elsewhere {row['elsewhere']}")
            if row["broke"]:
                print(f"       BROKE {row['broke']}")
            sys.stdout.flush()
        jobs = [pool.submit(silent_neutral, m, **asked) for m in neutral]
        jobs += [pool.submit(silent, name, spec, **asked) for name, spec in models]
        for job in jobs:
            row = job.result()
            clean.append(row)
            print(
                f"{'clean' if not row['errors'] else 'ALARM':6s}{row['name']:42s}{'; '.join(row['errors'])} {row['warnings']} warnings {row['broke']}"
            )
    total = max(1, len(rows))
    found, placed, explained = (sum(row[key] for row in rows) for key in ("detected", "placed", "explained"))
    print(
        f"detected {found}/{len(rows)}, in the right function {placed}/{len(rows)} ({placed / total:.0%}), explained {explained}/{len(rows)}"
    )
    broke = sum(bool(row["broke"]) for row in (*rows, *clean))
    print(f"{broke} models under which a probe broke" if broke else "no probe broke")
    print(f"false alarms on {sum(bool(row['errors']) for row in clean)} of {len(clean)} clean models")
    if arguments.json:
        arguments.json.write_text(json.dumps({"mutants": rows, "clean": clean}, indent=1), encoding="utf-8")
    return 0


def _is(finding: dict[str, Any], function: str) -> bool:
    """Whether a finding names this function, with or without its class."""
    named = finding["where"].get("function") or ""
    return named == function or named.endswith("." + function)


def _clean_row(name: str, findings: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "errors": [f"{f['probe']}: {f['message']}" for f in findings if f["severity"] == "error"],
        "warnings": sum(f["severity"] == "warning" for f in findings),
        "warned": sorted({f["probe"] for f in findings if f["severity"] == "warning"}),
        "cpu_seconds": round(seconds, 1),
        "broke": [f["probe"] for f in findings if f["severity"] == "broke"],
    }


if __name__ == "__main__":
    raise SystemExit(main())
