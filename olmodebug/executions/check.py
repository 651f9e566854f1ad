"""Two executions held against each other: each in a child process that writes a bundle, then compared, then told.

A child that dies is a finding. The two sides never live at the same time, and each may have been run elsewhere.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..environment import environment
from ..errors import OlmodebugError, UsageError
from ..explain import source_lines
from ..forks import Forks, forks
from ..process import Child, Death, innermost, last_line, run_child
from ..records import Where
from ..report import Environment, Finding, Outcome, Report, SubjectInfo, finding_from, merge_by_root, with_reproduction
from ..store import Run
from ..supervise import InternalFault
from .bundle import BUDGET_BYTES, Bundle, read_bundle
from .compare import Comparison, compare
from .death import KINDS, arguments_text, bad_index, death_finding
from .execution import Execution
from .findings import findings

MOST_DEPARTURES = 5  # findings; the evidence has the number of all

Progress = Callable[[int, int, str, float], None]
QUESTIONS = tuple(
    f"parity.{name}" for name in "runs arguments weights ops policy determinism range compiled decisions derivative implementation".split()
)
SEEN = ("parity.arguments", "parity.ops", "parity.policy", "parity.determinism", "parity.range")  # asked of single ops
NARROW = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A subject, as a job's values, and how it is run."""

    job: Mapping[str, Any]
    execution: Execution


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOrder:
    """What to compare, and how much it may cost. `keep` leaves the bundles in the run's record."""

    pairs: Sequence[tuple[Side, Side]]
    only: tuple[str, ...] = ()
    budget_bytes: int = BUDGET_BYTES // 4
    timeout_seconds: float = 300.0
    repeat: bool = True
    keep: bool = False
    command: str = ""


@dataclass(slots=True)
class _Told:
    """What a child has said so far."""

    head: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    step: str = "build"
    steps: int = 0
    findings: list[Finding] = field(default_factory=list)
    died: dict[str, Any] | None = None
    unusable: str | None = None
    fault: str | None = None
    peak_bytes: int = 0
    underived: list[dict[str, Any]] | None = None
    departures: list[dict[str, Any]] | None = None

    def note(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "op":
            self.last = event
        elif kind == "start":
            self.step, self.last = event["step"], None
            self.steps += 1
        elif kind == "head":
            self.head = event["value"]
        elif kind == "finding":
            found = finding_from(event["value"])
            self.findings.append(replace(found, probe="parity.runs"))
        elif kind in ("died", "done"):
            self.died = event if kind == "died" else None
            self.peak_bytes = event.get("peak_bytes", 0)
        elif kind == "departures":
            self.departures = event["values"]
        elif kind == "underived":
            self.underived = event["values"]
        elif kind == "unusable":
            self.unusable = event["text"]
        elif kind == "fault":
            self.fault = event["traceback"]


def check_parity(order: ParityOrder, run: Run, progress: Progress) -> Report:
    """The report on every pair of an order. UsageError when a side cannot be run, InternalFault when olmodebug broke."""
    started = time.monotonic()
    base = run.folder
    with tempfile.TemporaryDirectory(prefix="olmodebug-parity-") as scratch, forks(*_modules(order)) as forking:
        home = base / "bundles" if base is not None else Path(scratch)
        home.mkdir(parents=True, exist_ok=True)
        scripts = base / "scripts" if base is not None else None
        made: dict[str, Bundle | None] = {}
        derived = False
        sections, found, heads = [], [], []
        try:
            for i, (left, right) in enumerate(order.pairs):
                weights = min(left.execution.dtype, right.execution.dtype, key=NARROW.index)
                ticks = _ticks(progress, i, len(order.pairs), started)
                sides: list[Bundle | None] = []
                departed: list[dict[str, Any]] = []
                for side, judged in ((left, False), (right, True)):
                    key = f"{side.job['spec']}|{side.execution}|{weights}|{judged}"
                    if key not in made:
                        folder = home / f"{len(made)}-{str(side.execution).replace(',', '-').replace(':', '')}.bundle"
                        other = left.job if side is right and left.job["spec"] != right.job["spec"] else None
                        made[key], told = _one(
                            order, side, weights, judged, folder, ticks, other, derive=judged and i == 0, scripts=scripts, forking=forking
                        )
                        found += told.findings
                        departed = told.departures or []
                        derived |= told.underived is not None
                        heads += [told.head] if told.head else []
                        if made[key] is None:
                            sections.append(_died(left, right, told))
                    sides.append(made[key])
                    if sides[-1] is None:
                        break
                if len(sides) == 2 and sides[0] is not None and sides[1] is not None:
                    comparison = compare(sides[0], sides[1])
                    if departed:
                        comparison.section |= {"verdict": "parts", "first": _first_departure(departed[0])}
                    sections.append(comparison.section)
                    found += findings(comparison, sides[1], scripts=scripts)
        finally:
            if not order.keep:
                shutil.rmtree(home, ignore_errors=True)
    return report_of(order.command, run, sections, found, heads, time.monotonic() - started, derived=derived)


def _modules(order: ParityOrder) -> tuple[str, ...]:
    """What every child of an order imports before it looks at its subject."""
    ours = tuple(f"olmodebug.{name}" for name in ("environment", "explain", "spec", "executions.run", "executions.lift"))
    theirs = any(str(side.job["spec"]).startswith("transformers:") for pair in order.pairs for side in pair)
    return (*ours, *(("transformers.modeling_utils",) if theirs else ()))


def compare_bundles(left: Path, right: Path, run: Run, *, command: str) -> Report:
    """The report on two bundles, which may come from other machines."""
    started = time.monotonic()
    a, b = read_bundle(left), read_bundle(right)
    comparison: Comparison = compare(a, b)
    scripts = run.folder / "scripts" if run.folder is not None else None
    found = findings(comparison, b, scripts=scripts)
    return report_of(command, run, [comparison.section], found, [b.head], time.monotonic() - started)


def report_of(
    command: str,
    run: Run,
    sections: list[dict[str, Any]],
    found: list[Finding],
    heads: list[dict[str, Any]],
    seconds: float,
    *,
    derived: bool | None = None,
) -> Report:
    """Sections and findings as a report; `derived`: whether backwards were asked against their forwards, None where no model is at hand."""
    head = heads[-1] if heads else None
    subject = SubjectInfo(**{**head["subject"], "assumptions": tuple(head["subject"]["assumptions"])}) if head else SubjectInfo(spec="")
    machine = Environment(**{**head["environment"], "command": command}) if head else environment(seed=0, command=command)
    report = Report(
        subject=subject,
        environment=machine,
        outcomes=_outcomes(sections, found, derived),
        # Arguments name the cause; a module that parts in float64 at the same line says it once more.
        findings=merge_by_root(sorted(found, key=lambda finding: finding.probe == "parity.implementation")),
        sections={"parity": {"runs": sections}},
        seconds=round(seconds, 3),
        created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        id=run.id,
    )
    return with_reproduction(report, lambda _: command)


def _one(
    order: ParityOrder,
    side: Side,
    weights: str,
    judged: bool,
    folder: Path,
    tick: Callable[[str], None],
    other: Mapping[str, Any] | None,
    *,
    derive: bool,
    scripts: Path | None,
    forking: Forks,
) -> tuple[Bundle | None, _Told]:
    """Run one side in a child; its bundle, or None with the finding that says why there is none."""
    told = _Told()
    folder.mkdir(parents=True, exist_ok=True)
    child = Child(
        module="olmodebug.executions.child",
        folder=folder,
        timeout_seconds=order.timeout_seconds,
        environment=side.execution.environment,
    )
    message = {
        "job": dict(side.job),
        "execution": {**asdict(side.execution), "flags": list(side.execution.flags)},
        "weights": weights,
        "judged": judged,
        "repeat": order.repeat and judged,
        "only": list(order.only),
        "bundle": str(folder),
        "budget_bytes": order.budget_bytes,
        "derivative": derive,
        "scripts": str(scripts) if scripts is not None else None,
        "reference": dict(other) if other is not None else None,
        "command": order.command,
    }
    death = run_child(child, message, told.note, lambda: tick(f"{side.execution.words}: {told.step}"), forks=forking)
    if told.unusable is not None:
        raise UsageError(told.unusable)
    if told.fault is not None:
        raise InternalFault(told.fault)
    if told.findings:
        told.findings = [_with_index(finding, told.last) for finding in told.findings]
        return None, told
    told.findings = [*_departed(told.departures or []), *_underived(told.underived or [])]
    if death is not None or told.died is not None:
        told.findings.append(_death(side, told, death, folder))
        return None, told
    return read_bundle(folder), told


def _with_index(finding: Finding, last: dict[str, Any] | None) -> Finding:
    """An exception of an op that reads indices, with the index that is out of range."""
    bad = bad_index(last["arguments"]) if last is not None and finding.cause is None else None
    if last is None or bad is None:
        return finding
    where = replace(finding.where, module=last["module"], op=last["op"])
    evidence = {**finding.evidence, "arguments": arguments_text(last["arguments"]), "case": last["case"]}
    return replace(finding, cause=bad["cause"], where=where, expected=bad["expected"], observed=bad["observed"], evidence=evidence)


def _first_departure(item: dict[str, Any]) -> dict[str, Any]:
    """A module that parts as the first place of the section."""
    where = {name: item["where"][name] for name in ("module", "function", "file", "line", "op")}
    rest = {"phase": item["kind"], "case": "float64", "verdict": "diverged", "margin": "inf", "policy": None, "reason": item["what"]}
    return where | rest


def _departed(items: list[dict[str, Any]]) -> list[Finding]:
    """Modules that part in float64, so that the implementation is at fault and no precision."""
    found = []
    for item in items[:MOST_DEPARTURES]:
        where = Where(**item["where"])
        found.append(
            Finding(
                probe="parity.implementation",
                severity="error",
                message=f"{item['module'] or 'the model'} does not compute what the left side's does, in float64 on equal inputs: {item['what']}",
                where=where,
                source=source_lines(where),
                fix="make this line do what the left side does",
                expected="equal results in float64",
                observed=f"off by {item['gap']:.3g}" if item["gap"] is not None else None,
                evidence={"phase": item["kind"], "modules that part": len(items), **({"script": item["script"]} if item["script"] else {})},
            )
        )
    return found


def _underived(items: list[dict[str, Any]]) -> list[Finding]:
    """One finding for each custom function, however many modules use it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        groups.setdefault(item["function"], []).append(item)
    found = []
    for name, group in groups.items():
        item, where = group[0], Where(**group[0]["where"])
        finding = Finding(
            probe="parity.derivative",
            severity="error",
            message=f"the backward of {name} is not the derivative of its forward",
            cause="its backward computes something else; executions that share it agree all the same",
            where=where,
            source=source_lines(where),
            fix="derive it again, or let autograd do it; torch.autograd.gradcheck compares the two",
            expected=f"{item['numeric']:.6g} along one direction, by a difference quotient in float64",
            observed=f"{item['analytic']:.6g} by its backward",
            evidence={"modules": len(group), **({"script": item["script"]} if item["script"] else {})},
        )
        found.append(finding)
    return found


def _death(side: Side, told: _Told, death: Death | None, folder: Path) -> Finding:
    kind = told.died["of"] if told.died else "process"
    how = f"{KINDS[kind]}: {told.died['text']}" if told.died else death.text if death else "ended"
    # What the kernel kills without a word is, as a rule, the process that used the most memory.
    where = innermost(folder / "stacks.txt")
    return death_finding(
        told.last,
        how=f"{how} while {'it was built' if told.step == 'build' else f'it ran the case {told.step}'}",
        kind=kind,
        words=side.execution.words,
        death=death,
        printed=last_line(folder / "output.txt"),
        where=where,
    )


def _died(left: Side, right: Side, told: _Told) -> dict[str, Any]:
    """The section of a pair of which one side did not come to its end."""

    def side(one: Side) -> dict[str, Any]:
        environment_of = told.head["environment"] if told.head else {}
        return {
            "execution": one.execution.words,
            "subject": str(one.job["spec"]),
            "device": one.execution.device,
            "dtype": one.execution.dtype,
            "gpu": environment_of.get("gpu"),
            "torch": environment_of.get("torch"),
        }

    finding = told.findings[-1]
    names = ("module", "function", "file", "line", "op")
    first = {name: getattr(finding.where, name) for name in names}
    first |= {"phase": "forward", "case": told.step, "verdict": "died", "margin": 0.0, "policy": None, "reason": finding.message}
    empty: dict[str, Any] = {
        "ops": dict.fromkeys(("exact", "within", "explained", "diverged", "nondeterministic", "range", "unverified"), 0)
    }
    empty |= {
        "layers": [],
        "products": [],
        "policies": [],
        "unverified": [],
        "decisions": None,
        "compiled": [],
        "results": [],
        "left_out": 0,
    }
    return {"left": side(left), "right": side(right), "verdict": "died", "coverage": 0.0, "first": first, "died": finding.message, **empty}


def _outcomes(sections: list[dict[str, Any]], found: list[Finding], derived: bool | None) -> tuple[Outcome, ...]:
    failed = {finding.probe for finding in found if finding.severity == "error"}
    died = any(section["verdict"] == "died" for section in sections)
    decided = any(section["decisions"] for section in sections)
    two = any(section["left"]["subject"] != section["right"]["subject"] for section in sections)
    outcomes = []
    for name in QUESTIONS:
        if name in failed:
            outcomes.append(Outcome(probe=name, status="failed"))
        elif died and name != "parity.runs" and all(section["verdict"] == "died" for section in sections):
            outcomes.append(Outcome(probe=name, status="skipped", reason="an execution did not come to its end"))
        elif name == "parity.derivative" and not derived:
            why = "a bundle holds no model to ask" if derived is None else "no float64 copy of the model can be made beside it"
            outcomes.append(Outcome(probe=name, status="skipped", reason=why))
        elif name in SEEN and not any(sum(section["ops"].values()) for section in sections):
            outcomes.append(
                Outcome(probe=name, status="skipped", reason="compiled code runs no op that can be seen; its results are judged")
            )
        elif name == "parity.compiled" and not any(section["compiled"] for section in sections):
            outcomes.append(Outcome(probe=name, status="not-applicable", reason="no execution is compiled"))
        elif name == "parity.compiled" and (open_ := _undecided(sections)) is not None:
            outcomes.append(Outcome(probe=name, status="skipped", reason=open_))
        elif name == "parity.implementation" and not two:
            outcomes.append(Outcome(probe=name, status="not-applicable", reason="both sides are one implementation"))
        elif name == "parity.decisions" and not decided:
            outcomes.append(Outcome(probe=name, status="skipped", reason="no case has logits of both sides and a measured noise"))
        else:
            outcomes.append(Outcome(probe=name, status="passed"))
    return tuple(outcomes)


def _undecided(sections: list[dict[str, Any]]) -> str | None:
    """Why a compiled run could not be judged."""
    for found in (c for section in sections for c in section["compiled"] if c["verdict"] == "undecided"):
        if not found["graphs"]:
            return "torch.compile compiled nothing, every call ran uncompiled"
        if found["unstable"]:
            return "the uncompiled run gives other results when it is repeated"
        names = ", ".join([*found["unbounded"], *found["choices"]])
        return f"a result is outside the bound and agrees in float64, and the bound does not hold for {names}"
    return None


def _ticks(progress: Progress, done: int, total: int, started: float) -> Callable[[str], None]:
    return lambda step: progress(done, total, step, time.monotonic() - started)


def git_source(spec: str, folder: Path) -> str:
    """`git:REV:path.py:attr` as `FILE.py:attr`, with the folder of the file as it was at the revision below `folder`."""
    import subprocess

    _, _, rest = spec.partition(":")
    revision, _, place = rest.partition(":")
    path, _, attribute = place.rpartition(":")
    if not (revision and path.endswith(".py") and attribute):
        raise UsageError(f"{spec}: expected git:REVISION:path.py:attribute")
    root, inside = Path(path).parent, Path(path).name
    while (root / "__init__.py").is_file():  # a package is taken whole, so that its relative imports lead to its own modules
        root, inside = root.parent, f"{root.resolve().name}/{inside}"
    if not root.is_dir():  # the file and its folder are gone since
        root, inside = Path.cwd(), path
    git = ["git", "-C", str(root)]
    try:
        prefix = subprocess.run([*git, "rev-parse", "--show-prefix"], capture_output=True, text=True, check=True).stdout.strip()
        subprocess.run([*git, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"], capture_output=True, text=True, check=True)
        subprocess.run([*git, "cat-file", "-e", f"{revision}:{prefix}{inside}"], capture_output=True, text=True, check=True)
        part = inside.partition("/")[0] if "/" in inside else "."
        packed = subprocess.run([*git, "archive", revision, part], capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise UsageError(f"{spec}: git is not installed") from None
    except subprocess.CalledProcessError as error:
        text = error.stderr if isinstance(error.stderr, str) else error.stderr.decode(errors="replace")
        known = text.strip().partition(chr(10))[0] or f"git knows no revision {revision}"
        raise UsageError(f"{spec}: {known}") from None
    import io
    import tarfile

    target = folder / f"git-{revision.replace(os.sep, '-')}"
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(target, filter="data")
    found = target / inside
    if not found.is_file():
        raise OlmodebugError(f"{spec}: the revision has no {path}")
    return f"{found}:{attribute}"
