"""`python -m olmodebug.footprint.child`: predict and measure memory in a process that may die of it.

What it finds is told as it is found, so that a run which the system kills leaves the prediction behind.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from ..serve import Tell, serve

NO_CARD = "no CUDA device here: the run was on the CPU, at a small size, with the CPU's own kernels"


def run(order: dict[str, Any], tell: Tell) -> None:
    """Predict the plan of an order, try what would make it smaller, and measure, telling each result."""
    from ..environment import environment
    from ..errors import OlmodebugError
    from ..explain import explain
    from ..load import SubjectCodeError
    from ..report import plain
    from ..spec import Job

    job = Job(**order["job"])
    tell("environment", value=plain(environment(seed=job.seed, command=order["command"], device=order["device"])))
    tell("start", step="the prediction")
    try:
        _work(order, job, tell)
    except OlmodebugError as error:
        tell("unusable", text=str(error))
    except SubjectCodeError as error:
        tell("finding", value=plain(explain(error).finding().told(probe="memory.step-runs")))


def _work(order: dict[str, Any], job: Any, tell: Tell) -> None:
    from ..report import plain
    from .allocator import settings_from
    from .dry_run import Prepared, default_length, trace_fake
    from .estimate import estimate
    from .fit import largest, what_ifs
    from .gpus import gpu_named
    from .section import section, verdict
    from .training_step import StepPlan

    values = dict(order["plan"])
    plan = StepPlan(**{**values, "seq_len": values["seq_len"] or 1})
    gpu = gpu_named(order["gpu"]) if order["gpu"] else None
    settings = settings_from(order["allocator"])
    budget: int | None = order["budget_bytes"]
    started = time.perf_counter()
    prepared = Prepared(job, plan.weight_dtype)
    subject = prepared.subject
    if not values["seq_len"]:
        plan = replace(plan, seq_len=default_length(subject, plan))
    with step_of(job, subject, plan):
        trace = trace_fake(prepared, plan, gpu)
    found = estimate(trace, gpu, settings)
    seconds = time.perf_counter() - started
    body = section(
        found,
        plan={**asdict(plan), "text": str(plan)},
        gpu=None if gpu is None else _gpu(gpu),
        budget_bytes=budget,
        fits=verdict(found.needed, budget),
        predict_seconds=round(seconds, 3),
        notes=notes(subject, plan, job),
    )
    tell("subject", value=plain(subject.info()))
    tell("section", value=body)
    if order["confirm"] is not None:
        tell("start", step="a run on real tensors")
        for confirmation in confirmations(order, job, plan, subject, found):
            body = {**body, "confirmation": confirmation}
            tell("section", value=plain(body))
            tell("start", step="a short training")
    if order["what_ifs"]:
        tell("start", step="what-ifs")

        def note(text: str) -> None:
            tell("start", step=f"what-if: {text}")

        rows = what_ifs(prepared, plan, gpu, settings, base=found, budget_bytes=budget, note=note)
        body = {**body, "what_ifs": [plain(row) for row in rows]}
        tell("section", value=body)
        if budget is not None:
            sizes = []
            for axis in ("batch_size", "seq_len"):
                tell("start", step=f"the largest {axis.replace('_', ' ')}")
                sizes.append(plain(largest(prepared, plan, gpu, settings, axis=axis, budget_bytes=budget)))
            body = {**body, "largest": sizes}
            tell("section", value=body)


def confirmations(order: dict[str, Any], job: Any, plan: Any, subject: Any, found: Any) -> Iterator[dict[str, Any]]:
    """What a run on the card measures, or, where there is none, a run on the CPU."""
    from .confirm import confirm_on_cpu, is_cuda_here

    options = order["confirm"]
    if order["device"] == "cuda" and is_cuda_here():
        from .confirm_cuda import confirm_on_cuda

        yield from confirm_on_cuda(job, plan, found, budget_bytes=order["budget_bytes"] if options["limited"] else None)
        return
    missing = NO_CARD if order["device"] == "cuda" else None
    for confirmation in confirm_on_cpu(
        job,
        plan,
        batch_size=options["batch_size"],
        seq_len=options["seq_len"],
        parameters=sum(p.numel() for p in subject.model.parameters()),
        limit_bytes=order["budget_bytes"] if order["device"] == "cpu" else None,
    ):
        yield {**confirmation, "skipped": confirmation["skipped"] or missing}


@contextmanager
def step_of(job: Any, subject: Any, plan: Any) -> Iterator[None]:
    """What the model raises inside is a finding about it, if it raises on real tensors too.

    Fake tensors have no values, and a few operators have no fake form: that ends the prediction and is no fault of the
    model.
    """
    from torch._subclasses import fake_tensor as fake

    from ..errors import OlmodebugError
    from ..sources import short_path

    needs_values = (fake.DataDependentOutputException, fake.DynamicOutputShapeException, fake.UnsupportedOperatorException)
    try:
        yield
    except OlmodebugError:
        raise
    except Exception as error:
        spot = subject.sources.spot_of(error)
        where = f" at {short_path(spot.file)}:{spot.line}" if spot else ""
        if isinstance(error, needs_values):
            operator = getattr(error, "func", "an operator")
            text = f"{operator}{where} depends on values, which a dry run has not"
        else:
            must_run_for_real(job, plan, subject)
            text = f"on fake tensors{where}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise OlmodebugError(f"{subject.spec} cannot be predicted: {text}") from None


def must_run_for_real(job: Any, plan: Any, subject: Any) -> None:
    """SubjectCodeError when one step of the plan, a single sequence, raises on real tensors too; nothing for a model that is
    too large to try."""
    from ..load import SubjectCodeError
    from ..spec import SHRINK_ABOVE
    from .confirm import real_subject
    from .dry_run import trace_real

    if sum(p.numel() for p in subject.model.parameters()) > SHRINK_ABOVE:
        return
    single = replace(plan, batch_size=1, accumulation=1)
    try:
        trace_real(real_subject(job, single), single, steps=1)
    except Exception as error:
        raise SubjectCodeError(f"a training step ({single})") from error


def notes(subject: Any, plan: Any, job: Any) -> list[str]:
    """What a reader of the figures must know about this model and plan."""
    import torch

    said = []
    if plan.inference and not (subject.convention.cache and subject.convention.use_cache):
        said.append("this model takes no cache, so inference is one forward pass over the prompt")
    if job.spec.startswith("transformers:") and not job.config:
        said.append("the subject is a tiny configuration of its class: give its real sizes with --config")
    if any(isinstance(module, torch._dynamo.OptimizedModule) for module in subject.model.modules()):
        said.append("the model is compiled; what torch.compile saves or adds is not modelled")
    return said


def _gpu(gpu: Any) -> dict[str, Any]:
    return {"name": gpu.name, "total_bytes": gpu.total_bytes, "capability": ".".join(map(str, gpu.capability))}


if __name__ == "__main__":
    serve(run)
