"""What `import olmodebug` offers to Python: the same work as the command line, on live models, in this process."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from torch import nn

from .causes import common_causes
from .environment import environment
from .errors import SubjectError, UsageError
from .examine import BUILD, FIRST_RUN, Result, run_probe
from .explain import explain
from .first_run import from_model
from .load import SubjectCodeError
from .probe import no_such_probe, select, shipped_probes
from .records import ShapeTree
from .report import Finding, Outcome, Report, SubjectInfo, merge_by_root, plain
from .spec import Job, resolve
from .subject import Subject
from .tracing.shape_tree import shape_tree, tree_of_spec
from .tracing.tracer import Recording, record


def check(
    model: nn.Module | str,
    *,
    select_probes: str | None = None,
    config: object = None,
    adapter: Callable[..., Any] | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    quick: bool = False,
    expected_failures: Mapping[str, str] | None = None,
) -> Report:
    """The report on a live model, or on a subject given by its spec. The model is left exactly as it was.

    Unlike the command line this runs in the calling process: a model that aborts takes it along. SubjectError when the spec
    or the call cannot be resolved, UsageError when no probe is selected; a model that raises is a finding.
    """
    started = time.perf_counter()
    outcomes: list[Outcome] = []
    findings: list[Finding] = []
    probes = select(shipped_probes(), select_probes)
    if not probes:
        raise UsageError(no_such_probe(select_probes or "", [probe.name for probe in shipped_probes()]))
    job = Job(spec=model, seed=seed, tokenizer=tokenizer, vocab_size=vocab_size) if isinstance(model, str) else None
    try:
        subject = _subject(model, job, config=config, adapter=adapter, tokenizer=tokenizer, vocab_size=vocab_size, seed=seed)
    except SubjectCodeError as error:
        name = FIRST_RUN if error.stage == "first run" else BUILD
        info = SubjectInfo(spec=model if isinstance(model, str) else type(model).__name__)
        return _report(info, [Outcome(probe=name, status="failed")], [explain(error).finding().told(probe=name)], seed, started)
    outcomes += [Outcome(probe=name, status="passed") for name in (BUILD, FIRST_RUN)]
    failed: dict[str, str] = {}
    results: list[Result] = []
    for probe in probes:
        if quick and probe.cost == "slow":
            outcomes.append(Outcome(probe=probe.name, status="skipped", reason="slow, and quick=True was given"))
            continue
        result = run_probe(probe, subject, job=job, failed=failed, expected=expected_failures)
        if result.root is not None:
            failed[probe.name] = result.root
        outcomes.append(result.outcome)
        findings += result.findings
        results.append(result)
    places = {(f.probe, number): i for i, (f, number) in enumerate(_numbered(findings))}
    causes = [(places[cause], places[follower]) for cause, follower in common_causes(results, probes, job)] if job is not None else []
    return replace(_report(subject.info(), outcomes, findings, seed, started, causes), sections=plain(subject.measured))


def trace(model: nn.Module, run: Callable[[], Any], *, keep: bool = False, statistics: bool = False) -> Recording:
    """Every op and module call of `run()`, forward and backward, with module, function, line, shapes and dtypes.

    `keep` also keeps copies of the tensors, `statistics` the finiteness and largest magnitude of every output.
    """
    return record(model, run, keep=keep, statistics=statistics)


def shapes(model: nn.Module | str) -> ShapeTree:
    """The tree of a model with named dimensions; a spec is built on the meta device, whole."""
    if isinstance(model, str):
        return tree_of_spec(Job(spec=model))
    return shape_tree(from_model(model))


def parity(
    subject: str | nn.Module,
    reference: str | nn.Module | None = None,
    *,
    left: str | None = None,
    right: Sequence[str] = (),
    device: str = "cpu",
    dtype: str | None = None,
    cases: Sequence[str] = (),
    seed: int = 0,
) -> Report:
    """The report of `olmodebug parity`: two executions of a subject, or a subject and a reference, op by op.

    With specs each side runs in a process of its own, and the arguments mean what the options mean. Live models are compared
    in this process: copies of both with the subject's weights, in float64 on the CPU. SubjectError where that cannot be.
    """
    if isinstance(subject, nn.Module) or isinstance(reference, nn.Module):
        return _parity_here(subject, reference, stated=(left, tuple(right), dtype, tuple(cases), device != "cpu"), seed=seed)
    from .cli import parsed
    from .commands.parity import parity_report

    options = [f"--{name}={value}" for name, value in {"reference": reference, "left": left, "dtype": dtype}.items() if value]
    options += [f"--right={text}" for text in right] + [f"--case={name}" for name in cases]
    return parity_report(parsed(["parity", _spec(subject), f"--device={device}", f"--seed={seed}", *options]))


def _parity_here(subject: str | nn.Module, reference: str | nn.Module | None, *, stated: tuple[Any, ...], seed: int) -> Report:
    """Two implementations, at least one of them alive."""
    from .implementations.comparison import compare

    if reference is None or any(stated):
        raise SubjectError(
            "an execution runs in a process of its own and needs a spec such as my_model.py:build; live models are compared as parity(a, b)"
        )
    sides = [resolve(Job(spec=side, seed=seed)) if isinstance(side, str) else from_model(side, seed=seed) for side in (subject, reference)]
    return compare(*sides, seed=seed, command="olmodebug.parity()")


def _spec(subject: object) -> str:
    if not isinstance(subject, str):
        raise SubjectError(f"this runs in a process of its own and needs a spec such as my_model.py:build, not a {type(subject).__name__}")
    return subject


def _subject(model: nn.Module | str, job: Job | None, *, tokenizer: str | None, **options: Any) -> Subject:
    if job is not None:
        return resolve(job)
    if not isinstance(model, nn.Module):
        built = " (call it, and give what it returns)" if callable(model) else ""
        raise SubjectError(f"expected an nn.Module or a spec such as 'my_model.py:build', not a {type(model).__name__}{built}")
    return from_model(model, tokenizer=tokenizer, **options)


def _numbered(findings: Sequence[Finding]) -> Iterator[tuple[Finding, int]]:
    """Each finding with its number among those of its probe."""
    for i, finding in enumerate(findings):
        yield finding, sum(other.probe == finding.probe for other in findings[:i])


def _report(
    info: SubjectInfo,
    outcomes: list[Outcome],
    findings: list[Finding],
    seed: int,
    started: float,
    causes: Sequence[tuple[int, int]] = (),
) -> Report:
    return Report(
        subject=info,
        environment=environment(seed=seed, command="olmodebug.check()"),
        outcomes=tuple(outcomes),
        findings=merge_by_root(findings, causes),
        seconds=round(time.perf_counter() - started, 3),
        created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    )
