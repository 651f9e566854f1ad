"""Why a chunk that continues a cache parts from one full forward: hypotheses tested on the tensors of both runs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..compare import difference
from ..records import Event
from ..report import Scalar
from ..tracing.tracer import Kept, Recording
from .chunks import Chunk, Parting, Runs, counterpart, fellows
from .diagnose import is_fused_attention
from .patterns import Diagnosis
from .relation import WRITES

HIDDEN = -1e3  # an additive mask holds 0, and this or less
LOOK_BACK = 6  # ops between the slice of a cache and the copy into it
SAME = 1e-6  # relative distance of what is one tensor in both runs: ten roundings of a table in float32


def why(runs: Runs) -> Diagnosis:
    """What the captured tensors establish about the line at which a chunk parts from the full run."""
    assert runs.parting is not None
    for rule in (
        _left_out,
        _causal_top_left,
        _mask_diagonal,
        _wrong_order,
        _shifted,
        _short_bias,
        _keys_missing,
        _wrong_slot,
        _changed_places,
        _cached_part,
    ):
        for parting in (runs.parting, *fellows(runs)):
            told = rule(runs, parting)
            if told is not None:
                return told
    return Diagnosis()


def _left_out(runs: Runs, parting: Parting) -> Diagnosis | None:
    if not parting.missing:
        return None
    names = ", ".join(dict.fromkeys(event.where.function or event.op for event in parting.missing))
    lines = sorted({event.where.line for event in parting.missing if event.where.line})
    return Diagnosis(
        cause=f"the cached path leaves out {len(parting.missing)} ops that the full forward runs, in {names}: new tokens reach "
        f"{parting.event.where.function if parting.event else 'attention'} as they were before them",
        fix=f"do in the cached path what lines {lines[0]}..{lines[-1]} do without a cache"
        if lines
        else "do the same with a cache as without one",
        evidence={"ops that are left out": ", ".join(dict.fromkeys(event.op for event in parting.missing))},
    )


def _causal_top_left(runs: Runs, parting: Parting) -> Diagnosis | None:
    if parting.event is None or parting.kept is None or not is_fused_attention(parting.event.op):
        return None
    arguments = parting.kept.arguments
    query, key, mask = arguments.get("query"), arguments.get("key"), arguments.get("attn_mask")
    if isinstance(mask, Tensor) and parting.confirmed and parting.whole is not None:
        reach = _reach(mask, runs.chunk)
        whole = Chunk(start=0, stop=runs.chunk.seq, seq=runs.chunk.seq)
        shown = parting.whole.arguments.get("attn_mask")
        causal = _reach(shown, whole) == 0 if isinstance(shown, Tensor) else bool(parting.whole.arguments.get("is_causal"))
        return _diagonal_off(runs.chunk, reach) if causal and reach is not None and reach < runs.chunk.start else None
    if not arguments.get("is_causal") or not isinstance(query, Tensor) or not isinstance(key, Tensor) or query.shape[-2] == key.shape[-2]:
        return None
    queries, keys = query.shape[-2], key.shape[-2]
    return Diagnosis(
        cause=f"is_causal=True with {queries} queries and {keys} keys: torch aligns the causal mask top-left, so the first new query, "
        f"position {runs.chunk.start}, sees key 0 only",
        fix="with a cache pass attn_mask with True where key <= past + query; is_causal=True only where queries and keys are as many",
        evidence={"queries": queries, "keys": keys},
    )


def _mask_diagonal(runs: Runs, parting: Parting) -> Diagnosis | None:
    """A mask `[.., queries, keys]` whose row i shows the keys up to another one than past + i, which the full forward's shows."""
    if not parting.good or parting.kept is None or not parting.kept.outputs or not runs.chunk.start:
        return None
    good, bad, chunk = parting.good[0], parting.kept.outputs[0], runs.chunk
    for hides in (False, True):
        shown, wanted = _reach(bad, chunk, hides=hides), _reach(good, chunk, hides=hides)
        if shown is not None and wanted is not None and wanted == chunk.start != shown:
            return _diagonal_off(chunk, shown)
    return None


def _reach(mask: Tensor, chunk: Chunk, *, hides: bool = False) -> int | None:
    """The diagonal on which a causal mask ends, `past` where it is right; None for what is no such mask. `hides`: True, or
    1, says what is hidden."""
    if mask.is_complex() or mask.ndim < 2 or mask.shape[-2] != chunk.queries or mask.shape[-1] < chunk.stop:
        return None
    mask = mask[..., : chunk.stop]
    values = set(mask.double().unique().tolist())
    if mask.dtype == torch.bool or values <= {0.0, 1.0} and 1.0 in values:
        visible = mask.bool() != hides
    elif 0.0 in values and len(values) <= 2 and min(values) <= HIDDEN * (len(values) - 1):
        visible = mask == 0
    else:
        return None
    pattern = visible.reshape(-1, chunk.queries, chunk.stop)[0].cpu()
    if not bool((visible.cpu() == pattern).all()):
        return None
    reach = int(pattern[0].sum()) - 1
    wanted = torch.ones(chunk.queries, chunk.stop, dtype=torch.bool).tril(reach)
    return reach if bool((pattern == wanted).all()) else None


def _diagonal_off(chunk: Chunk, reach: int) -> Diagnosis:
    seen = "sees no key" if reach < 0 else "sees key 0 only" if reach == 0 else f"sees keys 0..{reach}"
    what = "is aligned top-left" if reach == 0 else f"ends {abs(chunk.start - reach)} too {'early' if reach < chunk.start else 'late'}"
    return Diagnosis(
        cause=f"the causal mask {what}: with {chunk.start} tokens in the cache the first new query, position {chunk.start}, {seen}",
        fix="move the diagonal by the cache's length: tril(diagonal=past_length), or key_index <= past_length + query_index",
        evidence={"queries": chunk.queries, "keys": chunk.stop},
    )


def _wrong_order(runs: Runs, parting: Parting) -> Diagnosis | None:
    if not parting.good or parting.kept is None or not parting.kept.outputs:
        return None
    good, bad, length = parting.good[0], parting.kept.outputs[0], runs.chunk.stop
    if good.shape != bad.shape:
        return None
    for dim in (d for d, size in enumerate(bad.shape) if size == length):
        for by in range(1, length):
            if difference(good.roll(by, dim), bad, relative_limit=SAME) is None:
                what = "the new tokens stand in front of the cached ones" if by == runs.chunk.queries else f"they are rolled by {by}"
                return Diagnosis(
                    cause=f"the cached and the new tokens are put together in the wrong order: {what}",
                    fix="concatenate the cache first: torch.cat([past, new], dim)",
                    evidence={"dimension": dim},
                )
    return None


def _shifted(runs: Runs, parting: Parting) -> Diagnosis | None:
    if not parting.good or parting.kept is None or parting.event is None or not parting.kept.outputs:
        return None
    good, bad = parting.good[0], parting.kept.outputs[0]
    if (told := _table_shifted(runs, parting, good, bad)) is not None or bad.is_complex():
        return told
    if bad.is_floating_point() and not bool((bad == bad.round()).all()) or good.shape != bad.shape or good.dtype == torch.bool:
        return None
    gaps = (good - bad).unique()
    if gaps.numel() != 1 or not float(gaps[0]):
        return None
    gap = int(gaps[0])
    values = _span(bad), _span(good)
    use = _used_for(runs.part, parting.event)
    restart = gap == runs.chunk.start and int(bad.min()) == 0
    evidence: dict[str, Scalar] = {"in the chunk": values[0], "in the full forward": values[1]}
    if use == "mask":
        what = "causal mask is aligned top-left: its query index" if restart else f"query index of the mask is off by {-gap}: it"
        return Diagnosis(
            cause=f"the {what} is {values[0]} in the chunk at {runs.chunk}, and {values[1]} in the full forward",
            fix="add the cache's length: query_index = torch.arange(past_length, past_length + query_length)",
            evidence=evidence,
        )
    if use != "positions":
        return None
    padding = runs.padded and -gap == runs.padded
    drift = "restart at 0 in each chunk" if restart else f"count the {runs.padded} padded tokens" if padding else f"are off by {-gap}"
    return Diagnosis(
        cause=f"positions {drift}: the chunk at {runs.chunk} gets {values[0]}, the full forward has {values[1]}",
        fix=(
            "derive positions from the mask in every chunk: (attention_mask.cumsum(-1) - 1)[:, -seq_len:]"
            if padding
            else "count positions on from the tokens seen so far: torch.arange(past_length, past_length + seq_len)"
        ),
        evidence=evidence,
    )


def _table_shifted(runs: Runs, parting: Parting, good: Tensor, bad: Tensor) -> Diagnosis | None:
    """Rotations or embeddings cut out of a table: the chunk has other rows of it than the full forward has for its positions."""
    chunk = runs.chunk
    if good.shape != bad.shape or not (good.is_complex() or good.is_floating_point()) or torch.equal(good, bad):
        return None
    assert parting.event is not None and parting.kept is not None
    tables = [kept.outputs[0] for event, kept in _constant(runs.full) if kept.outputs]
    tables = [kept.inputs[0] for event, kept in _constant(runs.part) if event is parting.event and kept.inputs] + tables
    first = next((row for table in tables if (row := _first_row(table, good, bad, chunk)) is not None), None)
    if first is None:
        return None
    drift = "restart at 0 in each chunk" if first == 0 else f"are off by {first - chunk.start}"
    rows = str(first) if chunk.queries == 1 else f"{first}..{first + chunk.queries - 1}"
    return Diagnosis(
        cause=f"positions {drift}: the chunk at {chunk} gets what a table holds for position {rows}",
        fix="cut the table at the positions of the new tokens: freqs_cis[input_pos], or [start : start + seq_len]",
    )


def _constant(recording: Recording) -> Iterator[tuple[Event, Kept]]:
    """The ops that read what nothing in this run writes into, as it writes into a cache."""
    written = {event.inputs[0].storage for event in recording.events if event.op in WRITES and event.inputs}
    for event, kept in zip(recording.events, recording.kept, strict=True):
        if not written & {info.storage for info in event.inputs}:
            yield event, kept


def _first_row(table: Tensor, good: Tensor, bad: Tensor, chunk: Chunk) -> int | None:
    """The row of a table at which the chunk's part begins, where the full forward's begins at the chunk's start."""
    if table.dtype != bad.dtype or not good.numel():
        return None
    while table.ndim > bad.ndim and table.shape[0] == 1:
        table = table[0]
    good, bad = (t.reshape(t.shape[t.ndim - table.ndim :]) if t.shape[: t.ndim - table.ndim].numel() == 1 else t for t in (good, bad))
    if table.ndim != bad.ndim:
        return None
    for dim, size in enumerate(table.shape):
        if (
            size < chunk.stop
            or bad.shape[dim] != chunk.queries
            or table.shape[:dim] + table.shape[dim + 1 :] != bad.shape[:dim] + bad.shape[dim + 1 :]
        ):
            continue
        if not torch.equal(table.narrow(dim, chunk.start, chunk.queries), good):
            continue
        for row in range(size - chunk.queries + 1):
            if torch.equal(table.narrow(dim, row, chunk.queries), bad):
                return row
    return None


def _short_bias(runs: Runs, parting: Parting) -> Diagnosis | None:
    """A bias with as many columns as the chunk has queries, added to scores that have a column for each key."""
    chunk = runs.chunk
    if parting.event is None or parting.kept is None or parting.event.op not in ("add", "add_", "baddbmm") or len(parting.kept.inputs) < 2:
        return None
    scores, bias = parting.kept.inputs[:2]
    scores, bias = (scores, bias) if scores.shape[-1:] == (chunk.stop,) else (bias, scores)
    if scores.shape[-1:] != (chunk.stop,) or bias.shape[-1:] != (chunk.queries,) or chunk.queries == chunk.stop:
        return None
    return Diagnosis(
        cause=f"a bias built over the query length {chunk.queries} is added to scores over {chunk.stop} keys"
        + (": one column for all keys, so it has no effect" if chunk.queries == 1 else ""),
        fix="build the bias over the keys: cached and new ones",
        evidence={"bias": str(tuple(bias.shape)), "scores": str(tuple(scores.shape))},
    )


def _keys_missing(runs: Runs, parting: Parting) -> Diagnosis | None:
    """Attention over fewer keys than have been read, where the full forward has no window of that size."""
    keys = _key_length(parting.event)
    if parting.dropped and keys is not None:
        return Diagnosis(
            cause=f"the cache holds {keys} of the {runs.chunk.stop} tokens read, and the full forward gives weight up to "
            f"{parting.dropped:.2g} to those that are gone",
            fix="keep every key that a later query may look at, and drop old ones only where the layer has a sliding window",
            evidence={"keys seen": keys, "tokens read": runs.chunk.stop},
        )
    if keys is None or keys >= runs.chunk.stop or parting.event is None:
        return None
    if keys == runs.chunk.queries:
        return Diagnosis(
            cause=f"attention sees the {keys} new keys only: the cached ones are not concatenated in front of them",
            fix="concatenate the cache and the new keys and values before attention",
            evidence={"keys seen": keys, "tokens read": runs.chunk.stop},
        )
    return Diagnosis(
        cause=f"attention sees {keys} keys where {runs.chunk.stop} tokens have been read, and the full forward gives weight to more",
        fix="keep every key that a later query may look at",
        evidence={"keys seen": keys, "tokens read": runs.chunk.stop},
    )


def _wrong_slot(runs: Runs, parting: Parting) -> Diagnosis | None:
    """New tokens that the chunk writes into other slots of a cache than those where they are then read."""
    places = range(runs.chunk.start, runs.chunk.stop)
    for index, slots in _writes(runs.part, runs.chunk):
        moved = [(place, slot) for place, slot in zip(places, slots, strict=True) if place != slot]
        lost = next((lost for good, bad in _reads(runs, index) if (lost := _lost(good, bad, moved, runs.chunk))), None) if moved else None
        if lost is not None:
            place, slot = lost
            return Diagnosis(
                cause=f"the token at position {place} is written into slot {slot} of the cache, and is read from slot {place}",
                fix="write new tokens behind those that are there: cache[:, start : start + seq_len], or cache[:, input_pos]",
                where=runs.part.events[index].where,
                evidence={"slots written": ", ".join(map(str, slots)), "slots read": ", ".join(map(str, places))},
            )
    return None


def _reads(runs: Runs, written: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What is read of the memory that an op has written, as it should be and as it is."""
    storage = runs.part.events[written].inputs[0].storage
    for event in runs.part.events[written + 1 :]:
        if event.op not in WRITES and storage in {info.storage for info in event.inputs}:
            if (good := counterpart(runs, event.index)) is not None:
                yield good, runs.part.kept[event.index].outputs[0]


def _lost(good: Tensor, bad: Tensor, moved: list[tuple[int, int]], chunk: Chunk) -> tuple[int, int] | None:
    """The first token that is not where it should be, where every such token stands in the slot that it was written into."""

    def is_in(dim: int, place: int, slot: int) -> bool:
        return difference(good.select(dim, place), bad.select(dim, slot), relative_limit=SAME) is None

    for dim in (dim for dim, size in enumerate(bad.shape) if size >= chunk.stop and bad.is_floating_point()):
        lost = [(place, slot) for place, slot in moved if not is_in(dim, place, place)]
        if lost and all(slot >= bad.shape[dim] or is_in(dim, place, slot) for place, slot in lost):
            return lost[0]
    return None


def _writes(part: Recording, chunk: Chunk) -> Iterator[tuple[int, list[int]]]:
    """The ops that write as many entries as the chunk has tokens into a longer tensor, each with the slots that it writes."""
    for index, event in enumerate(part.events):
        arguments = part.kept[index].arguments
        if event.op in ("index_put_", "_index_put_impl_", "index_copy_"):
            given = arguments.get("indices", [arguments.get("index")])
            slots = [i for i in given if isinstance(i, Tensor) and i.dtype == torch.int64 and i.numel() == chunk.queries]
            if len(slots) == 1:
                yield index, slots[0].flatten().tolist()
        elif event.op == "copy_" and event.inputs:
            yield from ((index, list(range(start, start + chunk.queries))) for start in _starts(part, index, chunk))


def _starts(part: Recording, index: int, chunk: Chunk) -> list[int]:
    """Where the slices that a copy goes into may begin in a longer tensor: a batch of one looks like one token."""
    target, starts = part.events[index].inputs[0], dict[int, int]()
    shape = target.shape
    for back in range(index - 1, max(-1, index - LOOK_BACK), -1):
        view, cut = part.events[back], part.kept[back].arguments
        if view.op != "slice" or view.outputs[0].storage != target.storage or view.outputs[0].shape != shape:
            continue
        dim, shape = int(cut.get("dim", 0)), view.inputs[0].shape
        starts[dim] = starts.get(dim, 0) + min(int(cut.get("start") or 0) % (shape[dim] + 1), shape[dim])
    return [start for dim, start in starts.items() if target.shape[dim] == chunk.queries < shape[dim]]


def _changed_places(runs: Runs, parting: Parting) -> Diagnosis | None:
    """Cached tokens that another tensor of the full forward holds than the one that the new tokens, put behind them, are from."""
    chunk = runs.chunk
    for event, kept in zip(runs.part.events, runs.part.kept, strict=True):
        if event.op != "cat" or len(kept.inputs) != 2 or not chunk.start:
            continue
        old, new = kept.inputs
        dim = next((d for d in range(old.ndim) if (old.shape[d], new.shape[d]) == (chunk.start, chunk.queries)), None)
        if dim is None or not old.is_floating_point() or not bool(old.any()):
            continue
        fresh, cached = _holding(runs.full, new, dim, chunk.start, chunk.seq), _holding(runs.full, old, dim, 0, chunk.seq)
        if not fresh or not cached or set(fresh) & set(cached):
            continue
        one, other = runs.full.events[fresh[0]], runs.full.events[cached[0]]
        places = f"line {other.where.line} of {other.where.function}", f"line {one.where.line}"
        if other.index > one.index and other.where.line != one.where.line and _leads_to(runs.full, one, other):
            return Diagnosis(
                cause=f"the cache holds what {places[0]} has made of the keys or values, and they go through it a second time: new tokens "
                f"are put behind them as they are in {places[1]}, before it",
                fix="put into the cache what stands at the place where it is read, or read it behind that step",
            )
        return Diagnosis(
            cause=f"the cached tokens are those of another tensor: the full forward has them in {places[0]}, module {other.where.module}, "
            f"and the new ones, which are put behind them, in {places[1]}, module {one.where.module}",
            fix="take keys and values out in the order in which they were put in, each from its own layer",
        )
    return None


def _holding(full: Recording, part: Tensor, dim: int, start: int, seq: int) -> list[int]:
    """The ops whose output holds these tokens from `start` on."""
    found = []
    for index, kept in enumerate(full.kept):
        for out in kept.outputs:
            if out.ndim != part.ndim or out.shape[dim] != seq or out.dtype != part.dtype:
                continue
            cut = out.narrow(dim, start, part.shape[dim])
            if cut.shape == part.shape and difference(cut, part, relative_limit=SAME) is None:
                found.append(index)
    return found


def _leads_to(full: Recording, one: Event, other: Event) -> bool:
    """Whether an op computes with what another has made; two views of one tensor, as keys and values may be, do not."""
    if other.outputs[0].storage == one.outputs[0].storage:
        return False
    reached = {info.storage for info in one.outputs}
    for event in full.events[one.index + 1 : other.index + 1]:
        if reached & {info.storage for info in event.inputs}:
            reached |= {info.storage for info in event.outputs}
            if event is other:
                return True
    return False


def _cached_part(runs: Runs, parting: Parting) -> Diagnosis | None:
    """Old and new tokens joined: which of the two is not what the full forward has."""
    if not parting.good or parting.kept is None or not parting.kept.outputs or parting.good[0].shape != parting.kept.outputs[0].shape:
        return None
    good, bad, chunk = parting.good[0], parting.kept.outputs[0], runs.chunk
    dims = [d for d, size in enumerate(bad.shape) if size == chunk.stop]
    if len(dims) != 1 or not bad.is_floating_point():
        return None
    old, new = (
        difference(good.narrow(dims[0], *span), bad.narrow(dims[0], *span), relative_limit=SAME) is not None
        for span in ((0, chunk.start), (chunk.start, chunk.queries))
    )
    if old == new:
        return None
    which = f"the cached tokens 0..{chunk.start - 1} are" if old else f"the new tokens at {chunk} are"
    return Diagnosis(
        cause=f"{which} not what the full forward has at this place; the {'new' if old else 'cached'} ones are right",
        fix="put the same tensors into the cache that the forward without a cache attends to"
        if old
        else "treat new tokens as without a cache",
    )


def _used_for(part: Recording, event: Event) -> str | None:
    """What integers end up in: `positions` (an angle or an embedding) or `mask` (a comparison); the first that comes."""
    tainted = {info.storage for info in event.outputs}
    for later in part.events[event.index + 1 :]:
        if not tainted & {info.storage for info in later.inputs}:
            continue
        if later.op in ("cos", "sin", "embedding", "index", "index_select", "polar", "gather"):
            return "positions"
        if later.op in ("le", "lt", "ge", "gt", "le_", "lt_", "ge_", "gt_"):
            compared = part.kept[later.index].arguments.get("other")
            if len(later.inputs) > 1 or not compared:  # a number but 0 is the size of a window, or of a bucket
                return "mask"
        tainted |= {info.storage for info in later.outputs if info.storage}
    return None


def _key_length(event: Event | None) -> int | None:
    if event is None:
        return None
    if is_fused_attention(event.op) and len(event.inputs) > 1:
        return event.inputs[1].shape[-2]
    if event.op in ("_softmax", "_safe_softmax"):
        return event.outputs[0].shape[-1]
    return None


def _span(values: Tensor) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low}..{high}"
