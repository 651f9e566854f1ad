"""`olmodebug replay`: recorded findings once more, on the values that their run kept."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EXIT_NOTHING_CHECKED, UsageError
from .check import run_check
from .shared import Commands, add_command

if TYPE_CHECKING:
    from ..report import Report

# From the worst: what a finding with parts of several probes counts as.
STATUSES = ("still fails", "error", "not reached", "does not apply", "fixed")
SETTLED = ("fixed", "does not apply")


def declare(commands: Commands) -> None:
    """The arguments of `replay`."""
    again = add_command(commands, replay)
    again.add_argument(
        "id",
        nargs="?",
        metavar="RUN[:FINDING]",
        help="a recorded run (default: the newest), and in it one finding by its number in the report or all of one probe",
    )


def replay(arguments: argparse.Namespace) -> int:
    """Judge the findings of a recorded run again, on the values that it kept: `fixed`, `still fails` or `error` for each."""
    import json
    from dataclasses import replace

    from ..report import read
    from ..store import find_run
    from ..supervise import CASES, order_from

    run, _, wanted = (arguments.id or "").partition(":")
    folder = find_run(Path.cwd(), run or None)
    old = read(folder / "report.json")
    kept = folder / CASES
    cases: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else _without_values(old)
    chosen = {number: cases[number] for number in _chosen(old, cases, wanted, folder.name)}
    if not chosen:
        print(f"{folder.name}: no probe failed in this run, so there is nothing to replay{_others(old, folder.name)}")
        return EXIT_NOTHING_CHECKED
    order = order_from(json.loads((folder / "job.json").read_text(encoding="utf-8")))
    probes = list(dict.fromkeys(record["probe"] for records in chosen.values() for record in records))
    select = " or ".join(name for name in probes if not name.startswith("build.")) or "build"
    again = run_check(replace(order, select=select, stored=chosen))
    return _tell(again, old, folder.name)


def _without_values(old: "Report") -> dict[str, Any]:
    """For a run that kept no values, as one of the pytest plugin: each finding is judged by its probe."""
    return {
        str(number): [{"probe": name, "severity": finding.severity} for name in (finding.probe, *finding.also)]
        for number, finding in enumerate(old.findings, start=1)
    }


def _chosen(old: "Report", cases: Mapping[str, Any], wanted: str, run: str) -> list[str]:
    """The numbers of the findings asked for: one, those of a probe, or every error."""
    expected = {outcome.probe for outcome in old.outcomes if outcome.status == "expected-failure"}
    if not wanted:
        return [n for n in cases if old.findings[int(n) - 1].severity == "error" and old.findings[int(n) - 1].probe not in expected]
    found = [n for n, records in cases.items() if n == wanted or any(record["probe"] == wanted for record in records)]
    if not found:
        listed = ", ".join(f"{number} ({finding.probe})" for number, finding in enumerate(old.findings, start=1)) or "none"
        raise UsageError(f"{run} has no finding {wanted}; it has {listed}")
    return found


def _others(old: "Report", run: str) -> str:
    """Where there are warnings or notes, how one of them is replayed."""
    return f"; olmodebug replay {run.rpartition('-')[2]}:1 judges its {old.findings[0].severity} again" if old.findings else ""


def _tell(again: "Report", old: "Report", run: str) -> int:
    """A line for each finding, from the worst of its parts, and one for a probe that fails on other cases now."""
    parts: dict[int, list[Mapping[str, Any]]] = {}
    for part in again.sections["replay"]["findings"]:
        parts.setdefault(part["finding"], []).append(part)
    worst = {number: min(of, key=lambda part: STATUSES.index(part["status"])) for number, of in sorted(parts.items())}
    for number, part in worst.items():
        print(f"{part['status']:14s} {run.rpartition('-')[2]}:{number} {old.findings[number - 1].probe}: {part['text']}")
    failing = {part["probe"] for of in parts.values() for part in of if part["status"] not in SETTLED}
    anew = [outcome.probe for outcome in again.outcomes if outcome.status in ("failed", "error") and outcome.probe not in failing]
    for probe in anew:
        print(f"{'still fails':14s} {probe}: on another case than the recorded ones; olmodebug report {again.id} shows it")
    return 0 if not anew and all(part["status"] in SETTLED for part in worst.values()) else again.exit_code or 1
