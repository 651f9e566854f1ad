"""Cases drawn by Hypothesis: sizes, lengths, cuts, padding and seeds, and the smallest one that breaks a rule.

Only small integers are drawn; token ids follow from a seed. Nothing of the user's own Hypothesis settings is read or
changed: every search carries its own, without a database and the same on every run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

EXAMPLES = 12  # per probe and search: a draw costs two forwards

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The integers that a pair of runs is made of; `cut` lies inside the sequence, `row` inside the batch."""

    batch: int
    seq: int
    cut: int
    row: int
    masked: bool


@st.composite
def sizes(draw: st.DrawFn, *, least_batch: int = 1, longest: int = 24) -> Sizes:
    """Any batch of up to five rows and any length up to `longest`; the simplest is the smallest."""
    batch = draw(st.integers(least_batch, 5), label="batch")
    seq = draw(st.integers(2, max(2, longest)), label="seq_len")
    cut = draw(st.integers(1, seq - 1), label="cut")
    row = draw(st.integers(0, batch - 1), label="row")
    return Sizes(batch=batch, seq=seq, cut=cut, row=row, masked=draw(st.booleans(), label="masked"))


def smallest_breaking(strategy: st.SearchStrategy[T], broken: Callable[[T], bool], *, examples: int = EXAMPLES) -> T | None:
    """The simplest drawn value for which `broken` holds, shrunk; None when none of the examples does."""
    rules = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    try:
        return find(strategy, broken, settings=rules)
    except NoSuchExample:
        return None
