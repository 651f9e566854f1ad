"""How a model is trained: batch, steps, learning rates, schedule, optimizer. Every number has its source.

- `datadecide-4M` ... `datadecide-1B`: what allenai/OLMo scripts/ladder.py @ 55d4871d computes for the DataDecide ladder.
- `short`: AdamW at the ladder's rate for 4M, 1.4e-2, on 100 steps of 8 x 512: where people start from.
- `olmodebug`: ours, for the same 100 steps of 8 x 512; `reports/training.md` says what each choice is worth.
"""

import difflib
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import UsageError

Schedule = Literal["cosine", "linear"]
Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to train. `embedding_rate` and `norm_rate` stand beside `learning_rate`, which is that of the matrices.

    `final_share`: the share of its peak at which a rate ends. `initializer_range`: the std that matrices and embedding are
    drawn with; None leaves the model's own. `zero_residual`: what layers add to the residual stream begins at 0.
    `document_tokens`: only so many first tokens of each document are trained on; `aligned`: each document starts a window;
    `starts_share`: the share of the steps, the last ones, that train on the windows with which documents begin, and the
    steps before them on all others.
    """

    name: str
    steps: int
    batch_size: int
    seq_len: int
    optimizer: Optimizer
    learning_rate: float
    embedding_rate: float
    norm_rate: float
    warmup_steps: int
    schedule: Schedule = "cosine"
    final_share: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.95
    clip_norm: float = 1.0
    initializer_range: float | None = None
    zero_residual: bool = False
    document_tokens: int | None = None
    aligned: bool = False
    starts_share: float = 0.0

    def rate_share(self, step: int) -> float:
        """The share of its peak that every rate has at a step, from 0: linear warmup, then the schedule."""
        if step < self.warmup_steps:
            # The ladder's first step has rate 0; a run of a hundred cannot spare it.
            return step / self.warmup_steps if self.name.startswith("datadecide") else (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        shape = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final_share + (1 - self.final_share) * shape

    def starts(self) -> int:
        """How many of the run's windows are such with which documents begin: whole steps, the last ones."""
        return round(self.starts_share * self.steps) * self.batch_size

    def first_of_kind(self, step: int) -> int:
        """The first step, from 0, that trains on the same kind of windows as this one does."""
        starts = self.steps - self.starts() // self.batch_size
        return starts if step >= starts else 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "betas": list(self.betas)}


# The ladder's steps and batches as published (DataDecide utils/constants.py): the trainer stops ten steps after the schedule's
# end, and the 530M run gained ten more when it was restarted. N is the exact count without the embedding up to 90M, and the
# nominal size from 150M on.
LADDER: dict[str, tuple[int, int, float]] = {  # steps, batch, N
    "4M": (5_725, 32, 3_744_832),
    "6M": (9_182, 32, 6_010_464),
    "8M": (13_039, 32, 8_538_240),
    "10M": (15_117, 32, 9_900_432),
    "14M": (21_953, 32, 14_380_224),
    "16M": (24_432, 32, 16_004_560),
    "20M": (14_584, 64, 19_101_888),
    "60M": (29_042, 96, 57_078_144),
    "90M": (29_901, 160, 97_946_640),
    "150M": (38_157, 192, 150e6),
    "300M": (45_787, 320, 300e6),
    "530M": (57_786, 448, 530e6),
    "750M": (63_589, 576, 750e6),
    "1B": (69_369, 704, 1e9),
}
LADDER_SEQ_LEN = 2048


def _ladder(size: str) -> Recipe:
    steps, batch, count = LADDER[size]
    rate = 0.0047 * (count / 108e6) ** (-1 / 3)
    return Recipe(
        name=f"datadecide-{size}",
        steps=steps,
        batch_size=batch,
        seq_len=LADDER_SEQ_LEN,
        optimizer="adamw",
        learning_rate=rate,
        embedding_rate=rate,
        norm_rate=rate,
        warmup_steps=round(count / (batch * LADDER_SEQ_LEN)),
        weight_decay=0.05,
        initializer_range=0.02,
    )


SHORT = Recipe(
    name="short",
    steps=100,
    batch_size=8,
    seq_len=512,
    optimizer="adamw",
    learning_rate=1.4e-2,
    embedding_rate=1.4e-2,
    norm_rate=1.4e-2,
    warmup_steps=10,
)

OURS = Recipe(
    name="olmodebug",
    steps=100,
    batch_size=8,
    seq_len=512,
    optimizer="muon",
    learning_rate=4e-2,
    embedding_rate=3e-2,
    norm_rate=4e-3,
    warmup_steps=10,
    schedule="linear",
    final_share=0.0,
    initializer_range=0.05,
    zero_residual=True,
    document_tokens=5120,  # ten windows: 80 documents fill about the 800 windows of the run once
    aligned=True,
    starts_share=0.2,  # 80 documents' first windows, twice
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (OURS, SHORT, *map(_ladder, LADDER))}


def recipe(name: str) -> Recipe:
    """The recipe of that name; UsageError with the nearest names where there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3) or list(RECIPES)[:4]
        raise UsageError(f"--recipe {name}: expected a known name such as {', '.join(near)}")
    return RECIPES[name]
