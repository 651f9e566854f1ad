"""The logits of ordinary tokens are ordinary numbers."""

from collections.abc import Iterator

import torch

from olmodebug.explain import place_of, source_lines
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case
from olmodebug.relations.invariance import run
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.subject import Subject, attention_choices, quiet
from olmodebug.tracing.tracer import record


@probe()
def finite(subject: Subject) -> Iterator[Finding]:
    """Random tokens give finite logits, in eval mode and in every attention implementation.

    Why: everything else compares logits, and NaN equals nothing.
    Catches: a mask that hides every key of a query; a division by a count that is zero.
    """
    for name in [None, *attention_choices(subject)]:
        twin = subject.twin(dtype=subject.dtype, attention=name)
        batch, seq = twin.sizes()
        case = Case(name="random tokens", input_ids=twin.token_ids(batch, seq, seed=32))
        logits = run(twin, case)
        if bool(torch.isfinite(logits).all()):
            continue
        weights = [key for key, p in twin.model.named_parameters() if not bool(torch.isfinite(p).all())]
        if weights:
            not_applicable(f"{weights[0]} is not finite itself")
        with torch.no_grad(), quiet():
            recording = record(twin.model, lambda: twin.call(case), keep=True)  # noqa: B023 - called at once
        where, cause = place_of(None), None
        for event, spot, kept in zip(recording.events, recording.spots, recording.kept, strict=True):
            born = any(t.is_floating_point() and bool(torch.isnan(t).any()) for t in kept.outputs)
            if born and not any(t.is_floating_point() and bool(torch.isnan(t).any()) for t in kept.inputs) and "empty" not in event.op:
                where = place_of(spot, module=event.where.module, op=event.op)
                if event.op in ("_softmax", "_safe_softmax") and bool((kept.inputs[0] == float("-inf")).all(-1).any()):
                    cause = (
                        "a query sees no key at all, so softmax runs over -inf alone: the causal mask hides what it should show, "
                        "or a padding mask hides every key"
                    )
                break
        yield Found(
            probe="",
            severity="error",
            message=f"{int((~torch.isfinite(logits)).sum())} of {logits.numel()} logits are not finite on random tokens",
            where=where,
            source=source_lines(where),
            cause=cause,
            fix="let query i see keys 0..i: is the mask inverted?" if cause else None,
            case=case,
        )
        return
