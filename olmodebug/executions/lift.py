"""Two implementations with the same module names, both in float64, each module on the other's inputs.

Every module of the candidate gets what the reference's module got, and hands on what the reference's module gave. So what
differs at a module's output comes from its own lines and from nothing before or below, and every place is found at once.
In float64 a broken rule stays and rounding is gone: what vanishes here was a matter of precision.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..compare import difference, roundings_limit
from ..own_code import quiet
from ..records import Case, Difference, Event, Where
from ..settle import settled
from ..subject import Subject
from ..tracing.recording import Recording
from ..tracing.tracer import record
from .backward_alone import script_of_backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """A module whose own lines do not compute what the reference's do: `kind` is `forward` or `backward`; `script` shows a
    backward alone."""

    module: str
    kind: str
    where: Where
    gap: Difference | None
    what: str
    script: str | None = None


@dataclass(slots=True, kw_only=True)
class _Call:
    """One call of a module: what went in, as it was given, and what came out."""

    arguments: Any
    outputs: Any


Calls = dict[tuple[str, int], _Call]


def departures(
    reference: Subject, candidate: Subject, case: Case, *, backward: bool = True, scripts: Path | None = None
) -> list[Departure]:
    """Every module of the candidate that departs from the reference's of that name, forward first, in the order of the run."""
    with settled(reference.model, seed=0), settled(candidate.model, seed=0), quiet(), torch.no_grad():
        calls, left = _recorded(reference, case)
        found, right = _forced(candidate, case, calls)
    limit = roundings_limit(left.dtypes() | right.dtypes())
    places: list[Departure] = []
    for module, expected, observed in found:
        gap = _gap(expected, observed, limit)
        if gap is not None and all(place.module != module for place in places):
            where, what = _line(module, left, right, limit)
            places.append(Departure(module=module, kind="forward", where=where, gap=gap, what=what))
    if backward and not places:
        places += _backward(reference.model, candidate.model, calls, max(limit, 1e-9))
    if places and places[0].kind == "backward":
        places[0] = replace(places[0], script=_script(reference, candidate, places[0].module, calls, scripts))
    return places


def _script(reference: Subject, candidate: Subject, module: str, calls: Calls, scripts: Path | None) -> str | None:
    """A script that shows the backward of a module alone, of the side that it shows to be wrong."""
    for subject, name in ((candidate, module), (reference, f"{module} of the left side")):
        found = script_of_backward(subject.model.get_submodule(module), name, calls[module, 0].arguments, scripts)
        if found is not None:
            return found
    return None


def calls_of(subject: Subject, case: Case) -> Calls:
    """What every module call of a run got and gave."""
    with settled(subject.model, seed=0), quiet(), torch.no_grad():
        return _recorded(subject, case)[0]


def _recorded(subject: Subject, case: Case) -> tuple[Calls, Recording]:
    calls: Calls = {}
    counts: dict[str, int] = {}
    open_calls: list[tuple[tuple[str, int], Any]] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            number = counts[name] = counts.get(name, -1) + 1
            open_calls.append(((name, number), _copied((args, kwargs))))

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        name, arguments = open_calls.pop()
        calls[name] = _Call(arguments=arguments, outputs=_copied(output))

    handles = [m.register_forward_pre_hook(enter(name), with_kwargs=True) for name, m in subject.model.named_modules()]
    handles += [m.register_forward_hook(leave) for m in subject.model.modules()]
    try:
        recording = record(subject.model, lambda: subject.call(case), keep=True)
    finally:
        for handle in handles:
            handle.remove()
    return calls, recording


def _forced(subject: Subject, case: Case, calls: Calls) -> tuple[list[tuple[str, Any, Any]], Recording]:
    """(module, the reference's tensors, the candidate's own) at each place where a module hands tensors on, and the trace.

    What a module gives to its children shows what its own lines did, as its output does.
    """
    counts: dict[str, int] = {}
    open_calls: list[tuple[str, int]] = []
    found: list[tuple[str, Any, Any]] = []

    def enter(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            number = counts[name] = counts.get(name, -1) + 1
            call = calls.get((name, number))
            if call is not None and open_calls:
                found.append((open_calls[-1][0], call.arguments, _copied((args, kwargs))))
            open_calls.append((name, number))
            return None if call is None or not name else _replaced((args, kwargs), call.arguments)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        name = open_calls.pop()
        call = calls.get(name)
        if call is None:
            return None
        found.append((name[0], call.outputs, _copied(output)))
        return _replaced(output, call.outputs)

    handles = [m.register_forward_pre_hook(enter(name), with_kwargs=True) for name, m in subject.model.named_modules()]
    handles += [m.register_forward_hook(leave) for m in subject.model.modules()]
    try:
        recording = record(subject.model, lambda: subject.call(case), keep=True)
    finally:
        for handle in handles:
            handle.remove()
    return found, recording


def _replaced(own: Any, other: Any) -> Any:
    """The structure of `own` with the tensors of `other`, where they correspond; None where they do not."""
    leaves, spec = tree_flatten(own)
    theirs, _ = tree_flatten(other)
    mine = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaf for leaf in theirs if isinstance(leaf, Tensor)]
    if len(mine) != len(tensors) or any(leaves[i].shape != t.shape for i, t in zip(mine, tensors, strict=True)):
        return None
    for i, tensor in zip(mine, tensors, strict=True):
        leaves[i] = tensor.to(leaves[i].dtype).clone()
    return tree_unflatten(leaves, spec)


def _copied(tree: Any) -> Any:
    leaves, spec = tree_flatten(tree)
    return tree_unflatten([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _gap(left: Any, right: Any, limit: float) -> Difference | None:
    a, b = ([leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)] for tree in (left, right))
    if len(a) != len(b):
        return None
    return next((gap for x, y in zip(a, b, strict=True) if (gap := difference(x, y, relative_limit=limit)) is not None), None)


# The line inside a module


def _line(module: str, left: Recording, right: Recording, limit: float) -> tuple[Where, str]:
    """The candidate's first own op that does something else: with other arguments, or another result from equal inputs."""
    a = [event for event in left.events if event.where.module == module]
    b = [event for event in right.events if event.where.module == module]
    pairs = _paired(a, b)
    partner = dict(pairs)
    last: Event | None = None
    for j, event in enumerate(b):
        if j not in partner:
            last = event if any("float" in t.dtype for t in event.outputs) else last
            continue
        other = a[partner[j]]
        mine, theirs = right.kept[event.index], left.kept[other.index]
        named = _argument(theirs.arguments, mine.arguments)
        if named:
            return event.where, f"{event.op}: {named}"
        if not _agree(theirs.outputs, mine.outputs, limit):
            if last is not None and not _agree(theirs.inputs, mine.inputs, limit):
                return last.where, f"{last.op}, which the reference does not do here"
            return event.where, f"{event.op} gives another result"
        last = None
    if last is not None:
        return last.where, f"{last.op}, which the reference does not do here"
    return (b[-1].where if b else Where(module=module)), "the module's result"


def _paired(a: list[Event], b: list[Event]) -> Iterator[tuple[int, int]]:
    """(index in b, index in a) of events that correspond."""
    keys_a, keys_b = [e.op for e in a], [e.op for e in b]
    for block in difflib.SequenceMatcher(a=keys_a, b=keys_b, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            yield block.b + i, block.a + i


def _argument(left: dict[str, Any], right: dict[str, Any]) -> str | None:
    for name in left.keys() & right.keys():
        x, y = left[name], right[name]
        if isinstance(x, bool | int | float) and isinstance(y, bool | int | float) and x != y:
            return f"{name} is {y}, and {x} in the reference"
    return None


def _agree(left: list[Tensor], right: list[Tensor], limit: float) -> bool:
    return len(left) == len(right) and all(difference(x, y, relative_limit=limit) is None for x, y in zip(left, right, strict=True))


# Backward


def _backward(left: nn.Module, right: nn.Module, calls: Calls, limit: float) -> list[Departure]:
    """The innermost modules whose gradients differ on equal inputs and equal cotangents; calls end inner ones first."""
    found: list[Departure] = []
    ours, theirs = dict(left.named_modules()), dict(right.named_modules())
    for (name, number), call in calls.items():
        if number or not name or name not in theirs or any(d.module.startswith(name + ".") for d in found):
            continue
        a, b = (gradients(table[name], call.arguments) for table in (ours, theirs))
        if a is None or b is None:
            continue
        if missing := [key for key in [*a, *b] if (key in a) != (key in b)]:
            text = f"{missing[0]} gets a gradient on one side only"
            found.append(Departure(module=name, kind="backward", where=Where(module=name), gap=None, what=text))
            continue
        wrong = next(((key, gap) for key in a if (gap := difference(a[key], b[key], relative_limit=limit)) is not None), None)
        if wrong is not None:
            text = f"the gradient of {wrong[0]} differs, with equal inputs, outputs and cotangents"
            found.append(Departure(module=name, kind="backward", where=Where(module=name), gap=wrong[1], what=text))
    return found


def gradients(module: nn.Module, arguments: Any) -> dict[str, Tensor] | None:
    """The gradients of a module's floating inputs and parameters for one fixed random cotangent; None where there are none."""
    leaves, spec = tree_flatten(arguments)
    inputs = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaves[i] = inputs[f"input {i}"] = leaf.detach().clone().requires_grad_(True)
    args, kwargs = tree_unflatten(leaves, spec)
    with torch.enable_grad(), quiet():
        try:
            outputs = module(*args, **kwargs)
        except Exception:  # a module that runs in its place only (its cache is full) proves nothing alone
            return None
        floats = [t for t in tree_flatten(outputs)[0] if isinstance(t, Tensor) and t.requires_grad]
        if not floats:
            return None
        generator = torch.Generator().manual_seed(0)
        scalar = torch.stack([(t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum() for t in floats]).sum()
        wanted = inputs | {name: p for name, p in module.named_parameters() if p.requires_grad}
        given = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True)
    return {name: g for name, g in zip(wanted, given, strict=True) if g is not None}
