"""Why a tensor of the ranks is not the single process's: hypotheses, told only where they give the observed numbers to rounding."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..report import Scalar
from .logical import Held, distance, is_whole, ratio
from .pair import Pair

Words = tuple[str | None, str | None, dict[str, Scalar]]  # cause, fix, evidence


def of_output(pair: Pair, name: str, expected: Tensor, held: Held) -> Words:
    """Why a module's output differs though its input agrees."""
    evidence: dict[str, Scalar] = {"world size": pair.world}
    if not all(part.shape == expected.shape for part in held.parts):
        return None, None, evidence
    evidence["largest difference"] = max(distance(expected, part) for part in held.parts)
    for parameter, start in pair.truth.of("start").items():
        inside = parameter.startswith(name + ".") and parameter.removeprefix(name + ".").count(".") == 0
        if not inside or start.parts[0].shape != expected.shape[-1:]:
            continue
        extra = expected + (pair.world - 1) * start.parts[0]
        if all(distance(extra, part) <= 4 * pair.limit * float(extra.abs().max()) for part in held.parts):
            cause = f"{parameter} is added once on each rank, and the sum over ranks counts it {pair.world} times"
            return cause, "add the bias after the all_reduce, or on one rank only", evidence
    factor = ratio(expected, held.parts[0], pair.limit)
    return (f"it is the single process's output times {factor:.6g}" if factor is not None else None), None, evidence


def of_gradients(pair: Pair, wrong: list[tuple[str, Held]]) -> Words:
    """Why gradients are wrong: the hypothesis that reproduces all of them, if there is one."""
    scale = pair.scale("gradient")

    def holds(test: Callable[[str, Held], float]) -> bool:
        return all(test(name, held) <= max(16 * pair.limit * scale, pair.floor * scale) for name, held in wrong)

    def expected(name: str) -> Tensor:
        return pair.truth.of("gradient")[name].parts[0]

    plain = all(is_whole(held) and held.parts[0].shape == expected(name).shape for name, held in wrong)
    apart = plain and any(not torch.equal(held.parts[0], part) for _, held in wrong for part in held.parts[1:])
    if apart and holds(lambda n, h: distance(expected(n), torch.stack(h.parts).sum(0))):
        return (
            "each rank keeps its share: the sum over ranks is the whole gradient to rounding, and no rank has it",
            "all_reduce (sum) these gradients over the ranks before the step",
            {},
        )
    if apart and holds(lambda n, h: distance(expected(n), torch.stack(h.parts).mean(0))):
        return (
            "each rank keeps the gradient of its own rows: their mean is the whole gradient to rounding, and no rank has it",
            "average these gradients over the ranks before the step; with DDP let the last micro-batch synchronise",
            {},
        )
    found = [ratio(expected(name), part, 64 * pair.limit) for name, held in wrong for part in pair.joined(held)]
    ratios = [factor for factor in found if factor is not None]
    if wrong and len(ratios) == len(found) and max(ratios) - min(ratios) <= max(1e-6, pair.limit) * abs(ratios[0]):
        words = {
            pair.world: "they are summed over ranks where they should be averaged",
            1 / pair.world: "they are divided by the number of ranks once too often",
        }
        near = max(1e-6, pair.limit)
        known = next((text for value, text in words.items() if abs(ratios[0] - value) < near * value), None)
        return (known or f"every one of them is the whole gradient times {ratios[0]:.6g}"), None, {"factor": ratios[0]}
    means = _mean_of_means(pair)
    if means and holds(lambda n, h: max(distance(means[n], part) for part in pair.joined(h))):
        return (
            "they are the mean over ranks of each rank's own mean: the ranks have unequal numbers of labelled tokens, and those with few count for more",
            "divide each rank's summed loss by the labelled tokens of all ranks (all_reduce the count), times the world size where gradients are averaged",
            {},
        )
    return None, None, {}


def _mean_of_means(pair: Pair) -> dict[str, Tensor] | None:
    """The gradients if every rank took the mean over its own rows, before clipping; None when it cannot be told."""
    if pair.rows is None or any(not rows for rows in pair.rows):
        return None
    labels = {row: pair.truth.of(f"row-{row}") for row in range(len(pair.ids(pair.truth)[0]))}
    counts = {row: float(pair.truth.of("count")[f"row-{row}"].parts[0]) for row in labels if f"row-{row}" in pair.truth.of("count")}
    if len(counts) != len(labels) or not all(labels.values()):
        return None
    means: dict[str, Tensor] = {}
    for name in pair.truth.of("gradient"):
        per_rank = [
            torch.stack([labels[row][name].parts[0] for row in rows]).sum(0) / sum(counts[row] for row in rows) for rows in pair.rows
        ]
        means[name] = torch.stack(per_rank).sum(0) / pair.world
    return means
