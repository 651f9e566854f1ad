"""Decoding with a cache in two implementations whose forward agrees: a prompt at once, then token by token, on both sides."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..compare import difference
from ..explain import explain
from ..load import SubjectCodeError
from ..own_code import refused
from ..records import Case, Difference, Where
from ..relations.chunks import locate, pieces
from ..relations.parted import why
from ..relations.ways import chunked, no_cache
from ..report import Finding
from .aligned import Aligned, Side

DECODING = "parity.decoding"
STEPS = 3  # tokens that are read one by one behind the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """What decoding showed; `unasked` says why there was nothing to compare."""

    findings: tuple[Finding, ...] = ()
    unasked: str | None = None


def decoding(aligned: Aligned) -> Decoding:
    """Whether both sides, each with its own cache, give the same logits; where not, which of them leaves its own forward."""
    sides = (("the subject", aligned.left), ("the reference", aligned.right))
    lacking = [f"{name}: {reason}" for name, side in sides if (reason := no_cache(side.subject)) is not None][:1]
    length = aligned.case.seq_len
    if lacking or length <= STEPS:
        return Decoding(unasked="; ".join(lacking) or "the sequence is too short")
    case = replace(aligned.case, labels=None)
    sizes = (length - STEPS, *(1,) * STEPS)
    decoded: list[Tensor] = []
    for name, side in sides:
        try:
            logits = chunked(side.subject.fresh_twin(), case, sizes)
        except SubjectCodeError as error:
            if side is aligned.left and refused(error) is None:
                finding = explain(error).finding(case=error.case)
                return Decoding(findings=(finding.told(probe=DECODING, message=f"with a cache: {finding.message}"),))
            return Decoding(unasked=f"{name} raises with a cache: {error}")
        if logits is None:
            return Decoding(unasked=f"{name} gives no cache back")
        decoded.append(logits[:, -STEPS - 1 :])
    gap = difference(decoded[0], decoded[1], relative_limit=aligned.limit)
    return Decoding() if gap is None else Decoding(findings=_parted(aligned, decoded, gap, case, sizes))


def _parted(aligned: Aligned, decoded: Sequence[Tensor], gap: Difference, case: Case, sizes: tuple[int, ...]) -> tuple[Finding, ...]:
    whole = [full[:, -STEPS - 1 :] for full in (aligned.left_logits, aligned.right_logits)]
    strays = [difference(d, w, relative_limit=aligned.limit) for d, w in zip(decoded, whole, strict=True)]
    if strays == [None, None]:  # either is as near to its own forward as roundings let it be
        return ()
    mine = strays[0] is not None
    left, right = aligned.left.subject.spec, aligned.right.subject.spec
    which = (
        "both leave their own forward" if None not in strays else f"{left if mine else f'the reference, {right},'} leaves its own forward"
    )
    row, step = gap.index[0], gap.index[1]
    where, cause, fix = _where(aligned.left if mine else aligned.right, case, sizes, row, aligned.limit)
    return (
        Finding(
            probe=DECODING,
            severity="error" if mine else "warning",  # what the reference alone does wrong is no fault of the subject
            message=f"in one forward the two agree, decoding with a cache they differ by {gap.relative:.3g} of the largest logit: {which}",
            cause=cause if mine or cause is None else f"in the reference, {cause}",
            fix=fix,
            where=where if mine else Where(),
            expected="the logits of one forward over the whole sequence",
            observed=f"the largest difference at position {case.seq_len - STEPS - 1 + step}, {'the last of the prompt' if step == 0 else f'token {step} behind the prompt'}",
            evidence={
                "relative": gap.relative,
                "limit": aligned.limit,
                "subject_leaves_its_forward": mine,
                "reference_leaves_its_forward": strays[1] is not None,
                **({"place in the reference": str(where)} if not mine and where != Where() else {}),
            },
            case=aligned.case,
        ),
    )


def _where(side: Side, case: Case, sizes: tuple[int, ...], row: int, limit: float) -> tuple[Where, str | None, str | None]:
    """(the line at which a side's cached run leaves its own forward, why, what to do), as far as it can be told."""
    runs = locate(side.subject.fresh_twin(), replace(case, input_ids=(case.input_ids[row],)), pieces(sizes), limit=limit)
    if runs is None or runs.parting is None:
        return Where(), None, None
    told = why(runs)
    return told.where or runs.parting.where, told.cause, told.fix
