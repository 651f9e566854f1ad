"""The parent of a training run: it starts a child for each subject, follows its journal, and makes the report.

It loads no torch. A child that crashes, hangs or runs out of memory is a finding with the step it was at.
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..group import Rank, first_to_fail, run_group
from ..process import Child, Death, innermost, last_line
from ..report import Environment, Finding, Outcome, Report, SubjectInfo, finding_from
from ..store import Run
from ..supervise import InternalFault
from ..units import number_text, plural

RUNS, FINITE, LEARNS, TOUCHED, CHECKPOINT, DATA = (
    "train.runs",
    "train.finite",
    "train.learns",
    "train.every-parameter",
    "train.checkpoint",
    "train.data",
)
BUILD = "build.constructs"

# Where a layer's output begins at zero, what lies before it gets its first gradient in the second step.
FEWEST_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOrder:
    """What to train and how. `jobs` are the subjects, one after the other; `folders` keep what each leaves."""

    jobs: tuple[Mapping[str, Any], ...]
    recipe: Mapping[str, Any]
    data: tuple[str, ...] = ()
    text_field: str = "text"
    tokenizer: str | None = None
    eos_id: int | None = None
    protocol: str = "default"
    dtype: str | None = None
    tf32: bool = False
    resume: bool = False
    save_every: int = 50
    cache: str | None = None
    timeout_seconds: float = 300.0
    command: str = ""
    world: "RankOf" = field(default_factory=lambda: RankOf())


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOf:
    """How many ranks train together, and which of them this process starts: None for all of them, a number under torchrun."""

    size: int = 1
    strategy: str = "ddp"
    rank: int | None = None


@dataclass(slots=True)
class Told:
    """Everything that one child has told."""

    spec: str
    step: str = BUILD
    outcomes: list[Outcome] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    subject: SubjectInfo | None = None
    environment: Environment | None = None
    data: dict[str, Any] | None = None
    said: list[str] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluated: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    ended: dict[str, Any] | None = None
    stopped: str | None = None
    checkpoint: bool | None = None
    unusable: str | None = None
    fault: str | None = None


Watcher = Callable[[Told], None]


def run_training(order: TrainOrder, run: Run, folders: Sequence[Path], watch: Watcher, *, stop: Path) -> Report:
    """Train every subject of an order. UsageError when something does not resolve, InternalFault for a fault of ours.

    `watch` is called after every event and about five times a second. A file at `stop` ends the run after its step.
    """
    started = time.monotonic()
    told: list[Told] = []
    for job, folder in zip(order.jobs, folders, strict=True):
        told.append(_one(order, job, run, folder, watch, stop))
        if told[-1].stopped == "interrupted":
            break
    return _report(order, told, run, time.monotonic() - started)


def _one(order: TrainOrder, job: Mapping[str, Any], run: Run, folder: Path, watch: Watcher, stop: Path) -> Told:
    told = Told(spec=str(job["spec"]))
    names = ("recipe", "data", "text_field", "tokenizer", "eos_id", "protocol", "dtype", "tf32", "resume", "save_every", "cache", "command")
    message = {name: getattr(order, name) for name in names} | {"job": dict(job), "folder": str(folder), "stop": str(stop)}
    message["timeout_seconds"] = order.timeout_seconds
    folder.mkdir(parents=True, exist_ok=True)

    def note(rank: Rank, event: dict[str, Any]) -> None:
        if rank.number == 0:
            _note(told, event)
            watch(told)
        elif event["event"] == "failed":
            ahead[rank.number] = event

    def tick(rank: Rank) -> None:
        if rank.number == 0:
            watch(told)

    ahead: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="olmodebug-") as scratch:
        place = run.folder or Path(scratch)
        started = _children(order, message, place, Path(scratch))
        ranks = run_group(started, note, tick)
        for rank in ranks:
            if rank.unusable is not None:
                raise UsageError(rank.unusable)
            if rank.fault is not None:
                raise InternalFault(rank.fault)
        first = first_to_fail(ranks)
        if first is not None:
            _record_end(told, order.world, first, ahead.get(first.number), started[first.number][0])
    _judge(told)
    return told


def _children(order: TrainOrder, message: Mapping[str, Any], place: Path, scratch: Path) -> list[tuple[Child, Mapping[str, Any]]]:
    """The processes to start: one for each rank, or the one that this process stands for."""
    world = order.world
    store = str(scratch / "store") if world.rank is None and world.size > 1 else None
    local = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"} if store else {}
    started: list[tuple[Child, Mapping[str, Any]]] = []
    for rank in range(world.size) if world.rank is None else (world.rank,):
        folder = place if rank == 0 else scratch / f"rank-{rank}"
        folder.mkdir(exist_ok=True)
        child = Child(module="olmodebug.training.child", folder=folder, timeout_seconds=order.timeout_seconds, environment=local)
        device = "cuda:" + str(rank) if store and message["job"]["device"] == "cuda" else message["job"]["device"]
        told = {"rank": rank, "size": world.size, "strategy": world.strategy, "store": store}
        started.append((child, {**message, "job": {**message["job"], "device": device}, "world": told}))
    return started


def _record_end(told: Told, world: RankOf, rank: Rank, failed: Mapping[str, Any] | None, child: Child) -> None:
    """How the rank that ended the run ended, as a finding that names it where there are several."""
    who = "the process" if world.size == 1 else f"rank {rank.number if world.rank is None else world.rank}"
    if failed is not None:  # what another rank than the leading one has found out about its own end
        finding = finding_from(failed["finding"])
        told.findings.append(replace(finding, message=f"{who}: {finding.message}"))
        told.stopped = failed["stopped"]
    elif rank.raised is not None:
        if rank.raised["lost_a_peer"]:
            told.findings.append(Finding(probe=RUNS, severity="error", message=f"{who} {rank.raised['text']}"))
            told.stopped = "raised"
    elif rank.abandoned and rank.death is not None:
        told.stopped = "hung"
        where = innermost(child.stacks)
        message = f"{who} does not come to the collective that the others wait in, at step {len(told.steps) + 1}"
        told.findings.append(Finding(probe=RUNS, severity="error", message=message, where=where))
    elif rank.death is not None:
        _record_death(told, rank.death, child, who, rank.step)


def _note(told: Told, event: dict[str, Any]) -> None:
    kind = event["event"]
    if kind == "start":
        told.step = event["step"]
    elif kind == "environment":
        told.environment = Environment(**event["value"])
    elif kind == "data":
        told.data = event["value"]
    elif kind == "said":
        told.said.append(event["text"])
    elif kind == "subject":
        told.subject = SubjectInfo(**{**event["value"], "assumptions": tuple(event["value"]["assumptions"])})
    elif kind == "result":
        told.outcomes.append(Outcome(**event["outcome"]))
        told.findings += [finding_from(finding) for finding in event["findings"]]
    elif kind == "step":
        told.steps.append(event["value"])
    elif kind == "evaluated":
        told.evaluated[f"{event['part']}_{event['when']}"] = event["value"]
    elif kind == "sample":
        told.samples[event["when"]] = event["value"]
    elif kind == "ended":
        told.ended, told.stopped = event["value"], event["value"]["stopped"]
        told.steps = event["value"]["steps"]
    elif kind == "failed":
        told.findings.append(finding_from(event["finding"]))
        told.stopped = event["stopped"]
    elif kind == "checkpoint":
        told.checkpoint = event["loadable"]
        told.findings += [finding_from(event["finding"])] if event["finding"] else []
    elif kind == "unusable":
        told.unusable = event["text"]
    elif kind == "fault":
        told.fault = event["traceback"]


def _record_death(told: Told, death: Death, child: Child, who: str, step: str) -> None:
    at = f"at step {len(told.steps) + 1}" if step == RUNS else f"during {step}"
    last = last_line(child.output)
    killed = death.signal == 9 and not death.hung
    told.stopped = "hung" if death.hung else "died"
    told.findings.append(
        Finding(
            probe=RUNS if step != BUILD else BUILD,
            severity="error",
            message=f"{who} {death.text} {at}",
            where=innermost(child.stacks),
            fix="the operating system kills a process so when memory runs out; try a smaller --batch-size" if killed else None,
            evidence={"last line of its output": last} if last else {},
        )
    )


def _judge(told: Told) -> None:
    """The outcomes of a run, and what its curves say."""
    failed = {finding.probe for finding in told.findings if finding.severity == "error"}
    built = any(outcome.probe == "build.runs" and outcome.status == "passed" for outcome in told.outcomes)
    if not built:
        if BUILD in failed and not any(outcome.probe == BUILD for outcome in told.outcomes):
            told.outcomes.append(Outcome(probe=BUILD, status="failed"))
        return
    seconds = round(told.ended["seconds"], 3) if told.ended else 0.0
    finished = told.ended is not None and told.stopped in (None, "interrupted")
    told.outcomes.append(Outcome(probe=RUNS, status="failed" if RUNS in failed else "passed", seconds=seconds))
    if RUNS in failed:
        return
    told.outcomes.append(Outcome(probe=FINITE, status="failed" if FINITE in failed else "passed"))
    if not finished or told.ended is None:
        return
    told.findings += [*_learning(told), *_touched(told.ended), *_skipped(told.ended), *_spikes(told.ended)]
    warned = {finding.probe for finding in told.findings if finding.severity == "error"}
    if told.stopped == "interrupted":
        reason = f"interrupted after {plural(len(told.steps), 'step')}; --resume goes on"
        told.outcomes += [Outcome(probe=name, status="skipped", reason=reason) for name in (LEARNS, CHECKPOINT)]
        return
    told.outcomes.append(Outcome(probe=LEARNS, status="failed" if LEARNS in warned else "passed"))
    told.outcomes.append(Outcome(probe=TOUCHED, status="failed" if TOUCHED in warned else "passed"))
    if told.checkpoint is False and CHECKPOINT not in warned:
        reason = "transformers has no class for this architecture: the folder holds the weights alone"
        told.outcomes.append(Outcome(probe=CHECKPOINT, status="not-applicable", reason=reason))
    elif told.checkpoint is not None:
        told.outcomes.append(Outcome(probe=CHECKPOINT, status="failed" if CHECKPOINT in warned else "passed"))


def _learning(told: Told) -> list[Finding]:
    """What the validation loss says beside the frequencies of the tokens and beside the loss before training."""
    before, after = told.evaluated.get("validation_before"), told.evaluated.get("validation_after")
    if not before or not after or told.data is None:
        return []
    if after["loss"] is None:
        return [Finding(probe=LEARNS, severity="error", message="the validation loss after training is not finite")]
    evidence = {
        "validation_loss_before": before["loss"],
        "validation_loss_after": after["loss"],
        "ln_vocabulary": math.log(told.data["vocab_size"]),
    }
    if before["loss"] is not None and after["loss"] >= before["loss"]:
        message = f"nothing was learned: validation loss {number_text(after['loss'])} after training, {number_text(before['loss'])} before"
        fix = "a smaller learning rate, more steps, or olmodebug check for what is wrong in the model"
        return [Finding(probe=LEARNS, severity="warning", message=message, fix=fix, evidence=evidence)]
    unigram = told.data["unigram_perplexity"]
    if unigram is not None and after["perplexity"] is not None and after["perplexity"] >= unigram:
        message = (
            f"the model knows token frequencies at best: validation perplexity {number_text(after['perplexity'])}, "
            f"and the frequencies of the training text alone give {number_text(unigram)}"
        )
        return [
            Finding(
                probe=LEARNS,
                severity="note",
                message=message,
                fix="more steps, or a recipe for few of them (--recipe olmodebug)",
                evidence=evidence,
            )
        ]
    return []


def _touched(ended: Mapping[str, Any]) -> list[Finding]:
    own = set(ended.get("of_own_loss", ()))  # heads for further tokens: the loss of this run is that of the next one
    names = [name for name in ended["untouched"] if name not in own]
    used = len(ended["steps"]) - len(ended["skipped"])
    if not names or used < FEWEST_STEPS:
        return []
    message = f"{plural(len(names), 'parameter')} got no gradient in {plural(used, 'step')}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
    return [Finding(probe=TOUCHED, severity="warning", message=message, evidence={"parameters": ", ".join(names[:20])})]


def _skipped(ended: Mapping[str, Any]) -> list[Finding]:
    if not ended["skipped"]:
        return []
    count, steps = len(ended["skipped"]), ended["skipped"]
    message = f"{plural(count, 'step')} left out because float16 gradients overflowed: {', '.join(map(str, steps[:8]))}"
    cause = "the loss scale begins at 65,536 and is halved until the gradients fit; a few such steps at the start are how it is found"
    return [Finding(probe=FINITE, severity="note", message=message, cause=cause, evidence={"skipped": count})]


def _spikes(ended: Mapping[str, Any]) -> list[Finding]:
    if not ended["spikes"]:
        return []
    message = f"the loss jumped by more than 1 nat over the last ten steps' median at step {', '.join(map(str, ended['spikes'][:8]))}"
    return [Finding(probe=LEARNS, severity="note", message=message)]


def _report(order: TrainOrder, told: Sequence[Told], run: Run, seconds: float) -> Report:
    from ..environment import environment

    first = told[0]
    problems = _problems(told)
    findings = [_named(finding, item.spec, len(told) > 1) for item in told for finding in item.findings]
    specs = ", ".join(item.spec for item in told)
    outcomes: list[Outcome] = []
    for item in told:
        several = f"{item.spec}: " if len(told) > 1 else ""
        outcomes += [
            Outcome(probe=o.probe, status=o.status, reason=f"{several}{o.reason}" if o.reason else None, seconds=o.seconds)
            for o in item.outcomes
        ]
    if first.data is not None:
        outcomes.append(Outcome(probe=DATA, status="passed"))
    return Report(
        subject=first.subject if first.subject and len(told) == 1 else SubjectInfo(spec=specs),
        environment=first.environment or environment(seed=int(order.jobs[0].get("seed", 0)), command=order.command),
        outcomes=tuple(outcomes),
        findings=(*findings, *problems),
        sections={"training": _section(order, told)},
        seconds=round(seconds, 3),
        created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        id=run.id,
    )


def _named(finding: Finding, spec: str, several: bool) -> Finding:
    """The finding with its subject in the message, where a report is on several."""
    return replace(finding, message=f"{spec}: {finding.message}") if several else finding


def _problems(told: Sequence[Told]) -> list[Finding]:
    data = told[0].data
    if data is None or not data["problem_count"]:
        return []
    first = data["problems"][0]
    place = f"{first['file']}:{first['line']}" if first["line"] else first["file"]
    count = data["problem_count"]
    message = f"{plural(count, 'place')} in the data could not be read, the rest was; first {place}: {first['text']}"
    return [Finding(probe=DATA, severity="warning", message=message, evidence={"places": count})]


def _section(order: TrainOrder, told: Sequence[Told]) -> dict[str, Any]:
    return {
        "recipe": dict(order.recipe),
        "data": next((item.data for item in told if item.data is not None), None),
        "runs": [_run_section(item) for item in told],
    }


def _run_section(told: Told) -> dict[str, Any]:
    ended = told.ended or {}
    return {
        "subject": told.spec,
        "parameters": told.subject.parameters if told.subject else 0,
        "said": told.said,
        "stopped": told.stopped,
        "steps": [{key: step[key] for key in STEP_KEYS} for step in told.steps],
        "skipped": ended.get("skipped", []),
        "spikes": ended.get("spikes", []),
        "untouched": ended.get("untouched", []),
        "seconds": round(ended.get("seconds", sum(step["seconds"] for step in told.steps)), 3),
        "tokens_per_second": ended.get("tokens_per_second"),
        "flop_utilisation": ended.get("flop_utilisation"),
        "peak_bytes": ended.get("peak_bytes"),
        "chunked_loss": ended.get("chunked_loss"),
        "evaluated": {name: told.evaluated.get(name) for name in ("validation_before", "validation_after", "test_after")},
        "samples": {name: told.samples.get(name) for name in ("before", "after")},
        "checkpoint": told.checkpoint,
    }


STEP_KEYS = ("step", "loss", "rate", "grad_norm", "update_ratio", "largest_logit", "loss_scale", "tokens", "skipped", "seconds")
