"""A token may depend on what came before it and on nothing that comes after."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn

from olmodebug.compare import difference
from olmodebug.explain import source_lines
from olmodebug.load import SubjectCodeError
from olmodebug.probe import not_applicable, probe, skip
from olmodebug.records import Case, Rows, Where
from olmodebug.relations.cases import Sizes
from olmodebug.relations.chunks import LENGTH_DEPENDENT, locate_prefix, rope_type
from olmodebug.relations.invariance import (
    Pair,
    Violation,
    base_part,
    below_rounding,
    drawn,
    findings_of,
    limit_of,
    run,
    settings_of,
    smallest,
    violation,
)
from olmodebug.relations.leaks import leaks, section
from olmodebug.relations.patterns import Diagnosis
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.subject import Subject
from olmodebug.switches import with_dropout_on
from olmodebug.tracing.products import score_parameters
from olmodebug.tracing.tracer import record

# Projections to queries and keys under the names that people give them, and the norms on them.
QUERY_KEY = re.compile(
    r"(^|[._])(q|k|wq|wk|to_q|to_k|query|key|q_proj|k_proj|qkv|qkv_proj|wqkv|c_attn|att_proj|query_key_value|in_proj|q_norm|k_norm)[._]?weight$"
)
# Causal-LM classes of transformers whose published architecture reads a prefix in both directions.
PREFIX_MODELS = ("cpmant",)
# Those whose published architecture hashes keys into as many buckets as the length of the sequence asks for.
HASHING_MODELS = ("reformer",)
# A finite mask constant such as -1e4 is beaten when scores reach this size; float16 training gets there (minGPT#75).
BEATING_SCORE = 1e5
UNMEASURED_GROWTH = 300.0  # of weights, where a fused kernel hides the scores


@probe()
def no_future(subject: Subject) -> Iterator[Finding]:
    """Logits at a position do not change when only later tokens change.

    Why: a model that sees the answer trains to a loss near zero and generates nonsense.
    Catches: a causal mask that is missing, inverted or off by one, in any attention implementation and in train mode;
    heads merged without a transpose; a norm or mean over the sequence.
    """
    if (kind := subject.setting("model_type")) in PREFIX_MODELS:
        not_applicable(f"{kind} attends in both directions by design")
    seen: set[tuple[str | None, int | None]] = set()
    for setting, twin in settings_of(subject):
        limit = limit_of(twin)
        for pair in pairs(twin):
            try:
                broken = violation(twin, pair, limit=limit)
            except SubjectCodeError:
                if pair.left.attention_mask is None:
                    raise
                continue  # padding.mask-is-accepted says it
            if broken is None:
                continue
            broken.setting = setting
            _measure(subject, twin, pair, limit, setting)
            small = smallest(small_pairs(twin), lambda p, t=twin, m=limit: violation(t, p, limit=m, place=False) is not None)  # type: ignore[misc]
            for finding in findings_of(broken, message=_text(broken), smallest=small):
                key = (finding.where.file, finding.where.line)
                if key not in seen:
                    seen.add(key)
                    yield finding
            break
    if not seen:
        found = list(_with_dropout(subject))
        yield from found[:1]
        if found:
            return
    twin = subject.twin()
    first = next(pairs(twin), None)
    if not seen and first is not None and (broken := below_rounding(twin, first)) is not None:
        yield from findings_of(broken, message=_text(broken))
        return
    if not seen and (broken := drawn(twin, lambda s: _pair(twin, s.batch, s.seq, s.cut, _ones(s, twin)), limit=limit_of(twin))) is not None:
        _measure(subject, twin, broken.pair, limit_of(twin), "")
        yield from findings_of(broken, message=_text(broken))


def _with_dropout(subject: Subject) -> Iterator[Finding]:
    """The same in train mode on the branches that are taken only where dropout is on."""
    for setting, twin in with_dropout_on(subject):
        pair, broken = next(pairs(twin), None), None
        with suppress(SubjectCodeError):  # a kernel without dropout
            broken = None if pair is None else violation(twin, pair, limit=limit_of(twin))
        if broken is not None:
            broken.setting = setting
            yield from findings_of(broken, message=_text(broken), altered=True)


@probe(after=("causality.no-future", "determinism.eval-repeats"))
def prefix_alone(subject: Subject) -> Iterator[Finding]:
    """A prefix gives the logits alone that it gives at the start of a longer sequence.

    Why: a model that looks at the length of its input computes one thing in training and another in use.
    Catches: scores divided by the square root of the sequence length; positions counted from the end.
    """
    if (kind := subject.setting("model_type")) in (*PREFIX_MODELS, *HASHING_MODELS):
        not_applicable(f"{kind} lets a token's attention depend on the length of the sequence, by design")
    if rope_type(subject) in LENGTH_DEPENDENT:
        not_applicable("its RoPE scaling depends on the length of the sequence, by design")
    twin = subject.twin()
    seq = twin.sizes()[1]
    if seq < 3:
        skip("the model takes too few tokens")
    case, limit = Case(name="a sequence", input_ids=twin.token_ids(1, seq, seed=3)), limit_of(twin)
    whole = run(twin, case)
    for length in (seq // 2 + 1, seq - 1, 1):
        short = replace(case, name=f"its first {length} tokens", input_ids=tuple(row[:length] for row in case.input_ids))
        apart = difference(whole[:, :length], run(twin, short), relative_limit=limit)
        if apart is None:
            continue
        parting = locate_prefix(twin, case, length, limit=limit).parting
        where = parting.where if parting is not None else Where()
        told = "with the whole run's values put here the prefix is right" if parting is not None and parting.confirmed else None
        yield Found(
            probe="",
            severity="error",
            message=f"the first {length} tokens alone give logits {apart.max_abs:.3g} away from those they give at the start of {seq} tokens",
            where=where,
            source=source_lines(where),
            cause="what this line gives depends on the length of the sequence" if told else None,
            fix="let nothing depend on how many tokens follow: neither positions nor factors" if told else None,
            expected="no difference beyond rounding",
            observed=f"{apart.max_abs:.3g} at position {apart.index[1]}",
            evidence={"limit": limit * apart.scale} | ({"confirmed": told} if told else {}),
            case=short,
        )
        return


@probe(after=("causality.no-future",))
def holds_for_large_scores(subject: Subject) -> Iterator[Finding]:
    """Causality holds when query and key weights have grown until scores reach 100,000.

    Why: masked scores set to a finite constant such as -1e4 lose against real scores that training has driven lower.
    Catches: masked_fill(mask, -1e4); a mask that is added as a small number.
    """
    twin = subject.fresh_twin()
    named = dict(twin.model.named_parameters())
    weights = [p for name, p in named.items() if QUERY_KEY.search(name)] or _by_use(twin, named)
    if not weights:
        skip("no query and key projections were recognised, by name or by their use")
    factor = _growth(twin)
    with torch.no_grad():
        for weight in {id(w): w for w in weights}.values():
            weight.mul_(factor)
    limit = limit_of(twin)
    for pair in pairs(twin):
        broken = violation(twin, pair, limit=limit)
        if broken is None:
            continue
        text = (
            f"logits at position {broken.position} depend on later tokens once attention scores reach {BEATING_SCORE:.0e}; "
            "the mask must hide them whatever the scores are"
        )
        constant = _finite_constant(twin, pair.left)
        told = Diagnosis(
            cause=f"masked scores are set to the finite constant {constant:.4g}, and real scores can be lower" if constant else None,
            fix="mask with float('-inf') or torch.finfo(scores.dtype).min",
            evidence={"mask constant": constant} if constant else None,
        )
        broken.diagnoses = [told for _ in broken.culprits]
        yield from findings_of(broken, message=text, severity="warning", fallback=told, altered=True)
        return


def _by_use(twin: Subject, named: dict[str, nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that queries and keys come from, as a run shows them."""
    batch, seq = twin.sizes()
    case = Case(name="scores", input_ids=twin.token_ids(batch, seq))
    recording = record(twin.model, lambda: twin.logits(case), keep=True)
    return [named[name] for name in sorted(score_parameters(recording, seq, named))]


def _measure(subject: Subject, twin: Subject, pair: Pair, limit: float, setting: str) -> None:
    """The leak matrix of the first setting that breaks the rule, for the report."""
    if "leaks" not in subject.measured:
        with suppress(SubjectCodeError):  # a model that takes no single row has no matrix
            subject.measured["leaks"] = section(leaks(twin, pair.left.input_ids[0], limit=limit, setting=setting))


def _text(broken: Violation) -> str:
    cut = broken.pair.part.columns.stop if broken.pair.part.columns else 0
    return (
        f"logits at position {broken.position} change by {broken.difference.max_abs:.3g} when only tokens "
        f"{cut}..{broken.pair.part.seq - 1} change; nothing before a change may move"
    )


def pairs(twin: Subject) -> Iterator[Pair]:
    """Sequences that part after a cut: early, in the middle, before the last token; with and without a mask of ones, and
    with the last token of a row padded, for which many models take another path."""
    batch, seq = twin.sizes()
    if seq < 2:
        skip("the model takes one token only")
    ones: Rows = tuple((1,) * seq for _ in range(batch))
    for mask in (None, ones) if twin.convention.attention_mask else (None,):
        for cut in sorted({seq // 2 + 1, seq - 1, 1}, key=lambda c: abs(c - seq // 2 - 1)):
            yield _pair(twin, batch, seq, cut, mask)
    if twin.convention.attention_mask and seq > 3:
        yield _pair(twin, batch, seq, seq // 2 + 1, (_last_padded(seq), *ones[1:]))


def small_pairs(twin: Subject) -> Iterator[Pair]:
    """The same question with one row and as few tokens as possible."""
    for seq in range(2, twin.sizes()[1] + 1):
        yield _pair(twin, 1, seq, seq - 1, None)
        if twin.convention.attention_mask and seq > 2:
            yield _pair(twin, 1, seq, seq - 2, (_last_padded(seq),))


def _last_padded(seq: int) -> tuple[int, ...]:
    return (*(1,) * (seq - 1), 0)


def _pair(twin: Subject, batch: int, seq: int, cut: int, mask: Rows | None) -> Pair:
    first, second = twin.token_ids(batch, seq, seed=1), twin.token_ids(batch, seq, seed=2)
    mixed = tuple(a[:cut] + b[cut:] for a, b in zip(first, second, strict=True))
    left = Case(name=f"tokens from {cut} on as drawn", input_ids=first, attention_mask=mask, labels=None)
    right = Case(name=f"tokens from {cut} on changed", input_ids=mixed, attention_mask=mask, labels=None)
    return Pair(
        left=left,
        right=right,
        part=base_part(twin, left, columns=slice(0, cut)),
        hidden="later tokens",
        change=f"tokens {cut}..{seq - 1}",
    )


def _ones(chosen: Sizes, twin: Subject) -> Rows | None:
    return ((1,) * chosen.seq,) * chosen.batch if chosen.masked and twin.convention.attention_mask else None


def _growth(twin: Subject) -> float:
    """The factor on query and key weights that brings the largest score to BEATING_SCORE."""
    batch, seq = twin.sizes()
    case = Case(name="scores", input_ids=twin.token_ids(batch, seq))
    eager = twin.fresh_twin(attention="eager") if hasattr(twin.model, "set_attn_implementation") else twin
    try:
        recording = record(eager.model, lambda: eager.logits(case), keep=True)
    except RuntimeError:  # its eager attention may refuse float64: GPT-2's reorder_and_upcast_attn does
        return UNMEASURED_GROWTH
    largest = 0.0
    for event, kept in zip(recording.events, recording.kept, strict=True):
        if event.op in ("_softmax", "_safe_softmax") and kept.inputs[0].ndim >= 3:
            scores = kept.inputs[0].double()
            real = scores[(scores > -9e3) & torch.isfinite(scores)]
            largest = max(largest, float(real.abs().max()) if real.numel() else 0.0)
    return float(max(1.0, (BEATING_SCORE / largest) ** 0.5)) if largest > 0 else UNMEASURED_GROWTH


def _finite_constant(twin: Subject, case: Case) -> float | None:
    """A value between -1e3 and -1e30 that fills the later keys of every softmax input."""
    recording = record(twin.model, lambda: twin.logits(case), keep=True)
    for event, kept in zip(recording.events, recording.kept, strict=True):
        for tensor in (*kept.inputs, *kept.outputs):
            if tensor.ndim >= 2 and tensor.shape[-1] == case.seq_len and tensor.shape[-2] == case.seq_len and tensor.is_floating_point():
                corner = tensor[..., 0, -1]
                value = float(corner.reshape(-1)[0])
                if -1e30 < value < -1e3 and bool((corner == value).all()):
                    return value
        if event.op in ("_softmax", "_safe_softmax"):
            break
    return None
