"""Writes the committed samples: `python -m tests.reports [WORD]`, or with `--draw` only their pictures, from the JSON alone.

Each report names its command, versions, seed and device.
`scoreboard.json` and `transformers.json` come from `python -m tests.scoreboard --json` and `python -m tests.sweep --json`,
which take many minutes; `python -m tests.reports --summaries` turns them into their Markdown pages.
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from olmodebug.render.formats import FORMATS
from olmodebug.render.guard import guarded_run_view
from olmodebug.render.html import html
from olmodebug.render.memory import memory_view
from olmodebug.render.plain import plain_text
from olmodebug.render.terminal import report_view
from olmodebug.report import Report, read

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "reports"
BUGS = "tests/mutants/bugs"

# What is run: the arguments of olmodebug, each with `--json` behind the command's name.
SAMPLES = {
    "pass-olmo1-4M": ["check", "olmo1-4M"],
    "pass-transformers-llama": ["check", "transformers:LlamaForCausalLM"],
    "fail-inv-freq-twice": ["check", f"{BUGS}/inv_freq_twice.py:build"],
    "fail-mask-added": ["check", f"{BUGS}/mask_added.py:build_repaired", "-k", "causality"],
    "fail-short-rope-table": ["check", f"{BUGS}/short_rope_table.py:build", "-k", "position"],
    "shapes-olmo2-7B": ["shapes", "olmo2-7B"],
    "memory-olmo1-4M": ["memory", "olmo1-4M", "--budget", "8GiB", "--predict-only"],
    "parity-olmo2-tiny": ["parity", "olmo2-tiny", "--dtype", "bfloat16"],
    "run-short-rope-table": ["run", "--", "python", f"{BUGS}/train_short_table.py"],
}

# What is drawn from a sample's JSON alone, by the end of the file's name; a test holds each to its JSON.
DRAWINGS: dict[str, Callable[[Report], str]] = {
    ".html": html,
    ".md": FORMATS["md"],
    ".concise.txt": FORMATS["concise"],
    ".github.txt": FORMATS["github"],
    ".jsonl": FORMATS["jsonl"],
    ".junit.xml": FORMATS["junit"],
    ".sarif.json": FORMATS["sarif"],
    ".txt": lambda report: terminal(report),
}
IN_EVERY_FORMAT = "fail-mask-added"
AS_A_PAGE = ("memory-olmo1-4M", "parity-olmo2-tiny", "shapes-olmo2-7B", "run-short-rope-table")


def samples(only: str = "") -> None:
    """Run the samples whose name holds `only`, keep their JSON, and draw them."""
    for name, arguments in SAMPLES.items():
        if only not in name:
            continue
        path = REPORTS / f"{name}.json"
        option = ["--json", str(path.relative_to(ROOT))]
        line = [sys.executable, "-m", "olmodebug", arguments[0], *option, *arguments[1:]]
        done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
        print(f"{name}: exit {done.returncode}")
        if done.returncode not in (0, 1):
            print(done.stderr)
        text = path.read_text(encoding="utf-8").replace(" " + shlex.join(option), "")  # what somebody would type
        path.write_text(text.replace(platform.platform(), f"{platform.system()} {platform.machine()}"), encoding="utf-8")
    draw()


def draw() -> None:
    """Draw every committed sample again from its JSON."""
    for path, text in drawings().items():
        path.write_text(text, encoding="utf-8")


def drawings() -> dict[Path, str]:
    """Every drawing of the committed samples: its file and what stands in it."""
    made = {}
    for name in SAMPLES:
        if not (REPORTS / f"{name}.json").is_file():
            continue
        report = read(REPORTS / f"{name}.json")
        endings = [".txt", *(DRAWINGS if name == IN_EVERY_FORMAT else [".html"] if name in AS_A_PAGE else [])]
        made |= {REPORTS / f"{name}{ending}": DRAWINGS[ending](report) for ending in endings}
    return made


def terminal(report: Report) -> str:
    """The command, and what the terminal shows at 100 columns."""
    return f"$ {report.environment.command}\n{plain_text(view(report))}(exit code {report.exit_code})\n"


def view(report: Report) -> RenderableType:
    """What the command of a report shows of it."""
    if "guard" in report.sections:
        return guarded_run_view(report)
    parts = [memory_view(report.sections["memory"]), Text()] if "memory" in report.sections else []
    return Group(*parts, report_view(report))


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
    elif "--draw" in sys.argv:
        draw()
    else:
        samples(sys.argv[1] if len(sys.argv) > 1 else "")
