"""`olmodebug replay`: the failed probes of a recorded run once more, with the cases that it kept."""

import argparse
from pathlib import Path

from ..errors import EXIT_NOTHING_CHECKED
from .check import run_check
from .shared import Commands, add_command


def declare(commands: Commands) -> None:
    """The arguments of `replay`."""
    again = add_command(commands, replay)
    again.add_argument("id", nargs="?", metavar="ID", help="a recorded run (default: the newest)")


def replay(arguments: argparse.Namespace) -> int:
    """Run the failed probes of a recorded run again, with its cases: `fixed`, `still fails` or `error` for each."""
    import json
    from dataclasses import replace

    from ..report import read
    from ..store import find_run
    from ..supervise import CASES, order_from

    folder = find_run(Path.cwd(), arguments.id)
    old = read(folder / "report.json")
    failed = [outcome.probe for outcome in old.outcomes if outcome.status == "failed"]
    if not failed:
        print(f"{folder.name}: no probe failed in this run, so there is nothing to replay")
        return EXIT_NOTHING_CHECKED
    order = order_from(json.loads((folder / "job.json").read_text(encoding="utf-8")))
    names = [name for name in failed if not name.startswith("build.")]
    kept = folder / CASES
    stored = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    again = run_check(replace(order, select=" or ".join(names) or "build", stored=stored))
    status = {outcome.probe: outcome.status for outcome in again.outcomes}
    words = {"passed": "fixed", "failed": "still fails", "skipped": "not reached", "not-applicable": "does not apply any more"}
    for name in failed:
        print(f"{words.get(status.get(name, 'error'), 'error'):12s} {name}")
    return 0 if all(status.get(name) in ("passed", "not-applicable") for name in failed) else again.exit_code or 1
