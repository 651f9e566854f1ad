"""The rules over one process's step and that of all ranks; each gives the finding where it does not hold, or None."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..records import Where
from ..report import Finding, Scalar
from . import causes
from .calls import of_ranks
from .logical import Held, distance, is_whole
from .pair import Pair


def data(pair: Pair) -> Finding | None:
    """Every row of the batch is seen once, by one rank or by the ranks of one group, or every rank sees all of them."""
    batch, seen = pair.ids(pair.truth)[0], pair.ids(pair.held)
    if pair.rows is None:
        return _finding("a rank saw a row that is not in the batch", expected="rows of the batch that the step was given")
    everyone = all(sorted(rows) == list(range(len(batch))) for rows in pair.rows)
    counts = [sum(rows.count(row) for rows in pair.rows) for row in range(len(batch))]
    once = sorted(row for group in pair.groups for row in pair.rows[group[0]]) == list(range(len(batch)))
    if everyone or once:
        return None
    evidence: dict[str, Scalar] = {f"rows of rank {rank}": ", ".join(map(str, rows)) for rank, rows in enumerate(pair.rows)}
    lost = [row for row, count in enumerate(counts) if count == 0]
    repeated = [row for row, count in enumerate(counts) if count > 1]
    message = "; ".join(
        [f"rows {_few(repeated)} of the batch are seen by more than one rank"] * bool(repeated)
        + [f"rows {_few(lost)} by none" if repeated else f"rows {_few(lost)} of the batch are seen by no rank"] * bool(lost)
    )
    same = repeated and all(rows == pair.rows[0] for rows in pair.rows)
    return _finding(
        message,
        cause="every rank takes the same rows: its rank does not enter the choice" if same and len(seen) > 1 else None,
        fix="give rank r the rows r, r + world_size, ...; a DistributedSampler does" if repeated else None,
        expected="each row once, or all rows on every rank",
        evidence=evidence,
    )


def start(pair: Pair) -> Finding | None:
    """The ranks start from the weights of the model that was handed in."""
    wrong = list(pair.unlike("start"))
    if not wrong:
        return _in_no_stage(pair)
    name, held, gap = wrong[0]
    whole = held.parts[0].shape == pair.truth.of("start")[name].parts[0].shape and is_whole(held)
    replicas = [rank for rank, part in zip(held.ranks, held.parts, strict=True) if not torch.equal(part, held.parts[0])] if whole else []
    if replicas:
        message = f"ranks start from different weights: {name} of rank {replicas[0]} is not that of rank 0"
        return _finding(
            message,
            module=name.rpartition(".")[0],
            where=held.where,
            cause="the replicas were initialised apart, and nothing made them equal",
            fix="seed every rank alike, or broadcast rank 0's weights before the first step",
            evidence={"weights that differ": f"{len(wrong)} of {len(pair.truth.of('start'))}", "largest difference": gap},
        )
    what = "the weights that the ranks start from are" if whole else "the shards of the ranks, put together, are"
    message = f"{what} not the weight of the model: {name} differs by {gap:.3g}"
    return _finding(message, module=name.rpartition(".")[0], where=held.where, evidence={"largest difference": gap})


def _in_no_stage(pair: Pair) -> Finding | None:
    """Weights of the model that no stage of a pipeline has."""
    known = {name for (stage, name) in pair.held.missing | pair.held.unkept if stage == "start"} | set(pair.held.of("start"))
    gone = [name for name in pair.truth.of("start") if name not in known]
    if not pair.held.staged or not gone:
        return None
    return _finding(
        f"{gone[0]} is in no stage of the pipeline",
        module=gone[0].rpartition(".")[0],
        where=pair.truth.of("gradient")[gone[0]].where if gone[0] in pair.truth.of("gradient") else None,
        cause="every weight of the model belongs to one stage at least, and no rank has this one",
        fix="let the ranges of blocks meet: the end of one stage is the start of the next",
        evidence={"weights in no stage": f"{len(gone)} of {len(pair.truth.of('start'))}"},
    )


def forward(pair: Pair) -> Finding | None:
    """The first module whose input agrees with the single process and whose output does not; in a pipeline also the first
    that is given something else than what the modules before it gave."""
    share: str | None = None
    strange: str | None = None
    for name, held in pair.held.of("forward").items():
        expected = pair.truth.of("forward").get(name)
        if expected is None or (pair.held.staged and not name and any(p.shape[1:] != expected.parts[0].shape[1:] for p in held.parts)):
            continue  # what a stage gives is no output of the model
        fit = pair.layout(expected.parts[0], held)
        if fit == "share":  # whoever takes it next may reduce it
            share = share or name
            if not name:
                return _unreduced(pair, share, name)
        if fit is not None:
            continue
        given, given_expected = pair.held.of("input").get(name), pair.truth.of("input").get(name)
        entry = pair.layout(given_expected.parts[0], given) if given is not None and given_expected is not None else "whole"
        if entry == "share" or (share is not None and (share.startswith(name + ".") or not name)):
            return _unreduced(pair, share or name, name)
        if entry is not None:
            return _output(pair, name, expected.parts[0], held)
        strange = strange or name
    return _handed_over(pair, strange) if pair.held.staged and strange else None


def gradients(pair: Pair) -> Finding | None:
    """The gradients that the optimizer got are those of the whole batch."""
    wrong = list(pair.unlike("gradient"))
    gone = [
        name
        for name in pair.truth.of("gradient")
        if name not in pair.held.of("gradient") and ("gradient", name) not in pair.held.unkept and not _is_sharded_flat(pair, name)
    ]
    if not wrong and not gone:
        return None
    if not wrong:
        return _finding(f"{gone[0]} has a gradient in one process and none on the ranks", module=gone[0].rpartition(".")[0])
    called = {name.partition("#")[0]: i for i, name in enumerate(pair.truth.of("input"))}
    # gradients come from the loss backwards: of those that differ, that of the module called last parts first
    name, held, gap = max(wrong, key=lambda item: called.get(item[0].rpartition(".")[0], -1))
    cause, fix, evidence = causes.of_gradients(pair, [(n, h) for n, h, _ in wrong])
    scale = float(pair.truth.of("gradient")[name].parts[0].abs().max())
    message = f"the gradient of {name} is not that of the whole batch: it differs by {gap:.3g}, and is of magnitude {scale:.3g}"
    return _finding(
        message,
        module=name.rpartition(".")[0],
        where=held.where,
        cause=cause,
        fix=fix,
        evidence={"gradients that differ": f"{len(wrong)} of {len(pair.truth.of('gradient'))}", **evidence},
    )


def norm(pair: Pair) -> Finding | None:
    """The gradient norm that each rank clips by is that of the whole gradient."""
    expected, held = pair.truth.of("norm").get("grad_norm"), pair.held.of("norm").get("grad_norm")
    if expected is None or held is None:
        return None
    norm, reported = float(expected.parts[0]), [float(part) for part in held.parts]
    if held.events[0].placements == ("partial",):
        reported = [sum(value**2 for value in reported) ** 0.5]
    if all(abs(value - norm) <= 2 * pair.limit * norm for value in reported):
        return None
    cause = fix = None
    together = sum(value**2 for value in reported) ** 0.5
    if len(reported) > 1 and abs(together - norm) <= 1e3 * pair.limit * norm:
        cause = "each rank takes the norm of its own shards: the squares of these norms sum to the square of the whole one"
        fix = "sum the squares over ranks before the root; for DTensors call full_tensor() on the norm"
    elif gradients(pair) is not None:
        return None  # the gradients themselves are wrong, and say so
    elif pair.held.staged and len(set(reported)) > 1:  # scaled back by its own norm, each stage has the right gradients
        cause = "each stage takes the norm of its own weights"
        fix = "sum the squares over the stages before the root, those of a weight that two stages hold once"
    return _finding(
        f"the gradient norm is {norm:.6g} in one process, and {', '.join(f'{value:.6g}' for value in reported)} on the ranks",
        cause=cause,
        fix=fix,
        expected=f"{norm:.6g} on every rank",
        observed=", ".join(f"{value:.6g}" for value in reported),
    )


def loss(pair: Pair) -> Finding | None:
    """A loss that all ranks report alike is that of the whole batch."""
    expected, held = pair.truth.of("loss").get("loss"), pair.held.of("loss").get("loss")
    if expected is None or held is None:
        return None
    if "loss#2" in pair.held.of("loss") or "loss#2" in pair.truth.of("loss"):
        return None  # of micro-batches, each of its own rows
    loss, reported = float(expected.parts[0]), [float(part) for part in held.parts]
    if max(reported) - min(reported) > pair.limit * abs(loss) or abs(reported[0] - loss) <= pair.limit * abs(loss):
        return None  # unlike losses are those of each rank's own rows, which is a way to log
    cause = None
    if abs(reported[0] - loss - float(torch.tensor(pair.world, dtype=torch.float64).log())) <= pair.limit * abs(loss):
        cause = f"it is too large by ln {pair.world}: the vocabulary is summed over on every rank, on logits that are whole already"
    return _finding(
        f"{'every rank reports' if len(reported) > 1 else f'{of_ranks(held.ranks)} reports'} a loss of {reported[0]:.6g}; "
        f"that of the batch is {loss:.6g}",
        severity="error" if cause else "warning",
        cause=cause,
    )


def step(pair: Pair) -> Finding | None:
    """What the optimizer did to every weight, and the momentum it keeps, is one number times the whole gradient."""
    gradients, start, after, state = pair.truth.of("gradient"), pair.held.of("start"), pair.held.of("step"), pair.held.of("state")
    moved = {
        name: Held(
            events=after[name].events,
            ranks=after[name].ranks,
            parts=[a - b for a, b in zip(start[name].parts, after[name].parts, strict=True)],
        )
        for name in gradients
        if name in start and name in after
    }
    kept = {name: state[f"{name}.momentum_buffer"] for name in gradients if f"{name}.momentum_buffer" in state}
    for what, found in (("change of the weight", moved), ("momentum of", kept)):
        factor = _factor(pair, found)
        if what.startswith("change") and found and abs(factor) < pair.limit:
            return _finding("the step changed no weight, though every gradient agrees", evidence={"weights": len(found)})
        scale = abs(factor) * pair.scale("gradient")
        for name, held in found.items():
            expected = gradients[name].parts[0] * factor
            gap = pair.gap(expected, held)
            # the change is a difference of two weights, each rounded
            rounding = (
                pair.floor * max((float(part.abs().max()) for part in start[name].parts if part.numel()), default=0.0)
                if name in start
                else 0.0
            )
            if gap > 64 * pair.limit * scale + rounding:
                return _finding(
                    f"after the step the {what} {name} differs by {gap:.3g} from {factor:.3g} times its gradient, though the gradient agrees",
                    module=name.rpartition(".")[0],
                    where=gradients[name].where,
                    evidence={"largest difference": gap, "gradients agree": True},
                )
    return None


ELEMENTWISE = {"SGD", "Adam", "AdamW"}  # optimizers whose change of an element follows from that element's gradient alone


def recorded_step(pair: Pair, optimizers: Collection[str]) -> Finding | None:
    """What any optimizer kept of each weight is what it kept in the other run, and where its rule is elementwise, so is its
    change. An element whose gradient is within rounding of zero says nothing: Adam's first update is the gradient's sign."""
    for name, _, gap in pair.unlike("state"):
        weight = name.rpartition(".")[0]
        return _finding(
            f"after the step {name} differs by {gap:.3g} from the other run's, though the gradient agrees before it is clipped",
            module=weight.rpartition(".")[0],
            where=pair.held.of("gradient")[weight].where if weight in pair.held.of("gradient") else None,
            evidence={"largest difference": gap, "optimizer": ", ".join(optimizers)},
        )
    if not optimizers or not set(optimizers) <= ELEMENTWISE:
        return None
    noise = pair.limit * pair.scale("gradient")
    largest = 0.0
    wrong: tuple[float, str] | None = None
    for name, after in pair.held.of("step").items():
        whole = {stage: pair.truth.of(stage).get(name) for stage in ("start", "gradient", "step")}
        start = pair.held.of("start").get(name)
        if start is None or any(held is None for held in whole.values()):
            continue
        before, gradient, expected = (held.parts[0].double() for held in whole.values() if held is not None)
        sure = gradient.abs() > 64 * noise
        change = (before - expected)[sure]
        for whole_start, whole_after in zip(pair.joined(start), pair.joined(after), strict=True):
            if whole_after.shape != before.shape or whole_start.shape != before.shape or not change.numel():
                continue
            observed = (whole_start.double() - whole_after.double())[sure]
            largest = max(largest, float(change.abs().max()))
            rounding = pair.floor * float(before.abs().max())
            gap = float((observed - change).abs().max()) - rounding
            wrong = max(wrong or (gap, name), (gap, name))
    if wrong is None or wrong[0] <= 64 * pair.limit * largest:
        return None
    gap, name = wrong
    return _finding(
        f"the step changes {name} by other amounts than in the other run (the difference is {gap:.3g}, the largest change {largest:.3g}), "
        "though the gradient agrees",
        module=name.rpartition(".")[0],
        where=pair.held.of("gradient")[name].where if name in pair.held.of("gradient") else None,
        fix="hold the optimizers' settings against each other: learning rate, betas, weight decay, and what each of them holds",
        evidence={"largest difference": gap, "optimizer": ", ".join(optimizers)},
    )


def _factor(pair: Pair, found: dict[str, Held]) -> float:
    """The number that the whole gradients are multiplied by in the largest of these tensors, on rank 0."""
    gradients = pair.truth.of("gradient")
    best, factor = 0.0, 1.0
    for name, held in found.items():
        flat = gradients[name].parts[0].double().flatten()
        whole = pair.joined(held)[0]
        if whole.numel() == flat.numel() and float(flat.dot(flat)) > best:
            best = float(flat.dot(flat))
            factor = float(flat.dot(whole.double().flatten())) / best
    return factor


def _is_sharded_flat(pair: Pair, name: str) -> bool:
    """Whether some ranks hold no element of a weight, as with flat shards, and so no gradient of it."""
    held = pair.held.of("start").get(name)
    return ("gradient", name) in pair.held.missing and held is not None and any(not part.numel() for part in held.parts)


def _output(pair: Pair, name: str, expected: Tensor, held: Held) -> Finding:
    cause, fix, evidence = causes.of_output(pair, name, expected, held)
    return _finding(
        f"the output of {name or 'the model'} differs from the single process, and its input agrees",
        module=name,
        where=held.where,
        cause=cause,
        fix=fix,
        evidence=evidence,
    )


def _handed_over(pair: Pair, name: str) -> Finding:
    """A module of a later stage that is given something else than in one process: told of the outermost such module."""
    given, truth = pair.held.of("input"), pair.truth.of("input")
    steps = name.split(".")
    above = [".".join(steps[:number]) for number in range(1, len(steps) + 1)]
    name = next((n for n in above if n in given and n in truth and pair.layout(truth[n].parts[0], given[n]) is None), name)
    held, expected = given[name], truth[name].parts[0]
    wrong = [
        rank for rank, part in zip(held.ranks, held.parts, strict=True) if distance(expected, part) > pair.limit * pair.scale("forward")
    ]
    cause, fix = causes.of_input(pair, expected, held.of(wrong[:1] or held.ranks)[0])
    return _finding(
        f"{name} on {of_ranks(wrong or held.ranks)} is given other hidden states than in one process, and every module before it gives the same",
        module=name,
        where=held.where,
        cause=cause,
        fix=fix,
        evidence={"micro-batches": pair.held.micro_batches},
    )


def _unreduced(pair: Pair, name: str, user: str) -> Finding:
    """A share of a sum that is used as if it were the sum: blamed on the module that gave it."""
    return _finding(
        f"the output of {name} is used as it is, though every rank holds only its share of a sum",
        module=name,
        where=pair.held.of("forward")[name].where,
        cause="the sum over ranks is the single process's value to rounding, and no rank has it: an all_reduce is missing",
        fix="reduce the output over the ranks before it is used",
        evidence={"parts in": user or "the model", "world size": pair.world},
    )


def _finding(message: str, *, severity: Any = "error", module: str = "", where: Where | None = None, **fields: Any) -> Finding:
    place = replace(where or Where(), module=module)
    return Finding(probe="", severity=severity, message=message, where=place, **fields)


def _few(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:6])) + (f" and {len(rows) - 6} more" if len(rows) > 6 else "")
