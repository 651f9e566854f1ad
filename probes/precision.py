"""The model in 16 bits, and 16 bits where nobody asked for them."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from olmodebug.casts import cast
from olmodebug.explain import source_lines
from olmodebug.load import SubjectCodeError
from olmodebug.own_code import own_code, quiet
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case, Event
from olmodebug.relations.invariance import crash, run
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.settle import settled
from olmodebug.subject import Subject
from olmodebug.tracing.tracer import Recording, record

LOW = ("bfloat16", "float16")
MOVES = (
    "_to_copy",
    "copy_",
    "clone",
    "view",
    "_unsafe_view",
    "expand",
    "slice",
    "select",
    "t",
    "transpose",
    "permute",
    "unsqueeze",
    "detach",
    "split",
    "alias",
)
# Where 8 bits of mantissa are known to cost accuracy in a model that is otherwise more precise: see the docstring.
SENSITIVE = ("_softmax", "_log_softmax", "_safe_softmax", "logsumexp", "exp", "cos", "sin", "outer", "nll_loss_forward")
OVERFLOW = re.compile(r"cannot be converted to type \S*(Half|BFloat16) without overflow")  # torch's words, for fill_ and masked_fill
# Ops that are told to write an infinity.
FILLS = (
    "full",
    "full_like",
    "fill_",
    "masked_fill",
    "masked_fill_",
    "where",
    "scalar_tensor",
    "triu",
    "tril",
    "log",
    "_to_copy",
    "copy_",
    "empty",
    "empty_like",
)


@probe()
def no_hidden_downcast(subject: Subject) -> Iterator[Finding]:
    """A model in float32 computes its softmax, its angles and its loss in float32: no cast to 16 bits is written into the code.

    Why: a softmax in bfloat16 has two digits, a loss in bfloat16 moves in steps of 3 %; more precise weights do not help.
    Catches: F.softmax(..., dtype=torch.bfloat16), logits.bfloat16() before the loss, angles in bfloat16.
    """
    twin = subject.fresh_twin(dtype=torch.float32)
    if twin.dtype != torch.float32:
        not_applicable("it does not run in float32")
    if any(t.dtype in (torch.bfloat16, torch.float16) for t in [*twin.model.parameters(), *twin.model.buffers()]):
        not_applicable("it holds 16-bit tensors of its own")
    batch, seq = twin.sizes()
    ids = twin.token_ids(batch, seq)
    case = Case(name="a batch", input_ids=ids, labels=ids if twin.convention.labels else None)
    try:
        recording = _recorded(twin, case)
    except SubjectCodeError:  # labels of another shape, or none without images: the loss probes speak of those
        recording = _recorded(twin, replace(case, labels=None))
    with _Autocasts() as autocasts:
        run(twin, replace(case, labels=None))
    told = False
    seen: set[tuple[str | None, int | None]] = set()
    for event in recording.events:
        low = [info.dtype for info in event.outputs if info.dtype in LOW]
        key = (event.where.file, event.where.line)
        if not low or event.op in MOVES or key in seen:
            continue
        seen.add(key)
        sensitive = event.op in SENSITIVE or _feeds_angle(recording, event)
        if not sensitive and any(e.op in SENSITIVE for e in recording.events if (e.where.file, e.where.line) == key):
            continue
        name = event.op.strip("_")
        if autocasts.seen and not sensitive:  # what autocast lowers is no slip: told once
            if not told:
                yield Found(
                    probe="",
                    severity="note",
                    message=f"forward switches autocast on by itself: {name} computes in {low[0]} whatever the caller asks for",
                    where=event.where,
                    source=source_lines(event.where),
                    case=case,
                )
            told = True
            continue
        yield Found(
            probe="",
            severity="error" if sensitive else "warning",
            message=f"{name} computes in {low[0]} although the model and its inputs are float32",
            where=event.where,
            source=source_lines(event.where),
            cause=f"the code casts to {low[0]} itself, in a model of any precision",
            fix="compute in float32 here: dtype=torch.float32, or no cast",
            expected="float32",
            observed=low[0],
            case=case,
        )


class _Autocasts(TorchFunctionMode):
    """Whether autocast is on in some call inside; none is on around it."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or torch.is_autocast_enabled("cpu")
        return func(*args, **(kwargs or {}))


@probe()
def finite_in_16_bits(subject: Subject) -> Iterator[Finding]:
    """In bfloat16 and in float16 the logits of ordinary tokens are finite, with padding too.

    Why: one overflow makes the loss NaN, and in training everything after it.
    Catches: a mask constant beyond 65504; two masks of finfo.min added up; exp without a maximum taken off.
    """
    batch, seq = subject.sizes()
    ids = subject.token_ids(batch, seq, seed=25)
    plain = Case(name="a batch", input_ids=ids)
    cases = [plain]
    if subject.convention.attention_mask and seq > 3:
        mask = tuple((0,) * (i % 3) + (1,) * (seq - i % 3) for i in range(batch))
        cases.append(replace(plain, name="a batch padded on the left", attention_mask=mask))
    usual = subject.twin(dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        twin = subject.fresh_twin(dtype=dtype)
        if twin.dtype != dtype:  # it raises, or is not finite even on a short prompt
            twin = _forced(subject, dtype)
        for case in cases:
            try:
                bad = _non_finite(run(twin, case), case)
            except SubjectCodeError as error:
                if OVERFLOW.search(str(error.__cause__)):
                    yield _too_large(twin, case, error, name)
                break  # else kernels that are missing on the CPU, or a dtype that the code does not take
            if bad == 0 or _non_finite(run(usual, case), case):
                continue
            recording = _recorded(twin, case, keep=True)
            event = _birth(recording)
            yield Found(
                probe="",
                severity="warning",
                message=f"in {name} {bad} logits of real tokens are not finite ({case.name})"
                + (f": {event.op.strip('_')} makes the first one" if event else ""),
                where=event.where
                if event
                else replace(recording.events[-1].where, function=None, file=None, line=None, op=None, module=""),
                source=source_lines(event.where) if event else (),
                fix="keep masks within torch.finfo(dtype), and compute squares, exponentials and norms in float32",
                expected="finite logits",
                observed=f"{bad} that are NaN or inf",
                evidence={"condition": f"the model in {name}"},
                case=case,
            )
            break


def _too_large(twin: Subject, case: Case, error: SubjectCodeError, dtype: str) -> Found:
    """The finding for a constant that torch refuses to write into a tensor of 16 bits."""
    return replace(
        crash(twin, case, error),
        severity="warning",
        message=f"in {dtype} forward raises {type(error.__cause__).__name__}: a constant written here is beyond {torch.finfo(getattr(torch, dtype)).max:.6g}",
        cause=f"the constant is a number of float32, and {dtype} has none as large",
        fix="take the dtype's own smallest number, torch.finfo(scores.dtype).min, or compute the scores in float32",
        evidence={"condition": f"the model in {dtype}"},
    )


@probe()
def softmax_in_float32(subject: Subject) -> Iterator[Finding]:
    """Attention weights of a model in bfloat16 come from a softmax in float32.

    Why: bfloat16 weights are rounded to 8 bits; long contexts and evaluations feel it. Many models accept that.
    Catches: F.softmax(scores, dim=-1) without dtype=torch.float32 in attention written out.
    """
    twin = subject.fresh_twin(dtype=torch.bfloat16)
    if twin.dtype != torch.bfloat16:
        not_applicable("it does not run in bfloat16")
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq))
    for event in _recorded(twin, case).events:
        info = event.outputs[0] if event.outputs else None
        if event.op == "_softmax" and info is not None and info.dtype == "bfloat16" and info.shape[-2:] == (seq, seq):
            yield Found(
                probe="",
                severity="note",
                message="in bfloat16 the attention softmax computes in bfloat16",
                where=event.where,
                source=source_lines(event.where),
                fix="F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)",
                evidence={"condition": "the model in bfloat16"},
                case=case,
            )
            return


def _recorded(twin: Subject, case: Case, *, keep: bool = False) -> Recording:
    with torch.no_grad(), quiet(), settled(seed=twin.seed), own_code(twin, case):
        return record(twin.model, lambda: twin.call(case), keep=keep)


def _forced(subject: Subject, dtype: torch.dtype) -> Subject:
    twin = subject.fresh_twin(dtype=subject.dtype)
    cast(twin.model, dtype)
    return twin


def _non_finite(logits: Tensor, case: Case) -> int:
    """How many logits of real tokens are NaN or infinite."""
    bad = ~torch.isfinite(logits)
    if case.attention_mask is not None and logits.shape[1] == case.seq_len:
        bad = bad & torch.tensor(case.attention_mask, dtype=torch.bool)[..., None]
    return int(bad.sum())


def _birth(recording: Recording) -> Event | None:
    """The first op that makes NaN, or inf out of finite numbers without being told to."""
    for event, kept in zip(recording.events, recording.kept, strict=True):
        floats = [t for t in kept.inputs if t.is_floating_point()]
        outputs = [t for t in kept.outputs if t.is_floating_point()]
        if event.op in FILLS or event.op.startswith("new_"):
            continue
        new_nan = any(bool(t.isnan().any()) for t in outputs) and not any(bool(t.isnan().any()) for t in floats)
        new_inf = any(bool(t.isinf().any()) for t in outputs) and not any(bool(t.isinf().any()) for t in floats)
        if new_nan or new_inf and floats:
            return event
    return None


def _feeds_angle(recording: Recording, event: Event) -> bool:
    """Whether the next sine or cosine reads what this op wrote in 16 bits, through casts at most."""
    pointers = {info.storage for info in event.outputs if info.storage}
    for later in recording.events[event.index + 1 : event.index + 6]:
        read = {info.storage for info in later.inputs}
        if later.op in ("cos", "sin") and read & pointers:
            return True
        if later.op in MOVES and read & pointers:
            pointers |= {info.storage for info in later.outputs if info.storage}
    return False
