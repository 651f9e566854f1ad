"""Writes the committed samples: `python -m tests.reports`. Each report names its command, versions, seed and device.

`scoreboard.json` and `transformers.json` come from `python -m tests.scoreboard --json` and `python -m tests.sweep --json`,
which take many minutes; `python -m tests.reports --summaries` turns them into their Markdown pages.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPORTS = Path(__file__).parents[1] / "reports"
BUGS = "tests/mutants/bugs"
SAMPLES = {
    "pass-olmo1-4M": ["olmo1-4M"],
    "pass-transformers-llama": ["transformers:LlamaForCausalLM"],
    "fail-inv-freq-twice": [f"{BUGS}/inv_freq_twice.py:build"],
    "fail-mask-added": [f"{BUGS}/mask_added.py:build_repaired"],
    "fail-short-rope-table": [f"{BUGS}/short_rope_table.py:build"],
}


def samples() -> None:
    """Run the sample checks and keep their JSON and what the terminal shows."""
    for name, arguments in SAMPLES.items():
        line = [sys.executable, "-m", "olmodebug", "check", *arguments, "--json", str(REPORTS / f"{name}.json")]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        text = f"$ olmodebug check {' '.join(arguments)}\n{done.stdout}(exit code {done.returncode})\n"
        (REPORTS / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}: exit {done.returncode}")


def scoreboard_page() -> str:
    """The scoreboard as Markdown: counts, what was missed, what was flagged on clean models."""
    body = json.loads((REPORTS / "scoreboard.json").read_text(encoding="utf-8"))
    rows, clean = body["mutants"], body["clean"]
    found, placed, explained = (sum(row[key] for row in rows) for key in ("detected", "placed", "explained"))
    alarms = [row for row in clean if row["errors"]]
    lines = [
        "# Broken and clean models",
        "",
        f"`python -m tests.scoreboard --json reports/scoreboard.json`, {_versions()}, CPU, seed 0.",
        "",
        f"- {len(rows)} broken models: {found} detected, {placed} in the right function ({placed / len(rows):.0%}), {explained} explained",
        f"- {len(clean)} clean models and legal variations: {len(alarms)} with an error finding",
        "",
        "The broken models were written by the same team as the probes, so these rates are optimistic.",
        "",
        "| not detected, not placed or not explained | row | detected | placed | explained |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if not (row["detected"] and row["placed"] and row["explained"]):
            marks = " | ".join("yes" if row[key] else "no" for key in ("detected", "placed", "explained"))
            lines.append(f"| {row['name']} | {row['row']} | {marks} |")
    lines += [f"\nFlagged on a clean model: {row['name']}: {'; '.join(row['errors'])}" for row in alarms]
    return "\n".join(lines) + "\n"


def transformers_page() -> str:
    """The sweep as Markdown: counts, and every error finding with its place."""
    rows: list[dict[str, Any]] = json.loads((REPORTS / "transformers.json").read_text(encoding="utf-8"))
    checked = [row for row in rows if row.get("outcomes")]
    flagged = [row for row in checked if any(f["severity"] == "error" for f in row["findings"])]
    ran = sum(o["status"] in ("passed", "failed") for row in checked for o in row["outcomes"])
    lines = [
        "# Every causal-LM class of transformers",
        "",
        f"`python -m tests.sweep --json reports/transformers.json`, {_versions()}, CPU, tiny random weights, seed 0.",
        "",
        f"- {len(rows)} model types, {len(checked)} built and checked, {ran:,} probes ran",
        f"- {len(checked) - len(flagged)} without an error finding, {len(flagged)} with one",
        "",
        "`notes.md` says which of these were confirmed by hand.",
        "",
        "| model type | probe | what | where |",
        "|---|---|---|---|",
    ]
    for row in flagged:
        for finding in row["findings"]:
            if finding["severity"] == "error":
                where = finding["where"]
                what = finding["message"].replace("|", "/")
                cause = f" Cause: {finding['cause']}" if finding["cause"] else ""
                lines.append(f"| {row['type']} | `{finding['probe']}` | {what}.{cause} | {where['function'] or ''} {where['line'] or ''} |")
    missing = [row for row in rows if not row.get("outcomes")]
    lines += ["", "Not built: " + "; ".join(f"{row['type']} ({str(row.get('error') or '')[:90]})" for row in missing)]
    return "\n".join(lines) + "\n"


def _versions() -> str:
    return f"olmodebug 0.1.0, torch {version('torch')}, transformers {version('transformers')}, Python {sys.version.split()[0]}"


if __name__ == "__main__":
    if "--summaries" in sys.argv:
        for name, page in (("scoreboard", scoreboard_page), ("transformers", transformers_page)):
            if (REPORTS / f"{name}.json").is_file():
                (REPORTS / f"{name}.md").write_text(page(), encoding="utf-8")
    else:
        samples()
