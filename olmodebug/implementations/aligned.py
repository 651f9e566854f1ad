"""Two implementations on the same weights and the same tokens: their runs, and whether these agree.

Both sides are deep copies in float64. Where they call SDPA, it runs as the plain matrix products that it stands for, so
that scores and weights are tensors of the trace. The weights are drawn anew, so that
no norm is all ones, no bias zero and no attention flat: whatever a model does with a weight then shows.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..compare import difference, roundings_limit
from ..errors import SubjectError
from ..own_code import own_code, quiet
from ..records import Case, Difference
from ..settle import settled
from ..subject import BATCH_SIZES, SEQ_LENS, Subject
from ..tracing.tracer import record
from ..units import listed
from .anchors import Graph, anchor, first_bad, graph_of
from .mapping import Layout, choices, fit, in_pairs, layout_of

# With embeddings of this size the usual eps of a norm, 1e-5 or 1e-6, is a visible part of the first mean square.
EMBEDDING_STD = 0.05
LONGEST = 67  # a window up to this length shows on the CPU in no time; a longer one is not tried

Weights = Mapping[str, Tensor]


@dataclass(slots=True, kw_only=True)
class Side:
    """One implementation: its copy in float64, its layout, and what its last traced run was."""

    subject: Subject
    layout: Layout
    pairs: bool = False  # its rows of q and k stand in interleaved order

    def load(self, weights: Weights) -> None:
        self.layout.load(in_pairs(weights, self.layout) if self.pairs else weights)

    def gradients(self) -> dict[str, Tensor | None]:
        found = self.layout.gradients()
        if not self.pairs:
            return found
        known = in_pairs({**{s: t for s, t in found.items() if t is not None}, **_shapes_of_q(self.layout, found)}, self.layout, back=True)
        return {slot: known.get(slot) if tensor is not None else None for slot, tensor in found.items()}


@dataclass(slots=True, kw_only=True)
class Aligned:
    """Both sides on one case with one set of weights; `limit` is the relative distance that rounding may make."""

    left: Side
    right: Side
    case: Case
    weights: dict[str, Tensor]
    limit: float = 0.0
    by_value: tuple[str, ...] = ()
    left_logits: Tensor = field(default_factory=lambda: torch.zeros(0))
    right_logits: Tensor = field(default_factory=lambda: torch.zeros(0))
    others: "list[Aligned]" = field(default_factory=list)  # what names left open, settled otherwise; none of them agrees either
    _graphs: tuple[Graph, Graph] | None = None

    @property
    def agree(self) -> bool:
        return self.gap() is None

    def gap(self, left: Tensor | None = None, right: Tensor | None = None) -> Difference | None:
        """How far the logits are apart; None where they agree."""
        a = self.left_logits if left is None else left
        return difference(a, self.right_logits if right is None else right, relative_limit=self.limit)

    def load(self) -> None:
        """Write the shared weights into both models, which other ways to map them may have overwritten."""
        self.left.load(self.weights)
        self.right.load(self.weights)

    def run_left(self, weights: Weights | None = None) -> Tensor:
        """The logits of the left with other weights, which are taken back."""
        return self._run(self.left, weights)

    def run_right(self, weights: Weights | None = None) -> Tensor:
        return self._run(self.right, weights)

    def _run(self, side: Side, weights: Weights | None) -> Tensor:
        if weights is not None:
            side.load(weights)
        try:
            return logits_of(side.subject, self.case)
        finally:
            if weights is not None:
                side.load(self.weights)

    def graphs(self) -> tuple[Graph, Graph]:
        """Both runs traced and anchored in one another."""
        if self._graphs is None:
            graphs = [traced(side.subject, self.case) for side in (self.left, self.right)]
            anchor(graphs[0], graphs[1], self.limit)
            self._graphs = (graphs[0], graphs[1])
        return self._graphs


def align(left: Subject, right: Subject, *, stated: Mapping[str, str] | None = None, seed: int = 0) -> Aligned:
    """Both subjects loaded with the same weights, what names leave open settled by value; SubjectError where they do not fit."""
    twins = [_twin(subject) for subject in (left, right)]
    for twin, given in zip(twins, (left, right), strict=True):
        with own_code(given, given.first_case(), stage="run in float64"):
            if not torch.isfinite(logits_of(twin, given.first_case())).all():
                raise SubjectError(f"{given.spec}: its logits are not finite, so there is nothing to compare; try olmodebug check")
    case = shared_case(twins[0], twins[1], seed=seed)
    uses: dict[int, dict[str, int]] = {}
    used = partial(_first_uses, case=case, known=uses)
    first, second = fit(layout_of(twins[0], other=twins[1]), layout_of(twins[1], other=twins[0]), stated=stated, used=used)
    reached: list[tuple[int, int, Aligned]] = []
    ways = [(way, False) for way in choices(first, second)]
    ways += [(way, True) for way, _ in ways if first.by_use]  # parts side by side may be used in any order
    for number, ((orders_left, orders_right, pairs_on), backwards) in enumerate(ways):
        if number:
            mine, theirs = (
                layout_of(twin, orders=orders, other=other)
                for twin, orders, other in ((twins[0], orders_left, twins[1]), (twins[1], orders_right, twins[0]))
            )
            first, second = fit(mine, theirs, stated=stated, used=partial(used, backwards=mine if backwards else None))
        found = _loaded(first, second, case, pairs_on, seed)
        if len(ways) > 1:
            found.by_value = _settled(orders_left, orders_right, pairs_on)
        if first.by_use:
            found.by_value += (f"{listed(first.by_use, 3)}: the order in which a run uses them{', the last first' * backwards}",)
        if found.agree:
            return found
        if len(ways) == 1:
            return found
        place = first_bad(found.graphs()[0])
        reached.append((len(found.graphs()[0].nodes) if place is None else place, -number, found))
    reached.sort(key=lambda item: item[:2], reverse=True)
    kept = reached[0][2]
    kept.others = [found for _, _, found in reached[1:]]
    kept.load()
    return kept


def _first_uses(layout: Layout, *, case: Case, known: dict[int, dict[str, int]], backwards: Layout | None = None) -> dict[str, int]:
    """By parameter, the op of a run that uses it first, below 0 for the layout that is counted backwards; each subject runs once."""
    subject = layout.subject
    if id(subject) not in known:
        with torch.no_grad(), quiet(), settled(subject.model, seed=subject.seed):
            recording = record(subject.model, lambda: subject.call(replace(case, labels=None)))
        found: dict[str, int] = {}
        for event in recording.events:
            for name in event.parameters:
                found.setdefault(name, event.index)
        known[id(subject)] = found
    return {name: -index for name, index in known[id(subject)].items()} if layout is backwards else known[id(subject)]


def _loaded(first: Layout, second: Layout, case: Case, pairs_on: str | None, seed: int) -> Aligned:
    found = Aligned(
        left=Side(subject=first.subject, layout=first, pairs=pairs_on == "left"),
        right=Side(subject=second.subject, layout=second, pairs=pairs_on == "right"),
        case=case,
        weights=drawn(first, second, seed=seed),
    )
    found.load()
    found.limit = max(limit_of(first.subject, case), limit_of(second.subject, case))
    found.left_logits, found.right_logits = logits_of(first.subject, case), logits_of(second.subject, case)
    return found


def _settled(orders_left: Mapping[str, str], orders_right: Mapping[str, str], pairs_on: str | None) -> tuple[str, ...]:
    lines = [f"{name} of the subject holds {order}" for name, order in orders_left.items()]
    lines += [f"{name} of the reference holds {order}" for name, order in orders_right.items()]
    if pairs_on:
        side = "subject" if pairs_on == "left" else "reference"
        lines.append(f"the rows of q and k of the {side} stand in interleaved pairs")
    return tuple(lines)


def _twin(subject: Subject) -> Subject:
    """A copy in float64 that takes the paths that the subject takes; nobody else uses it."""
    return subject.fresh_twin()


def shared_case(left: Subject, right: Subject, *, seed: int = 0) -> Case:
    """Random tokens that no side treats specially, in sizes that are nobody's own, longer than a short window."""
    sizes = left._dimensions() | right._dimensions()
    longest = min(left.usable_positions or 10**6, right.usable_positions or 10**6)
    windows = [w for w in (s.setting("sliding_window", "window_size", "window") for s in (left, right)) if isinstance(w, int)]
    least = max([w + 3 for w in windows if 0 < w <= LONGEST - 3], default=0)

    def clash(number: int) -> int:
        return sum(size % number == 0 for size in sizes)

    lengths = [n for n in (*SEQ_LENS[:5], 29, 31, 37, 41, 43, 47, 53, 59, LONGEST) if least <= n <= longest] or [max(1, min(longest, 5))]
    seq = min(lengths, key=lambda n: (clash(n), lengths.index(n)))
    batch = min((n for n in BATCH_SIZES if n != seq), key=clash)
    vocab = min(left.vocab_size, right.vocab_size)
    rows = left.token_ids(batch, seq, seed=seed + 1)
    other = right.token_ids(1, 1, seed=seed)[0][0]
    banned = _special(left) | _special(right)
    rows = tuple(tuple(i if i < vocab and i not in banned else other for i in row) for row in rows)
    return Case(name=f"{batch} rows of {seq} random tokens", input_ids=rows, labels=rows, seed=seed)


def _special(subject: Subject) -> set[int]:
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "mask_token_id")
    values = [subject.setting(name) for name in names]
    return {v for value in values for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)}


def drawn(left: Layout, right: Layout, *, seed: int = 0) -> dict[str, Tensor]:
    """Fresh weights for every slot, float64: matrices of std 1/sqrt(fan in), norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed + 20)
    weights: dict[str, Tensor] = {}
    for slot in left.slots:
        shape = left.shape(slot)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        kind = slot.split(".")[-2] if "." in slot else slot
        if kind in ("embed", "position"):
            weights[slot] = EMBEDDING_STD * noise
        elif slot.endswith("bias"):
            weights[slot] = 0.1 * noise
        elif len(shape) <= 1:
            weights[slot] = 1 + 0.2 * noise
        else:
            weights[slot] = noise / math.sqrt(shape[-1])
    for tied in {**left.tied, **right.tied}:
        if tied in weights and "embed.weight" in weights:
            weights[tied] = weights["embed.weight"]
    return weights


def limit_of(subject: Subject, case: Case) -> float:
    """What rounding may make of a run: by the least precise dtype of its ops."""
    with torch.no_grad(), quiet(), settled(subject.model, seed=subject.seed):
        recording = record(subject.model, lambda: subject.call(replace(case, labels=None)))
    return roundings_limit(recording.dtypes())


def logits_of(subject: Subject, case: Case) -> Tensor:
    """Logits in eval mode, without gradients, from a fixed random state."""
    with settled(subject.model, seed=subject.seed), quiet(), own_code(subject, case), sdpa_kernel(SDPBackend.MATH):
        subject.model.eval()
        return subject.logits(replace(case, labels=case.labels if subject.convention.logits_need_labels else None)).detach()


def traced(subject: Subject, case: Case, change: Callable[[int, list[Tensor]], None] | None = None) -> Graph:
    """The graph of one run, where `change(index, outputs)` may write into the outputs of every op."""
    plain = replace(case, labels=case.labels if subject.convention.logits_need_labels else None)
    blame = own_code(subject, case) if change is None else nullcontext()  # what fails with our values in it is not the subject's
    with torch.no_grad(), settled(subject.model, seed=subject.seed), quiet(), blame, sdpa_kernel(SDPBackend.MATH):
        subject.model.eval()
        recording = record(subject.model, lambda: subject.call(plain).logits, keep=True, replace=change)
    return graph_of(recording, batch=case.batch_size, seq=case.seq_len, logits=recording.result)


def _shapes_of_q(layout: Layout, known: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Queries' weights, whose height tells the width of a head, where a gradient is missing."""
    read = layout.read()
    return {slot: read[slot] for slot in known if slot.endswith(".q.weight") and known[slot] is None}
