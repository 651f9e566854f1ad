"""With a cache the model gives what it gives without one."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from olmodebug.caches import keeps_its_cache
from olmodebug.compare import roundings_limit
from olmodebug.explain import explain_run, place_of, source_lines
from olmodebug.load import SubjectCodeError
from olmodebug.own_code import refused
from olmodebug.probe import not_applicable, probe, skip
from olmodebug.records import Case, Difference
from olmodebug.relations.chunks import LENGTH_DEPENDENT, locate, pieces, rope_type, run_chunks
from olmodebug.relations.diagnose import mask_added_as_number
from olmodebug.relations.invariance import limit_of, run
from olmodebug.relations.parted import why
from olmodebug.relations.patterns import Diagnosis
from olmodebug.relations.repair import Found
from olmodebug.relations.ways import Way, breach, no_cache, way_record
from olmodebug.report import Finding, Scalar
from olmodebug.settings import attention_choices
from olmodebug.subject import Subject, rows_before_the_first_position

# Widths of uneven chunks: a prompt, a second turn, one token, a third turn.
UNEVEN = (4, 3, 1, 2, 1)
# Windows and contexts longer than this are not run on a CPU in float64.
LONGEST = 1024
MOST_LOGITS = 4_000_000
# Settings of sparse attention: a query keeps its best keys, so that a tie or a rounding changes which.
CHOOSES_KEYS = ("index_topk", "indexer_budget", "index_top_k", "keep_window_size")
# Layers that carry a state: state-space models, linear attention, gated recurrences.
RECURRENT = re.compile(r"mamba|ssm|recurrent|deltanet|linearattention|lightning|rwkv|xlstm|lstm|retention", re.IGNORECASE)
REFUSALS = (NotImplementedError, ValueError, AssertionError, TypeError)


@probe(after=("causality.no-future", "determinism.eval-repeats", "position.honoured"))
def matches_full_forward(subject: Subject) -> Iterator[Finding]:
    """Prefill and one-token decoding, and uneven chunks, give the logits of one full forward at every position.

    Why: generation with a cache is another code path than training; where the two disagree, generation is wrong.
    Catches: positions that restart or drift in decode; is_causal=True with fewer queries than keys; keys that are not
    rotated, not kept or in the wrong order; an ALiBi bias as long as the queries.
    """
    _needs_cache(subject)
    brief = not keeps_its_cache(subject)
    yield from _broken(subject, lambda twin: _ways(twin, _length(twin), brief=brief and twin is not subject.twin()))


@probe(after=("cache.matches-full-forward",))
def left_padded_rows_decode(subject: Subject) -> Iterator[Finding]:
    """A left-padded batch, prefilled and decoded in steps, gives the logits of the full padded forward at real tokens.

    Why: batched generation pads on the left; with wrong positions only the longest prompt is answered well.
    Catches: decode positions taken from the length of the cache, prefill positions from the mask.
    """
    _needs_cache(subject)
    if subject.convention.attention_mask is None:
        not_applicable("forward takes no attention_mask")
    if _stateful_only(subject):
        not_applicable("it has no attention that a mask over earlier tokens could reach")
    yield from _broken(subject, lambda twin: _padded_ways(twin, _length(twin)))


@probe(after=("cache.matches-full-forward", "window.receptive-field"))
def past_the_window(subject: Subject) -> Iterator[Finding]:
    """Decoding goes on as one full forward does when the sequence grows longer than the sliding window.

    Why: a cache that drops old keys goes wrong only then, hundreds of tokens into an answer.
    Catches: positions counted from the rows that are left; a ring buffer that is read unordered.
    """
    _needs_cache(subject)
    window = subject.setting("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size")
    if not isinstance(window, int) or window < 1:
        not_applicable("its config declares no sliding window")
    longest = subject.usable_positions or 10**6
    seq = max(window + 4, _length(subject)) if window <= LONGEST else 0
    if not seq or seq > longest:
        skip(f"a sequence longer than the window of {window} tokens is too long to be run here")
    yield from _broken(subject, lambda twin: _ways(twin, seq, prefill=(max(1, window - 1), window + 1), brief=True))


@probe(after=("cache.matches-full-forward", "position.whole-context-runs"))
def table_end(subject: Subject) -> Iterator[Finding]:
    """Decoding works up to the last position that the config declares, and gives there what one full forward gives.

    Why: a table that is checked against the new tokens only comes back short at the end of a long answer.
    Catches: a bound tested against seq_len, not against past + seq_len.
    """
    _needs_cache(subject)
    longest = subject.max_positions
    if longest is None or longest < 6:
        not_applicable("its config declares no context length")
    if rope_type(subject) in LENGTH_DEPENDENT:
        not_applicable("its RoPE scaling depends on the length of the sequence")
    if any(subject.setting(name) is not None for name in CHOOSES_KEYS):
        not_applicable("it attends to the keys of the highest rank only, and equal ranks may fall either way")
    longest -= rows_before_the_first_position(subject, longest)

    def ways(twin: Subject) -> Iterator[Way]:
        if longest <= LONGEST and longest * twin.vocab_size <= MOST_LOGITS:
            yield Way(
                case=Case(name="the whole context", input_ids=twin.token_ids(1, longest, seed=21)), sizes=(longest - 2, 1, 1), given=""
            )
        elif twin.convention.position_ids:
            case = Case(
                name="the end of the context", input_ids=twin.token_ids(1, 6, seed=21), position_ids=(tuple(range(longest - 6, longest)),)
            )
            yield Way(case=case, sizes=(4, 1, 1), given=twin.convention.position_ids)
        else:
            skip(f"a sequence of {longest} tokens is too long to be run here")

    yield from _broken(subject, ways, shrink=False)


def _needs_cache(subject: Subject) -> None:
    reason = no_cache(subject)
    if reason is not None:
        not_applicable(reason)


def _recurrent(twin: Subject) -> bool:
    """Whether some layer carries a state instead of keys and values: one token at a time is then all that is promised."""
    return any(RECURRENT.search(type(module).__name__) or isinstance(module, torch.nn.Conv1d) for module in twin.model.modules())


def _stateful_only(twin: Subject) -> bool:
    """Whether there is no attention at all, so that nothing has a use for a mask over tokens read before."""
    return _recurrent(twin) and not any("attention" in type(module).__name__.lower() for module in twin.model.modules())


def _length(twin: Subject) -> int:
    return twin.sizes()[1]


def _ways(twin: Subject, seq: int, *, prefill: tuple[int, ...] = (), brief: bool = False) -> Iterator[Way]:
    """One-token decoding, then uneven chunks; with what generation passes: nothing, a mask of ones, positions, both."""
    if seq < 2:
        skip("the model takes one token only")
    form, batch = twin.convention, 2
    plain = Case(name="one sequence", input_ids=twin.token_ids(batch, seq, seed=20))
    starts = prefill or (max(1, seq - 3),)
    plans = [*((start, *(1,) * (seq - start)) for start in starts if 0 < start < seq), _uneven(seq, starts[-1] if prefill else 0)]
    for sizes in dict.fromkeys(plans):
        for mask in (False, True) if form.attention_mask and not _stateful_only(twin) else (False,):
            for positions in (False, True) if form.position_ids else (False,):
                if (brief or sizes == plans[-1]) and mask != positions and form.attention_mask and form.position_ids:
                    continue  # with nothing and with everything is enough here
                given = " and ".join(name for name, on in ((form.attention_mask, mask), (form.position_ids, positions)) if on and name)
                case = replace(
                    plain,
                    attention_mask=((1,) * seq,) * batch if mask else None,
                    position_ids=(tuple(range(seq)),) * batch if positions else None,
                )
                yield Way(case=case, sizes=sizes, given=given)


def _uneven(seq: int, first: int = 0) -> tuple[int, ...]:
    """Chunks of uneven widths, the second of them of several tokens where there is room."""
    sizes = [first or max(1, min(UNEVEN[0], seq - 2))]
    while sum(sizes) < seq:
        sizes.append(min(UNEVEN[len(sizes) % len(UNEVEN)], seq - sum(sizes)))
    return tuple(sizes)


def _padded_ways(twin: Subject, seq: int) -> Iterator[Way]:
    """Rows padded on the left, decoded token by token and in pairs, with and without positions; each row judged alone."""
    batch, prompt = max(2, min(3, twin.sizes()[0])), max(2, seq - 4)
    widths = [i * max(1, (prompt - 1) // 2) % prompt for i in range(batch)]
    mask = tuple((0,) * w + (1,) * (seq - w) for w in widths)
    counted = tuple(tuple(max(0, sum(row[: i + 1]) - 1) for i in range(seq)) for row in mask)
    ids = twin.token_ids(batch, seq, seed=22)
    form = twin.convention
    for tail in ((1,) * (seq - prompt), (2, 1, seq - prompt - 3)):
        if min(tail) < 1 or (max(tail) > 1 and _recurrent(twin)):
            continue
        for positions in (True, False) if form.position_ids else (False,):
            given = f"{form.attention_mask} with left padding" + (f" and {form.position_ids}" if positions else "")
            case = Case(name="rows padded on the left", input_ids=ids, attention_mask=mask, position_ids=counted if positions else None)
            yield Way(case=case, sizes=(prompt, *tail), given=given, first=max(widths))


def _broken(subject: Subject, ways: Any, *, shrink: bool = True) -> Iterator[Finding]:
    """A finding for the line at which chunks part from the full forward, in any attention implementation."""
    for setting, twin in _settings(subject):
        limit = limit_of(twin)
        full: dict[Case, Tensor] = {}
        for way in ways(twin):
            twin, limit = _finite(twin, way, limit)
            try:
                broken = breach(twin, way, limit, full)
            except SubjectCodeError as error:
                finding = _refused(twin, way, error)
                if finding is not None:
                    yield finding
                    return
                continue
            if broken is None:
                continue
            small = _smaller(twin, way, limit, broken.index[0]) if shrink else None
            finding = _finding(twin, way, small or _where_it_shows(twin, way, broken.index[0], limit), broken, limit, setting)
            if _recurrent(twin) and any(size > 1 for size in way.sizes[1:]):
                finding = replace(finding, severity="warning", message=f"several tokens that continue a recurrent state: {finding.message}")
            yield finding
            return


def _settings(subject: Subject) -> Iterator[tuple[str, Subject]]:
    if keeps_its_cache(subject):
        yield "", subject.fresh_twin()
        return
    yield "", subject.twin()
    used = getattr(subject.config, "_attn_implementation", None) or getattr(subject.config, "attn_implementation", None)
    for name in attention_choices(subject.model):
        if name != used:
            yield f"{name} attention", subject.twin(attention=name)


def _finite(twin: Subject, way: Way, limit: float) -> tuple[Subject, float]:
    """A float32 twin where float64 gives NaN: finfo.min of float64 is -inf in code that casts to float32."""
    if way.case.attention_mask is None or twin.dtype != torch.float64 or bool(torch.isfinite(run(twin, way.case)[:, way.first :]).all()):
        return twin, limit
    return twin.fresh_twin(dtype=torch.float32), max(limit, roundings_limit({"float32"}))


def _one_row(way: Way, row: int, seq: int | None = None) -> Way:
    """The same with one row, its padding kept."""

    def cut(rows: Any) -> Any:
        return None if rows is None else (rows[row][:seq],)

    case = replace(
        way.case, input_ids=cut(way.case.input_ids), attention_mask=cut(way.case.attention_mask), position_ids=cut(way.case.position_ids)
    )
    padded = way.case.attention_mask[row].count(0) if way.case.attention_mask else 0
    return replace(way, case=case, first=padded)


def _where_it_shows(twin: Subject, way: Way, row: int, limit: float) -> Way:
    """The way with this row alone; as it is where the row alone goes right."""
    alone = _one_row(way, row)
    return alone if way.case.batch_size == 1 or breach(twin, alone, limit) is not None else way


def _smaller(twin: Subject, way: Way, limit: float, row: int) -> Way | None:
    """The shortest sequence of this row alone, in as few chunks as possible, that still goes wrong; behind one token a position
    that restarts is one that lags by one, so that a longer prompt is tried first."""
    first = way.sizes[0]
    starts = dict.fromkeys((1, 2, 3, first - 1, first, first + 1))
    plans = [(start, *tail) for start in starts for tail in ((1,), (2,), (1, 1), (1, 2)) if start > 0]
    for sizes in [*sorted((p for p in plans if sum(p) <= way.case.seq_len), key=lambda p: (p[0] == 1, sum(p), len(p))), way.sizes]:
        small = replace(_one_row(way, row, sum(sizes)), sizes=sizes)
        try:
            if small.first < sum(sizes) and breach(twin, small, limit) is not None:
                return small
        except SubjectCodeError:
            continue
    return None


def _refused(twin: Subject, way: Way, error: SubjectCodeError) -> Finding | None:
    """A chunk that raises: an error for one token, a warning for several unless the model says so itself."""
    several = any(size > 1 for size in way.sizes[1:])
    if (isinstance(error.__cause__, REFUSALS) and several) or refused(error) is not None:
        return None
    told = explain_run(twin, lambda: run_chunks(twin, way.case, pieces(way.sizes)), error, case=way.case)
    message = f"{way}: {told.message}"
    return told.finding(case=way.case, message=message, severity="warning" if several else "error")


def _finding(twin: Subject, way: Way, small: Way, broken: Difference, limit: float, setting: str) -> Found:
    position = way.first + broken.index[1]
    runs = locate(twin, small.case, pieces(small.sizes), limit=limit, first=small.first)
    parting = runs.parting if runs else None
    told = why(runs) if runs and parting else Diagnosis()
    if small.case.batch_size > 1 and broken.index[0]:
        told = Diagnosis(
            cause=f"row {broken.index[0]} alone is decoded right: among others what it gets from the cache is not its own",
            fix="write and read the cache at the rows of the batch: cache[:batch]",
        )
    evidence: dict[str, Scalar] = {
        "largest difference": broken.max_abs,
        "logits of magnitude": broken.scale,
        "limit": limit * broken.scale,
        "smallest chunks that show it": ", ".join(map(str, small.sizes)),
    }
    if setting:
        evidence["setting"] = setting
    if parting is not None and parting.confirmed:
        evidence["confirmed"] = "with the full forward's values put here the chunk is right"
    if parting is not None and parting.module_only:
        evidence["placed at"] = "the smallest module; its ops could not be told apart"
    where = told.where or (parting.where if parting else None)
    if runs is not None and mask_added_as_number(runs.full) is None and (added := mask_added_as_number(runs.part)) is not None:
        event, mask = runs.part.events[added[0]], added[1].inputs[1]
        where = place_of(runs.part.spots[added[0]], module=event.where.module, op=event.op)
        kind = str(mask.dtype).removeprefix("torch.")
        told = Diagnosis(
            cause=f"the cached path adds its {kind} mask to the scores as zeros and ones, which hides nothing: a hidden key keeps 1/e of its weight",
            fix="fill the scores where the mask is False: scores.masked_fill(~mask, finfo.min)",
        )
    found = Found(
        probe="",
        severity="error",
        message=f"logits at position {position} {broken.apart} between one full forward and {way}" + (f" ({setting})" if setting else ""),
        cause=told.cause,
        fix=told.fix,
        expected="the logits of the full forward",
        observed=f"logits that {broken.apart} at row {broken.index[0]}, position {position}",
        evidence=evidence | (told.evidence or {}),
        case=replace(small.case, name=str(small)),
        records=(way_record(twin, small),),
    )
    return replace(found, where=where, source=source_lines(where)) if where else found
