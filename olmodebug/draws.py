"""What probes draw of a subject, token ids and sizes, written down as values, so that a probe can be run on them again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .records import Rows


@dataclass(slots=True, kw_only=True)
class Draws:
    """`made` is what has been drawn since it was last emptied; `given` is handed out where it was drawn once before.

    Both hold JSON values: `sizes` is `[batch, seq_len]`, and `3x11 seed 1` the token ids of that shape and seed.
    """

    made: dict[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)

    def ids(self, shape: tuple[int, ...], seed: int, vocab_size: int, draw: Callable[[], Rows]) -> Rows:
        """The ids given for this shape and seed, if the vocabulary still has them, else those that `draw` makes."""
        name = f"{'x'.join(map(str, shape))} seed {seed}"
        known = tuple(tuple(row) for row in self.given.get(name, ()))
        rows = known if known and max(map(max, known), default=0) < vocab_size else draw()
        self.made[name] = rows
        return rows

    def sizes(self, draw: Callable[[], tuple[int, int]], longest: int | None) -> tuple[int, int]:
        """The (batch, seq_len) given, if the model still takes that many tokens, else those that `draw` finds."""
        known = self.given.get("sizes")
        batch, seq = known if known and known[1] <= (longest or known[1]) else draw()
        self.made["sizes"] = (batch, seq)
        return batch, seq
