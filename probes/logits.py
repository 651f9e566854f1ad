"""The logits of ordinary tokens are ordinary numbers."""

from collections.abc import Iterator

import torch
from torch import Tensor

from olmodebug.compare import difference
from olmodebug.convention import find_logits
from olmodebug.explain import place_of, source_lines
from olmodebug.load import SubjectCodeError
from olmodebug.own_code import own_code, quiet
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case, Event
from olmodebug.relations.invariance import limit_of, run
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.settings import attention_choices
from olmodebug.sources import Spot
from olmodebug.subject import Subject
from olmodebug.tracing.tracer import record

# Long enough that a state which doubles with every token leaves float32; 256 such steps leave float64 too.
LONG = 192
# Ops that are given an infinity as a number.
MAKES_INFINITY = (
    "full",
    "full_like",
    "fill",
    "fill_",
    "masked_fill",
    "masked_fill_",
    "scalar_tensor",
    "where",
    "lift_fresh",
    "new_full",
    "pad",
)


@probe()
def finite(subject: Subject) -> Iterator[Finding]:
    """Random tokens give finite logits, in eval mode, in every attention implementation, and in one long sequence.

    Why: everything else compares logits, and NaN equals nothing.
    Catches: a mask that hides every key of a query; a division by a count that is zero; a state that grows with every token.
    """
    short = subject.sizes()
    long = min(LONG, subject.usable_positions or LONG)
    for name, (batch, seq) in [*((name, short) for name in [None, *attention_choices(subject.model)]), (None, (1, long))]:
        twin = subject.twin(dtype=subject.dtype, attention=name)
        case = Case(name="random tokens", input_ids=twin.token_ids(batch, seq, seed=32))
        try:
            logits = run(twin, case)
        except SubjectCodeError:
            if seq <= short[1]:
                raise
            continue  # how long a sequence may be is asked by position.whole-context-runs
        if bool(torch.isfinite(logits).all()):
            continue
        weights = [key for key, p in twin.model.named_parameters() if not bool(torch.isfinite(p).all())]
        if weights:
            not_applicable(f"{weights[0]} is not finite itself")
        with torch.no_grad(), quiet():
            recording = record(twin.model, lambda: twin.call(case), keep=True)  # noqa: B023 - called at once
        where, cause, fix = place_of(None), None, None
        left: tuple[Event, Spot | None, Tensor] | None = None  # where finite numbers first gave an infinite one
        for event, spot, kept in zip(recording.events, recording.spots, recording.kept, strict=True):
            floats = [t for t in kept.outputs if t.is_floating_point()]
            over = any(bool((t == float("inf")).any()) for t in floats) and event.op not in MAKES_INFINITY
            if left is None and over and all(bool(torch.isfinite(t).all()) for t in kept.inputs if t.is_floating_point()):
                left = event, spot, floats[0]
            born = any(t.is_floating_point() and bool(torch.isnan(t).any()) for t in kept.outputs)
            if born and not any(t.is_floating_point() and bool(torch.isnan(t).any()) for t in kept.inputs) and "empty" not in event.op:
                where = place_of(spot, module=event.where.module, op=event.op)
                if event.op in ("_softmax", "_safe_softmax") and bool((kept.inputs[0] == float("-inf")).all(-1).any()):
                    cause = (
                        "a query sees no key at all, so softmax runs over -inf alone: the causal mask hides what it should show, "
                        "or a padding mask hides every key"
                    )
                    fix = "let query i see keys 0..i: is the mask inverted?"
                elif left is not None:
                    event, spot, made = left
                    where = place_of(spot, module=event.where.module, op=event.op)
                    dtype = str(made.dtype).removeprefix("torch.")
                    cause = f"finite numbers become infinite here: they leave the range of {dtype}, which ends at {torch.finfo(made.dtype).max:.3g}"
                break
        yield Found(
            probe="",
            severity="error",
            message=f"{int((~torch.isfinite(logits)).sum())} of {logits.numel()} logits are not finite on {seq} random tokens",
            where=where,
            source=source_lines(where),
            cause=cause,
            fix=fix,
            case=case,
        )
        return


@probe(after=("logits.finite",))
def last_position_alone(subject: Subject) -> Iterator[Finding]:
    """Where a model gives the logits of one position only when it gets no labels, they are those of the last position.

    Why: generation samples from them, and from another position it answers another question.
    Catches: x[:, [0], :] for x[:, [-1], :]; a final norm that only one of the two branches applies.
    """
    form = subject.convention
    if not form.logits_need_labels or form.labels is None or form.labels in form.required or form.loss_method:
        not_applicable("it gives the logits of all positions without labels")
    twin = subject.twin()
    batch, seq = twin.sizes()
    case = Case(name="random tokens", input_ids=twin.token_ids(batch, seq, seed=36))
    every = run(twin, case)
    with torch.no_grad(), quiet(), own_code(twin, case):
        recording = record(twin.model, lambda: twin.forward({form.ids: torch.tensor(case.input_ids, device=twin.device)}))
        single = find_logits(recording.result, batch_size=batch, seq_len=seq).logits
    if single.shape[1] != 1:
        not_applicable("it gives the logits of all positions without labels")
    limit = limit_of(twin)
    found = difference(every[:, -1:], single, relative_limit=limit)
    if found is None:
        return
    same = [t for t in range(seq) if difference(every[:, t : t + 1], single, relative_limit=limit) is None]
    takes = ("select", "slice", "index", "narrow", "split", "unbind", "index_select", "gather")
    shape = next((info.shape[:2] for event in recording.events for info in event.inputs if len(info.shape) == 3), ())
    cuts = [
        (event, spot)
        for event, spot in zip(recording.events, recording.spots, strict=True)
        if event.op in takes and event.inputs and event.inputs[0].shape[:2] == shape and event.outputs[0].shape[:2] != shape
    ]
    where = place_of(cuts[-1][1], module=cuts[-1][0].where.module, op=cuts[-1][0].op) if cuts else place_of(None)
    yield Found(
        probe="",
        severity="error" if len(same) == 1 else "warning",  # other numbers of the same position may be meant: a cap, a temperature
        message=f"without {form.labels} it gives the logits of one position, and they are {found.max_abs:.3g} away from those of the last",
        where=where,
        source=source_lines(where),
        cause=f"they are the logits of position {same[0]} of {seq}" if len(same) == 1 else None,
        fix="take the last position: [:, [-1], :]" if len(same) == 1 else None,
        expected=f"the logits that position {seq - 1} has with {form.labels} given",
        observed=f"the logits of position {same[0]}" if len(same) == 1 else f"a difference of {found.max_abs:.3g}",
        case=case,
    )
