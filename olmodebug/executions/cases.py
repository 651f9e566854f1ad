"""What two executions are compared on: a padded batch, a long one, cached decoding, and a step of training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UsageError
from ..records import Case
from ..subject import Subject

Mode = Literal["forward", "decode", "step"]
NAMES = ("padded", "long", "decode", "step")
LONG = 4  # times the usual length
RATE = 1e-2  # of the one optimizer step; large enough that the smallest change is no rounding of the weight


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityCase:
    """One case and what is run on it: a forward, a decoding with the cache, or loss, backward and optimizer step."""

    name: str
    mode: Mode
    case: Case


def cases_of(subject: Subject, only: Sequence[str] = ()) -> list[ParityCase]:
    """The cases that apply to a subject; the step comes last, since it changes the weights. UsageError where none of `only` does."""
    for name in only:
        if name not in NAMES:
            raise UsageError(f"--case {name}: expected one of {', '.join(NAMES)}")
    batch, length = subject.sizes()
    ids = subject.token_ids(batch, length, seed=11)
    plain = Case(name="a batch", input_ids=ids)
    found = []
    if subject.convention.attention_mask and length > 3:
        mask = tuple((0,) * (i % 3) + (1,) * (length - i % 3) for i in range(batch))
        found.append(ParityCase(name="padded", mode="forward", case=replace(plain, name="padded on the left", attention_mask=mask)))
    longest = min(subject.usable_positions or LONG * length, LONG * length)
    if longest > length:
        found.append(ParityCase(name="long", mode="forward", case=Case(name="long", input_ids=subject.token_ids(1, longest, seed=12))))
    if subject.convention.cache and length > 3:
        found.append(ParityCase(name="decode", mode="decode", case=plain))
    found.append(ParityCase(name="step", mode="step", case=replace(plain, labels=ids)))
    kept = [case for case in found if not only or case.name in only]
    if not kept:
        raise UsageError(
            f"--case {', '.join(only)}: not for this model: `padded` needs an attention_mask, `decode` a cache, `long` room for positions"
        )
    return kept


def learning_rule(model: nn.Module, dtype: str) -> Any:
    """The optimizer of the step: AdamW, and SGD in 16 bits, where AdamW's eps of 1e-8 is zero in float16."""
    if dtype in ("float16", "bfloat16"):
        return torch.optim.SGD(model.parameters(), lr=RATE, foreach=False)
    return torch.optim.AdamW(model.parameters(), lr=RATE, foreach=False, fused=False)
