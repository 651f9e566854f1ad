"""How far the tensors of the ranks are from those of the other run, as shares of their bounds, layer by layer."""

import re
from collections.abc import Iterator
from typing import Any

from ..report import Finding
from . import step_rules
from .logical import Held
from .pair import Pair

LAYER = re.compile(r"^(.*?\.?\d+)(?:\.|$)")  # a module's path as far as its first number: a block of the model

# Stages in the order of a step, each with the probe that judges it.
PROBES = {
    "start": "ranks.same-start",
    "forward": "ranks.forward-agrees",
    "gradient": "ranks.gradients-agree",
    "step": "ranks.step-agrees",
    "state": "ranks.step-agrees",
}


def errors_by_layer(pair: Pair, findings: list[Finding], *, stages: tuple[str, ...]) -> list[dict[str, Any]]:
    """For each stage its layers in the order of the step, with the largest error of a tensor as a share of its bound (None
    where a tensor cannot be laid beside the other), and `first`, the layer of the finding that the stage's probe made."""
    made = []
    for stage in stages:
        layers: dict[str, dict[str, Any]] = {}
        for name, error in _errors(pair, stage):
            body = layers.setdefault(_layer(name), {"module": _layer(name), "tensors": 0, "error": 0.0, "worst": name})
            body["tensors"] += 1
            if error is None or (body["error"] is not None and error > body["error"]):
                body["error"], body["worst"] = error, name
        if layers:
            found = next((f for f in findings if f.probe == PROBES[stage] and f.where.module), None)
            first = _layer(f"{found.where.module}.") if found is not None else None
            made.append({"stage": stage, "layers": list(layers.values()), "first": first if first in layers else None})
    return made


def replica_counts(pair: Pair, *, stages: tuple[str, ...] = ("start", "step")) -> list[dict[str, Any]]:
    """Of the weights before and after the step: how many every rank holds whole, how many of these are the same bits on all of
    them, and how many are spread over the ranks."""
    made = []
    for stage in stages:
        held = pair.held.of(stage)
        whole = [name for name, each in held.items() if _whole(pair, stage, name, each)]
        alike = [name for name in whole if len({event.digest for event in held[name].events}) == 1]
        unlike = [name for name in whole if name not in alike]
        made.append({"stage": stage, "whole": len(whole), "alike": len(alike), "spread": len(held) - len(whole), "unlike": unlike[:8]})
    return made


def _whole(pair: Pair, stage: str, name: str, held: Held) -> bool:
    if held.events[0].placements:
        return set(held.events[0].placements) == {"replicate"}
    expected = pair.truth.of(stage).get(name)
    return len(held.parts) == pair.world and expected is not None and all(part.shape == expected.parts[0].shape for part in held.parts)


def _errors(pair: Pair, stage: str) -> Iterator[tuple[str, float | None]]:
    if stage == "step" and pair.clipped:
        for _, name, gap, bound in step_rules.step_gaps(pair):
            yield name, _finite(gap / bound if bound else 0.0)
        return
    for name, held in pair.held.of(stage).items():
        expected = pair.truth.of(stage).get(name)
        if expected is None or (stage == "forward" and not name and pair.held.staged):
            continue
        gap = pair.nearest(expected.parts[0], held) if stage == "forward" else pair.gap(expected.parts[0], held)
        bound = pair.bound(stage, expected.parts[0])
        yield name, _finite(gap / bound if bound else (0.0 if not gap else float("inf")))


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def _layer(name: str) -> str:
    """`model.layers.3` of what is inside it; elsewhere the module of a weight, or the module itself."""
    found = LAYER.match(name)
    if found:
        return found.group(1)
    return name.partition("#")[0].removesuffix(".weight").removesuffix(".bias").rstrip(".") or "model"
