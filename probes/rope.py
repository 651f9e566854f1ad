"""Rotary position embeddings: a rotation, by the angles that the configuration says, that only distance can be read from."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from olmodebug.compare import difference, roundings_limit
from olmodebug.explain import place_of, source_lines
from olmodebug.frequencies import declared_bases, declared_factor, exponent_slip, fits, wrong_frequencies
from olmodebug.load import SubjectCodeError
from olmodebug.probe import not_applicable, probe
from olmodebug.rebuilt import with_another_base
from olmodebug.records import Case, Where
from olmodebug.relations.invariance import limit_of, run
from olmodebug.relations.patterns import Diagnosis
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.sources import Spot
from olmodebug.subject import Subject
from olmodebug.tracing.rotation import (
    Angles,
    Scores,
    angle_tables,
    attentions,
    constant_case,
    maker,
    projected,
    rounded_table,
    table_factor,
    trace_case,
    varies,
)
from olmodebug.tracing.tracer import Recording

# Rounding of angles grows with the position: float32 angles at position p are off by p * 6e-8 radians, and scores with them.
FLOAT32 = roundings_limit({"float32"})
FURTHEST = 4096
# Angles in float16 carry 11 bits and in bfloat16 8; in float32 24. Between them lies no doubt.
COARSE = 2.0**-14
# Radians that can be felt at the end of a context.
FELT = 0.02
FELT_SHIFT = 1e-2
OTHER_BASE = 7.0  # times the base that a config declares: its frequencies are unlike in every pair but the first
# What the short contexts of small models show of angles that are computed in 16 bits.
FELT_AFTER_CAST = 1e-3


@dataclass(slots=True, kw_only=True)
class Rotated:
    """A run on one repeated token and its first rotary attention, from position `start` on; `values_turn`: its values are
    rotated too."""

    recording: Recording
    first: Scores
    case: Case
    start: int = 0
    values_turn: bool = False


@probe(after=("causality.no-future",))
def depends_on_distance(subject: Subject) -> Iterator[Finding]:
    """Scores between a query and a key depend on how far they are apart, not on where they are.

    Why: this is what rotary embeddings are for; a model without it cannot carry what it learned to other positions.
    Catches: cos and sin laid out in halves with pairs taken side by side; queries rotated and keys not; values rotated
    too; a partner outside the rotated part; positions that are clamped.
    """
    rotated = _rotated(subject)
    if rotated.values_turn:
        yield _values_finding(rotated)
    if _scaled_by_position(rotated.first.query) or _scaled_by_position(rotated.first.key):
        not_applicable("queries or keys are scaled by their position, all heads alike")
    scores = rotated.first.scores
    apart = difference(scores[:, :-1, :-1], scores[:, 1:, 1:], relative_limit=max(FLOAT32, _rounding(subject.twin())))
    if apart is None:
        return
    head, query, key = apart.index
    start = rotated.start
    rounded = _kept_in_16_bits(subject, angle_tables(rotated.recording, rotated.case.seq_len)) or _cast_to_16_bits(rotated)
    told = rounded or _why_not_relative(subject, rotated)
    finding = _placed(
        subject,
        rotated,
        told,
        f"one repeated token gives a query at {query + start} and a key at {key + start} another score than "
        f"{query + start + 1} and {key + start + 1}: {apart.max_abs:.3g} apart; at the same distance scores must be the same",
        expected="equal scores at equal distance",
        observed=f"{float(scores[head, query, key]):.6g} and {float(scores[head, query + 1, key + 1]):.6g} in head {head}",
    )
    yield replace(finding, severity="warning") if rounded else finding


@probe(after=("rope.depends-on-distance",))
def relative_shift(subject: Subject) -> Iterator[Finding]:
    """Logits do not change when all position_ids move by the same number.

    Why: left-padded and packed rows start at other positions than training rows do.
    Catches: positions that are clamped, wrapped or rounded far from the start.
    """
    if subject.convention.position_ids is None:
        not_applicable("forward takes no position_ids")
    _rotated(subject)
    twin = subject.twin()
    seq = twin.sizes()[1]
    longest = min(twin.usable_positions or FURTHEST, FURTHEST)
    moves = sorted({k for k in (1, 7, (longest - seq) // 2, longest - seq) if 0 < k <= longest - seq})
    if not moves:
        not_applicable("its context is too short to shift positions")
    ids = twin.token_ids(1, seq, seed=31)
    start = Case(name="positions from 0", input_ids=ids, position_ids=(tuple(range(seq)),))
    for by in moves:
        moved = replace(start, name=f"positions from {by}", position_ids=(tuple(range(by, by + seq)),))
        # Angles in float32 at far positions move the scores by rounding alone, and every layer carries that on.
        limit = max(FLOAT32 if limit_of(twin) < 1e-9 else FELT_SHIFT, 8 * 1.2e-7 * (by + seq), _rounding(twin))
        apart = difference(run(twin, start), run(twin, moved), relative_limit=limit)
        if apart is None:
            continue
        parted = _parted(twin, start, moved, seq, limit)
        if parted is None:
            continue  # something else than rotary attention reads the positions, as a recurrence that restarts at 0 does
        recording, place = parted
        yield _placed(
            subject,
            Rotated(recording=recording, first=place, case=moved),
            _shared_rotations(subject) or Diagnosis(),
            f"logits change by {apart.max_abs:.3g} when all position_ids move by {by}",
            expected="no change beyond rounding",
            observed=f"scores of {place.module} change already",
        )
        return


@probe(after=("rope.depends-on-distance",))
def keeps_norm(subject: Subject) -> Iterator[Finding]:
    """A rotation keeps the length of queries and keys, up to one factor that the configuration declares.

    Why: a factor that is applied twice, or never declared, sharpens all attention; nothing fails.
    Catches: YaRN's attention_factor applied twice. (Pairs that turn by two angles fail depends-on-distance.)
    """
    rotated = _rotated(subject)
    norms = rotated.first.query.double().norm(dim=-1)
    if float(((norms - norms[:, :1]).abs() / norms[:, :1].clamp(min=1e-300)).max()) > FLOAT32:
        not_applicable("the length of queries changes with the position, and scores depend on the distance alone (xPos)")
    expected = declared_factor(subject)
    tables = angle_tables(rotated.recording, rotated.case.seq_len)
    seen = [factor for table in tables if (factor := table_factor(rotated.recording, table, rotated.case.seq_len)) is not None]
    if expected is None or not seen:
        return
    observed = max(seen)
    if min(abs(observed - expected), abs(observed - 1.0)) <= 2e-3 * expected:
        return
    twice = abs(observed - expected**2) <= 1e-3 * observed
    yield _placed(
        subject,
        rotated,
        Diagnosis(
            cause=f"the attention factor {expected:.4g} is applied twice: {observed:.4g} is its square" if twice else None,
            fix="multiply cos and sin by the attention factor once" if twice else None,
        ),
        f"rotary embeddings scale queries by {observed:.4g}, and the config declares the factor {expected:.4g}",
        expected=f"{expected:.6g}",
        observed=f"{observed:.6g}",
        in_angles=True,
    )


@probe(after=("position.honoured", "rope.depends-on-distance"))
def angles_are_precise(subject: Subject) -> Iterator[Finding]:
    """Angles grow by the same step from each position to the next, over the whole context, and no two positions share one.

    Why: angles in 16 bits are wrong by radians at position 2000, and only long texts suffer.
    Catches: positions or frequencies in bfloat16; positions that are clamped; a table that model.to(bfloat16) rounds.
    """
    dtype = subject.dtype if subject.dtype.is_floating_point else torch.float32
    tables = _tables(subject.twin(dtype=dtype))
    if not tables:
        not_applicable("no rotary angles were seen")
    seen: set[tuple[str | None, int | None]] = set()
    for positions, table in tables:
        told = _imprecise(positions, table)
        if told is None or (key := (table.where.file, table.where.line)) in seen:
            continue
        seen.add(key)
        message, diagnosis = told
        rounded = _kept_in_16_bits(subject, [table])
        finding = _at(subject, table, message, rounded or diagnosis)
        yield replace(finding, severity="warning") if rounded else finding
    if seen or dtype != torch.float32:
        return
    yield from _after_cast(subject, tables)


@probe(after=("rope.angles-are-precise",))
def frequencies_as_configured(subject: Subject) -> Iterator[Finding]:
    """The angle per position of each pair is theta ** (-2i / rotary_dim), with the theta and the scaling of the config.

    Why: another base is fluent on short texts and incoherent on long ones, and no other check can see it.
    Catches: a rope_theta that is not passed on; an exponent over head_dim where only a part is rotated; a scaling that
    is declared and never applied; a table that models of two configs share.
    """
    declared = declared_bases(subject)
    if not declared:
        not_applicable("its config declares no rope_theta with a scaling of kind default or linear")
    tables = _tables(subject.twin(dtype=torch.float32), near=True)
    if not tables:
        not_applicable("no rotary angles were seen")
    for _, table in tables:
        frequencies = table.frequencies.sort(descending=True).values
        if frequencies.numel() < 3 or float(frequencies[-1]) <= 0 and exponent_slip(frequencies, declared) is None:
            continue
        if any(fits(frequencies, theta, factor) for theta, factor in declared):
            continue
        message, told = wrong_frequencies(subject, frequencies, declared)
        finding = _at(subject, table, message, told)
        # Frequencies that no known slip explains may be a scaling of the model's own.
        yield finding if told.cause else replace(finding, severity="note")
        return
    if (found := _base_of_a_second_model(subject, [table for _, table in tables], declared[0][0])) is not None:
        yield found


def _base_of_a_second_model(subject: Subject, tables: list[Angles], theta: float) -> Found | None:
    """The finding for a model of the same class, built beside the first with another base, that turns by the first one's."""
    base = OTHER_BASE * theta
    model = with_another_base(subject, theta, base) if all(table.cos.shape[-1] > 1 for table in tables) else None
    if model is None:
        return None
    try:
        others = [table for _, table in _tables(subject.twin(dtype=torch.float32).around(model), near=True)]
    except SubjectCodeError:
        return None
    if len(others) != len(tables) or not all(torch.equal(a.frequencies, b.frequencies) for a, b in zip(tables, others, strict=True)):
        return None
    message = f"a second model whose config declares the base {base:g} has the rotary frequencies of the first, whose base is {theta:g}"
    told = Diagnosis(
        cause="the base of the config does not reach them: a constant stands in its place, or the table is kept from one model to the next",
        fix="make the table from the config, and key what is kept by the base too",
        evidence={"theta in use": theta, "theta declared": base},
    )
    return replace(_at(subject, others[0], message, told), severity="warning")


def _rotated(subject: Subject) -> Rotated:
    """The first attention of the float64 twin whose queries turn while its values stay; leaves the probe without one."""
    twin = subject.twin()
    case = constant_case(twin)
    seq = case.seq_len
    if seq < 5:
        not_applicable("its context is too short")
    recording = trace_case(twin, case)
    found = attentions(recording, seq)
    if not found:
        not_applicable("no attention scores over the sequence were recognised")
    # A short convolution or token shift sees no full past at the first positions: only the later half is judged.
    half = seq // 2
    for whole in found:
        value = None if whole.value is None else whole.value[:, half:]
        scores = replace(whole, query=whole.query[:, half:], key=whole.key[:, half:], value=value)
        if value is not None and varies(value, FLOAT32) and _turned_values(recording, whole, half):
            return Rotated(recording=recording, first=scores, case=case, start=half, values_turn=True)
        if scores.value is None or varies(scores.value, FLOAT32):
            not_applicable("positions reach the hidden states before the first rotation (learned or absolute positions)")
        if varies(scores.query, FLOAT32) or varies(scores.key, FLOAT32):
            break
    else:
        not_applicable("queries and keys are not rotated")
    if not any(event.op in ("cos", "sin", "polar") for event in recording.events) and not angle_tables(recording, seq):
        not_applicable("queries change with the position, and no cosines were seen")
    return Rotated(recording=recording, first=scores, case=case, start=half)


def _rounding(twin: Subject) -> float:
    """What is lost of scores where queries and keys themselves are rounded to 16 bits; a pair that turns by two angles is
    wrong by the size of the scores."""
    return 8 * torch.finfo(twin.dtype).eps if twin.dtype in (torch.bfloat16, torch.float16) else 0.0


def _turned_values(recording: Recording, whole: Scores, half: int) -> bool:
    """Whether values of one repeated token change with the position although what they are projected to does not, and
    keep their length, as what is rotated does."""
    assert whole.value is not None
    norms = whole.value[:, half:].double().norm(dim=-1)
    if whole.values_at is None or float(((norms - norms[:, :1]).abs() / norms[:, :1].clamp(min=1e-300)).max()) > FLOAT32:
        return False
    made = projected(recording, *whole.values_at)
    return made is not None and made.shape[0] == whole.value.shape[1] and not varies(made[None, half:], FLOAT32)


def _values_finding(rotated: Rotated) -> Found:
    recording, value = rotated.recording, rotated.first.value
    assert rotated.first.values_at is not None and value is not None
    made = maker(recording, *rotated.first.values_at)
    where = place_of(None, module=rotated.first.module)
    if made is not None:
        where = place_of(recording.spots[made], module=recording.events[made].where.module, op=recording.events[made].op)
    moved = float((value - value[:, :1]).abs().max())
    return Found(
        probe="",
        severity="warning",
        message=f"one repeated token gives values that change with the position, by up to {moved:.3g}, and keep their length: they are rotated",
        where=where,
        source=source_lines(where),
        cause="the rotation is applied to the values too: what attention returns then depends on where a key stands, not on how far away",
        fix="rotate queries and keys only",
        expected="values that a position does not change",
        observed=f"a change of {moved:.3g}",
        case=rotated.case,
    )


def _why_not_relative(subject: Subject, rotated: Rotated) -> Diagnosis:
    first = rotated.first
    query, key = varies(first.query, FLOAT32), varies(first.key, FLOAT32)
    if query != key:
        turned, still = ("queries", "keys") if query else ("keys", "queries")
        return Diagnosis(
            cause=f"{turned} are rotated and {still} are not: {still} are the same at every position, so scores depend on where a token is",
            fix="rotate queries and keys alike",
        )
    unturned = [head for head, states in enumerate(first.query if query else first.key) if not varies(states[None], FLOAT32)]
    if unturned:
        return Diagnosis(
            cause=f"{'query' if query else 'key'} heads {', '.join(map(str, unturned))} are not rotated, and the others are",
            fix="rotate all heads alike",
        )
    shared = _shared_rotations(subject)
    if shared is not None:
        return shared
    coarse = next(
        (told[1] for positions, table in _tables(subject.twin()) if (told := _imprecise(positions, table, felt=0.0)) is not None), None
    )
    if coarse is not None and coarse.cause:
        return coarse
    norms = [float((n.amax(-1) / n.amin(-1)).max()) - 1 for n in (t.double().norm(dim=-1) for t in (first.query, first.key))]
    if max(norms) > FLOAT32:
        return Diagnosis(
            cause=f"the two members of a pair do not turn by one angle: it is no isometry (lengths change by {max(norms):.2g}). Either the angles "
            "are laid out for other pairs (halves i, i + d/2, or neighbours 2i, 2i + 1) than the rotation takes, or it is not "
            "x1 cos - x2 sin, x2 cos + x1 sin",
            fix="lay cos and sin out as the pairs are taken: cat((f, f)) for halves, repeat_interleave(2) for neighbours, within the rotary "
            "part only; and turn both members of a pair by the same cos and sin",
        )
    if difference(first.scores[:, :-1, 1:], first.scores[:, 1:, :-1], relative_limit=FLOAT32) is None:
        return Diagnosis(
            cause="queries and keys are turned in opposite directions: scores depend on the sum of the two positions",
            fix="turn queries and keys alike, by the same sign of the angle",
        )
    same = _same_order(first)
    if same is not None:
        return Diagnosis(
            cause=f"queries and keys are rotated, and their dimensions stand in a different order afterwards: {same}",
            fix="put the pairs of queries and of keys together in the same way",
        )
    return Diagnosis()


def _kept_in_16_bits(subject: Subject, tables: list[Angles]) -> Diagnosis | None:
    """What a model that is kept in 16 bits does to the tables of cosines and sines among its buffers; None where it has none."""
    dtype = subject.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    for table in tables:
        if table.name is not None and all(torch.equal(t, t.to(dtype).to(t.dtype)) for t in (table.cos, table.sin)):
            name = str(dtype).removeprefix("torch.")
            return Diagnosis(
                cause=f"the model is in {name}, and its buffer {table.name} with it: cosines and sines carry {8 if name == 'bfloat16' else 11} bits",
                fix="keep the table in float32: compute it in forward, or make it anew in _apply after a cast",
                evidence={"buffer": table.name},
            )
    return None


def _cast_to_16_bits(rotated: Rotated) -> Diagnosis | None:
    """Cosines and sines that forward casts to 16 bits, in a run in float64."""
    for table in angle_tables(rotated.recording, rotated.case.seq_len):
        low = rounded_table(rotated.recording, table, rotated.case.seq_len)
        if low is not None:
            return Diagnosis(
                cause=f"forward casts cosines and sines to {low}, whatever the model's dtype: they carry {8 if low == 'bfloat16' else 11} bits",
                fix="cast them to the dtype of queries and keys",
                evidence={"dtype of the cosines": low},
            )
    return None


def _scaled_by_position(states: Tensor) -> bool:
    """Whether lengths change with the position by one factor for all heads, as log-n scaling or xPos makes them."""
    norms = states.double().norm(dim=-1)
    shape = norms / norms[:, :1].clamp(min=1e-300)
    return len(shape) > 1 and float((shape - 1).abs().max()) > FLOAT32 and float((shape - shape[:1]).abs().max()) <= FLOAT32


def _same_order(first: Scores) -> str | None:
    """Whether the speeds at which dimensions turn stand in another order in the keys than in the queries."""
    speeds = [_speeds(t) for t in (first.query[0], first.key[0])]
    if torch.allclose(speeds[0], speeds[1], atol=1e-3) or not torch.allclose(speeds[0].sort().values, speeds[1].sort().values, atol=1e-3):
        return None
    place = int((speeds[0] - speeds[1]).abs().argmax())
    return (
        f"dimension {place} turns by {float(speeds[0][place]):.3g} rad a position in queries and by {float(speeds[1][place]):.3g} in keys"
    )


def _speeds(states: Tensor) -> Tensor:
    """The angle per position of each dimension of `[seq_len, dim]`, by x(p+1) + x(p-1) = 2 cos(w) x(p), least squares."""
    x = states.double()
    middle, around = x[1:-1], x[2:] + x[:-2]
    cosine = (middle * around).sum(0) / (2 * middle.square().sum(0)).clamp(min=1e-300)
    return cosine.clamp(-1, 1).arccos()


def _shared_rotations(subject: Subject) -> Diagnosis | None:
    """Positions that share one rotation, by the tables that the model uses."""
    for positions, table in _tables(subject.twin(dtype=torch.float32)):
        pairs = _shared(positions, table)
        if pairs:
            return _saturated(pairs, positions)
    return None


def _shared(positions: list[int], table: Angles) -> list[tuple[int, int]]:
    """Neighbouring positions with the same angles in every pair."""
    same = ((table.cos[1:] == table.cos[:-1]) & (table.sin[1:] == table.sin[:-1])).all(1)
    return [(positions[i], positions[i + 1]) for i in range(len(positions) - 1) if bool(same[i]) and positions[i] != positions[i + 1]]


def _saturated(pairs: list[tuple[int, int]], positions: list[int]) -> Diagnosis:
    low, high = pairs[0][0], pairs[-1][1]
    whole = high == positions[-1] and len(pairs) > 2 and [a for a, _ in pairs] == positions[positions.index(low) : -1]
    cause = (
        f"positions saturate: {low}..{high} all share one rotation, so that tokens there cannot be told apart by position"
        if whole
        else f"positions {low} and {pairs[0][1]} share one rotation, and {len(pairs) - 1} more neighbours of those tried"
    )
    fix = "do not clamp positions: to reach further, scale the frequencies" if whole else "compute positions and angles in float32"
    return Diagnosis(cause=cause, fix=fix, evidence={"first shared position": low})


def _imprecise(positions: list[int], table: Angles, *, felt: float = FELT) -> tuple[str, Diagnosis] | None:
    """What is wrong with the angles of a table, by their own step from position 0 to 1."""
    pairs = _shared(positions, table)
    if pairs:
        return f"positions {pairs[0][0]} and {pairs[0][1]} get the same rotary angles", _saturated(pairs, positions)
    if positions[:2] != [0, 1]:
        return None
    steps = torch.tensor(positions, dtype=torch.float64)[:, None]
    ideal = steps * table.frequencies
    off = _radians(table, ideal + torch.atan2(table.sin[0], table.cos[0]))
    allowed = (COARSE * ideal).clamp(min=max(felt, 1e-6))
    wrong = off > allowed
    if not bool(wrong.any()):
        return None
    place = int((off * wrong).max(1).values.argmax())
    pair = int((off * wrong)[place].argmax())
    size = float(off[place, pair])
    relative = size / max(1e-9, float(ideal[place, pair]))
    coarse = 2.0**-12 < relative < 2.0**-5
    cause = (
        f"the angles carry about {round(-math.log2(relative))} bits, as in bfloat16 or float16: position * inv_freq is rounded"
        if coarse
        else None
    )
    return (
        f"the rotary angle of pair {pair} at position {positions[place]} is off by {size:.2g} rad from {positions[place]} times its step",
        Diagnosis(
            cause=cause, fix="compute positions, inv_freq and their product in float32" if coarse else None, evidence={"radians": size}
        ),
    )


def _after_cast(subject: Subject, exact: list[tuple[list[int], Angles]]) -> Iterator[Finding]:
    """What model.to(bfloat16) does to the angles."""
    twin = subject.fresh_twin(dtype=torch.bfloat16)
    if twin.dtype != torch.bfloat16:
        return
    for (positions, before), (_, after) in zip(exact, _tables(twin), strict=False):
        if before.cos.shape != after.cos.shape:
            continue
        pairs = _shared(positions, after)
        if pairs:
            finding = _at(
                subject,
                after,
                f"after model.to(bfloat16) positions {pairs[0][0]} and {pairs[0][1]} get the same rotary angles",
                _saturated(pairs, positions),
            )
            yield replace(
                finding,
                severity="warning",
                cause=f"positions are computed in bfloat16, which has 8 bits: above 256 neighbours share one rotation ({pairs[0][0]} and {pairs[0][1]} here)",
                fix="compute positions and angles in float32, and cast cos and sin afterwards",
            )
            return
        size = float(_radians(after, torch.atan2(before.sin, before.cos)).max())
        if after.low is not None and size > FELT_AFTER_CAST:
            message = f"after model.to(bfloat16) rotary angles are off by up to {size:.2g} rad at position {positions[-1]}"
            told = Diagnosis(
                cause=f"position * inv_freq is computed in {after.low}, which has 8 bits, before its cosine is taken",
                fix="compute positions, inv_freq and their product in float32, and cast cos and sin afterwards",
            )
            yield replace(_at(subject, after, message, told), severity="warning")
            return
        if size > 0.01:
            yield replace(
                _at(
                    subject,
                    after,
                    f"after model.to(bfloat16) rotary angles are off by up to {size:.2g} rad at position {positions[-1]}",
                    Diagnosis(),
                ),
                severity="note",
                cause="model.to(bfloat16) rounds the buffer that the angles come from (inv_freq or its table) to 8 bits",
                fix="keep the buffer in float32: recompute it after a cast, or build the model in bfloat16 with inv_freq in float32",
            )
            return


def _radians(table: Angles, angles: Tensor) -> Tensor:
    """How far each angle of a table is from these, in radians."""
    return torch.atan2(table.sin * angles.cos() - table.cos * angles.sin(), table.cos * angles.cos() + table.sin * angles.sin()).abs()


def _tables(twin: Subject, *, near: bool = False) -> list[tuple[list[int], Angles]]:
    """The tables of angles that a run uses, each with its positions: the first, and with position_ids the last too."""
    longest = min(twin.usable_positions or 2048, 1 << 17)
    case = constant_case(twin)
    seq, positions = case.seq_len, list(range(case.seq_len))
    plain = angle_tables(trace_case(twin, case), seq)
    if not plain or near:
        return [(positions, table) for table in plain]
    if twin.convention.position_ids and longest > 4 * seq:
        spots = [*range(seq // 3), *(p for p in (257, 258, 259) if p < longest // 2), longest // 2, longest // 2 + 1]
        positions = [*spots, *range(longest - (seq - len(spots)), longest)]
        case = replace(case, position_ids=(tuple(positions),))
    elif twin.convention.position_ids is None:
        seq = min(longest, 300) if twin.vocab_size * 300 < 2_000_000 else seq
        case = replace(case, input_ids=(case.input_ids[0][:1] * seq,))
        positions = list(range(seq))
    return [(positions, table) for table in angle_tables(trace_case(twin, case), seq)]


def _parted(twin: Subject, left: Case, right: Case, seq: int, limit: float) -> tuple[Recording, Scores] | None:
    """The first attention whose scores change while its values do not."""
    before, recording = trace_case(twin, left), trace_case(twin, right)
    for a, b in zip(attentions(before, seq), attentions(recording, seq), strict=False):
        if a.value is None or b.value is None or difference(a.value, b.value, relative_limit=limit) is not None:
            return None
        if difference(a.scores, b.scores, relative_limit=limit) is not None:
            return recording, b
    return None


def _placed(
    subject: Subject,
    rotated: Rotated,
    told: Diagnosis,
    message: str,
    *,
    expected: str,
    observed: str,
    operand: int | None = None,
    in_angles: bool = False,
) -> Found:
    """The finding at the op that made the rotated queries or keys."""
    recording, index = rotated.recording, rotated.first.index
    if operand is None:
        operand = 0 if varies(rotated.first.query, FLOAT32) else 1
    made = maker(recording, index, operand)
    place = index if made is None else made  # where the scores are made, if what made the operand is not seen
    where = place_of(recording.spots[place], module=recording.events[place].where.module, op=recording.events[place].op)
    tables = angle_tables(recording, rotated.case.seq_len)
    if (in_angles or told.evidence is not None) and tables:
        where = _built(subject, tables[0])
    return Found(
        probe="", severity="error", message=message, where=where, source=source_lines(where), cause=told.cause, fix=told.fix,
        expected=expected, observed=observed, evidence=told.evidence or {}, case=rotated.case,
    )  # fmt: skip


def _at(subject: Subject, table: Angles, message: str, told: Diagnosis) -> Found:
    where = _built(subject, table)
    return Found(
        probe="", severity="error", message=message, where=where, source=source_lines(where), cause=told.cause, fix=told.fix,
        evidence=told.evidence or {},
    )  # fmt: skip


def _built(subject: Subject, table: Angles) -> Where:
    """Where angles are made: the line that takes the cosine, or the one that registers the table."""
    if table.name is None:
        return table.where
    path, _, leaf = table.name.rpartition(".")
    try:
        init = type(subject.model.get_submodule(path)).__init__
        code: Any = init.__code__
        lines, first = inspect.getsourcelines(code)
    except (AttributeError, OSError, TypeError):
        return table.where
    line = next((first + k for k, text in enumerate(lines) if f'"{leaf}"' in text or f"'{leaf}'" in text or f"self.{leaf}" in text), None)
    return place_of(Spot(code, 0, line), module=path) if line else table.where
