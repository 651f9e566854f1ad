"""What would make it smaller, and how much fits: every answer is a trace of its own, none a formula."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import UsageError
from .allocator import AllocatorSettings
from .dry_run import Prepared, trace_fake
from .estimate import estimate
from .gpus import Gpu
from .records import MemoryEstimate, Range
from .training_step import StepPlan

Axis = Literal["batch_size", "seq_len"]

STEPS_TO_COMPARE = 2  # the second step is the first with optimizer state; the third shows the same peak
MOST_CHECKS = 6
MOST_BATCH = 1 << 20
SEQ_STEP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """One change of the plan and what it would take; `reason` where it does not apply."""

    change: str
    tensors: Range | None = None
    needed: Range | None = None
    saved_bytes: int = 0
    fits: bool | None = None
    owner: str = ""
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """The largest value of one size whose safe figure stays within the budget; 0 where not even the smallest does.

    `bounded_by` says what stopped it: the budget, or the positions that the model declares.
    """

    axis: Axis
    value: int
    safe_bytes: int
    traces: int
    bounded_by: str


def changes(plan: StepPlan, settings: AllocatorSettings) -> Iterator[tuple[str, StepPlan, AllocatorSettings]]:
    """The changes worth knowing: those that the plan does not make already."""
    if not plan.inference:
        if not plan.checkpointing:
            yield "gradient checkpointing", replace(plan, checkpointing=True), settings
        if plan.loss == "model":
            yield "chunked cross-entropy", replace(plan, loss="chunked"), settings
        if not plan.checkpointing and plan.loss == "model":
            yield "checkpointing and chunked cross-entropy", replace(plan, checkpointing=True, loss="chunked"), settings
        if plan.optimizer == "adamw":
            yield "fused optimizer", replace(plan, optimizer="adamw-fused"), settings
        if plan.loss == "model" and not plan.keep_outputs:
            yield "outputs held: out = model(...)", replace(plan, keep_outputs=True), settings
    if plan.batch_size > 1:
        accumulation = plan.accumulation * 2 if plan.batch_size % 2 == 0 and not plan.inference else plan.accumulation
        text = "half the batch, twice the micro-batches" if accumulation != plan.accumulation else "half the batch"
        yield text, replace(plan, batch_size=plan.batch_size // 2, accumulation=accumulation), settings
    if not settings.expandable_segments:
        yield "expandable segments", plan, replace(settings, expandable_segments=True)


def what_ifs(
    prepared: Prepared,
    plan: StepPlan,
    gpu: Gpu | None,
    settings: AllocatorSettings,
    *,
    base: MemoryEstimate,
    budget_bytes: int | None,
    note: Callable[[str], None] = lambda text: None,
) -> list[WhatIf]:
    """Each change traced; the savings are those of the expected figure."""
    rows = []
    for text, changed, options in changes(plan, settings):
        if gpu is None and options != settings:
            continue
        note(text)
        try:
            found = _estimate(prepared, changed, gpu, options)
        except UsageError as error:
            rows.append(WhatIf(change=text, reason=str(error).partition(": ")[2] or str(error)))
            continue
        except Exception as error:  # the model's own code may not stand the change: the prediction itself remains
            first = str(error).strip().partition("\n")[0]
            rows.append(WhatIf(change=text, reason=f"it does not run so: {type(error).__name__}: {first}"))
            continue
        rows.append(
            WhatIf(
                change=text,
                tensors=found.tensors,
                needed=found.needed,
                saved_bytes=base.needed.expected - found.needed.expected,
                fits=None if budget_bytes is None else found.needed.safe <= budget_bytes,
                owner=found.peak.owner,
            )
        )
    return rows


def largest(prepared: Prepared, plan: StepPlan, gpu: Gpu | None, settings: AllocatorSettings, *, axis: Axis, budget_bytes: int) -> Largest:
    """Two traces give the slope, further ones check: the value returned was itself traced and fits."""
    known: dict[int, int] = {}

    def need(value: int) -> int:
        if value not in known:
            found = _estimate(prepared, _with(plan, axis, value), gpu, settings)
            known[value] = found.needed.safe
        return known[value]

    step = 1 if axis == "batch_size" else SEQ_STEP
    most = MOST_BATCH
    if axis == "seq_len" and prepared.subject.max_positions:
        most = prepared.subject.max_positions - (plan.new_tokens if plan.inference else 0)
    first = min(step, most)
    if need(first) > budget_bytes:
        return Largest(axis=axis, value=0, safe_bytes=known[first], traces=len(known), bounded_by="the budget")
    low, low_need = first, need(first)
    high = min(most, max(2 * step, getattr(plan, axis) // step * step))
    if high == low:
        return Largest(axis=axis, value=low, safe_bytes=low_need, traces=len(known), bounded_by="the positions that the model declares")
    too_much: int | None = None
    failures = 0
    for _ in range(MOST_CHECKS):
        if need(high) <= budget_bytes:
            failures = 0
            before, before_need, low, low_need = low, low_need, high, need(high)
        else:
            too_much = high if too_much is None else min(too_much, high)
            failures += 1
            before, before_need = high, need(high)
        slope = (before_need - low_need) / (before - low) if before != low else 0.0
        reach = most if slope <= 0 else low + int((budget_bytes - low_need) / slope)
        candidate = min(most, reach // step * step if reach < most else most)
        if too_much is not None and (candidate >= too_much or failures > 1):  # what is reserved need not grow along a line
            candidate = max(low, (low + too_much) // 2 // step * step)
        if candidate <= low:
            break
        high = candidate
    stopped = "the positions that the model declares" if low == most and axis == "seq_len" else "the budget"
    return Largest(axis=axis, value=low, safe_bytes=low_need, traces=len(known), bounded_by=stopped)


def _with(plan: StepPlan, axis: Axis, value: int) -> StepPlan:
    return replace(plan, batch_size=value) if axis == "batch_size" else replace(plan, seq_len=value)


def _estimate(prepared: Prepared, plan: StepPlan, gpu: Gpu | None, settings: AllocatorSettings) -> MemoryEstimate:
    return estimate(trace_fake(prepared, plan, gpu, steps=STEPS_TO_COMPARE, lines=False), gpu, settings)
