"""The logits of ordinary tokens are ordinary numbers."""

import inspect
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from olmodebug.compare import difference
from olmodebug.convention import find_logits
from olmodebug.explain import place_of, source_lines
from olmodebug.load import SubjectCodeError
from olmodebug.own_code import own_code, quiet
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case, Event, Where
from olmodebug.relations.invariance import limit_of, run
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.settings import attention_choices
from olmodebug.sources import Spot
from olmodebug.subject import Subject
from olmodebug.tracing.tracer import Recording, record

# By which transformers and what is written like it are asked for the logits of the last positions.
KEEP_NAMES = ("logits_to_keep", "num_logits_to_keep")
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
    where = _cut_at(recording)
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


@probe(after=("logits.finite",))
def kept_are_the_last(subject: Subject) -> Iterator[Finding]:
    """A model that is asked for the logits of the last n positions (logits_to_keep) gives those, as the whole forward has them.

    Why: generation asks for one, and samples from it: from another position it answers another question.
    Catches: hidden[:, :n] for hidden[:, -n:]; positions counted from the padded or the cached length.
    """
    twin = subject.twin()
    name = next((name for name in KEEP_NAMES if name in inspect.signature(twin.model.forward).parameters), None)
    if name is None or subject.convention.last_only or subject.convention.logits_need_labels:
        not_applicable("its forward takes no number of logits to keep")
    batch, seq = twin.sizes()
    case = Case(name="random tokens", input_ids=twin.token_ids(batch, seq, seed=36))
    every, limit = run(twin, case), limit_of(twin)
    arguments: dict[str, object] = {twin.convention.ids: torch.tensor(case.input_ids, device=twin.device)}
    arguments |= {twin.convention.use_cache: False} if twin.convention.use_cache else {}
    for count in (1, 3):
        if count >= seq:
            return
        with torch.no_grad(), quiet(), own_code(twin, case):
            recording = record(twin.model, lambda: twin.forward({**arguments, name: count}))  # noqa: B023 - called at once
        kept = _kept(recording.result)
        if kept is None or kept.shape[1] == seq:
            not_applicable(f"with {name}={count} it gives the logits of every position")
        if kept.shape == every[:, -count:].shape and difference(every[:, -count:], kept, relative_limit=limit) is None:
            continue
        length = kept.shape[1]
        same = [t for t in range(seq - length + 1) if difference(every[:, t : t + length], kept, relative_limit=limit) is None]
        where = _cut_at(recording)
        wanted = _positions(seq - count, count)
        yield Found(
            probe="",
            severity="error",
            message=f"with {name}={count} the logits are not those of {wanted}"
            + (f", but of {_positions(same[0], length)}" if same else ""),
            where=where,
            source=source_lines(where),
            cause=f"they are cut from the front of the sequence, of {seq} positions" if same == [0] else None,
            fix=f"hidden_states[:, -{name}:]" if same else None,
            expected=f"the logits of {wanted}, as the whole forward has them",
            observed=f"logits of {_positions(same[0], length)}" if same else f"{length} others",
            case=case,
        )
        return


def _kept(result: object) -> Tensor | None:
    """The logits of a call, of whatever length; None where there are none."""
    given = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", result)
    items = given if isinstance(given, tuple | list) else (given,)
    return next((item for item in items if isinstance(item, Tensor) and item.ndim == 3), None)


def _positions(first: int, count: int) -> str:
    return f"position {first}" if count == 1 else f"positions {first} to {first + count - 1}"


def _cut_at(recording: Recording) -> Where:
    """The last op that takes a part of the positions of some hidden states; nowhere when there is none."""
    takes = ("select", "slice", "index", "narrow", "split", "unbind", "index_select", "gather")
    shape = next((info.shape[:2] for event in recording.events for info in event.inputs if len(info.shape) == 3), ())
    cuts = [
        (event, spot)
        for event, spot in zip(recording.events, recording.spots, strict=True)
        if event.op in takes and event.inputs and event.inputs[0].shape[:2] == shape and event.outputs[0].shape[:2] != shape
    ]
    return place_of(cuts[-1][1], module=cuts[-1][0].where.module, op=cuts[-1][0].op) if cuts else place_of(None)
