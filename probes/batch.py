"""The rows of a batch do not know of each other."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from olmodebug.compare import difference
from olmodebug.explain import place_of, source_lines
from olmodebug.load import SubjectCodeError
from olmodebug.own_code import quiet
from olmodebug.probe import probe
from olmodebug.records import Case, Rows
from olmodebug.relations.diagnose import OTHER_ROWS
from olmodebug.relations.invariance import (
    Pair,
    Violation,
    base_part,
    below_rounding,
    crash,
    drawn,
    findings_of,
    limit_of,
    run,
    settings_of,
    smallest,
    violation,
)
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.settings import HEAD_NAMES
from olmodebug.subject import Subject
from olmodebug.tracing.tracer import record


@probe()
def rows_independent(subject: Subject) -> Iterator[Finding]:
    """Logits of a row do not change when only the other rows of the batch change: their tokens, masks and positions.

    Why: a result that depends on what else is in the batch can be neither evaluated nor reproduced.
    Catches: statistics over the batch; a [batch, seq_len] mask read as [query, key] when batch equals seq_len; a table
    [batch, seq_len, head_dim] that falls on the heads when batch equals the number of heads; row 0's positions for all.
    """
    seen: set[tuple[str | None, int | None]] = set()
    for setting, twin in settings_of(subject):
        limit = limit_of(twin)
        for pair in pairs(twin) if not setting else square_pairs(twin):
            try:
                broken = violation(twin, pair, limit=limit)
            except SubjectCodeError as error:
                if (finding := _shape_crash(twin, pair, error)) is not None:
                    yield finding
                    return
                raise
            if broken is None:
                continue
            broken.setting = setting
            small = smallest(small_pairs(twin, pair), lambda p, t=twin, m=limit: violation(t, p, limit=m, place=False) is not None)  # type: ignore[misc]
            for finding in findings_of(broken, message=_text(broken), smallest=small):
                key = (finding.where.file, finding.where.line)
                if key not in seen:
                    seen.add(key)
                    yield finding
            break
    twin = subject.twin()
    change = "masks" if twin.convention.attention_mask else "positions" if twin.convention.position_ids else "tokens"
    first = next(pairs(twin), None)
    if not seen and first is not None and (broken := below_rounding(twin, first)) is not None:
        yield from findings_of(broken, message=_text(broken))
        return
    make = lambda s: _pair(twin, s.batch, s.seq, change if s.masked else "tokens")  # noqa: E731
    if not seen and (broken := drawn(twin, make, limit=limit_of(twin), least_batch=2)) is not None:
        yield from findings_of(broken, message=_text(broken))


@probe(after=("batch.rows-independent", "determinism.eval-repeats"))
def rows_alike(subject: Subject) -> Iterator[Finding]:
    """Rows of the same tokens have the same logits, wherever in the batch they stand.

    Why: what a model says then depends on the place in the batch, and no token knows its own position.
    Catches: a table of positions read along the batch: pe[: x.size(0)] where the batch comes first.
    """
    twin = subject.twin()
    batch, seq = twin.sizes()
    case = Case(name="rows of the same tokens", input_ids=twin.token_ids(1, seq, seed=39) * batch)
    logits, limit = run(twin, case), limit_of(twin)
    found = difference(logits[:1].expand_as(logits), logits, relative_limit=limit)
    if found is None:
        return
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case), keep=True)
    place = None
    for event, kept, spot in zip(recording.events, recording.kept, recording.spots, strict=True):
        parted = [t for t in kept.outputs if t.is_floating_point() and t.ndim > 1 and t.shape[0] == batch]
        if any(difference(t[:1].expand_as(t), t, relative_limit=limit) is not None for t in parted):
            place = place_of(spot, module=event.where.module, op=event.op)
            break
    yield Found(
        probe="",
        severity="error",
        message=f"row {found.index[0]} has logits {found.max_abs:.3g} away from those of row 0, and holds the same tokens",
        where=place or place_of(None),
        source=source_lines(place) if place else (),
        cause=f"at this line a tensor of {batch} rows, one for each of the batch, holds other numbers in every row" if place else None,
        fix="is a dimension of positions taken for that of the batch? With the batch first, positions are counted along dimension 1",
        expected="the same logits in every row",
        observed=f"a difference of {found.max_abs:.3g} in row {found.index[0]}",
        case=case,
    )


def _text(broken: Violation) -> str:
    part = broken.pair.part
    return (
        f"logits of row {broken.row} change by {broken.difference.max_abs:.3g} when only {broken.pair.change} of the "
        f"other rows change (batch {part.batch}, seq_len {part.seq})"
    )


def pairs(twin: Subject) -> Iterator[Pair]:
    """Other rows with other tokens, then with other masks and positions too, on batches that equal no size, the number
    of heads, and the sequence length: the last two are where a wrong broadcast goes unnoticed."""
    batch, seq = twin.sizes()
    heads = twin.setting(*HEAD_NAMES)
    yield _pair(twin, batch, seq, "tokens")
    if not (twin.convention.attention_mask or twin.convention.position_ids):
        return
    batches = [batch]
    batches += [heads] if isinstance(heads, int) and 1 < heads <= 64 and heads != batch else []
    batches += [seq] if seq <= 64 else []
    for size in batches:
        if twin.convention.position_ids:
            yield _pair(twin, size, seq, "positions")
        if twin.convention.attention_mask:
            yield _pair(twin, size, seq, "masks")


def square_pairs(twin: Subject) -> Iterator[Pair]:
    """The pairs that matter in every other setting: other tokens, and other masks on a square batch."""
    batch, seq = twin.sizes()
    yield _pair(twin, batch, seq, "tokens")
    if twin.convention.attention_mask and seq <= 64:
        yield _pair(twin, seq, seq, "masks")


def small_pairs(twin: Subject, pair: Pair) -> Iterator[Pair]:
    """The same change with fewer rows and tokens; square where the broken pair is square."""
    change = pair.change
    for seq in range(2, pair.part.seq + 1):
        yield _pair(twin, seq if pair.part.batch == pair.part.seq else min(pair.part.batch, 2), seq, change)


def _pair(twin: Subject, batch: int, seq: int, change: str) -> Pair:
    row = batch // 2
    first, second = twin.token_ids(batch, seq, seed=3), twin.token_ids(batch, seq, seed=4)
    others = tuple(first[i] if i == row else second[i] for i in range(batch))
    left = Case(name="a batch", input_ids=first)
    right = Case(name=f"the other rows with other {change}", input_ids=others)
    counted = tuple(range(seq))
    longest = twin.usable_positions or 4096  # stretched, not shifted: a mere shift would not show with RoPE
    moved = tuple(range(0, 2 * seq, 2)) if longest >= 2 * seq else tuple(range(max(0, longest - seq), longest))
    if change == "positions":
        left = replace(left, position_ids=(counted,) * batch)
        right = replace(right, position_ids=tuple(counted if i == row else moved for i in range(batch)))
    if change == "masks":
        ones: Rows = ((1,) * seq,) * batch
        short = tuple(
            (1,) * seq if i == row else (0,) * (1 + i % max(1, seq // 2)) + (1,) * (seq - 1 - i % max(1, seq // 2)) for i in range(batch)
        )
        left, right = replace(left, attention_mask=ones), replace(right, attention_mask=short)
        if twin.convention.position_ids:
            positions = (counted,) * batch
            left, right = replace(left, position_ids=positions), replace(right, position_ids=positions)
    part = base_part(twin, left, rows=slice(row, row + 1))
    return Pair(left=left, right=right, part=part, hidden=OTHER_ROWS, change=change)


def _shape_crash(twin: Subject, pair: Pair, error: SubjectCodeError) -> Finding | None:
    """A batch with positions or a mask that the model's own signature offers, and that it cannot take."""
    if pair.change == "tokens":
        return None
    case = pair.right
    try:
        twin.logits(replace(case, attention_mask=None, position_ids=None))
    except Exception:  # it does not run without them either, and so they are not to blame
        return None
    argument = twin.convention.position_ids if pair.change == "positions" else twin.convention.attention_mask
    return crash(twin, case, error, message=f"{argument} of shape [batch, seq_len] = [{case.batch_size}, {case.seq_len}] is not accepted")
