"""Writes the committed samples: `python -m tests.reports [WORD]`, or with `--draw` only their pictures, from the JSON alone.

Each report names its command, versions, seed and device.
`scoreboard.md` and `transformers.md` come from `python -m tests.scoreboard --json` and `python -m tests.sweep --json`, which
take many minutes, by way of `python -m tests.summaries`.
"""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from rich.console import RenderableType

from olmodebug.render.formats import FORMATS
from olmodebug.render.guard import guarded_run_view
from olmodebug.render.html import html
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
    "parity-reference-olmo2": ["parity", "olmo2-tiny", "--reference", "transformers:Olmo2ForCausalLM"],
    "train-olmo1-tiny": ["train", "olmo1-tiny", "--steps", "60", "--batch-size", "4", "--seq-len", "64"],
    "ranks-ddp-no-sync": [
        "parity",
        "tests/mutants/clean/nanogpt_style.py:build",
        *("--ranks", "2", "--launch", "tests/mutants/parallel.py:no_sync_all_the_way"),
    ],
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
AS_A_PAGE = (
    *("memory-olmo1-4M", "parity-olmo2-tiny", "parity-reference-olmo2", "train-olmo1-tiny", "ranks-ddp-no-sync", "shapes-olmo2-7B"),
    "run-short-rope-table",
)


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
        text = text.replace(f"{Path(find_spec('transformers').origin).parents[1]}/", "")  # where this machine keeps its packages
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
    return report_view(report)


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw()
    else:
        samples(sys.argv[1] if len(sys.argv) > 1 else "")
