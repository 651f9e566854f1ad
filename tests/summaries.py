"""Turns the rows of long runs into the committed pages: `python -m tests.summaries scoreboard|transformers|events FILE@COMMIT...`.

Several files are the slices of one run; where a name occurs twice the later file counts. The commit is the code that the
rows of a file come from, and the page says how many come from which. What a page does not need is dropped from the JSON
that goes with it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.event_sweep import PRECISIONS
from tests.mutants.courses import FIRST_CONTACT as COURSES
from tests.mutants.coverage import LEFT_OUT, ROWS
from tests.mutants.strangers import FIRST_CONTACT as STRANGE
from tests.mutants.strangers import STRANGERS
from tests.scoreboard import ALL
from tests.sweep import line_of

REPORTS = Path(__file__).parents[1] / "reports"
Row = dict[str, Any]


def first_contact() -> str:
    """The rates on styles that no probe had been changed for, with the probes as they were then."""
    seeded, found, placed, explained = (sum(counts) for counts in zip(*STRANGE.values(), strict=True))
    return (
        f"Five of the styles were written before any probe had run on them. On first contact 21 of 30 faults were detected in `lit/`, 21 in "
        f"the right function, 19 explained, with no false alarm on its 13 clean and legal variants. In {', '.join(f'`{name}/`' for name in STRANGE)} "
        f"it was {found} of {seeded}, {placed} and {explained}, with false errors on the clean models of two of them; {seeded - len(STRANGERS)} of "
        f"those faults turned out to be legal or not to be told from what is. In four models as courses write them {COURSES[1]} of {COURSES[0]} "
        f"were detected, with no false alarm; what was missed is in `course/`. In five models as people write them every day, with faults that "
        f"were meant to be hard, it was 91 of 118, 74 in the right function, 85 explained, with two false errors on the 30 clean and legal "
        f"ones; part of what was missed is in `gpt2/`, `postnorm/` and `plain/`. In "
        f"six more files it was 99 of 120, 81 and 72, with no false error on the 54 clean and legal ones. The rows below come after the probes had learnt from "
        f"them. On faults written by others expect the rates of first contact."
    )


def merged(paths: list[str], key: str) -> list[Row]:
    """The rows of several files, by name, the later ones in place of the earlier."""
    rows: dict[str, Row] = {}
    for each in paths:
        path, _, commit = each.partition("@")
        body = json.loads(Path(path).read_text(encoding="utf-8"))
        for row in body.get(key, []) if isinstance(body, dict) else body:
            rows[row.get("name") or row["type"]] = row | ({"commit": commit} if commit else {})
    return [rows[name] for name in sorted(rows)]


def scoreboard(paths: list[str]) -> None:
    """reports/scoreboard.json and .md."""
    order = {m.name: i for i, m in enumerate(ALL)}
    mutants = sorted((row for row in merged(paths, "mutants") if row["name"] in order), key=lambda row: order[row["name"]])
    clean = merged(paths, "clean")
    small = [{key: value for key, value in row.items() if key != "words" or not row["explained"]} for row in mutants]
    _write("scoreboard", {"mutants": small, "clean": clean}, scoreboard_page(mutants, clean))


def scoreboard_page(rows: list[Row], clean: list[Row]) -> str:
    """The scoreboard as Markdown: counts, what was missed, what was flagged on clean models, every row of the corpus."""
    found, placed, explained = (sum(row[key] for row in rows) for key in ("detected", "placed", "explained"))
    alarms = [row for row in clean if row["errors"]]
    slow = max((row.get("cpu_seconds", 0.0) for row in [*rows, *clean]), default=0.0)
    lines = [
        "# Broken and clean models",
        "",
        f"`python -m tests.scoreboard --json FILE`, {_versions()}, CPU, seed 0.",
        "",
        f"- {len(rows)} broken models: {found} detected ({found / len(rows):.1%}), {placed} in the right function ({placed / len(rows):.1%}), "
        f"{explained} explained ({explained / len(rows):.1%})",
        f"- {len(clean)} clean models and legal variations: {len(alarms)} with an error finding, "
        f"{sum(bool(row['warnings']) for row in clean)} with a warning ({', '.join(row['name'] for row in clean if row['warnings']) or 'none'})",
        f"- the dearest model took {slow:.0f} s of one core, where that was measured",
        f"- {_codes([*rows, *clean])}",
        "",
        "Detected: a probe of the right topic finds an error or a warning. In the right function: such a finding names the function",
        "that was changed. Explained: it says what is wrong in words that were fixed beforehand.",
        "",
        "The broken models were written by the same team as the probes, so these rates are optimistic.",
        first_contact(),
        "",
        "| style | faults | detected | in the right function | explained |",
        "|---|---|---|---|---|",
    ]
    for style in dict.fromkeys(row["name"].partition("/")[0] for row in rows):
        mine = [row for row in rows if row["name"].startswith(style + "/")]
        counts = " | ".join(str(sum(row[key] for row in mine)) for key in ("detected", "placed", "explained"))
        lines.append(f"| {style} | {len(mine)} | {counts} |")
    lines += ["", "| not detected, not placed or not explained | row | detected | placed | explained |", "|---|---|---|---|---|"]
    for row in rows:
        if not (row["detected"] and row["placed"] and row["explained"]):
            marks = " | ".join("yes" if row[key] else "no" for key in ("detected", "placed", "explained"))
            lines.append(f"| {row['name']} | {row['row']} | {marks} |")
    lines += [f"\nFlagged on a clean model: {row['name']}: {'; '.join(row['errors'])}" for row in alarms]
    lines += ["", "## Rows of the corpus of real bugs", "", "| row | faults here | detected |", "|---|---|---|"]
    for name in ROWS:
        mine = [row for row in rows if name in row["row"].split(",")]
        if mine:
            lines.append(f"| {name} | {len(mine)} | {sum(row['detected'] for row in mine)} |")
    lines += ["", "Left out, with the reason:", "", "| row | why no model here has it |", "|---|---|"]
    lines += [f"| {name} | {LEFT_OUT[name]} |" for name in ROWS if name in LEFT_OUT]
    return "\n".join(lines) + "\n"


def transformers(paths: list[str]) -> None:
    """reports/transformers.json and .md."""
    rows = merged(paths, "rows")
    small = []
    for row in rows:
        findings = [
            {key: finding[key] for key in ("probe", "severity", "message", "cause")}
            | {"where": {key: finding["where"][key] for key in ("module", "function", "line", "op")}}  # no path of a machine
            for finding in row.get("findings", [])
            if finding["severity"] != "note"
        ]
        statuses = dict(Counter(outcome["status"] for outcome in row.get("outcomes", [])))
        kept = {key: row[key] for key in ("type", "class", "commit", "seconds", "cpu_seconds", "error", "assumptions") if row.get(key)}
        if "error" in kept:
            kept["error"] = kept["error"].rpartition(" (/")[0] or kept["error"]  # without the place on this machine
        small.append(kept | {"outcomes": statuses, "findings": findings})
    _write("transformers", small, transformers_page(rows))


def transformers_page(rows: list[Row]) -> str:
    """The sweep as Markdown: counts, every error finding with its place, how often each probe ran, what was not built."""
    checked = [row for row in rows if row.get("outcomes")]
    flagged = [row for row in checked if any(f["severity"] == "error" for f in row["findings"])]
    outcomes = [outcome for row in checked for outcome in row["outcomes"]]
    ran = sum(o["status"] in ("passed", "failed") for o in outcomes)
    lines = [
        "# Every causal-LM class of transformers",
        "",
        f"`python -m tests.sweep --json FILE`, {_versions()}, CPU, tiny random weights, seed 0.",
        "",
        f"- {len(rows)} model types, {len(checked)} built and checked, {ran:,} probes ran, {sum(o['status'] == 'error' for o in outcomes)} broke",
        f"- {len(checked) - len(flagged)} without an error finding, {len(flagged)} with one",
        f"- {_codes(rows)}",
        "",
        "`notes.md` says of each error finding what was found out by hand.",
        "",
        "| model type | severity | probe | what | where |",
        "|---|---|---|---|---|",
    ]
    lines += [line_of(row, finding) for row in flagged for finding in row["findings"] if finding["severity"] == "error"]
    warned = Counter(f["probe"] for row in checked for f in row["findings"] if f["severity"] == "warning")
    lines += ["", "| probe | passed | failed | not applicable | skipped | types with a warning |", "|---|---|---|---|---|---|"]
    for probe in sorted({o["probe"] for o in outcomes}):
        status = Counter(o["status"] for o in outcomes if o["probe"] == probe)
        counts = " | ".join(str(status[word]) for word in ("passed", "failed", "not-applicable", "skipped"))
        lines.append(f"| `{probe}` | {counts} | {warned[probe]} |")
    lines += ["", "Checked: " + ", ".join(row["type"] for row in checked) + "."]
    missing = [row for row in rows if not row.get("outcomes")]
    lines += ["", "Not built: " + "; ".join(f"{row['type']} ({str(row.get('error') or '')[:90]})" for row in missing)]
    return "\n".join(lines) + "\n"


def events(paths: list[str]) -> None:
    """reports/memory-events.md."""
    (REPORTS / "memory-events.md").write_text(events_page(merged(paths, "rows")), encoding="utf-8")


def events_page(rows: list[Row]) -> str:
    """The sweep of events as Markdown: counts, what differs by its first event, what could not be asked."""
    asked = [row for row in rows if row["ok"]]
    unlike = [(row["type"], name, row[name]) for row in asked for name in PRECISIONS if not row[name]["identical"]]
    apart = {name for name, _, _ in unlike}
    counted = sum(row[name]["measured"] for row in asked for name in PRECISIONS)
    lines = [
        "# Predicted and real events of memory, over the causal-LM classes of transformers",
        "",
        f"`python -m tests.event_sweep --json FILE`, {_versions()}, CPU, tiny random weights, seed 0. Three AdamW steps over two rows of 16",
        "tokens, in float32 and in bfloat16 autocast, on fake and on real tensors: each allocation and each free, with its operator, module,",
        "phase and size.",
        "",
        f"- {len(rows)} classes, {len(asked)} compared, {counted:,} events; {len(asked) - len(apart)} identical in both precisions, {len(apart)} not",
        f"- {_codes(rows)}",
        "",
        "| class | precision | events | the first that differs |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {precision} | {found['measured']} | {found['first_difference'].replace('|', '/')} |"
        for name, precision, found in unlike
    ]
    lines += ["", "| not compared | why |", "|---|---|"]
    lines += [
        f"| {row['type']} | {(row['error'].rpartition(' (/')[0] or row['error'])[:160].replace('|', '/')} |"
        for row in rows
        if not row["ok"]
    ]
    return "\n".join(lines) + "\n"


def _codes(rows: list[Row]) -> str:
    """How many rows come from which commit."""
    return "rows by the commit whose probes they ran: " + ", ".join(
        f"{commit or 'unknown'} {n}" for commit, n in Counter(r["commit"] for r in rows).items()
    )


def _versions() -> str:
    return f"olmodebug 0.1.0, torch {version('torch')}, transformers {version('transformers')}, Python {sys.version.split()[0]}"


def _write(name: str, body: object, page: str) -> None:
    (REPORTS / f"{name}.json").write_text(json.dumps(body, separators=(",", ":")) + "\n", encoding="utf-8")
    (REPORTS / f"{name}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    {"scoreboard": scoreboard, "transformers": transformers, "events": events}[sys.argv[1]](sys.argv[2:])
