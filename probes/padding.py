"""Padded tokens are as if they were not there."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch

from olmodebug.compare import difference
from olmodebug.explain import forward_place, place_of, source_lines
from olmodebug.load import SubjectCodeError
from olmodebug.own_code import quiet
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case, Rows, Where
from olmodebug.relations.diagnose import is_fused_attention, mask_added_as_number, mask_operand_edits
from olmodebug.relations.invariance import Pair, Violation, base_part, crash, findings_of, limit_of, run, settings_of, smallest, violation
from olmodebug.relations.patterns import Diagnosis
from olmodebug.relations.relation import Culprit
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.settle import random_state_kept, set_seed, settled
from olmodebug.sources import Spot, code_of
from olmodebug.subject import Subject
from olmodebug.tracing.tracer import Recording, record


@probe()
def mask_is_accepted(subject: Subject) -> Iterator[Finding]:
    """An attention_mask [batch, seq_len] of ones runs, and gives the logits that no mask gives.

    Why: this is the mask that every tokenizer and collator produces.
    Catches: a mask [batch, seq_len] added to scores [batch, heads, seq_len, seq_len], which fails loudly when the sizes
    differ and passes silently when they do not.
    """
    _needs_mask(subject)
    twin = subject.twin()
    batch, seq = twin.sizes()
    case = Case(name="a mask of ones", input_ids=twin.token_ids(batch, seq, seed=5), attention_mask=((1,) * seq,) * batch)
    plain = run(twin, replace(case, attention_mask=None))
    try:
        masked = run(twin, case)
        if not bool(torch.isfinite(masked).all()):  # float64's finfo.min overflows where a model casts to float32 inside
            twin = subject.twin(dtype=subject.dtype)
            plain, masked = run(twin, replace(case, attention_mask=None)), run(twin, case)
    except SubjectCodeError as error:
        yield crash(twin, case, error, message=f"{twin.convention.attention_mask} [{batch}, {seq}] is not accepted")
        return
    apart = difference(plain, masked, relative_limit=limit_of(twin))
    if apart is None:
        return
    inverted = False
    mask = _added(twin, case)
    with suppress(SubjectCodeError):
        zeros = run(twin, replace(case, attention_mask=((0,) * seq,) * batch))
        inverted = difference(plain, zeros, relative_limit=limit_of(twin)) is None
    text = f"a mask of ones changes the logits by {apart.max_abs:.3g}; all tokens are real, so it must change nothing"
    where, name = forward_place(twin.model), twin.convention.attention_mask
    yield mask or Found(
        probe="",
        severity="error",
        message=text,
        where=where,
        source=source_lines(where),
        cause=f"{name} is read the other way round: a mask that hides every token leaves the logits as they are" if inverted else None,
        fix=f"invert {name} where it is used" if inverted else None,
        case=case,
        evidence={"largest change": apart.max_abs},
    )


@probe(after=("padding.mask-is-accepted",))
def left_content_ignored(subject: Subject) -> Iterator[Finding]:
    """With padding on the left, masked, the logits of real tokens do not change with what stands in the padding.

    Why: generation pads on the left; what a prompt yields must not depend on the padding token or its embedding.
    Catches: a mask that is accepted and not used, inverted, added as 0 and 1, or laid on the queries.
    """
    _needs_mask(subject)
    yield from _content(subject, left=True)


@probe(after=("padding.mask-is-accepted", "causality.no-future"))
def right_content_ignored(subject: Subject) -> Iterator[Finding]:
    """With padding on the right, masked, the logits of real tokens do not change with what stands in the padding.

    Why: training pads on the right.
    Catches: a causal mask that is replaced by the padding mask.
    """
    _needs_mask(subject)
    yield from _content(subject, left=False)


@probe(after=("padding.mask-is-accepted",))
def finite(subject: Subject) -> Iterator[Finding]:
    """Logits of real tokens are finite in a padded batch, forward and backward, also where a query sees no key at all.

    Why: one NaN in one row ruins the gradient of every parameter.
    Catches: softmax over a row of -inf; two planes of finfo.min added up.
    """
    _needs_mask(subject)
    for setting, twin in settings_of(subject, train=False, dtype=subject.dtype):
        case = _padded(twin, *twin.sizes(), left=True)
        if not bool(torch.isfinite(run(twin, replace(case, attention_mask=None))).all()):
            not_applicable("logits are not finite without padding either")
        logits = run(twin, case)
        real = torch.tensor(case.attention_mask, dtype=torch.bool)
        if not bool(torch.isfinite(logits[real]).all()):
            found = _non_finite(twin, case, setting, "logits of real tokens are not finite in a left-padded batch")
            # Of a mask as torch.nn takes it nobody promises padding on the left: its queries see no key at all.
            yield replace(found, severity="warning") if twin.convention.mask_hides else found
            return
        with settled(twin.model), quiet(), torch.enable_grad():
            twin.model.zero_grad(set_to_none=True)
            twin.call(case).logits[real.to(twin.device)].float().square().sum().backward()
            bad = [name for name, p in twin.model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
            twin.model.zero_grad(set_to_none=True)
        if bad:
            message = f"the gradient of {bad[0]} and {len(bad) - 1} more is not finite in a left-padded batch, though the logits are"
            yield _non_finite(twin, case, setting, message)
            return


@probe(after=("padding.mask-is-accepted", "padding.finite"))
def summed_masks_stay_finite(subject: Subject) -> Iterator[Finding]:
    """Where two masks are added up, no place becomes -inf that was finite in both.

    Why: finfo.min + finfo.min is -inf; a query all of whose keys become so has NaN weights in the next kernel or dtype,
    though this one may stay finite.
    Catches: a causal and a padding plane of finfo.min each, added instead of combined as booleans.
    """
    _needs_mask(subject)
    twin = subject.twin(dtype=subject.dtype)
    batch, seq = twin.sizes()
    case = _padded(twin, batch, seq, left=True)
    run(twin, case)
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case), keep=True)
    if not _infinite_at_attention(recording):
        return  # what was summed up may have been made finite again
    for event, kept, spot in zip(recording.events, recording.kept, recording.spots, strict=True):
        if event.op not in ("add", "add_") or len(kept.inputs) < 2 or not kept.outputs or kept.outputs[0].shape[-1:] != (seq,):
            continue
        first, second = kept.inputs[:2]
        if not all(t.is_floating_point() and bool(torch.isfinite(t).all()) and float(t.max()) <= 0 for t in (first, second)):
            continue
        lost = kept.outputs[0] == float("-inf")
        if not bool(lost.any()):
            continue
        whole = bool(lost.all(-1).any())
        where = place_of(spot, module=event.where.module, op=event.op)
        yield Found(
            probe="",
            severity="warning",
            message=f"two masks of {float(first.min()):.3g} and {float(second.min()):.3g} are added up: {int(lost.sum())} places of the sum are -inf",
            where=where,
            source=source_lines(where),
            cause="finfo.min + finfo.min overflows to -inf; "
            + (
                "a query has no finite score left, so its softmax is NaN"
                if whole
                else "a query whose keys all become -inf has a NaN softmax"
            ),
            fix="combine the masks as booleans, and fill once: torch.where(causal & padding, 0, finfo.min)",
            evidence={"condition": "a padded batch", "mask": str(tuple(kept.outputs[0].shape))},
            case=case,
        )
        return


@probe(after=("padding.left-content-ignored",))
def left_padding_moves_no_position(subject: Subject) -> Iterator[Finding]:
    """A row padded on the left, masked, gives at its real tokens what it gives alone: positions do not count the padding.

    Why: with a table of positions every prompt but the longest of a batch is read at positions it never had.
    Catches: learned positions from arange(seq_len) where they should come from the mask. (Rotary positions may all shift.)
    """
    _needs_mask(subject)
    twin = subject.twin()
    seq = twin.sizes()[1]
    width = seq // 2
    if width < 1 or seq - width < 2:
        not_applicable("its context is too short to pad")
    ids = twin.token_ids(1, seq, seed=15)
    alone = Case(name="a row alone", input_ids=(ids[0][width:],))
    padded = Case(name="padded on the left", input_ids=ids, attention_mask=((0,) * width + (1,) * (seq - width),))
    expected, limit = run(twin, alone), limit_of(twin)
    apart = difference(expected, run(twin, padded)[:, width:], relative_limit=limit)
    if apart is None:
        return
    lookup = _position_lookup(twin, padded, width)
    if lookup is None:
        not_applicable("positions are not looked up in a table")
    counted = replace(padded, position_ids=((0,) * width + tuple(range(seq - width)),))
    name = twin.convention.position_ids
    told = name is not None and difference(expected, run(twin, counted)[:, width:], relative_limit=limit) is None
    yield Found(
        probe="",
        severity="warning",
        message=f"a row padded on the left by {width} gives logits {apart.max_abs:.3g} away from the row alone"
        + (f", unless {name} are passed" if told else ""),
        where=lookup,
        source=source_lines(lookup),
        cause=f"positions are counted from the padding: the first real token is looked up at position {width}, not 0",
        fix="where no positions are passed, count them from the mask: (attention_mask.cumsum(-1) - 1).clamp(min=0)",
        expected="the logits of the row alone",
        observed=f"a difference of {apart.max_abs:.3g} on logits of magnitude {apart.scale:.3g}",
        evidence={"condition": "a left-padded batch" + (f" without {name}" if told else "")},
        case=padded,
    )


def _infinite_at_attention(recording: Recording) -> bool:
    """Whether -inf reaches a softmax or a fused attention as its scores or mask."""
    for event, kept in zip(recording.events, recording.kept, strict=True):
        if event.op in ("_softmax", "_safe_softmax") or is_fused_attention(event.op):
            if any(t.is_floating_point() and bool((t == float("-inf")).any()) for t in kept.inputs):
                return True
    return False


def _position_lookup(twin: Subject, case: Case, width: int) -> Where | None:
    """Where a table is read at the counted positions, the padding included; None where no table is."""
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case), keep=True)
    for event, kept, spot in zip(recording.events, recording.kept, recording.spots, strict=True):
        if event.op not in ("embedding", "index", "index_select", "gather"):
            continue
        for tensor in kept.inputs[1:]:
            flat = tensor.reshape(-1)
            if tensor.dtype.is_floating_point or flat.numel() != case.seq_len or tensor.dtype == torch.bool:
                continue
            if (
                bool((flat.diff() == 1).all())
                and event.parameters
                and not any("cos" in n or "sin" in n or "freq" in n for n in event.parameters)
            ):
                return place_of(spot, module=event.where.module, op=event.op)
    return None


@probe(after=("padding.mask-is-accepted", "padding.right-content-ignored"))
def same_in_every_dtype(subject: Subject) -> Iterator[Finding]:
    """The same mask as integers, booleans and floats gives the same logits.

    Why: tokenizers give int64, collators bool, some callers float.
    Catches: ~mask on an integer mask; a float mask that is added; a boolean mask that cannot be subtracted from 1.
    """
    _needs_mask(subject)
    twin = subject.twin()
    case = _padded(twin, *twin.sizes(), left=False)
    real = torch.tensor(case.attention_mask, dtype=torch.bool)
    limit = limit_of(twin)
    expected = run(twin, case)[real]
    for dtype in (torch.bool, torch.float32):
        name = str(dtype).removeprefix("torch.")
        try:
            with torch.no_grad(), quiet(), random_state_kept():
                set_seed(twin.seed)
                observed = twin.call(case, attention_mask=real.to(twin.device, dtype)).logits.cpu()[real]
        except Exception:
            continue  # refusing a dtype loudly is a choice; giving another result is not
        apart = difference(expected, observed, relative_limit=limit)
        if apart is not None:
            yield Found(
                probe="",
                severity="warning",
                message=f"a {name} attention_mask gives other logits than the same int64 mask: {apart.max_abs:.3g} apart",
                expected="the same logits",
                observed=f"a difference of {apart.max_abs:.3g} on logits of magnitude {apart.scale:.3g}",
                case=case,
            )


def _needs_mask(subject: Subject) -> None:
    if subject.convention.attention_mask is None:
        not_applicable("forward takes no attention_mask")


def _content(subject: Subject, *, left: bool) -> Iterator[Finding]:
    for setting, twin in settings_of(subject):
        limit = limit_of(twin)
        batch, seq = twin.sizes()
        for size in (batch, seq):
            for pair in _pairs(twin, size, seq, left=left):
                broken = violation(twin, pair, limit=limit)
                if broken is None:
                    continue
                broken.setting = setting
                yield from _explained(twin, broken, limit, left)
                return


def _forward_spot(twin: Subject) -> Spot | None:
    """The first line of the model's forward."""
    forward = code_of(type(twin.model).forward)
    return Spot(forward, 0, forward.co_firstlineno) if forward is not None else None


def _explained(twin: Subject, broken: Violation, limit: float, left: bool) -> Iterator[Finding]:
    pair, side = broken.pair, "left" if left else "right"
    text = (
        f"logits of the real token at position {broken.position} change by {broken.difference.max_abs:.3g} when only masked "
        f"{side} padding changes"
    )
    fallback = None
    if _mask_is_ignored(twin, pair.left):
        fallback = Diagnosis(
            cause=f"{twin.convention.attention_mask} is accepted and has no effect: logits are the same with it and without it",
            fix="pass the mask on to the attention, or take it out of the signature",
        )
        broken.culprits = [Culprit(where=forward_place(twin.model), spot=_forward_spot(twin))]
        broken.diagnoses = [fallback]
    added = _added(twin, pair.left)
    if added is not None:
        yield replace(added, message=text, expected="no change beyond rounding", case=pair.right)
        return

    def candidates() -> Iterator[Pair]:
        for seq in range(2, twin.sizes()[1] + 1):
            yield from _pairs(twin, 1 if pair.part.batch != pair.part.seq else seq, seq, left=left)

    small = smallest(candidates(), lambda p: violation(twin, p, limit=limit, place=False) is not None)
    yield from findings_of(broken, message=text, smallest=small, fallback=fallback)


def _mask_is_ignored(twin: Subject, case: Case) -> bool:
    with_mask, without = run(twin, case), run(twin, replace(case, attention_mask=None))
    return bool(torch.equal(with_mask, without))


def _added(twin: Subject, case: Case) -> Found | None:
    """The finding for a mask of zeros and ones that is added to the scores; established by the operand's values."""
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(_padded(twin, case.batch_size, case.seq_len, left=True)), keep=True, catch=True)
    if recording.error is not None or (found := mask_added_as_number(recording)) is None:
        return None
    index, kept = found
    event, spot = recording.events[index], recording.spots[index]
    where = place_of(spot, module=event.where.module, op=event.op)
    culprit = Culprit(where=where, spot=spot, event=event, left=kept, right=kept)
    return Found(
        probe="",
        severity="error",
        message="the attention mask is added to the scores as 0 and 1",
        where=where,
        source=source_lines(where),
        cause="the mask is added to the scores as zeros and ones: a padded key keeps 1/e of its weight, where it should lose all of it",
        fix="add 0 where real and finfo.min where padded: (1 - mask[:, None, None, :]) * torch.finfo(scores.dtype).min",
        evidence={"values of the mask": "0 and 1", "scores": str(tuple(kept.inputs[0].shape)), "mask": str(tuple(kept.inputs[1].shape))},
        edits=mask_operand_edits(culprit),
    )


def _pairs(twin: Subject, batch: int, seq: int, *, left: bool) -> Iterator[Pair]:
    """A padded batch and the same with other tokens in the padding; the longest padding, then each row's own."""
    even = _padded(twin, batch, seq, left=left, even=True)
    assert even.attention_mask is not None
    count = sum(even.attention_mask[0])
    columns = slice(seq - count, None) if left else slice(0, count)
    part = base_part(twin, even, columns=columns)
    yield Pair(left=even, right=_other_padding(twin, even), part=part, hidden="padded tokens", change="padding")
    if batch < 2:
        return
    ragged = _padded(twin, batch, seq, left=left)
    assert ragged.attention_mask is not None
    for row in range(min(batch, 3)):
        count = sum(ragged.attention_mask[row])
        columns = slice(seq - count, None) if left else slice(0, count)
        part = base_part(twin, ragged, rows=slice(row, row + 1), columns=columns)
        yield Pair(left=ragged, right=_other_padding(twin, ragged), part=part, hidden="padded tokens", change="padding")


def _padded(twin: Subject, batch: int, seq: int, *, left: bool, even: bool = False) -> Case:
    """Rows of different lengths (or of one length) padded to `seq`, with positions counted over real tokens."""
    deepest = max(1, seq // 2)
    widths = [min(deepest, seq - 1) if even else 1 + i % deepest for i in range(batch)]
    mask: Rows = tuple((0,) * w + (1,) * (seq - w) if left else (1,) * (seq - w) + (0,) * w for w in widths)
    positions: Rows = tuple(tuple(max(0, sum(row[: i + 1]) - 1) for i in range(seq)) for row in mask)
    side = "left" if left else "right"
    return Case(
        name=f"padded on the {side}",
        input_ids=twin.token_ids(batch, seq, seed=6),
        attention_mask=mask,
        position_ids=positions if twin.convention.position_ids else None,
    )


def _other_padding(twin: Subject, case: Case) -> Case:
    fresh = twin.token_ids(case.batch_size, case.seq_len, seed=7)
    assert case.attention_mask is not None
    ids = tuple(
        tuple(old if real else new for old, new, real in zip(*rows, strict=True))
        for rows in zip(case.input_ids, fresh, case.attention_mask, strict=True)
    )
    return replace(case, name=f"{case.name}, other tokens in the padding", input_ids=ids)


def _non_finite(twin: Subject, case: Case, setting: str, message: str) -> Found:
    """Placed at the first op that makes a non-finite value out of finite ones, masks at -inf left aside."""
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case), keep=True)
    where, spot = place_of(None), None
    cause = None
    for index, (event, kept) in enumerate(zip(recording.events, recording.kept, strict=True)):
        born = any(t.is_floating_point() and bool(torch.isnan(t).any()) for t in kept.outputs)
        inherited = any(t.is_floating_point() and bool(torch.isnan(t).any()) for t in kept.inputs)
        if born and not inherited:
            spot = recording.spots[index]
            where = place_of(spot, module=event.where.module, op=event.op)
            if event.op in ("_softmax", "_safe_softmax") and bool((kept.inputs[0] == float("-inf")).all(-1).any()):
                cause = "a query that sees no key has only -inf scores, and softmax over -inf alone is NaN"
            break
    return Found(
        probe="",
        severity="error",
        message=message + (f" ({setting})" if setting else ""),
        where=where,
        source=source_lines(where),
        cause=cause,
        fix="mask with torch.finfo(scores.dtype).min instead of -inf, or zero the weights of fully masked rows" if cause else None,
        case=case,
    )
