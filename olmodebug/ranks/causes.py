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
        return _of_factor(pair, ratios[0]) or f"every one of them is the whole gradient times {ratios[0]:.6g}", None, {"factor": ratios[0]}
    tied = _tied_share(pair, wrong)
    if tied is not None:
        return tied
    means = _mean_of_means(pair)
    if means and holds(lambda n, h: max(distance(means[n], part) for part in pair.joined(h))):
        return (
            "they are the mean over ranks of each rank's own mean: the ranks have unequal numbers of labelled tokens, and those with few count for more",
            "divide each rank's summed loss by the labelled tokens of all ranks (all_reduce the count), times the world size where gradients are averaged",
            {},
        )
    return None, None, {}


def of_input(pair: Pair, expected: Tensor, given: Tensor) -> tuple[str | None, str | None]:
    """Why a stage is given other hidden states `[rows, seq_len, width]` than the one before it made."""
    if given.shape != expected.shape or not given.ndim:
        return None, None
    bound = pair.limit * pair.scale("forward")
    order = [next((at for at, row in enumerate(expected) if distance(row, mine) <= bound), None) for mine in given]
    if sorted(at for at in order if at is not None) == list(range(len(expected))):
        cause = f"they are the same rows in another order: {', '.join(map(str, order))}"
        return cause, "let every stage take its micro-batches in the order in which the first one sends them"
    same = next((n for n, held in pair.truth.of("forward").items() if n and distance(held.parts[0], given) <= bound), None)
    before = next((n for n, held in pair.truth.of("forward").items() if n and distance(held.parts[0], expected) <= bound), None)
    if same is None or before is None or not float(given.abs().max()):
        return None, None
    return f"they are the output of {same}, and in one process the output of {before} comes here", None


def _of_factor(pair: Pair, factor: float) -> str | None:
    """What a factor of all gradients is, where it is one that ranks or micro-batches make."""
    near = max(1e-6, pair.limit)
    count = pair.held.micro_batches
    causes = []
    if not pair.held.staged and abs(factor - pair.world) < near * pair.world:
        causes.append("they are summed over ranks where they should be averaged")
    if not pair.held.staged and abs(factor - 1 / pair.world) < near:
        causes.append("they are divided by the number of ranks once too often")
    if count > 1 and abs(factor - count) < near * count:
        causes.append(f"the mean losses of {count} micro-batches are summed, and not divided by {count}")
    return ", or ".join(causes) or None


def _tied_share(pair: Pair, wrong: list[tuple[str, Held]]) -> Words | None:
    """A weight that is one in the model and two in the stages: each has its share of the gradient under a name of its own."""
    others = {name: held for name, held in pair.held.of("gradient").items() if name not in pair.truth.of("gradient")}
    for name, held in wrong:
        expected = pair.truth.of("gradient")[name].parts[0]
        for other, its in others.items():
            both = held.parts[0] + its.parts[0] if held.parts[0].shape == its.parts[0].shape == expected.shape else None
            if both is not None and distance(expected, both) <= 16 * pair.limit * pair.scale("gradient"):
                cause = f"{other} is the same weight in one process: the gradients of both sum to the whole one, and neither stage has it"
                return cause, "all_reduce (sum) the gradient of a tied weight over the stages that hold it, before the step", {}
    return None


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
