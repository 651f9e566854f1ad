"""Sliding-window layers look back as far as the configuration says, and no further."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from olmodebug.explain import place_of, source_lines
from olmodebug.probe import not_applicable, probe, skip
from olmodebug.records import Case
from olmodebug.relations.diagnose import is_fused_attention
from olmodebug.relations.invariance import settings_of
from olmodebug.relations.patterns import Diagnosis
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.subject import Subject
from olmodebug.tracing.rotation import maker, trace_case
from olmodebug.tracing.tracer import Recording

LONGEST = 256
# A score this far below the best of its row is masked, whatever constant the mask uses.
MASKED = 5e3
WINDOW_NAMES = ("sliding_window", "sliding_window_size")
# Under these names the query's own key is counted by some and not by others: only a window that no layer has is judged.
LOOSE_NAMES = ("window", "window_size", "local_window", "local_window_size", "attention_window", "attention_window_size")
MASKS = ("add", "add_", "where", "masked_fill", "masked_fill_")
WINDOWED, FULL = "sliding_attention", "full_attention"


@dataclass(slots=True, kw_only=True)
class Reach:
    """How many keys the last query of a layer can see, itself counted; `index` is the op that shows it."""

    layer: int
    keys: int
    index: int
    mask: int | None


@probe(after=("causality.no-future",))
def receptive_field(subject: Subject) -> Iterator[Finding]:
    """A layer with sliding_window W sees W keys, its own counted; a layer without one sees all keys before it.

    Why: a window that is one too long, or missing in one kernel, makes training and inference two models; nothing fails.
    Catches: key >= query - window; a window that never reaches SDPA; a mask cached without the window in its key.
    """
    window, kinds = _declared(subject)
    seq = max(window + 3, subject.sizes()[1])
    if window > LONGEST or seq > (subject.usable_positions or seq):
        skip(f"a sequence longer than the window of {window} tokens is too long to be run here")
    seen: set[tuple[object, ...]] = set()
    for setting, twin in settings_of(subject, train=False):
        case = Case(name="longer than the window", input_ids=twin.token_ids(1, seq, seed=40))
        recording = trace_case(twin, case)
        reaches = list(_reaches(recording, seq, len(kinds) if kinds else None))
        for reach, expected in _wrong(reaches, kinds, window, seq, exact=subject.setting(*WINDOW_NAMES) is not None):
            finding = _finding(recording, reach, expected, window, kinds, case, setting)
            keys: set[tuple[object, ...]] = {(finding.where.file, finding.where.line), (finding.cause or reach.layer,)}
            if not keys & seen:
                seen |= keys
                yield finding


def _declared(subject: Subject) -> tuple[int, list[str] | None]:
    """The window and the kind of each layer; None where the config does not name the kinds."""
    window = subject.setting(*WINDOW_NAMES, *LOOSE_NAMES)
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        not_applicable("its config declares no sliding_window")
    if subject.setting("use_sliding_window") is False:
        not_applicable("use_sliding_window is off")
    kinds = subject.setting("layer_types")
    if kinds is None:
        return window, None
    kinds = [str(kind) for kind in kinds]
    if WINDOWED not in kinds:
        not_applicable("no layer is of the kind sliding_attention")
    return window, kinds


def _wrong(reaches: list[Reach], kinds: list[str] | None, window: int, seq: int, *, exact: bool) -> Iterator[tuple[Reach, int]]:
    """The layers that see another number of keys than is declared, with that number; `exact`: its own key counts for sure."""
    if not exact:
        if reaches and all(reach.keys == seq for reach in reaches):
            yield reaches[0], window
        return
    if kinds is not None:
        for reach in reaches:
            expected = {WINDOWED: window, FULL: seq}.get(kinds[reach.layer]) if reach.layer < len(kinds) else None
            if expected is not None and reach.keys != expected:
                yield reach, expected
        return
    # Which layers have the window is not said: each may have it or see everything, and one at least must have it.
    if reaches and all(reach.keys == seq for reach in reaches):
        yield reaches[0], window
    yield from ((reach, window) for reach in reaches if abs(reach.keys - window) == 1)


def _reaches(recording: Recording, seq: int, layers: int | None) -> Iterator[Reach]:
    """One reach for each layer whose mask is visible, by the number in the module's path or by order."""
    found: list[tuple[str, int, int, int | None]] = []
    for index, event in enumerate(recording.events):
        seen = _seen(recording, index, seq)
        if seen is not None:
            keys, mask = seen
            found.append((event.where.module, keys, index, mask))
    numbers = [re.findall(r"(?:^|\.)(\d+)(?:\.|$)", module) for module, *_ in found]
    by_order = layers == len(found) or layers is None
    for place, (number, (_, keys, index, mask)) in enumerate(zip(numbers, found, strict=True)):
        if number:
            yield Reach(layer=int(number[0]), keys=keys, index=index, mask=mask)
        elif by_order:
            yield Reach(layer=place, keys=keys, index=index, mask=mask)


def _seen(recording: Recording, index: int, seq: int) -> tuple[int, int | None] | None:
    """How many keys the last query sees in this softmax or fused attention, and the operand that masks it."""
    event, kept = recording.events[index], recording.kept[index]
    if event.op in ("_softmax", "_safe_softmax"):
        scores = kept.inputs[0]
        if scores.ndim < 3 or scores.shape[-2] != seq or scores.shape[-1] not in (seq, seq + 1):
            return None
        last = scores[..., -1, :seq].reshape(-1, seq).double()
        visible = (last > last.max(-1, keepdim=True).values - MASKED).any(0)
        return None if (keys := _count(visible)) is None else (keys, None)
    if not is_fused_attention(event.op):
        return None
    query, mask = kept.arguments.get("query"), kept.arguments.get("attn_mask", kept.arguments.get("attn_bias"))
    if not isinstance(query, Tensor) or query.shape[-2] != seq:
        return None
    if not isinstance(mask, Tensor):
        return seq, None
    if mask.shape[-1] != seq or mask.shape[-2] != seq:
        return None
    last = mask[..., -1, :].reshape(-1, seq)
    visible = (last if mask.dtype == torch.bool else last > -MASKED).any(0)
    operand = next((k for k, t in enumerate(kept.inputs) if t.shape == mask.shape and t.dtype == mask.dtype), None)
    return None if (keys := _count(visible)) is None else (keys, operand)


def _count(visible: Tensor) -> int | None:
    """How many keys are visible, in one stretch that ends with the query's own; other patterns are no windows."""
    keys = int(visible.sum())
    return keys if keys and bool(visible[-keys:].all()) else None


def _finding(recording: Recording, reach: Reach, expected: int, window: int, kinds: list[str] | None, case: Case, setting: str) -> Found:
    seq = case.seq_len
    event, spot = recording.events[reach.index], recording.spots[reach.index]
    made = _mask_maker(recording, reach, seq)
    told = _why(recording, reach, expected, window, seq)
    undone = _undone(recording, reach, expected, seq)
    if undone is not None:
        event, spot = recording.events[undone], recording.spots[undone]
        told = Diagnosis(
            cause=f"the mask of {expected} keys is applied before this {event.op.strip('_')}, which brings the hidden scores back within reach",
            fix="mask last, after scales and softcaps",
        )
    elif made is not None and _is_made(recording, made, expected, seq):
        told = Diagnosis(
            cause=f"a mask that shows {expected} keys is made in this run, and this layer gets {'the full causal one' if reach.keys == seq else 'another one'}",
            fix="give each layer the mask of its kind",
        )
    elif made is not None:
        made = _first_with(recording, made, reach.keys, seq)
        event, spot = recording.events[made], recording.spots[made]
    kind = kinds[reach.layer] if kinds else "sliding_window"
    seen = f"all {seq}" if reach.keys == seq else str(reach.keys)
    where = place_of(spot, module=recording.events[reach.index].where.module, op=event.op)
    return Found(
        probe="",
        severity="error",
        message=f"layer {reach.layer} ({kind}) sees {seen} keys at position {seq - 1}, expected {expected} with sliding_window={window}"
        + (f" ({setting})" if setting else ""),
        where=where,
        source=source_lines(where),
        cause=told.cause,
        fix=told.fix,
        expected=f"{expected} keys, the query's own counted",
        observed=f"{reach.keys} keys",
        evidence={"keys seen": reach.keys, "sliding_window": window, "seq_len": seq},
        case=case,
    )


def _why(recording: Recording, reach: Reach, expected: int, window: int, seq: int) -> Diagnosis:
    event, kept = recording.events[reach.index], recording.kept[reach.index]
    if expected == window and reach.keys in (window + 1, window - 1):
        more = "more" if reach.keys > window else "less"
        return Diagnosis(
            cause=f"the window is off by one: {reach.keys} keys are seen, one {more} than sliding_window={window}, which counts the query's own key",
            fix="a query sees the keys with key > query - sliding_window and key <= query",
        )
    if expected == window and reach.keys == seq:
        if is_fused_attention(event.op) and not isinstance(kept.arguments.get("attn_mask", kept.arguments.get("attn_bias")), Tensor):
            return Diagnosis(
                cause="scaled_dot_product_attention gets is_causal=True and no attn_mask: the sliding window never reaches it",
                fix="build the mask with the window and pass it as attn_mask",
            )
        return Diagnosis(
            cause="the mask that this layer gets is the full causal one: the sliding window is not in it",
            fix="hide the keys with key <= query - sliding_window; where masks are kept, make the window a part of their key",
        )
    return Diagnosis()


def _shows(tensor: Tensor, keys: int, seq: int) -> bool:
    """Whether the last row of a mask shows, or hides all but, so many keys up to the query's own."""
    if tensor.dtype != torch.bool or tensor.ndim < 2 or tensor.shape[-2:] != (seq, seq):
        return False
    last = tensor[..., -1, :].reshape(-1, seq)
    return any(bool((rows.sum(-1) == keys).all() and rows[:, -keys:].all()) for rows in (last, ~last))


def _undone(recording: Recording, reach: Reach, expected: int, seq: int) -> int | None:
    """The op between the mask that is as declared and the softmax after which hidden scores are no longer hidden."""
    if is_fused_attention(recording.events[reach.index].op):
        return None
    before = [i for i in range(max(0, reach.index - 12), reach.index) if recording.events[i].op in MASKS]
    applied = [i for i in before if any(_shows(tensor, expected, seq) for tensor in recording.kept[i].inputs)]
    for index in range(applied[-1] + 1, reach.index) if applied else ():
        out = recording.kept[index].outputs[0] if recording.kept[index].outputs else None
        if out is not None and out.is_floating_point() and out.shape[-2:] == (seq, seq) and float(out[..., -1, 0].max()) > -MASKED:
            return index
    return None


def _is_made(recording: Recording, last: int, keys: int, seq: int) -> bool:
    """Whether an op up to this one, or one beside it, makes a causal mask that shows so many keys."""
    corner = torch.ones(seq, seq, dtype=torch.bool).triu(1)

    def causal(tensor: Tensor) -> bool:
        return any(not bool((rows & corner).any()) for rows in (tensor, ~tensor))

    return any(_shows(tensor, keys, seq) and causal(tensor) for kept in recording.kept[: last + 24] for tensor in kept.outputs)


def _first_with(recording: Recording, index: int, keys: int, seq: int) -> int:
    """The first op, back from the one that made a mask, whose result shows so many keys already: the line of the window."""
    for _ in range(16):
        inputs = recording.kept[index].inputs
        before = next((maker(recording, index, k) for k, tensor in enumerate(inputs) if _shows(tensor, keys, seq)), None)
        if before is None or before >= index:
            break
        index = before
    return index


def _mask_maker(recording: Recording, reach: Reach, seq: int) -> int | None:
    """The op that made the mask: the fused kernel's operand, or what was added to the scores before the softmax."""
    if reach.mask is not None:
        return maker(recording, reach.index, reach.mask)
    kept = recording.kept[reach.index]
    if is_fused_attention(recording.events[reach.index].op):
        return None
    heads = kept.inputs[0].shape[-3]
    for index in range(reach.index - 1, max(-1, reach.index - 12), -1):
        if recording.events[index].op not in MASKS:
            continue
        for operand, tensor in enumerate(recording.kept[index].inputs):
            if tensor.ndim >= 2 and tensor.shape[-2:] == (seq, seq) and (tensor.ndim == 2 or tensor.shape[-3] != heads):
                return maker(recording, index, operand)
    return None
