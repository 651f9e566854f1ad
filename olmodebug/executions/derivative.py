"""Whether a backward that somebody wrote is the derivative of its forward: a check that two wrong executions cannot pass.

Only custom `torch.autograd.Function`s are asked: what torch derives itself is its own. In float64, along one random
direction, the directional derivative of each module that runs such a function is compared with a difference quotient.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..explain import place_of
from ..own_code import quiet
from ..records import Case, Where
from ..sources import Spot
from ..subject import Subject
from .backward_alone import script_of_backward
from .lift import calls_of

STEP = 2.0**-17  # of the direction: the quotient errs by its square, about 1e-10, and float64 by 1e-16 over it
# A wrong derivative is off by its own size, and a right one by the quotient's error where float32 hides inside.
LIMIT = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Underived:
    """A backward that is not the derivative of its forward; `alone` where the module runs no other custom function."""

    module: str
    function: str
    where: Where
    analytic: float
    numeric: float
    alone: bool
    script: str | None = None


def underived(subject: Subject, case: Case, *, scripts: Path | None = None) -> list[Underived]:
    """The custom autograd functions of a float64 subject whose backward is not their forward's derivative, by module; with a
    folder for them, the first module of each function carries a script that shows it."""
    found: list[Underived] = []
    modules = dict(subject.model.named_modules())
    for (name, number), call in calls_of(subject, case).items():  # inner calls end first
        if number or any(item.module.startswith(f"{name}.") or not name for item in found):
            continue
        result = _directional(modules[name], call.arguments)
        if result is None:
            continue
        functions, analytic, numeric, rougher = result
        scale = max(abs(analytic), abs(numeric))
        smooth = abs(numeric - rougher) <= LIMIT * max(abs(numeric), abs(rougher))  # a quantizer's forward has no derivative
        if smooth and abs(numeric) > 0 and abs(analytic - numeric) > LIMIT * scale:
            kind = functions[0]
            code = kind.backward.__code__
            where = place_of(Spot(code, 0, code.co_firstlineno), module=name)
            fresh = all(item.function != kind.__qualname__ for item in found)
            script = script_of_backward(modules[name], name, call.arguments, scripts) if fresh else None
            alone = len(set(functions)) == 1
            found.append(
                Underived(
                    module=name,
                    function=kind.__qualname__,
                    where=where,
                    analytic=analytic,
                    numeric=numeric,
                    alone=alone,
                    script=script,
                )
            )
    return found


def _directional(module: nn.Module, arguments: Any) -> tuple[list[Any], float, float, float] | None:
    """(custom functions, derivative by backward, by a difference quotient, by one of twice the step); None without such a function."""
    leaves, spec = tree_flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dtype == torch.float64]
    if not places:
        return None
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(leaves[i].shape, generator=generator, dtype=torch.float64) for i in places]

    def value(step: float, *, grad: bool = False) -> tuple[Tensor, list[Tensor]]:
        moved = list(leaves)
        inputs = []
        for i, direction in zip(places, directions, strict=True):
            moved[i] = (leaves[i] + step * direction).detach().requires_grad_(grad)
            inputs.append(moved[i])
        args, kwargs = tree_unflatten(moved, spec)
        outputs = [t for t in tree_flatten(module(*args, **kwargs))[0] if isinstance(t, Tensor) and t.is_floating_point()]
        weights = torch.Generator().manual_seed(2)
        return sum(((t * torch.randn(t.shape, generator=weights, dtype=torch.float64)).sum() for t in outputs), torch.zeros(())), inputs

    with quiet():
        try:
            with torch.enable_grad():
                scalar, inputs = value(0.0, grad=True)
                functions = custom_functions(scalar)
                if not functions:
                    return None
                given = torch.autograd.grad(scalar, inputs, allow_unused=True)
        except Exception:  # what does not run alone, or has no gradient, is not judged
            return None
        analytic = sum(float((g * d).sum()) for g, d in zip(given, directions, strict=True) if g is not None)
        with torch.no_grad():
            quotient = [float(value(h)[0] - value(-h)[0]) / (2 * h) for h in (STEP, 2 * STEP)]
    return functions, analytic, quotient[0], quotient[1]


def custom_functions(scalar: Tensor) -> list[Any]:
    """The custom autograd functions in the graph of a tensor, the last to run first."""
    found: list[Any] = []
    seen: set[Any] = set()
    waiting = [scalar.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # The node of a custom function is of a class made for it, which keeps the function as _forward_cls; there is no
        # public way back. Without it no custom function would be found, and none judged.
        kind = getattr(type(node), "_forward_cls", None)
        if kind is not None and not kind.__module__.startswith("torch."):
            found.append(kind)
        waiting += [following for following, _ in node.next_functions]
    return found
