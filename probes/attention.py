"""Attention scores are scaled once, by the size of a head."""

import math
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from olmodebug.convention import first_embedding
from olmodebug.explain import place_of, source_lines
from olmodebug.own_code import quiet
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.settings import HEAD_NAMES, attention_choices
from olmodebug.sources import Spot, code_of
from olmodebug.subject import Subject
from olmodebug.switches import with_grown_scores
from olmodebug.tracing.dims import WIDTH_NAMES
from olmodebug.tracing.products import LAYOUTS, met_states, product_at
from olmodebug.tracing.tracer import Recording, record

Scale = tuple[int, float, tuple[int, ...], int]  # (event, scale, the sizes that a head is made of, how many factors the scale has)

FINAL_CAPS = ("final_logit_softcapping", "final_logit_softcap", "logits_soft_cap", "final_softcap")
SCORE_CAPS = ("attn_logit_softcapping", "attn_logit_softcap", "attention_logit_softcapping", "attn_logits_soft_cap", "attention_softcap")
# Published architectures that leave the scores unscaled.
UNSCALED = ("gpt_neo", "t5", "mt5", "umt5")
# Settings that say by which power of which number the scores are multiplied (Granite; lit-gpt; Gemma).
DECLARED_SCALES = {"attention_multiplier": 1.0, "attention_scores_scalar": -0.5, "query_pre_attn_scalar": -0.5}
# Settings by which a configuration chooses its own scale; where one is present the choice is the model's.
OWN_SCALE = (
    "scale_attn_weights",
    "attn_scale",
    "softmax_scale",
    "attention_scale",
    "scale_attn_by_inverse_layer_idx",
    "mup_scale_factor",
)


@probe()
def scaled_by_head_size(subject: Subject) -> Iterator[Finding]:
    """Scores are the products of queries and keys divided by the square root of head_dim, once.

    Why: without it, or with it twice, the softmax is far too sharp or too flat; training still works, worse.
    Catches: hidden_size ** -0.5 instead of head_dim ** -0.5; a scale that scaled_dot_product_attention applies again; one that
    the config declares and nothing reads.
    """
    if any(subject.setting(name) not in (None, False) for name in OWN_SCALE):
        not_applicable("its configuration chooses a scale of its own")
    if subject.setting("scale_attn_weights") is False:
        not_applicable("its config switches the scale off")
    if subject.setting("model_type") in UNSCALED:
        not_applicable("its architecture leaves the scores unscaled")
    choices: list[str | None] = [*attention_choices(subject.model)] or [None]
    looked = [scaled for name in choices if (scaled := _scaled(subject.twin(attention=name))) is not None]
    if not looked:
        not_applicable("no scores of queries and keys over one sequence were recognised")
    yield from [finding for scaled in looked if (finding := _judged(subject, *scaled)) is not None][:1]


@probe()
def groups_agree(subject: Subject) -> Iterator[Finding]:
    """Query heads that share a key head share its value head (grouped-query attention).

    Why: a head that looks with one group's keys and reads another group's values learns neither; weights from elsewhere
    give random words.
    Catches: keys repeated head by head (repeat_interleave) and values as a whole (repeat, expand), or the other way round.
    """
    choices: list[str | None] = [*attention_choices(subject.model)] or [None]
    compared = 0
    for name in choices:
        twin = subject.twin(attention=name)
        case = Case(name="one sequence", input_ids=twin.token_ids(1, twin.sizes()[1], seed=38))
        with torch.no_grad(), quiet():
            recording = record(twin.model, lambda: twin.call(case), keep=True)  # noqa: B023 - called at once
        for index, keys, values in met_states(recording, case.seq_len):
            shared, read = _alike(keys), _alike(values)
            compared += 1
            if sorted(map(len, shared)) != sorted(map(len, read)) or len(shared) in (1, len(keys)) or shared == read:
                continue
            made_keys, made_values = (_repeated_at(recording, index, states) for states in (keys, values))
            event = recording.events[index]
            where = place_of(recording.spots[made_keys or index], module=event.where.module, op=recording.events[made_keys or index].op)
            other = recording.events[made_values].where if made_values is not None else None
            first, second = shared[0], next(group for group in read if shared[0][0] in group)
            yield Found(
                probe="",
                severity="error",
                message=f"query heads {_heads(first)} share one key head, and query heads {_heads(second)} one value head",
                where=where,
                source=source_lines(where),
                cause="keys and values are repeated in different orders" + (f": values at line {other.line}" if other else ""),
                fix="repeat both in the same way: repeat_interleave(groups, dim=heads)",
                expected="the same heads in both groups",
                observed=f"{_heads(first)} and {_heads(second)}",
                evidence={"query heads": len(keys), "key heads": len(shared)},
                case=case,
            )
            return
    if not compared:
        not_applicable("no attention over heads was recognised")


def _alike(states: Tensor) -> list[tuple[int, ...]]:
    """The heads of states `[heads, seq_len, head_dim]` that hold the same numbers, as groups."""
    groups: list[list[int]] = []
    for head in range(len(states)):
        group = next((group for group in groups if torch.equal(states[group[0]], states[head])), None)
        if group is None:
            groups.append([head])
        else:
            group.append(head)
    return [tuple(group) for group in groups]


def _heads(group: tuple[int, ...]) -> str:
    return ", ".join(map(str, group[:-1])) + f" and {group[-1]}" if len(group) > 1 else str(group[0])


def _repeated_at(recording: Recording, index: int, states: Tensor) -> int | None:
    """The op before `index` that made as many numbers as these states have out of fewer."""
    for i in range(index - 1, -1, -1):
        event = recording.events[i]
        for info in event.outputs:
            sizes = [prod(each.shape) for each in event.inputs]
            if prod(info.shape) == states.numel() and sizes and max(sizes) < states.numel() and event.op not in ("mm", "addmm", "bmm"):
                same = recording.kept[i].outputs[0]
                if set(same.shape) & set(states.shape) and torch.equal(same.flatten().sort().values, states.flatten().sort().values):
                    return i
    return None


def _scaled(twin: Subject) -> tuple[Case, Recording, Scale] | None:
    """A run and the first scores in it; None where none were recognised."""
    batch, seq = twin.sizes()
    case = Case(name="scores", input_ids=twin.token_ids(batch, seq, seed=30))
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case), keep=True)
    scale = next(iter(_scales(recording, seq)), None)
    return None if scale is None else (case, recording, scale)


def _judged(subject: Subject, case: Case, recording: Recording, found: Scale) -> Found | None:
    index, scale, sizes, factors = found
    seq, head_dim = case.seq_len, sum(sizes)
    declared = next(
        ((n, v**power) for n, power in DECLARED_SCALES.items() if isinstance(v := subject.setting(n), int | float) and v > 0), None
    )
    expected = head_dim**-0.5 if declared is None else declared[1]
    if math.isclose(scale, expected, rel_tol=1e-3):
        return None
    lengths = _lengths(recording, index, seq)
    multiplied = math.isclose(scale, head_dim**0.5, rel_tol=1e-3)
    # What queries and keys of one length are scaled by is a choice, but for scores as large as the square of the length.
    if declared is None and lengths is not None and not (multiplied and lengths > head_dim / 2):
        return None
    width, heads = subject.setting(*WIDTH_NAMES), subject.setting(*HEAD_NAMES)
    if not isinstance(width, int) and (table := first_embedding(subject.model)) is not None:
        width = table.embedding_dim
    slips: list[tuple[float, str, str]] = []
    if declared is not None:
        slips.append(
            (head_dim**-0.5, f"the scale is head_dim ** -0.5, and the {declared[0]} of the config is not read", "use the config's scale")
        )
    if factors > 1:  # 1 / head_dim at once is a choice (muP)
        slips.append((1.0 / head_dim, "the scale is applied twice", "scale once: scaled_dot_product_attention does it by itself"))
    if isinstance(width, int) and width != head_dim:
        slips.append(
            (width**-0.5, f"the scale is hidden_size ** -0.5 ({width}), not head_dim ** -0.5 ({head_dim})", "scale by head_dim ** -0.5")
        )
    if isinstance(heads, int):
        slips.append((heads**-0.5, f"the scale is the number of heads ({heads}) ** -0.5", "scale by head_dim ** -0.5"))
    slips += [
        (size**-0.5, f"the scale is that of a part of the head ({size} of its {head_dim} dimensions)", "scale by head_dim ** -0.5")
        for size in sizes
        if size != head_dim
    ]
    slips.append((head_dim**0.5, "the scores are multiplied by sqrt(head_dim), not divided by it", "scale by head_dim ** -0.5"))
    slips.append((1.0, "the scores are not scaled at all", "multiply the scores by head_dim ** -0.5"))
    told = next(((cause, fix) for value, cause, fix in slips if math.isclose(scale, value, rel_tol=1e-3)), None)
    if told is None:
        return None  # a scale that no known slip gives is a choice
    event, spot = recording.events[index], recording.spots[index]
    where = place_of(spot, module=event.where.module, op=event.op)
    return Found(
        probe="",
        severity="warning",
        message=f"attention scores are scaled by {scale:.4g}, and {f'the config declares {declared[0]}:' if declared else '1/sqrt(head_dim) is'} {expected:.4g}",
        where=where,
        source=source_lines(where),
        cause=told[0],
        fix=told[1] if declared is None else "multiply the scores by the config's scale",
        expected=f"{expected:.4g}",
        observed=f"{scale:.4g}",
        evidence={"head_dim": head_dim},
        case=case,
    )


def _lengths(recording: Recording, index: int, seq: int) -> float | None:
    """The length of a query times that of a key, where the queries of a head have one length at all positions, and its keys
    too (QK-norm); None where they do not."""
    made, arguments = product_at(recording, index, seq), recording.kept[index].arguments
    states = (made.query, made.key) if made is not None else (arguments.get("query"), arguments.get("key"))
    product = 1.0
    for each in states:
        if not isinstance(each, Tensor):
            return None
        lengths = each.double().norm(dim=-1)
        if bool(((lengths - lengths[..., :1]).abs() > 1e-3 * lengths[..., :1]).any()):
            return None
        product *= float(lengths.mean())
    return product


def _scales(recording: Recording, seq: int) -> Iterator[Scale]:
    """The scale of each softmax over scores `[.., seq, seq]`, and of each fused attention; the scale is the ratio of what enters the softmax to the product, or the
    sum of products, that it came from."""
    bare: dict[int, tuple[int, Tensor, tuple[int, ...]]] = {}  # storage -> the product that it holds, in whatever layout
    last: tuple[int, Tensor, tuple[int, ...]] | None = None
    for index, (event, kept) in enumerate(zip(recording.events, recording.kept, strict=True)):
        if event.op.startswith("_scaled_dot_product"):
            query, scale = kept.arguments.get("query"), kept.arguments.get("scale")
            if isinstance(query, Tensor):
                own = float(scale) if scale is not None else query.shape[-1] ** -0.5
                before, factors = _scaled_before(recording, index, query)
                yield index, own * before, (int(query.shape[-1]),), factors + 1
            continue
        parts = [bare[info.storage] for info in event.inputs if info.storage in bare]
        if (made := product_at(recording, index, seq)) is not None:
            last = index, kept.outputs[0], (int(made.query.shape[-1]),)
        elif event.op in LAYOUTS and len(event.inputs) == 1 and parts:
            last = parts[0][0], kept.outputs[0], parts[0][2]
        elif event.op in ("add", "add_") and len(parts) == 2 and parts[0][0] != parts[1][0]:
            last = parts[0][0], kept.outputs[0], (*parts[0][2], *parts[1][2])
        else:
            if event.op in ("_softmax", "_safe_softmax") and last is not None and kept.inputs[0].shape[-2:] == (seq, seq):
                at, raw, sizes = last
                last = None
                ratio = _ratio(raw, kept.inputs[0])
                if ratio is not None:
                    before, factors = _scaled_before(recording, at, recording.kept[at].inputs[0])
                    factors += sum(_constant(recording, i, raw.numel()) is not None for i in range(at + 1, index))
                    yield at, ratio * before, sizes, factors
            continue
        bare |= {info.storage: last for info in event.outputs}


def _ratio(raw: Tensor, scores: Tensor) -> float | None:
    """The one factor between a product and the scores at the diagonal, which no causal mask hides; None if there is none
    (a bias such as ALiBi is zero there, a softcap is not)."""
    if raw.numel() != scores.numel():
        return None
    a = raw.reshape(-1, *raw.shape[-2:]).double().diagonal(dim1=-2, dim2=-1).flatten()
    b = scores.reshape(-1, *scores.shape[-2:]).double().diagonal(dim1=-2, dim2=-1).flatten()
    usable = a.abs() > 1e-3 * a.abs().max()
    ratios = (b / a)[usable]
    middle = float(ratios.median())
    return middle if bool(((ratios - middle).abs() <= 1e-3 * abs(middle)).all()) else None


def _scaled_before(recording: Recording, end: int, states: Tensor) -> tuple[float, int]:
    """The constants that queries and keys were multiplied by on their way into the product, as one, and how many they are.

    The way back follows the first tensor that each op read, from the product to the projection.
    """
    factors: list[float] = []
    for wanted in {info.storage for info in recording.events[end].inputs[:2]}:
        storage = wanted
        for index in range(end - 1, -1, -1):
            event = recording.events[index]
            if not event.inputs or storage not in {info.storage for info in event.outputs}:
                continue
            if event.op in ("mm", "addmm", "bmm", "linear"):
                break
            number = _constant(recording, index, states.numel())
            factors += [number] if number else []
            storage = event.inputs[0].storage
    return math.prod(factors), len(factors)


def _constant(recording: Recording, index: int, size: int) -> float | None:
    """The number other than one by which an op multiplies a tensor of `size` values; None where it does not."""
    event, kept = recording.events[index], recording.kept[index]
    if event.op not in ("mul", "div", "mul_", "div_") or kept.outputs[0].numel() != size:
        return None
    other: Any = kept.arguments.get("other")
    number = float(other) if isinstance(other, int | float) or (isinstance(other, Tensor) and other.numel() == 1) else 1.0
    return None if number in (0.0, 1.0) else number if event.op.startswith("mul") else 1.0 / number


@probe()
def softcap_as_configured(subject: Subject) -> Iterator[Finding]:
    """Final logits and attention scores stay within the softcaps of the configuration, however large the weights are.

    Why: a model trained with a softcap is too sure of itself without it.
    Catches: a softcap in the config that forward does not apply.
    """
    final, scores = (_declared_cap(subject, names) for names in (FINAL_CAPS, SCORE_CAPS))
    if final is None and scores is None:
        not_applicable("its config declares no softcap on the logits or on the scores")
    if scores is not None:
        yield from _uncapped_scores(subject, scores)
    if final is not None:
        yield from _uncapped_logits(subject, final)


def _declared_cap(subject: Subject, names: tuple[str, ...]) -> float | None:
    cap = subject.setting(*names)
    return float(cap) if isinstance(cap, int | float) and not isinstance(cap, bool) and cap > 0 else None


def _uncapped_scores(subject: Subject, cap: float) -> Iterator[Found]:
    twin = with_grown_scores(subject.fresh_twin(), 1e3)
    batch, seq = twin.sizes()
    case = Case(name="query and key weights 1,000 times as large", input_ids=twin.token_ids(batch, seq, seed=35))
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case), keep=True)
    for index, event in enumerate(recording.events):
        met = recording.kept[index].inputs[0] if event.op in ("_softmax", "_safe_softmax") else None
        if met is None or met.ndim < 3 or met.shape[-2:] != (seq, seq):
            continue
        largest = float(met.diagonal(dim1=-2, dim2=-1).abs().max())  # of each query with its own key, which no mask hides
        if largest > cap * (1 + 1e-6):
            where = place_of(recording.spots[index], module=event.where.module, op=event.op)
            yield Found(
                probe="",
                severity="error",
                message=f"attention scores reach {largest:.3g}, and the config declares a softcap of {cap:g} on them",
                where=where,
                source=source_lines(where),
                cause="the softcap of the config is not applied to the scores: scaling queries and keys scales the scores beyond it",
                fix=f"scores = {cap:g} * tanh(scores / {cap:g}), before the mask",
                expected=f"at most {cap:g}",
                observed=f"{largest:.3g}",
                case=case,
            )
            return


def _uncapped_logits(subject: Subject, cap: float) -> Iterator[Found]:
    twin = subject.fresh_twin()
    head = twin.model.get_output_embeddings() if hasattr(twin.model, "get_output_embeddings") else getattr(twin.model, "lm_head", None)  # type: ignore[operator]
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        not_applicable("its output head was not recognised")
    with torch.no_grad():
        head.weight.mul_(1e4)
    batch, seq = twin.sizes()
    case = Case(name="a head 10,000 times as large", input_ids=twin.token_ids(batch, seq, seed=34))
    largest = float(twin.logits(case).abs().max())
    if largest <= cap * (1 + 1e-6):
        return
    code = code_of(type(twin.model).forward)
    where = place_of(Spot(code, 0, code.co_firstlineno) if code else None)
    yield Found(
        probe="",
        severity="error",
        message=f"logits reach {largest:.3g}, and the config declares a softcap of {cap:g}",
        where=where,
        cause="the final softcap of the config is not applied: scaling the head scales the logits beyond it",
        fix=f"logits = {cap:g} * tanh(logits / {cap:g})",
        expected=f"at most {cap:g}",
        observed=f"{largest:.3g}",
        case=case,
    )
