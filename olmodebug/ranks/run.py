"""The same training step in one process and on several ranks: the parent that starts them, and the report on both.

A rank that raises, dies or waits in a collective that the others never call is a finding that names it.
"""

import math
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import OlmodebugError, UsageError
from ..group import Rank, first_to_fail, peer_words, run_group
from ..process import Child, innermost, last_line
from ..records import Where
from ..report import Environment, Finding, Outcome, Report, SubjectInfo, plain, with_reproduction
from ..store import Run
from .calls import Unlike, parted
from .last_op import read_last_op

COMPLETES, MATCH = "ranks.step-completes", "ranks.collectives-match"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOrder:
    """What to run: the job that makes the subject, on how many ranks, spread how. `mesh` are
    the sizes of two mesh dimensions, dp and tp, or empty for one. `patience_seconds` is how long a
    collective may wait for the other ranks."""

    job: Mapping[str, Any]
    ranks: int = 2
    strategy: str = "ddp"
    launch: str | None = None
    mesh: tuple[int, ...] = ()
    timeout_seconds: float = 300.0
    patience_seconds: float = 60.0
    command: str = ""


def compare_step(order: RankOrder, run: Run, progress: Callable[[str, float], None]) -> Report:
    """Run the step in one process and on the ranks, and report where they part. UsageError when the subject or the
    wrapper cannot be used."""
    if order.ranks < 2:
        raise UsageError("--ranks needs at least 2")
    if order.mesh and math.prod(order.mesh) != order.ranks:
        raise UsageError(f"--mesh {'x'.join(map(str, order.mesh))} has {math.prod(order.mesh)} places, and --ranks is {order.ranks}")
    if order.mesh and not order.launch and order.strategy != "fsdp":
        raise UsageError(f"--mesh goes with --strategy fsdp or --launch, not with {order.strategy}")
    started = time.monotonic()
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="olmodebug-ranks-") as scratch:
        ranks = _run_ranks(order, Path(scratch), told, progress, started)
        for rank in ranks:
            if rank.unusable:
                raise UsageError(rank.unusable)
            if rank.fault:
                raise RuntimeError(f"rank {rank.number} failed:\n{rank.fault}")
        findings, outcomes, section = _judged(order, ranks, told, Path(scratch))
    report = Report(
        subject=SubjectInfo(**{**told["subject"], "assumptions": tuple(told["subject"]["assumptions"])})
        if "subject" in told
        else SubjectInfo(spec=str(order.job["spec"])),
        environment=_environment(order),
        outcomes=tuple(outcomes),
        findings=tuple(findings),
        sections={"ranks": section},
        seconds=round(time.monotonic() - started, 3),
        created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        id=run.id,
    )
    return with_reproduction(report, lambda _: order.command)


def _run_ranks(order: RankOrder, folder: Path, told: dict[str, Any], progress: Callable[[str, float], None], started: float) -> list[Rank]:
    children = []
    for number in range(order.ranks):
        place = folder / f"child-{number}"
        place.mkdir()
        child = Child(
            module="olmodebug.ranks.child",
            folder=place,
            timeout_seconds=order.timeout_seconds,
            environment={"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        message = {
            "job": dict(order.job),
            "rank": number,
            "world": order.ranks,
            "strategy": order.strategy,
            "launch": order.launch,
            "mesh": list(order.mesh),
            "records": str(folder),
            "store": str(folder / "store"),
            "patience": order.patience_seconds,
        }
        children.append((child, message))
    lock = threading.Lock()

    def note(_: Rank, event: dict[str, Any]) -> None:
        if event["event"] == "subject":
            told["subject"] = event["value"]
        elif event["event"] == "dtypes":
            with lock:
                told.setdefault("dtypes", set()).update(event["value"])

    def tick(rank: Rank) -> None:
        if rank.number == 0:
            progress(f"rank 0: {rank.step}", time.monotonic() - started)

    return run_group(children, note, tick)


def _judged(order: RankOrder, ranks: list[Rank], told: dict[str, Any], folder: Path) -> tuple[list[Finding], list[Outcome], dict[str, Any]]:
    from ..compare import roundings_limit
    from .compare import compare_ranks
    from .record import read_records
    from .replicas import first_unlike_collectives

    section: dict[str, Any] = {"world": order.ranks, "strategy": _spread(order), "compared": None, "collectives": []}
    bad = [rank for rank in ranks if not rank.ended_well]
    try:
        records = read_records(folder / "ranks")
    except OlmodebugError:
        records = []
    unlike = first_unlike_collectives(records) if len(records) == order.ranks else None
    section["collectives"] = [sum(1 for _ in record.collectives()) for record in records]
    if bad:
        finding = _died(bad, ranks, unlike, folder)
        outcomes = [Outcome(probe=COMPLETES, status="failed")]
        return [finding], outcomes, section
    outcomes = [Outcome(probe=COMPLETES, status="passed")]
    findings: list[Finding] = []
    if unlike is not None:
        message, place = parted(unlike)
        findings.append(Finding(probe=MATCH, severity="error", message=message, where=place))
    outcomes.append(Outcome(probe=MATCH, status="failed" if findings else "passed"))
    [single] = read_records(folder / "single")
    comparison = compare_ranks(single, records, limit=roundings_limit(told["dtypes"]))
    section |= {"compared": comparison.compared, "layers": comparison.layers, "replicas": comparison.replicas}
    return findings + comparison.findings, outcomes + comparison.outcomes, section


def _spread(order: RankOrder) -> str:
    return (order.launch or order.strategy) + (f" on a mesh of {'x'.join(map(str, order.mesh))}" if order.mesh else "")


def _died(bad: list[Rank], ranks: list[Rank], unlike: Unlike | None, folder: Path) -> Finding:
    """The finding on a step that did not come to its end: the rank that began it, not those that lost their peer."""
    first = first_to_fail(bad)
    assert first is not None
    own = first.raised is not None and not first.raised["lost_a_peer"]
    dead = first.death is not None and not first.death.hung and not first.abandoned
    place = folder / f"child-{first.number}"
    evidence = {f"rank {rank.number}": _ending(rank) for rank in ranks if rank is not first}
    where, cause = innermost(place / "stacks.txt"), None
    words, line = parted(unlike) if unlike is not None else ("", Where())
    if unlike is not None and all(call is not None for call in unlike[1].values()):  # torch's own abort is what comes of it
        where, cause = line, words
    if own and first.raised is not None:
        message = f"rank {first.number} raised while {first.step}: {first.raised['text'][:300]}"
        where = Where(**first.raised["where"])
    elif dead and first.death is not None:
        message = f"rank {first.number} {first.death.text} while {first.step}"
        if last := last_line(place / "output.txt"):
            evidence["last line of its output"] = peer_words(last)
        if not where.line:
            last_op = read_last_op(folder / f"op-{first.number}.txt")
            message += "; its last op was at this line" if last_op is not None and last_op.line else ""
            where = last_op if last_op is not None and last_op.line else line
        if unlike is not None and cause is None:
            evidence["who waits"] = words
    else:
        message, cause = words or f"rank {first.number} does not come to the end of {first.step}, and the others wait", None
        where = where if where.line and not where.op else line
    return Finding(probe=COMPLETES, severity="error", message=message, where=where, cause=cause, evidence=evidence)


def _ending(rank: Rank) -> str:
    if rank.raised is not None:
        return peer_words(str(rank.raised["text"]))
    return rank.death.text if rank.death else "ended well"


def _environment(order: RankOrder) -> Environment:
    from ..environment import environment

    return environment(seed=int(order.job.get("seed", 0)), command=order.command)


def order_record(order: RankOrder) -> dict[str, Any]:
    """An order as JSON-able values."""
    return dict(plain(asdict(order)))
