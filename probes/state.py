"""A call leaves nothing behind that changes the next one, and nothing changed that belongs to the caller."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from olmodebug.compare import difference
from olmodebug.explain import place_of, source_lines
from olmodebug.load import SubjectCodeError
from olmodebug.own_code import own_code, quiet
from olmodebug.probe import probe
from olmodebug.records import Case, Where
from olmodebug.relations.earlier import HOW_TO_KEY, different_calls
from olmodebug.relations.invariance import limit_of, run
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.settle import settled
from olmodebug.state import keeper
from olmodebug.subject import Subject
from olmodebug.tracing.tracer import record

# Of what rounding can make in a forward, the share that is let pass: a table made for a longer sequence may be the same
# function in other bits, as xPos is, which counts from the middle.
LEAST = 1 / 32
COMPARED = 5  # the first calls of the list are compared with a fresh model's; the others come between them


@probe()
def calls_do_not_interfere(subject: Subject) -> Iterator[Finding]:
    """A call gives the same logits after other calls: of other lengths, batches, masks and positions.

    Why: a mask or table cached under too small a key is right in the first test and wrong ever after.
    Catches: a mask cached by sequence length alone; a rotary table that keeps what an earlier call put into it.
    """
    first = subject.twin()
    cases = list(different_calls(first))
    used = subject.fresh_twin()
    for case in (*cases, *reversed(cases)):
        if case not in cases[:COMPARED]:
            _try(used, case)
            continue
        try:
            expected = run(subject.fresh_twin(), case)
        except SubjectCodeError:
            continue  # what does not run at all is told by the probes of masks, positions and batches
        observed = _try(used, case)
        apart = difference(expected, observed, relative_limit=LEAST * limit_of(first)) if observed is not None else None
        if observed is not None and apart is None:
            continue
        where, name = keeper(used.model)
        yield Found(
            probe="",
            severity="error",
            message=f"{case.name} gives another result after other calls than as the first call"
            + (f": {apart.max_abs:.3g} apart" if apart else ": it fails"),
            where=where,
            source=source_lines(where),
            cause=f"{name} is kept from one call and used in the next"
            if name
            else "the model keeps something from one call that changes the next",
            fix=HOW_TO_KEY,
            expected="equal logits",
            observed=f"{apart.mismatched} of {apart.total} logits differ" if apart else "an exception",
            case=case,
        )
        return


@probe()
def leaves_things_alone(subject: Subject) -> Iterator[Finding]:
    """A forward in eval mode changes neither its arguments nor the model's parameters and buffers.

    Why: ids that are overwritten in place poison the labels made from them.
    Catches: labels[mask] = -100 on a view of input_ids; running statistics updated in eval.
    """
    twin = subject.fresh_twin()
    if twin.adapter is not None:
        return
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=18))
    ids = torch.tensor(case.input_ids, device=twin.device)
    padding = subject.setting("pad_token_id")
    if isinstance(padding, int) and 0 <= padding < twin.vocab_size:
        ids[:, -1] = padding  # some code rewrites padded places only
    kept = ids.clone()
    state = {name: t.clone() for name, t in twin.model.state_dict().items()}
    arguments: dict[str, Any] = {twin.convention.labels: ids} if twin.convention.labels else {}
    if twin.convention.use_cache:
        arguments[twin.convention.use_cache] = False
    with torch.no_grad(), quiet(), settled(seed=twin.seed):
        recording = record(twin.model, lambda: twin.forward({twin.convention.ids: ids, **arguments}), catch=True)
        if recording.error is not None:  # labels of another shape, or none without images: the loss probes speak of those
            arguments.pop(twin.convention.labels or "", None)
            ids.copy_(kept)
            with own_code(twin, case):
                recording = record(twin.model, lambda: twin.forward({twin.convention.ids: ids, **arguments}))
    if not torch.equal(ids, kept):
        storage = recording.storages.number(ids)
        where = Where()
        for event, spot in zip(recording.events, recording.spots, strict=True):
            if event.op.endswith("_") and event.inputs and event.inputs[0].storage == storage:
                where = place_of(spot, module=event.where.module, op=event.op)
                break
        yield Found(
            probe="",
            severity="error",
            message=f"forward writes into its {twin.convention.ids} or labels: {int((ids != kept).sum())} of {ids.numel()} values changed",
            where=where,
            source=source_lines(where),
            cause="an in-place write reaches the caller's tensor, directly or through a view",
            fix="clone before writing",
            case=case,
        )
    changed = [name for name, t in twin.model.state_dict().items() if name in state and difference(t, state[name]) is not None]
    if changed:
        yield Found(
            probe="",
            severity="error",
            message=f"a forward in eval mode changes {changed[0]}" + (f" and {len(changed) - 1} more" if len(changed) > 1 else ""),
            where=Where(module=changed[0].rpartition(".")[0]),
            fix="update buffers in train mode only",
        )


def _try(twin: Subject, case: Case) -> Tensor | None:
    try:
        return run(twin, case)
    except SubjectCodeError:
        return None
