"""A sequence run in chunks through a cache, laid beside one full forward, and the first line where the two part.

The ops of a chunk are aligned with those of the full run by op, module and line. Of a tensor of the full run the part
that a chunk's tensor stands for is cut out: a dimension of the whole length is cut to the chunk's queries where the
chunk has as many, to all the keys so far where it has as many, to the last of them where a window has dropped the rest.
A line is confirmed by putting the full run's values there and seeing the chunk's logits come right.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from ..caches import keeps_its_cache, makes_new_caches, new_cache
from ..compare import difference
from ..deep_copies import deep_copy
from ..own_code import quiet
from ..records import Case, Event, Where
from ..settle import random_state_kept, set_seed
from ..sources import Sources, Spot, short_path
from ..subject import Subject
from ..tracing.tracer import Kept, KeptCall, Recording, record

MOST_TRIALS = 24
# RoPE whose frequencies depend on how long the sequence is: a prefix has other ones than the whole, by design.
LENGTH_DEPENDENT = ("dynamic", "longrope", "su")


class NoCache(Exception):
    """The model was asked for a cache and gave none back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Positions `start..stop-1` of a sequence of `seq` tokens."""

    start: int
    stop: int
    seq: int

    @property
    def queries(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"position {self.start}" if self.queries == 1 else f"positions {self.start}..{self.stop - 1}"


@dataclass(slots=True, kw_only=True)
class Parting:
    """Where a chunk parts from the full run: the chunk's op, its tensors, those of the full run's op (`whole`), and the part of
    them that the chunk's should equal (`good`). `missing`: the ops of the full run, at `where`, that the chunk did not run at all; `own`: an op that the
    full run has not. `inputs_agree`: the op alone is to blame. `confirmed`: with the full run's values put here the chunk is right. `dropped`: the largest
    weight that the full run gives to a key which the chunk no longer has.
    """

    where: Where
    spot: Spot | None = None
    event: Event | None = None
    kept: Kept | None = None
    whole: Kept | None = None
    good: list[Tensor] = field(default_factory=list)
    missing: tuple[Event, ...] = ()
    own: bool = False
    inputs_agree: bool = False
    confirmed: bool = False
    module_only: bool = False
    dropped: float = 0.0


@dataclass(slots=True, kw_only=True)
class Runs:
    """The traced full run, the traced chunk, the chunk itself, and where they part (None: nowhere that can be seen).

    `padded`: how many tokens at the start are padding. `pairs`: which op of the full run is which of the chunk's.
    """

    full: Recording
    part: Recording
    chunk: Chunk
    padded: int = 0
    parting: Parting | None = None
    pairs: dict[int, int] = field(default_factory=dict)


def pieces(sizes: tuple[int, ...]) -> list[Chunk]:
    """The chunks of these sizes, one after the other."""
    ends = [0, *itertools.accumulate(sizes)]
    return [Chunk(start=a, stop=b, seq=ends[-1]) for a, b in itertools.pairwise(ends)]


def run_chunks(twin: Subject, case: Case, chunks: list[Chunk]) -> tuple[list[Tensor], Any]:
    """Logits `[batch, queries, vocab]` of each chunk, and the cache after the last; NoCache when the model gives none.

    Each chunk gets the mask up to its end and its own positions, as generation passes them. A model that keeps its cache
    itself makes one with room for the whole case.
    """
    cache: Any = None
    found: list[Tensor] = []
    if keeps_its_cache(twin):
        new_cache(twin, case.batch_size, case.seq_len)
        if twin.convention.start is not None and not makes_new_caches(twin):
            _soil(twin, case)
    for chunk in chunks:
        output = call_chunk(twin, case, chunk, cache)
        if output.cache is None and not keeps_its_cache(twin):
            raise NoCache
        cache = output.cache
        found.append(output.logits)
    return found, cache


def _soil(twin: Subject, case: Case) -> None:
    """Run other tokens through a model that never empties its cache: what it leaves there must not be read, and what one full
    forward left, which holds the very values that a chunk forgets to write, would hide that."""
    other = tuple(tuple((token + 1) % twin.vocab_size for token in row) for row in case.input_ids)
    with torch.no_grad(), quiet(), random_state_kept(), suppress(Exception):  # the chunks' own run tells of it
        twin.call(Case(name="other tokens", input_ids=other))


def call_chunk(twin: Subject, case: Case, chunk: Chunk, cache: Any, *, use_cache: bool = True) -> Any:
    """The output of one chunk that continues a cache, or of a prefix alone."""

    def cut(rows: Any, start: int) -> Any:
        return None if rows is None else tuple(row[start : chunk.stop] for row in rows)

    piece = Case(
        name=str(chunk),
        input_ids=cut(case.input_ids, chunk.start),
        attention_mask=cut(case.attention_mask, 0),
        position_ids=cut(case.position_ids, chunk.start),
    )
    with torch.no_grad(), quiet(), random_state_kept():
        set_seed(twin.seed)
        return twin.call(piece, cache=cache, use_cache=use_cache, start=chunk.start if use_cache else None)


def aligned(full: Tensor, part: Tensor, chunk: Chunk) -> list[Tensor]:
    """The parts of a full run's tensor that a chunk's tensor may stand for, each of its shape; empty where none fits."""
    if full.ndim != part.ndim:
        return []
    views = [full]
    for dim, size in enumerate(part.shape):
        views = [cut for view in views for cut in _cuts(view, dim, size, chunk)]
    return views


def locate(twin: Subject, case: Case, chunks: list[Chunk], *, limit: float, first: int = 0) -> Runs | None:
    """Where the first chunk whose logits are wrong parts from one full forward; None when no chunk's are.

    `first` is the first position that counts. The case has one row, so that merged dimensions stay readable.
    """
    if twin.convention.last_only:
        return _locate_last(twin.at_once, case, chunks, limit=limit, first=first)
    with torch.no_grad(), quiet():
        full = record(twin.model, lambda: twin.call(case), keep=True, sources=Sources(twin.model))
    for place, chunk in enumerate(chunks):
        runs = Runs(full=full, part=Recording(), chunk=chunk, padded=first)
        if _parts(twin, case, chunks[:place], runs, late=max(0, first - chunk.start), limit=limit):
            return runs
    return None


def _locate_last(once: Subject, case: Case, chunks: list[Chunk], *, limit: float, first: int) -> Runs | None:
    """The same where a run gives the logits of its last position only: each chunk beside one run up to its end, a call each."""
    for place, chunk in enumerate(chunks):
        start = replace(case, input_ids=tuple(row[: chunk.stop] for row in case.input_ids), attention_mask=None, position_ids=None)
        with torch.no_grad(), quiet():
            full = record(once.model, lambda: once.call(start), keep=True)  # noqa: B023 - called at once
        runs = Runs(full=full, part=Recording(), chunk=replace(chunk, seq=chunk.stop), padded=first)
        if _parts(once, start, chunks[:place], runs, late=chunk.queries - 1, limit=limit):
            return runs
    return None


def _parts(twin: Subject, case: Case, before: list[Chunk], runs: Runs, *, late: int, limit: float) -> bool:
    """Whether the chunk parts from the full run at its positions from the `late`th on; the chunk's run and its place are noted."""
    chunk, sources = runs.chunk, Sources(twin.model)
    if late >= chunk.queries:
        return False
    wanted = runs.full.result.logits
    wanted = wanted[:, chunk.start + late : chunk.stop] if wanted.shape[1] > 1 else wanted

    def go(write: Any = None) -> Recording:
        mine = twin if write is None else _copy_of(twin)
        cache = run_chunks(mine, case, before)[1]
        return record(
            mine.model, lambda: call_chunk(mine, case, chunk, cache), keep=write is None, sources=sources, replace=write, catch=True
        )

    def wrong(recording: Recording) -> bool:
        if recording.error is not None:
            return True
        given = min(wanted.shape[1], recording.result.logits.shape[1])
        return difference(wanted[:, -given:], recording.result.logits[:, -given:], relative_limit=limit) is not None

    runs.part = go()
    if runs.part.error is not None or not wrong(runs.part):
        return False
    runs.parting = _parting(runs, go, wrong, limit)
    return True


def locate_prefix(twin: Subject, case: Case, length: int, *, limit: float) -> Runs:
    """Where the first `length` tokens, run alone, part from the run on the whole case."""
    sources, chunk = Sources(twin.model), Chunk(start=0, stop=length, seq=case.seq_len)
    with torch.no_grad(), quiet():
        full = record(twin.model, lambda: twin.call(case), keep=True, sources=sources)

    def go(write: Any = None) -> Recording:
        mine = twin if write is None else _copy_of(twin)
        run = lambda: call_chunk(mine, case, chunk, None, use_cache=False)  # noqa: E731
        return record(mine.model, run, keep=True, sources=sources, replace=write, catch=True)

    def wrong(recording: Recording) -> bool:
        if recording.error is not None:
            return True
        return difference(full.result.logits[:, :length], recording.result.logits, relative_limit=limit) is not None

    runs = Runs(full=full, part=go(), chunk=chunk)
    runs.parting = _parting(runs, go, wrong, limit)
    return runs


def _copy_of(twin: Subject) -> Subject:
    """A copy to write into: what an op gives back may be a view of a table that the model keeps."""
    return twin.around(deep_copy(twin.model))


def _parting(runs: Runs, go: Callable[..., Recording], wrong: Callable[[Recording], bool], limit: float) -> Parting | None:
    """The first line that, put right, puts the chunk right, alone or with others that it takes, such as the keys' and the
    values'; else the first op that is to blame alone; else a module."""
    runs.pairs = _matching(runs.full, runs.part)
    tried: set[tuple[Any, ...]] = set()
    alone: Parting | None = None
    own: dict[int, list[Tensor]] = {}
    so_far: list[tuple[Parting, dict[int, list[Tensor]]]] = []

    def mends(values: Iterable[dict[int, list[Tensor]]]) -> bool:
        return not wrong(go(write=_writer({index: goods for each in values for index, goods in each.items()})))

    for parting, values in _candidates(runs, limit):
        if parting.missing:
            # What was left out may end in several places, such as queries and cached keys: they come right together.
            own |= values
            values = own
        elif parting.event is None or line_of(parting.event) in tried:
            continue
        else:
            tried.add(line_of(parting.event))
            own |= values if parting.own else {}
        if len(tried) > MOST_TRIALS:
            break
        so_far.append((parting, values))
        if mends([values]):
            parting.confirmed = True
            return parting
        if len(so_far) > 1 and mends(each for _, each in so_far):
            needed = so_far
            for item in so_far:
                rest = [other for other in needed if other is not item]
                needed = rest if mends(each for _, each in rest) else needed
            needed[0][0].confirmed = True
            return needed[0][0]
        if alone is None and parting.inputs_agree and parting.good and parting.good[0].is_floating_point():
            alone = parting
    return _dropped_keys(runs) or alone or _smallest_module(runs, limit)


def _candidates(runs: Runs, limit: float) -> Iterator[tuple[Parting, dict[int, list[Tensor]]]]:
    """Places where the chunk is not what the full run says, in the order they run, with the values to put there."""
    full, part, chunk = runs.full, runs.part, runs.chunk
    pairs = runs.pairs
    matched = set(pairs.values())
    state: dict[int, str] = {}
    writer: dict[Any, int] = {}  # by storage and shape, and by storage alone
    for i, event in enumerate(part.events):
        j = pairs.get(i)
        if j is not None:
            inputs = [_state(a, b, chunk, limit) for a, b in zip(full.kept[j].inputs, part.kept[i].inputs, strict=False)]
            outputs = [_state(a, b, chunk, limit) for a, b in zip(full.kept[j].outputs, part.kept[i].outputs, strict=False)]
            state[i] = "differs" if "differs" in outputs else "agrees" if "agrees" in outputs else "unknown"
            for k, (condition, info) in enumerate(zip(inputs, event.inputs, strict=False)):
                source = writer.get((info.storage, info.shape), writer.get(info.storage))
                if condition != "differs" or source is None:
                    continue
                good = _best(full.kept[j].inputs[k], part.kept[i].inputs[k], chunk)
                if source not in pairs and good is not None:
                    yield _own_op(runs, source, good), _same_line(runs, source)
                elif state.get(source) == "agrees" and good is not None:
                    missing = [
                        e for e in full.events[pairs[source] + 1 : j] if e.index not in matched and e.where.module == event.where.module
                    ]
                    if missing:
                        first = missing[0]
                        left_out = Parting(where=first.where, spot=full.spots[first.index], event=event, missing=tuple(missing))
                        yield left_out, _at_ends(runs, source)
            if "differs" in outputs:
                goods = [
                    g for a, b in zip(full.kept[j].outputs, part.kept[i].outputs, strict=True) if (g := _best(a, b, chunk)) is not None
                ]
                here = Parting(where=event.where, spot=part.spots[i], event=event, kept=part.kept[i], whole=full.kept[j], good=goods)
                here.inputs_agree = "differs" not in inputs
                yield here, _same_line(runs, i)
        for info in event.outputs:
            if info.storage:
                writer[info.storage] = writer[(info.storage, info.shape)] = i


def line_of(event: Event) -> tuple[Any, ...]:
    """The op and the line of source, in whatever layer."""
    return (event.op, event.where.function, event.where.file, event.where.line)


def _own_op(runs: Runs, index: int, good: Tensor) -> Parting:
    """An op that only the chunk has, such as the concatenation with the cache."""
    event, kept = runs.part.events[index], runs.part.kept[index]
    fits = [good] if kept.outputs and kept.outputs[0].shape == good.shape else []
    return Parting(where=event.where, spot=runs.part.spots[index], event=event, kept=kept, good=fits, own=True)


def _same_line(runs: Runs, index: int) -> dict[int, list[Tensor]]:
    """The values of the full run for every op of the chunk at the line of this one, in every layer."""
    key = line_of(runs.part.events[index])
    values: dict[int, list[Tensor]] = {}
    for i, event in enumerate(runs.part.events):
        if line_of(event) == key and (goods := _goods(runs, i)):
            values[i] = goods
    return values


def _goods(runs: Runs, index: int) -> list[Tensor]:
    """What the full run has for the outputs of an op of the chunk; empty where that cannot be told."""
    full, part, chunk = runs.full, runs.part, runs.chunk
    if index not in runs.pairs:
        good = _read_as(runs, index)
        return [] if good is None else [good]
    found = [_best(a, b, chunk) for a, b in zip(full.kept[runs.pairs[index]].outputs, part.kept[index].outputs, strict=False)]
    return [good for good in found if good is not None]


def counterpart(runs: Runs, index: int) -> Tensor | None:
    """What the full run has for the first output of an op of the chunk, of its shape; None where that cannot be told."""
    goods, outputs = _goods(runs, index), runs.part.kept[index].outputs
    return goods[0] if goods and outputs and goods[0].shape == outputs[0].shape else None


def fellows(runs: Runs) -> list[Parting]:
    """The other ops of the line at which the chunk parts, in the same call of its module: a line may be several of a kind."""
    found, parting = [], runs.parting
    for i, event in enumerate(runs.part.events) if parting is not None and parting.event is not None else ():
        assert parting is not None and parting.event is not None
        if i == parting.event.index or line_of(event) != line_of(parting.event) or event.where.module != parting.where.module:
            continue
        if (good := counterpart(runs, i)) is not None:
            whole = runs.full.kept[runs.pairs[i]] if i in runs.pairs else None
            found.append(replace(parting, event=event, kept=runs.part.kept[i], whole=whole, good=[good]))
    return found


def _at_ends(runs: Runs, source: int) -> dict[int, list[Tensor]]:
    """The values that the full run has made out of what the chunk passed on unchanged, for every op at that line."""
    key = line_of(runs.part.events[source])
    found = {i: _read_as(runs, i) for i, event in enumerate(runs.part.events) if line_of(event) == key}
    return {i: [good] for i, good in found.items() if good is not None}


def _read_as(runs: Runs, index: int) -> Tensor | None:
    """What the full run has where an op of the chunk next reads this op's output."""
    storages = {info.storage for info in runs.part.events[index].outputs}
    shape = runs.part.kept[index].outputs[0].shape if runs.part.kept[index].outputs else None
    for i in range(index + 1, len(runs.part.events)):
        event = runs.part.events[i]
        if i in runs.pairs:
            for k, info in enumerate(event.inputs):
                if info.storage in storages and info.shape == shape and k < len(runs.full.kept[runs.pairs[i]].inputs):
                    return _best(runs.full.kept[runs.pairs[i]].inputs[k], runs.part.kept[i].inputs[k], runs.chunk)
    return None


def _writer(values: dict[int, list[Tensor]]) -> Callable[[int, list[Tensor]], None]:
    def write(index: int, outputs: list[Tensor]) -> None:
        for good, out in zip(values.get(index, ()), outputs, strict=False):
            spread = any(
                stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)
            )  # torch refuses to write there
            if good.shape == out.shape and good.dtype == out.dtype and not spread:
                with torch.no_grad():
                    out.copy_(good)

    return write


def _smallest_module(runs: Runs, limit: float) -> Parting | None:
    """The first module call to end whose inputs agree and whose outputs do not."""
    seen: dict[str, list[KeptCall]] = {}
    for call in runs.full.kept_calls:
        seen.setdefault(call.module, []).append(call)
    for mine in runs.part.kept_calls:
        theirs = seen.get(mine.module)
        if not theirs or not mine.module:
            continue
        other = theirs.pop(0)
        inputs = [_state(a, b, runs.chunk, limit) for a, b in zip(other.inputs, mine.inputs, strict=False)]
        outputs = [_state(a, b, runs.chunk, limit) for a, b in zip(other.outputs, mine.outputs, strict=False)]
        if outputs[:1] == ["differs"] and inputs[:1] == ["agrees"]:
            spot = mine.spot
            where = Where(module=mine.module)
            if spot is not None:
                where = Where(module=mine.module, function=spot.function, file=short_path(spot.file), line=spot.line)
            return Parting(where=where, spot=spot, module_only=True)
    return None


def _dropped_keys(runs: Runs) -> Parting | None:
    """The first softmax of the chunk that lacks a key to which the full run gives weight."""
    chunk = runs.chunk
    for i, j in runs.pairs.items():
        event = runs.part.events[i]
        if event.op not in ("_softmax", "_safe_softmax"):
            continue
        weights, mine = runs.full.kept[j].outputs[0], runs.part.kept[i].outputs[0]
        gone = chunk.stop - mine.shape[-1]
        if weights.shape[-2:] != (chunk.seq, chunk.seq) or gone <= 0:
            continue
        largest = float(weights[..., chunk.start : chunk.stop, :gone].max())
        if largest > 0:
            return Parting(where=event.where, spot=runs.part.spots[i], event=event, kept=runs.part.kept[i], dropped=largest)
    return None


def _matching(full: Recording, part: Recording) -> dict[int, int]:
    """Chunk op -> full op, for the ops that are the same op at the same place."""
    left, right = ([(e.op, e.where.module, *line_of(e)[1:]) for e in r.events] for r in (full, part))
    blocks = SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    return {block.b + k: block.a + k for block in blocks for k in range(block.size)}


def _state(full: Tensor, part: Tensor, chunk: Chunk, limit: float) -> str:
    views = aligned(full, part, chunk)
    if not views:
        return "unknown"
    return "agrees" if any(difference(view, part, relative_limit=limit) is None for view in views) else "differs"


def _best(full: Tensor, part: Tensor, chunk: Chunk) -> Tensor | None:
    views = aligned(full, part, chunk)
    return views[0] if views else None


def _cuts(view: Tensor, dim: int, size: int, chunk: Chunk) -> list[Tensor]:
    whole = view.shape[dim]
    if whole == size:
        return [view]
    if whole == chunk.seq:
        if size == chunk.queries:
            return [view.narrow(dim, chunk.start, size)]
        return [view.narrow(dim, chunk.stop - size, size)] if size <= chunk.stop else []
    times, rest = divmod(whole, chunk.seq)
    if rest or times < 2 or size != times * chunk.queries:
        return []
    rows = view.unflatten(dim, (chunk.seq, times)).narrow(dim, chunk.start, chunk.queries).flatten(dim, dim + 1)
    columns = view.unflatten(dim, (times, chunk.seq)).narrow(dim + 1, chunk.start, chunk.queries).flatten(dim, dim + 1)
    return [rows, columns]


def rope_type(subject: Subject) -> str | None:
    """The declared kind of RoPE scaling, under the names that configs use for it."""
    declared = subject.setting("rope_parameters", "rope_scaling")
    if not isinstance(declared, dict):
        return None
    kinds = [declared, *(value for value in declared.values() if isinstance(value, dict))]
    found = [str(kind.get("rope_type") or kind.get("type")) for kind in kinds if kind.get("rope_type") or kind.get("type")]
    return next((kind for kind in found if kind in LENGTH_DEPENDENT), found[0] if found else None)
