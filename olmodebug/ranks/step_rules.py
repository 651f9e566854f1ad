"""The rules over what the optimizers did: in one process, and on all ranks."""

from collections.abc import Collection, Iterator

from ..report import Finding
from .logical import Held
from .pair import Pair
from .rules import finding


def step(pair: Pair) -> Finding | None:
    """What the optimizer did to every weight, and the momentum it keeps, is one number times the whole gradient."""
    moved = _moved(pair)
    if moved and abs(_factor(pair, moved)) < pair.limit:
        return finding("the step changed no weight, though every gradient agrees", evidence={"weights": len(moved)})
    for what, name, gap, bound in step_gaps(pair):
        if gap > bound:
            factor = _factor(pair, moved if what == CHANGE else _kept(pair))
            return finding(
                f"after the step the {what} {name} differs by {gap:.3g} from {factor:.3g} times its gradient, though the gradient agrees",
                module=name.rpartition(".")[0],
                where=pair.truth.of("gradient")[name].where,
                evidence={"largest difference": gap, "gradients agree": True},
            )
    return None


CHANGE = "change of the weight"


def step_gaps(pair: Pair) -> Iterator[tuple[str, str, float, float]]:
    """(what, weight, how far it is from the whole gradient times one number, how far rounding may take it) for the change of
    every weight and the momentum that is kept of it."""
    gradients, start = pair.truth.of("gradient"), pair.held.of("start")
    for what, found in ((CHANGE, _moved(pair)), ("momentum of", _kept(pair))):
        factor = _factor(pair, found)
        scale = abs(factor) * pair.scale("gradient")
        for name, held in found.items():
            parts = start[name].parts if name in start else []
            # the change is a difference of two weights, each rounded
            rounding = pair.floor * max((float(part.abs().max()) for part in parts if part.numel()), default=0.0)
            yield what, name, pair.gap(gradients[name].parts[0] * factor, held), 64 * pair.limit * scale + rounding


def _moved(pair: Pair) -> dict[str, Held]:
    """What the step took from every weight, on the ranks."""
    start, after = pair.held.of("start"), pair.held.of("step")
    return {
        name: Held(
            events=after[name].events,
            ranks=after[name].ranks,
            parts=[a - b for a, b in zip(start[name].parts, after[name].parts, strict=True)],
        )
        for name in pair.truth.of("gradient")
        if name in start and name in after
    }


def _kept(pair: Pair) -> dict[str, Held]:
    state = pair.held.of("state")
    return {name: state[f"{name}.momentum_buffer"] for name in pair.truth.of("gradient") if f"{name}.momentum_buffer" in state}


ELEMENTWISE = {"SGD", "Adam", "AdamW"}  # optimizers whose change of an element follows from that element's gradient alone


def recorded_step(pair: Pair, optimizers: Collection[str]) -> Finding | None:
    """What any optimizer kept of each weight is what it kept in the other run, and where its rule is elementwise, so is its
    change. An element whose gradient is within rounding of zero says nothing: Adam's first update is the gradient's sign."""
    for name, _, gap in pair.unlike("state"):
        weight = name.rpartition(".")[0]
        return finding(
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
    return finding(
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
