"""The rules over one process's step and that of all ranks; each gives the finding where it does not hold, or None."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..records import Where
from ..report import Finding, Scalar
from ..units import listed
from . import causes
from .calls import MOST_NAMED, of_ranks
from .logical import Held, distance, is_whole
from .pair import Pair


def data(pair: Pair) -> Finding | None:
    """Every row of the batch is seen once, by one rank or by the ranks of one group, or every rank sees all of them."""
    batch, seen = pair.ids(pair.truth)[0], pair.ids(pair.held)
    if pair.rows is None:
        return finding("a rank saw a row that is not in the batch", expected="rows of the batch that the step was given")
    everyone = all(sorted(rows) == list(range(len(batch))) for rows in pair.rows)
    counts = [sum(rows.count(row) for rows in pair.rows) for row in range(len(batch))]
    once = sorted(row for group in pair.groups for row in pair.rows[group[0]]) == list(range(len(batch)))
    if everyone or once:
        return None
    evidence: dict[str, Scalar] = {f"rows of rank {rank}": ", ".join(map(str, rows)) for rank, rows in enumerate(pair.rows)}
    lost = [row for row, count in enumerate(counts) if count == 0]
    repeated = [row for row, count in enumerate(counts) if count > 1]
    message = "; ".join(
        [f"rows {listed(repeated, MOST_NAMED)} of the batch are seen by more than one rank"] * bool(repeated)
        + [f"rows {listed(lost, MOST_NAMED)} by none" if repeated else f"rows {listed(lost, MOST_NAMED)} of the batch are seen by no rank"]
        * bool(lost)
    )
    same = repeated and all(rows == pair.rows[0] for rows in pair.rows)
    return finding(
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
    copies = pair.joined(held) if held.events[0].placements else []
    apart = any(not torch.equal(copy, copies[0]) for copy in copies)
    if replicas or apart:
        which = f"{name} of rank {replicas[0]} is not that of rank 0" if replicas else f"the copies of {name} that shards make are unlike"
        message = f"ranks start from different weights: {which}"
        return finding(
            message,
            module=name.rpartition(".")[0],
            where=held.where,
            cause="the replicas were initialised apart, and nothing made them equal",
            fix="seed every rank alike, or broadcast rank 0's weights before the first step",
            evidence={"weights that differ": f"{len(wrong)} of {len(pair.truth.of('start'))}", "largest difference": gap},
        )
    what = "the weights that the ranks start from are" if whole else "the shards of the ranks, put together, are"
    message = f"{what} not the weight of the model: {name} differs by {gap:.3g}"
    return finding(message, module=name.rpartition(".")[0], where=held.where, evidence={"largest difference": gap})


def _in_no_stage(pair: Pair) -> Finding | None:
    """Weights of the model that no stage of a pipeline has."""
    known = {name for (stage, name) in pair.held.missing | pair.held.unkept if stage == "start"} | set(pair.held.of("start"))
    gone = [name for name in pair.truth.of("start") if name not in known]
    if not pair.held.staged or not gone:
        return None
    return finding(
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
        if name in pair.held.of("start") and name not in pair.held.of("gradient") and ("gradient", name) not in pair.held.unkept
    ]
    if not wrong and not gone:
        return None
    if not wrong:
        return finding(f"{gone[0]} has a gradient in one process and none on the ranks", module=gone[0].rpartition(".")[0])
    called = {name.partition("#")[0]: i for i, name in enumerate(pair.truth.of("input"))}
    # gradients come from the loss backwards: of those that differ, that of the module called last parts first
    name, held, gap = max(wrong, key=lambda item: called.get(item[0].rpartition(".")[0], -1))
    cause, fix, evidence = causes.of_gradients(pair, [(n, h) for n, h, _ in wrong])
    scale = float(pair.truth.of("gradient")[name].parts[0].abs().max())
    message = f"the gradient of {name} is not that of the whole batch: it differs by {gap:.3g}, and is of magnitude {scale:.3g}"
    return finding(
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
    return finding(
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
    return finding(
        f"{'every rank reports' if len(reported) > 1 else f'{of_ranks(held.ranks)} reports'} a loss of {reported[0]:.6g}; "
        f"that of the batch is {loss:.6g}",
        severity="error" if cause else "warning",
        cause=cause,
    )


def _output(pair: Pair, name: str, expected: Tensor, held: Held) -> Finding:
    cause, fix, evidence = causes.of_output(pair, name, expected, held)
    return finding(
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
    return finding(
        f"{name} on {of_ranks(wrong or held.ranks)} is given other hidden states than in one process, and every module before it gives the same",
        module=name,
        where=held.where,
        cause=cause,
        fix=fix,
        evidence={"micro-batches": pair.held.micro_batches},
    )


def _unreduced(pair: Pair, name: str, user: str) -> Finding:
    """A share of a sum that is used as if it were the sum: blamed on the module that gave it."""
    return finding(
        f"the output of {name} is used as it is, though every rank holds only its share of a sum",
        module=name,
        where=pair.held.of("forward")[name].where,
        cause="the sum over ranks is the single process's value to rounding, and no rank has it: an all_reduce is missing",
        fix="reduce the output over the ranks before it is used",
        evidence={"parts in": user or "the model", "world size": pair.world},
    )


def finding(message: str, *, severity: Any = "error", module: str = "", where: Where | None = None, **fields: Any) -> Finding:
    place = replace(where or Where(), module=module)
    return Finding(probe="", severity=severity, message=message, where=place, **fields)
