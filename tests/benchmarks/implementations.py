"""How well two implementations are told apart: `python -m tests.benchmarks.implementations [WORD]` prints the fault table.

A fault counts as detected when a finding is an error, as placed when its function is the one that is wrong (or makes the
first wrong tensor), as explained when the named cause is the right one; a fault without a named cause is explained by
claiming none. A clean pair is flagged by any finding but a note.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from olmodebug.environment import environment
from olmodebug.implementations.comparison import compare
from olmodebug.implementations.equivalent import config_for
from olmodebug.report import Report
from olmodebug.spec import Job, resolve
from olmodebug.subject import Subject
from olmodebug.tiny import causal_lm_class
from tests.mutants.catalog import CLEAN as FILES
from tests.mutants.catalog import materialize
from tests.mutants.implementation_faults import CLEAN, FAULTS, Fault

# Ours against those that the presets are equal to.
PRESETS = (
    ("olmo1-tiny", "transformers:OlmoForCausalLM"),
    ("olmo2-tiny", "transformers:Olmo2ForCausalLM"),
    ("olmo3-tiny", "transformers:Olmo3ForCausalLM"),
    ("datadecide-tiny", "transformers:LlamaForCausalLM"),
)
ACTIVATION = {"transformers:GPT2LMHeadModel": {"activation_function": "gelu"}}  # nanoGPT has the exact one


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One fault against one reference."""

    fault: Fault
    against: str
    report: Report

    @property
    def first(self) -> object:
        return next((f for f in self.report.findings if f.severity == "error"), None)

    @property
    def detected(self) -> bool:
        return self.first is not None

    @property
    def cause(self) -> str:
        named = [str(f.evidence["cause"]) for f in self.report.findings if f.severity == "error" and "cause" in f.evidence]
        return named[0] if named else ""

    @property
    def place(self) -> str:
        found = next((f.where.function or f.where.module for f in self.report.findings if f.severity == "error"), "")
        return found or ""

    @property
    def placed(self) -> bool:
        mutant = self.fault.mutant
        if "tied head" in self.fault.causes and self.place in ("lm_head", "transformer.wte"):
            return True  # a parameter that is there twice has a module and no line
        return self.place in (mutant.function, *mutant.also, *self.fault.functions)

    @property
    def explained(self) -> bool:
        return self.cause in self.fault.causes if self.fault.causes else self.cause == ""


def subject_of(path: Path, build: str) -> Subject:
    return resolve(Job(spec=f"{path}:{build}"))


def reference_of(spec: str, subject: Subject) -> Subject:
    """A transformers class in the sizes of the subject."""
    kind, _ = causal_lm_class(spec.partition(":")[2])
    return resolve(Job(spec=spec, config={**config_for(kind, subject), **ACTIVATION.get(spec, {})}))


def judged(fault: Fault, folder: Path) -> list[Row]:
    """The fault against the clean file, and against the equivalent class of transformers."""
    mutant = fault.mutant
    clean = subject_of(FILES / f"{mutant.base}.py", mutant.build)
    subject = subject_of(materialize(mutant, folder), mutant.build)
    rows = [Row(fault=fault, against="clean file", report=compare(subject, clean))]
    if fault.equivalent:
        rows.append(
            Row(fault=fault, against=fault.equivalent.partition(":")[2], report=compare(subject, reference_of(fault.equivalent, clean)))
        )
    return rows


def clean_pairs(folder: Path) -> list[tuple[str, Report]]:
    """Every clean pair, both ways round where both are files."""
    found = []
    for base, edits, build, other in CLEAN:
        text = (FILES / f"{base}.py").read_text()
        for old, new in edits:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = folder / f"{base}_{len(found)}.py"
        path.write_text(text)
        subject = subject_of(path, build)
        name = other.partition(":")[2]
        reference = subject_of(FILES / f"{base}.py", name) if other.startswith("clean:") else reference_of(other, subject)
        words = f"{base}:{build}{' (gate and up fused)' if edits else ''}"
        found.append((f"{words} / {name}", compare(subject, reference)))
        found.append((f"{name} / {words}", compare(reference, subject)))
    for preset, other in PRESETS:
        subject = resolve(Job(spec=preset))
        found.append((f"{preset} / {other.partition(':')[2]}", compare(subject, reference_of(other, subject))))
    return found


def table(word: str) -> str:
    """The whole table as Markdown."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [row for fault in FAULTS if word in fault.mutant.name for row in judged(fault, folder)]
        pairs = clean_pairs(folder) if not word else []
    lines = ["| fault | row | against | detected | first place | right | cause | right |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row.fault.mutant.name, row.fault.mutant.row, row.against, _yes(row.detected), f"`{row.place}`", _yes(row.placed), row.cause or "(none claimed)", _yes(row.explained)]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    total = len(rows)
    counts = {name: sum(getattr(row, name) for row in rows) for name in ("detected", "placed", "explained")}
    shares = ", ".join(f"{name} {count} of {total} ({100 * count / max(total, 1):.0f} %)" for name, count in counts.items())
    lines += ["", f"{len({row.fault.mutant.name for row in rows})} faults, {total} comparisons: {shares}."]
    if pairs:
        flagged = [name for name, report in pairs if any(f.severity != "note" for f in report.findings)]
        lines += ["", f"Clean pairs flagged: {len(flagged)} of {len(pairs)}{': ' + ', '.join(flagged) if flagged else ''}.", ""]
        lines += [
            "| clean pair | logits, relative | gradients compared | largest gradient difference, relative | limit |",
            "|---|---|---|---|---|",
        ]
        for name, report in pairs:
            section = report.sections["implementations"]
            logits, gradients = section["logits"], section["gradients"]
            share = logits["largest_difference"] / logits["largest_magnitude"]
            compared, largest = (gradients["compared"], f"{gradients['largest_relative_difference']:.1e}") if gradients else (0, "")
            lines.append(f"| {name} | {share:.1e} | {compared} | {largest} | {section['limit']:.1e} |")
    return "\n".join(lines)


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def main() -> None:
    machine = environment(seed=0, command="python -m tests.benchmarks.implementations")
    print("# Two implementations: faults found, placed and explained\n")
    print("`python -m tests.benchmarks.implementations`")
    print(f"torch {machine.torch}, transformers {machine.transformers}, Python {machine.python}, CPU, float64, seed 0\n")
    print(table(sys.argv[1] if len(sys.argv) > 1 else ""))


if __name__ == "__main__":
    main()
