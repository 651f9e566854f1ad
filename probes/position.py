"""Positions: honoured, and valid over the whole context that the configuration declares."""

import ast
import inspect
import linecache
import re
import textwrap
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from olmodebug.compare import difference
from olmodebug.explain import forward_place, place_of, source_lines
from olmodebug.load import SubjectCodeError
from olmodebug.own_code import quiet
from olmodebug.probe import not_applicable, probe, skip
from olmodebug.records import Case, Where
from olmodebug.relations.invariance import crash, limit_of, run
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.sources import Spot, code_of
from olmodebug.subject import Subject, rows_before_the_first_position
from olmodebug.tracing.tracer import Recording, record
from olmodebug.units import listed

# A run on the whole context is tried for real up to this many logits; above it by position_ids and on the meta device.
MOST_LOGITS = 40_000_000
LONGEST = 8192
LEAST_ROWS = 16  # a table with fewer may number something else: segments, sides
ALIBI_NAMES = ("alibi", "use_alibi")
ANGLE_OPS = ("cos", "sin", "polar")
POSITION_TABLE = re.compile(r"(^|[._])(cos|sin|rope|rotary|inv_freq|freqs|freqs_cis|wpe|wpos|pos|position|positions|alibi)([._]|$|_)")


@probe()
def whole_context_runs(subject: Subject) -> Iterator[Finding]:
    """Every position that the configuration declares can be used, up to the last.

    Why: a position table that is too short is an IndexError on the CPU and `device-side assert triggered` on CUDA,
    hours into a run, at the first long sequence.
    Catches: cos[position_ids] with a table made for fewer positions; cos[:seq_len] that comes back short.
    """
    longest = subject.max_positions
    if longest is None:
        not_applicable("its config declares no context length")
    longest -= rows_before_the_first_position(subject, longest)
    twin = subject.twin(dtype=torch.float32)
    for case in _cases(twin, longest):
        try:
            run(twin, case)
        except SubjectCodeError as error:
            if isinstance(error.__cause__, MemoryError):
                skip(f"a sequence of {longest} tokens does not fit into this machine's memory")
            last = max(case.position_ids[0]) if case.position_ids else case.seq_len - 1
            finding = crash(twin, case, error, message=f"position {last} fails, and the config declares {longest} positions")
            yield replace(finding, case=replace(case, input_ids=tuple(row[:8] for row in case.input_ids)) if case.seq_len > 64 else case)
            return


@probe(after=("position.whole-context-runs",))
def honoured(subject: Subject) -> Iterator[Finding]:
    """Given position_ids change the logits: stretched positions are not the same as counted ones.

    Why: packed and left-padded batches rely on the positions they pass.
    Catches: position_ids accepted and rebuilt inside; a RoPE that does nothing.
    """
    if subject.convention.position_ids is None:
        not_applicable("forward takes no position_ids")
    twin = subject.twin()
    batch, seq = twin.sizes()
    stretch = min(3, ((twin.usable_positions or 4096) - 1) // max(1, seq - 1))
    if stretch < 2 or seq < 3:
        not_applicable("its context is too short to stretch positions")
    ids = twin.token_ids(batch, seq, seed=8)
    counted = Case(name="counted positions", input_ids=ids, position_ids=(tuple(range(seq)),) * batch)
    stretched = replace(counted, name=f"positions times {stretch}", position_ids=(tuple(range(0, seq * stretch, stretch)),) * batch)
    limit = limit_of(twin)
    if difference(run(twin, counted), run(twin, stretched), relative_limit=limit) is not None:
        # Positions that jump may be taken for packed documents, which a mask of ones says they are not.
        seen = ((1,) * seq,) * batch if subject.convention.attention_mask else None
        counted, stretched = (replace(case, attention_mask=seen) for case in (counted, stretched))
        if seen is None or difference(run(twin, counted), run(twin, stretched), relative_limit=limit) is not None:
            return
        if not _table_unused(twin, counted, stretched):
            return  # made from the mask, or met by queries and keys that are zero yet
    if any(subject.setting(name) is True for name in ALIBI_NAMES):
        not_applicable("its config chooses ALiBi, which counts keys and knows no positions")
    if not _looks_back(twin, counted):
        not_applicable("no token sees another one (a window of 1), so positions change nothing")
    if not _encodes_positions(twin, counted):
        not_applicable("the model encodes no positions at all, which is a design of its own (NoPE)")
    where, reached = _where_positions_end(twin, counted, stretched)
    where = where if where.file else forward_place(twin.model)
    yield Found(
        probe="",
        severity="error",
        where=where,
        source=source_lines(where),
        message=f"logits do not change when {twin.convention.position_ids} are stretched by {stretch}",
        cause=f"the positions reach {where.op} at this line, and nothing after it depends on them: the rotation is not applied"
        if reached
        else f"{twin.convention.position_ids} is accepted and not used: no op depends on it",
        fix="use the result of the rotation" if reached else f"use {twin.convention.position_ids} where positions are made",
        expected="other logits",
        observed="the same logits",
        case=stretched,
    )


@probe(after=("position.whole-context-runs",))
def table_is_read(subject: Subject) -> Iterator[Finding]:
    """A table of positions is read at another row for every position.

    Why: a row that all tokens share says nothing about their order, and the other rows are never trained.
    Catches: zeros where arange belongs; positions of shape [seq_len, 1] that count the wrong dimension; a clamp that keeps
    the far end of the context on one row.
    """
    twin = subject.twin()
    batch, seq = twin.sizes()
    if seq < 3:
        not_applicable("the model takes fewer than three tokens")
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=37))
    run(twin, case)  # an exception of the model is a finding of its own
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case), keep=True)
    tables = 0
    for event, kept, spot in zip(recording.events, recording.kept, recording.spots, strict=True):
        name = next((name for name in event.parameters if POSITION_TABLE.search(name.lower())), None)
        rows = kept.arguments.get("indices")
        if event.op != "embedding" or name is None or not isinstance(rows, Tensor) or rows.numel() < seq:
            continue
        tables += 1
        table = kept.inputs[0].shape[0]
        if table < max(seq, LEAST_ROWS):
            continue
        where = place_of(spot, module=event.where.module, op=event.op)
        if bool((rows != rows.flatten()[0]).any()):
            if (found := _read_twice(subject, name, where)) is not None:
                yield found
                return
            continue
        yield Found(
            probe="",
            severity="warning",
            message=f"{name} is read at row {int(rows.flatten()[0])} for all {seq} positions; it has {table} rows",
            where=where,
            source=source_lines(where),
            cause="the indices that it is read with are all the same",
            fix="read it with torch.arange(seq_len)",
            expected="a row for each position",
            observed="one row for all",
            case=case,
        )
        return
    if not tables:
        not_applicable("forward looks no positions up in a table")


def _read_twice(subject: Subject, name: str, where: Where) -> Found | None:
    """The finding for a table of positions that is long enough for the whole context and is read at one row for several
    positions of it."""
    path = name.rpartition(".")[0]
    twin, longest = subject.twin(dtype=torch.float32), subject.max_positions
    module = dict(twin.model.named_modules()).get(path)
    if longest is None or type(module) is not nn.Embedding:  # a class of its own may be called with something else than the rows
        return None
    longest -= rows_before_the_first_position(subject, longest)
    if longest > min(LONGEST, module.num_embeddings) or longest * twin.vocab_size > MOST_LOGITS:
        return None
    asked: list[Tensor] = []
    watch = module.register_forward_pre_hook(lambda _, given: asked.append(given[0].detach().flatten()))
    try:
        run(twin, Case(name="the whole context", input_ids=twin.token_ids(1, longest, seed=37)))
    finally:
        watch.remove()
    rows = asked[0].tolist() if asked else []
    if len(rows) != longest or len(set(rows)) == longest:
        return None
    row = next(row for i, row in enumerate(rows) if row in rows[:i])
    same = [i for i, each in enumerate(rows) if each == row]
    return Found(
        probe="",
        severity="warning",
        message=f"{name} is read at row {row} for {len(same)} of {longest} positions ({listed(same, 4)}); it has {module.num_embeddings} rows",
        where=where,
        source=source_lines(where),
        cause="several positions of the context are looked up in one row",
        fix="a row for each position: torch.arange(seq_len), without a clamp below the declared context",
        expected=f"{longest} rows",
        observed=f"{len(set(rows))} rows",
    )


def _looks_back(twin: Subject, case: Case) -> bool:
    """Whether the last position depends on the tokens before it."""
    other = twin.token_ids(case.batch_size, case.seq_len, seed=18)
    changed = replace(case, input_ids=tuple(a[:-1] + b[-1:] for a, b in zip(other, case.input_ids, strict=True)))
    return difference(run(twin, case)[:, -1], run(twin, changed)[:, -1], relative_limit=limit_of(twin)) is not None


def _encodes_positions(twin: Subject, case: Case) -> bool:
    """Whether forward computes sines and cosines, or reads a table whose name says that it holds positions."""
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case))
    named = (name.lower() for event in recording.events for name in event.parameters)
    return any(event.op in ANGLE_OPS for event in recording.events) or any(POSITION_TABLE.search(name) for name in named)


def _where_positions_end(twin: Subject, counted: Case, stretched: Case) -> tuple[Where, bool]:
    """The last op that still depends on the positions given; else the line that counts positions by itself, or cuts them
    out of a table. The second value says which."""
    with torch.no_grad(), quiet():
        first = record(twin.model, lambda: twin.call(counted), keep=True)
        second = record(twin.model, lambda: twin.call(stretched), keep=True)
    last = _last_parted(first, second)
    if last is not None:
        event = first.events[last]
        dropped = _dropped_call(twin, event.where.module, event.where.function)
        if dropped is not None:
            return replace(dropped, op=event.op), True
        return place_of(first.spots[last], module=event.where.module, op=event.op), True
    for event, spot in zip(first.events, first.spots, strict=True):
        counts = event.op == "arange" and "pos" in linecache.getline(event.where.file or "", event.where.line or 0)
        cuts = event.op in ("slice", "narrow") and any(POSITION_TABLE.search(name) for name in event.parameters)
        if counts or cuts:
            return place_of(spot, module=event.where.module, op=event.op), False
    turned = next((i for i, event in enumerate(first.events) if event.op in ANGLE_OPS), 0)
    for event, spot, kept in reversed(list(zip(first.events, first.spots, first.kept, strict=True))[:turned]):
        if event.op == "arange" and kept.outputs[0].tolist() == list(range(counted.seq_len)):  # what the angles are made of
            return place_of(spot, module=event.where.module, op=event.op), False
    return Where(), False


def _last_parted(first: Recording, second: Recording) -> int | None:
    """The last op that gives two runs other numbers."""
    parted = (
        index
        for index, (a, b) in enumerate(zip(first.kept, second.kept, strict=False))
        if any(x.is_floating_point() and difference(x, y) is not None for x, y in zip(a.outputs, b.outputs, strict=False))
    )
    return max(parted, default=None)


def _table_unused(twin: Subject, counted: Case, stretched: Case) -> bool:
    """Whether the positions end in a table, the same for all tokens, or in a call whose result is thrown away."""
    others = replace(counted, input_ids=twin.token_ids(counted.batch_size, counted.seq_len, seed=9))
    with torch.no_grad(), quiet():
        first, second, third = (record(twin.model, lambda c=case: twin.call(c), keep=True) for case in (counted, stretched, others))  # type: ignore[misc]
    last = _last_parted(first, second)
    if last is None:
        return False
    where = first.events[last].where
    table = [e.op for e in first.events] == [e.op for e in third.events] and all(
        difference(x, y) is None for x, y in zip(first.kept[last].outputs, third.kept[last].outputs, strict=True)
    )
    return table or _dropped_call(twin, where.module, where.function) is not None


def _dropped_call(twin: Subject, module: str, function: str | None) -> Where | None:
    """The line of the module's forward that calls this function and throws away what it returns."""
    code = code_of(type(twin.model.get_submodule(module)).forward)
    if code is None or function is None:
        return None
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return None
    name = function.rpartition(".")[2]
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func).rpartition(".")[2] == name:
            return place_of(Spot(code, 0, first + node.lineno - 1), module=module)
    return None


def _cases(twin: Subject, longest: int) -> Iterator[Case]:
    """The last positions by position_ids, then the whole context at once where it is affordable."""
    if twin.convention.position_ids:
        seq = min(4, longest)
        positions = (tuple(range(longest - seq, longest)),)
        yield Case(name=f"positions up to {longest - 1}", input_ids=twin.token_ids(1, seq, seed=9), position_ids=positions)
    if longest <= LONGEST and longest * twin.vocab_size <= MOST_LOGITS:
        yield Case(name=f"{longest} tokens", input_ids=twin.token_ids(1, longest, seed=9))
