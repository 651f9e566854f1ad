"""A run that fails only after other calls: what the model keeps of them is the cause, whatever the exception says."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..explain import Explanation
from ..load import SubjectCodeError
from ..own_code import quiet
from ..records import Case
from ..settle import settled
from ..state import keeper
from ..subject import Subject

HOW_TO_KEY = "key what is cached by everything it depends on: sizes, offset, window, positions, mask, dtype, device"


def different_calls(twin: Subject) -> Iterator[Case]:
    """Calls that a table kept under too small a key takes for one: plain, with one row, with positions, with other ones,
    with a mask, of other sizes."""
    batch, seq = twin.sizes()
    ids = twin.token_ids(batch, seq, seed=17)
    yield Case(name="a plain call", input_ids=ids)
    yield Case(name="a call with one row", input_ids=ids[:1])
    longest = twin.usable_positions or 4 * seq
    counted, moved = (tuple(range(seq)),) * batch, (tuple(range(0, 2 * seq, 2)),) * batch  # a mere shift would not show with RoPE
    with_positions = bool(twin.convention.position_ids) and longest >= 2 * seq
    case = Case(name="a call with positions", input_ids=ids, position_ids=counted)
    yield case if with_positions else replace(case, name="a plain call again", position_ids=None)
    if with_positions:
        yield Case(name="a call with other positions", input_ids=ids, position_ids=moved)
    padded = ((0,) * (seq // 2) + (1,) * (seq - seq // 2),) * batch
    if twin.convention.attention_mask:
        yield Case(name="a call with a mask", input_ids=ids, attention_mask=((1,) * (seq - 1) + (0,),) * batch)
        yield Case(name="a call with left padding", input_ids=ids, attention_mask=padded)
    for length in (max(1, seq - 3), min(seq + 5, longest)):
        yield Case(name=f"a call with {length} tokens", input_ids=twin.token_ids(batch + 1, length, seed=19))


def fails_after_another(subject: Subject, error: BaseException) -> Explanation | None:
    """What an exception of a run comes from where the run goes through as the first call of a copy and, on another copy, not
    after one of `different_calls`; None where that is not so. An exception that brings no case is looked for with one row."""
    if isinstance(error.__cause__ or error, MemoryError | torch.OutOfMemoryError):
        return None  # copies would want more of it
    used, case = (error.subject, error.case) if isinstance(error, SubjectCodeError) else (None, None)
    dtype, training, attention = torch.float64, False, None
    if used is not None:
        dtype, training, attention = used.dtype, used.model.training, used.attention

    def copy() -> Subject:
        return subject.fresh_twin(dtype=dtype, training=training, attention=attention)

    try:
        first = copy()
    except SubjectCodeError:  # what cannot be copied cannot be asked
        return None
    if case is None:
        case = Case(name="a sequence", input_ids=first.token_ids(1, subject.sizes()[1]))
    if _raised(first, case) is not None:
        return None
    for earlier in different_calls(first):
        other = copy()
        if _raised(other, earlier) is None and (raised := _raised(other, case)) is not None:
            where, name = keeper(other.model)
            words = f"{type(raised).__name__}: {str(raised).strip().partition(chr(10))[0]}"
            return Explanation(
                message=f"{case.name} goes through as the first call, and after {earlier.name} it fails",
                where=where,
                cause=f"{name} is kept from one call and used in the next"
                if name
                else "the model keeps something from one call that changes the next",
                fix=HOW_TO_KEY,
                raised=words,
                expected="what it gives as the first call",
                observed="an exception",
            )
    return None


def _raised(twin: Subject, case: Case) -> Exception | None:
    with settled(twin.model, seed=twin.seed), quiet():
        try:
            twin.logits(case)
        except Exception as error:
            return error
    return None
