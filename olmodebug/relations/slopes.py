"""The slope of the loss along a direction, by the gradient and by central differences, and the line whose cut parts the two."""

import ast
import inspect
import re
import sys
import textwrap
from contextlib import suppress
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from ..double import KeepDouble
from ..executions.derivative import custom_functions
from ..own_code import own_code, quiet
from ..records import Case
from ..sources import Spot
from ..subject import Subject

TOLERANCE = 1e-2  # central differences in float64 err by 1e-6 here; a path that is cut changes the slope by its whole share
COPIES = ("view_as", "clone", "view", "contiguous", "detach", "reshape", "to")
SHARE = 1e-4  # the share of one projection in a fused one, told only where the cut that takes it is found
STEP = 1e-4
TAKES_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
# What has no derivative, or 0: a gradient that goes through it is made up on purpose (straight-through estimators).
ROUNDS = (torch.round, Tensor.round, torch.sign, Tensor.sign, torch.floor, Tensor.floor, torch.ceil, Tensor.ceil, torch.trunc, Tensor.trunc,
          Tensor.round_, Tensor.sign_, Tensor.floor_, Tensor.ceil_, torch.fake_quantize_per_tensor_affine)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Slope:
    """One slope along one direction: by the gradient, by differences, and by differences of twice the step, which are
    another where the loss jumps."""

    analytic: float
    numeric: float
    wider: float

    @property
    def gap(self) -> float:
        """How far the gradient is off, as a share of the loss's own slope; 0 where the differences cannot say so."""
        off, scale = abs(self.analytic - self.numeric), max(abs(self.numeric), 1e-6)
        return off / scale if abs(self.wider - self.numeric) <= min(1e-3 * scale, 0.1 * off) else 0.0


@dataclass(frozen=True, slots=True)
class Cut:
    """A place where own code leaves the graph: the line of a detach, or the function that computes under no_grad."""

    spot: Spot
    by: str

    def is_(self, other: "Cut") -> bool:
        same = self.spot.code is other.spot.code and self.by == other.by
        return same and (self.by == "no_grad" or self.spot.line == other.spot.line)


class Slopes:
    """The loss of a float64 twin on a case, its gradient, and its slopes along random directions.

    `cuts` are the places where own code cuts the graph, `custom` the functions with a backward of their own in it, and
    `leaves_out` says whether own code computes with parameters under no_grad.
    """

    def __init__(self, twin: Subject, case: Case) -> None:
        self.twin, self.case = twin, case
        self.target = torch.tensor(case.input_ids, device=twin.device)[:, 1:]
        self.parameters = {name: p for name, p in twin.model.named_parameters() if p.requires_grad}
        watch = _Watch(twin, None)
        self.gradients, self.custom = self._gradients(watch)
        self.cuts, self._rounds, self._hooks, self.leaves_out = watch.cuts, watch.rounds, watch.hooks, watch.leaves_out
        self.least = SHARE if self.cuts else TOLERANCE
        self._without: dict[Cut, dict[str, Tensor]] = {}

    def groups(self) -> list[list[str]]:
        """The parameters by their part in a layer, those of all layers together."""
        found: dict[str, list[str]] = {}
        for name in self.parameters:
            found.setdefault(re.sub(r"\d+", "*", name), []).append(name)
        return list(found.values())

    def along(self, names: list[str], seed: int) -> Slope:
        """The slope along a random direction of some parameters."""
        ways = self._directions(names, seed)
        slope = Slope(_predicted(self.gradients, ways), numeric := self._difference(ways, STEP), numeric)
        return slope if slope.gap <= self.least else replace(slope, wider=self._difference(ways, 2 * STEP))

    def parted(self, names: list[str]) -> tuple[Slope, Slope] | None:
        """Two slopes that the gradient misses, each along a direction of its own; None where one agrees."""
        first = self.along(names, 1)
        second = self.along(names, 2) if first.gap > self.least else first
        return (first, second) if second.gap > self.least else None

    def culprit(self, names: list[str], missed: tuple[Slope, Slope]) -> Cut | None:
        """The one cut without which the gradient is the derivative of the loss, along both directions that it missed."""
        ways = [self._directions(names, seed) for seed in (1, 2)]
        for cut in self.cuts:
            predicted = [_predicted(self.without(cut), way) for way in ways]
            if all(abs(v - s.numeric) <= 0.05 * abs(s.analytic - s.numeric) for v, s in zip(predicted, missed, strict=True)):
                return cut
        return None

    def withholds(self, name: str) -> Cut | None:
        """The one cut without which a parameter that gets no gradient gets one."""
        return next((cut for cut in self.cuts if name in self.without(cut)), None)

    def without(self, cut: Cut) -> dict[str, Tensor]:
        """The gradient of each parameter with the path of one cut in the graph; none where the graph cannot be kept there, as
        where a tensor is written in place."""
        if cut not in self._without:
            self._without[cut] = {}
            with suppress(Exception):
                self._without[cut], _ = self._gradients(_Watch(self.twin, cut))
        return self._without[cut]

    def made_up(self) -> str | None:
        """Why the gradient may be meant to be no derivative; None where nothing says so."""
        if self._rounds:
            return "something rounds on the way to the logits, and the gradient of a rounding is made up"
        if self._hooks:
            return "forward hooks a function to a gradient, which makes another one of it"
        # torch has no public way to ask for the hooks that register_full_backward_hook keeps: without these names such a model is told of.
        if any(m._backward_hooks or m._backward_pre_hooks for m in self.twin.model.modules()):
            return "a module hooks a function to its gradients, which makes others of them"
        if (cut := next((cut for cut in self.cuts if _is_estimator(cut.spot)), None)) is not None:
            return f"the gradient is made up on purpose at line {cut.spot.line}: what is detached there is in the sum with its gradient too"
        if (kind := next((kind for kind in self.custom if _hands_on(kind)), None)) is not None:
            return f"{kind.__qualname__} hands its input on and shapes the gradient alone"
        return None

    def _directions(self, names: list[str], seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            return {
                name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device) * (p.abs().mean() + 1e-8).double()
                for name, p in self.parameters.items()
                if name in names
            }

    def _loss(self) -> Tensor:
        with quiet(), KeepDouble(), own_code(self.twin, self.case):
            logits = self.twin.call(self.case).logits
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]).double(), self.target.reshape(-1))

    def _gradients(self, watch: "_Watch") -> tuple[dict[str, Tensor], list[Any]]:
        """The gradient of each parameter, and the functions with a backward of their own that it went through."""
        with torch.enable_grad(), quiet():
            self.twin.model.zero_grad(set_to_none=True)
            with watch:
                value = self._loss()
            custom = custom_functions(value)
            with own_code(self.twin, self.case):  # a backward of the model's own may refuse: Reformer's does in eval mode
                value.backward()
        found = {name: p.grad.double() for name, p in self.parameters.items() if p.grad is not None}
        self.twin.model.zero_grad(set_to_none=True)
        return found, custom

    def _difference(self, ways: dict[str, Tensor], step: float) -> float:
        values = []
        with torch.no_grad():
            for sign in (1.0, -2.0):
                self._move(ways, sign * step)
                values.append(float(self._loss()))
            self._move(ways, step)
        return (values[0] - values[1]) / (2 * step)

    def _move(self, ways: dict[str, Tensor], step: float) -> None:
        for name, way in ways.items():
            self.parameters[name].add_(way, alpha=step)


def on_purpose(missed: tuple[Slope, Slope]) -> bool:
    """Whether a cut makes of the gradient what no slip does: the same multiple of it in every direction, which is a scaled
    gradient, or a gradient where the loss has no slope at all, which is a straight-through estimator."""
    first, second = missed
    if all(abs(slope.numeric) <= 1e-3 * abs(slope.analytic) for slope in missed):
        return True
    product = first.analytic * second.numeric
    return product != 0 and abs(product - second.analytic * first.numeric) <= 1e-4 * abs(product)


def _predicted(gradients: dict[str, Tensor], ways: dict[str, Tensor]) -> float:
    return sum(float((gradients[name] * way).sum()) for name, way in ways.items() if name in gradients)


class _Watch(TorchFunctionMode):
    """Notes where own code cuts the graph, and mends one of the cuts: what it gives back is then still in the graph."""

    def __init__(self, twin: Subject, mend: Cut | None) -> None:
        super().__init__()
        self.sources, self.mend = twin.sources, mend
        self.cuts: list[Cut] = []
        self.rounds, self.hooks = False, False
        self.leaves_out = False  # whether own code computes with parameters under no_grad

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.hooks = self.hooks or func is Tensor.register_hook
        detaches = func in (torch.detach, Tensor.detach, TAKES_DATA)
        leaves = detaches or not torch.is_grad_enabled()
        if not (leaves or func in ROUNDS) or not _in_graph((args, kwargs)):
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if not any(isinstance(value, Tensor) and value.is_floating_point() for value in tree_iter(result)):
            return result  # a size, a device, a comparison
        self.rounds = self.rounds or func in ROUNDS
        spot = self.sources.spot(sys._getframe(1)) if leaves else None
        if spot is not None:
            cut = Cut(spot, "detach" if detaches else "no_grad")
            self.leaves_out |= not detaches and any(isinstance(value, nn.Parameter) for value in tree_iter((args, kwargs)))
            if self.mend is not None and cut.is_(self.mend):
                return self._kept(func, args, kwargs, detaches)
            if not any(cut.is_(other) for other in self.cuts):
                self.cuts.append(cut)
        return result

    def _kept(self, func: Any, args: Any, kwargs: Any, detaches: bool) -> Any:
        if detaches:
            return args[0].view_as(args[0])
        with torch.enable_grad():
            return func(*args, **kwargs)


def _in_graph(values: Any) -> bool:
    return any(isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad for value in tree_iter(values))


def _is_estimator(spot: Spot) -> bool:
    """Whether a detached term stands in one sum with the same term undetached, `x + (y - x).detach()` or `a * x + b * x.detach()`:
    that changes no value, only the gradient."""
    tree, first = _parsed(spot.code)
    statements = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= spot.line - first + 1 <= (n.end_lineno or n.lineno)]
    if not statements:
        return False
    cut: set[str] = set()
    plain: set[str] = set()
    waiting: list[ast.AST] = [*ast.iter_child_nodes(statements[-1])]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.BinOp | ast.UnaryOp):
            waiting += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "detach":
            cut |= _terms(node.func.value)
        elif isinstance(node, ast.Attribute) and node.attr == "data":
            cut |= _terms(node.value)
        elif isinstance(node, ast.expr) and not isinstance(getattr(node, "ctx", None), ast.Store):
            plain.add(ast.unparse(node))
    return bool(cut & plain)


def _terms(node: ast.expr) -> set[str]:
    """The terms of a sum or product, as text."""
    parts = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)] if isinstance(node, ast.BinOp | ast.UnaryOp) else []
    return set().union(*map(_terms, parts)) if parts else {ast.unparse(node)}


def _hands_on(kind: Any) -> bool:
    """Whether the forward of a custom function gives back an argument as it came, or a copy or another view of it."""
    code = inspect.unwrap(kind.forward).__code__  # torch.amp.custom_fwd wraps it
    tree, _ = _parsed(code)
    made = {n.targets[0].id: n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Return) else None
        while value is not None:
            if isinstance(value, ast.Name) and value.id in code.co_varnames[: code.co_argcount]:
                return True
            if isinstance(value, ast.Name):
                value = made.pop(value.id, None)
            elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in COPIES:
                of_torch = isinstance(value.func.value, ast.Name) and value.func.value.id == "torch"
                value = next(iter(value.args), None) if of_torch else value.func.value
            else:
                value = None
    return False


def _parsed(code: CodeType) -> tuple[ast.AST, int]:
    """The source of a function as a tree, and the line that it starts at; an empty one where it cannot be read."""
    try:
        lines, first = inspect.getsourcelines(code)
        return ast.parse(textwrap.dedent("".join(lines))), first
    except (OSError, TypeError, SyntaxError):
        return ast.Module(body=[], type_ignores=[]), 1
