"""Loss and gradients of two implementations that give the same logits, parameter by parameter."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..compare import difference, roundings_limit
from ..convention import is_scalar_loss
from ..executions.backward_alone import script_of_backward
from ..executions.lift import calls_of
from ..own_code import own_code, quiet
from ..records import Difference, Rows
from ..settle import settled
from ..sources import Sources, Spot
from .aligned import Aligned, Side
from .anchors import Graph
from .wiring import weights_read

# Below this share of the largest gradient a gradient is what rounding leaves of nothing, such as that of a key's bias.
NOTHING = 0.01


@dataclass(slots=True, kw_only=True)
class GradientGap:
    """Which gradients differ, by slot, the last on the way forward first; `cause` is established by running without it."""

    losses: tuple[float, float]
    own: tuple[float, float] | None  # the subject's own loss, and the mean cross-entropy of its logits, where they differ
    compared: int
    largest: float
    differing: dict[str, Difference] = field(default_factory=dict)
    cause: str | None = None
    spot: Spot | None = None
    module: str = ""


class NoGradients(Exception):
    """A forward whose logits no gradient flows back from: it runs under no_grad or inference_mode. The text names the side."""


def gradient_gap(aligned: Aligned) -> GradientGap:
    """Compare the losses and all gradients of both sides; NoGradients where one has none."""
    mine, theirs = _run(aligned, aligned.left), _run(aligned, aligned.right)
    differing, largest = _differing(aligned, mine[1], theirs[1])
    gap = GradientGap(
        losses=(float(mine[0]), float(theirs[0])),
        own=_strange_loss(aligned),
        compared=len(theirs[1]),
        largest=largest,
        differing={slot: differing[slot] for slot in _last_read_first(aligned, differing)},
    )
    if differing:
        let_through = _LetThrough(Sources(aligned.left.subject.model))
        again = _run(aligned, aligned.left, let_through)
        if let_through.spot is not None and not _differing(aligned, again[1], theirs[1])[0]:
            gap.cause = "a detach or a .data cuts the gradient that the reference lets through; with it let through, all gradients agree"
            gap.spot = let_through.spot
    return gap


def _last_read_first(aligned: Aligned, slots: Iterable[str]) -> list[str]:
    places = _first_reads(aligned.graphs()[0], aligned.left)
    return sorted(slots, key=lambda slot: places.get(slot, -1), reverse=True)


def _first_reads(graph: Graph, side: Side) -> dict[str, int]:
    """The event that reads each weight first: the gradient of one that is read again, as a tied head, may differ from there on."""
    return {slot: graph.nodes[i].event for i, slot in reversed(weights_read(graph, side.layout))}


def script_of_gradients(aligned: Aligned, gradients: GradientGap, folder: Path | None) -> str | None:
    """A script that shows the backward of one module alone: of the innermost around the fault whose gradients are not those
    that autograd gives its ops, in the subject or else in the reference; its path."""
    for side, graph in zip((aligned.left, aligned.right), aligned.graphs(), strict=True):
        needs = side.subject.convention.logits_need_labels
        calls = calls_of(side.subject, aligned.case if needs else replace(aligned.case, labels=None)) if folder is not None else {}
        for name in _around_fault(graph, side, set(gradients.differing)):
            call = calls.get((name, 0))
            title = name if side is aligned.left else f"{name} of the reference"
            script = script_of_backward(side.subject.model.get_submodule(name), title, call.arguments, folder) if call else None
            if script is not None:
                return script
    return None


def _around_fault(graph: Graph, side: Side, differing: set[str]) -> list[str]:
    """Modules that run between the last weight whose gradient differs and the next one, whose gradient does not; the inner first."""
    reads = _first_reads(graph, side)
    start = max((event for slot, event in reads.items() if slot in differing), default=0)
    end = min((event for event in reads.values() if event > start), default=len(graph.recording.events))
    calls = [c for c in graph.recording.calls if c.module and c.first_event <= end and c.last_event >= start]
    return list(dict.fromkeys(c.module for c in sorted(calls, key=lambda c: c.last_event - c.first_event)))


def _run(aligned: Aligned, side: Side, mode: "_LetThrough | None" = None) -> tuple[Tensor, dict[str, Tensor | None]]:
    """(loss, gradients by slot) of one side in eval mode; the loss is made here, from the logits, alike for both."""
    subject, case = side.subject, aligned.case
    needs = subject.convention.logits_need_labels
    with settled(subject.model, seed=subject.seed), quiet(), torch.enable_grad(), own_code(subject, case, stage="backward"):
        subject.model.eval()
        output = _call(lambda: subject.call(case if needs else replace(case, labels=None)), mode)
        if not output.logits.requires_grad:
            which = "subject" if side is aligned.left else "reference"
            raise NoGradients(f"no gradient flows through the forward of the {which}: it runs under no_grad or inference_mode")
        loss = _shifted(output.logits, case.input_ids)
        loss.backward()
        once = [s for s in aligned.left.layout.slots if not (s in aligned.left.layout.tied and s in aligned.right.layout.tied)]
        found = side.gradients()
        return loss.detach(), {s: None if (g := found[s]) is None else g.detach().clone() for s in once}


def _strange_loss(aligned: Aligned) -> tuple[float, float] | None:
    """The subject's own loss, where it is no mean cross-entropy of its logits though the reference's is.

    Labels may be shifted inside or come shifted already (nanoGPT, OLMo-core): both are conventions, and either is right.
    """
    odd = [_own_loss(aligned, side) for side in (aligned.left, aligned.right)]
    mine, theirs = odd
    return (mine[0], mine[1]) if mine is not None and theirs is not None and not mine[2] and theirs[2] else None


def _own_loss(aligned: Aligned, side: Side) -> tuple[float, float, bool] | None:
    """(own loss, expected loss, whether it is one of the expected) of a side; None where it gives no loss."""
    subject, case = side.subject, aligned.case
    if not subject.convention.labels:
        return None
    with settled(subject.model, seed=subject.seed), quiet(), torch.no_grad(), own_code(subject, case):
        subject.model.eval()
        output = subject.call(case)
    if output.loss is None or not is_scalar_loss(output.loss) or output.logits.shape[1] != case.seq_len:
        return None
    logits, labels = output.logits, torch.tensor(case.input_ids)
    wanted = _shifted(logits, case.input_ids), F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten())
    # Most losses are taken in float32 inside, which the run without labels that set the limit has not shown.
    limit = max(aligned.limit, roundings_limit({"float32"}))
    fits = any(difference(output.loss.reshape(1), w.reshape(1), relative_limit=limit) is None for w in wanted)
    return float(output.loss), float(wanted[1 if subject.convention.labels_aligned else 0]), fits


def _shifted(logits: Tensor, rows: Rows) -> Tensor:
    """The mean cross-entropy of each position's logits against the next token, in float64."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), torch.tensor(rows)[:, 1:].flatten())


def _call(run: Callable[[], Any], mode: "_LetThrough | None") -> Any:
    if mode is None:
        return run()
    with mode:
        return run()


def _differing(
    aligned: Aligned, mine: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None]
) -> tuple[dict[str, Difference], float]:
    overall = max((float(g.abs().max()) for g in theirs.values() if g is not None and g.numel()), default=0.0)
    found: dict[str, Difference] = {}
    largest = 0.0
    for slot, wanted in theirs.items():
        got = mine.get(slot)
        if got is None and wanted is None:
            continue
        if got is None or wanted is None:
            known = got if got is not None else wanted
            assert known is not None
            got, wanted = (torch.zeros_like(known) if got is None else got), (torch.zeros_like(known) if wanted is None else wanted)
        gap = float((got.double() - wanted.double()).abs().max()) if got.shape == wanted.shape else float("inf")
        scale = max(float(got.abs().max()), float(wanted.abs().max()), NOTHING * overall)
        largest = max(largest, gap / scale if scale else 0.0)
        if scale and not gap <= aligned.limit * scale:
            found[slot] = Difference(max_abs=gap, scale=scale, mismatched=1, total=1, limit=aligned.limit)
    return found, largest


class _LetThrough(TorchFunctionMode):
    """detach() and .data give the tensor itself; remembers the first line of the subject's that asked for one."""

    def __init__(self, sources: Sources) -> None:
        super().__init__()
        self.sources = sources
        self.spot: Spot | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cuts = func in (Tensor.detach, Tensor.data.__get__, torch.detach)  # type: ignore[attr-defined]
        if cuts and args and isinstance(args[0], Tensor) and args[0].requires_grad:
            if self.spot is None:
                self.spot = self.sources.spot(sys._getframe(1), _call.__code__)
            return args[0]
        return func(*args, **(kwargs or {}))
