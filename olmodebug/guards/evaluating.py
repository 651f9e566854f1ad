"""Evaluations with dropout, and training without: a model whose mode is not the one that the script means."""

import inspect
import sys
import weakref
from typing import Any

import torch
from torch import nn
from torch.autograd import Function

from ..sources import Spot
from . import place
from .part import Part
from .place import Place, text_of

EVAL = "loop.evaluates-in-eval-mode"
MODE = "loop.trains-in-train-mode"

SAME_STEPS = 2  # in a row in eval mode before it is told
FEWEST_LOSSES = 2  # of a script that only evaluates; a single loss may be a look at a fresh model
MEAN_OR_SUM = (1, 2)  # torch's numbers of a reduction; a loss per token may choose or weigh examples and is no evaluation

aten = torch.ops.aten


class Evaluating(Part):
    """Follows dropout, losses without gradients and calls of `eval()`."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.dropped: weakref.ref[nn.Module] | None = None  # the model in whose forward dropout drew numbers without gradients
        self.losses: list[Place] = []  # of a script that has not trained yet
        self.stepped: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self.evals: weakref.WeakKeyDictionary[nn.Module, Spot] = weakref.WeakKeyDictionary()
        self.evaluated: weakref.WeakKeyDictionary[nn.Module, Spot] = weakref.WeakKeyDictionary()

    def listen(self) -> None:
        self.watch.look(aten.embedding.default, self._forward)
        for op in (aten.native_dropout.default, aten.bernoulli_.float):
            self.watch.look(op, self._dropout)
        for op in (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default):
            self.watch.look(op, self._loss)
        self.watch.look(aten.multinomial.default, self._sampled)
        self.watch.events.on("module_eval", self._eval)
        self.watch.events.on("backward", lambda roots, spot: self.losses.clear())
        self.watch.events.on("step", self._step)

    # Losses after dropout

    def _forward(self, args: Any, output: Any) -> None:
        self.dropped = None

    def _dropout(self, args: Any, output: Any) -> None:
        if self.dropped is None and not torch.is_grad_enabled() and torch._C._current_autograd_node() is None:
            modules = place.here(sys._getframe(3)).modules
            self.dropped = weakref.ref(modules[0]) if modules else None

    def _loss(self, args: Any, output: Any) -> None:
        """A loss without gradients after dropout ran: an evaluation in train mode."""
        if torch.is_grad_enabled() or _inside_a_function():
            return
        self._remember_evaluation()
        model = self.dropped() if self.dropped is not None else None
        if model is None or not model.training:  # dropout in eval mode is meant (Monte Carlo dropout)
            return
        here = place.here(sys._getframe(3))
        if not self.watch.backwards:
            self.losses.append(here)
        elif args[3] in MEAN_OR_SUM:
            self._tell_evaluated(here)

    def _sampled(self, args: Any, output: Any) -> None:
        """Tokens drawn after a forward with dropout and without gradients; what a router draws inside of one is no token."""
        model = self.dropped() if self.dropped is not None else None
        here = place.here(sys._getframe(3)) if model is not None and model.training and not torch.is_grad_enabled() else None
        if here is not None and not here.modules:
            text = "tokens are sampled with dropout: the model is in train mode, and no gradient is recorded"
            self._tell_dropout(here, text, "multinomial")

    def _tell_evaluated(self, here: Place) -> None:
        text = "an evaluation runs with dropout: the loss is computed under no_grad, and the model is in train mode"
        self._tell_dropout(here, text, "cross_entropy")

    def _tell_dropout(self, here: Place, message: str, op: str) -> None:
        self.watch.tell(
            EVAL,
            "warning",
            here,
            message,
            op,
            cause="dropout drew random numbers in this forward, and no gradient was recorded",
            fix="model.eval() before it, model.train() after it",
        )

    def finish(self) -> None:
        """A script that never trained has had nothing but evaluations."""
        if not self.watch.backwards and len(self.losses) >= FEWEST_LOSSES:
            self._tell_evaluated(self.losses[0])

    # Steps in eval mode

    def _eval(self, args: Any, kwargs: Any, spot: Spot | None) -> None:
        if spot is not None:
            self.evals[args[0]] = spot

    def _remember_evaluation(self) -> None:
        """Losses in the function that called `eval()`, or below it: that call was made for an evaluation."""
        if not self.evals:
            return
        running = _running()
        for module, spot in list(self.evals.items()):
            if not module.training and spot.code in running:
                self.evaluated[module] = spot

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for root in self.watch.models.roots():
            if not any(id(p) in held for p in root.parameters()):
                continue
            if root.training or not _is_off(root):
                self.stepped[root] = 0
                continue
            count, left = self.stepped.get(root), self._left_in_eval(root)
            if count is None and left is None:
                continue  # it never trained in train mode: dropout may be off on purpose
            self.stepped[root] = (count or 0) + 1
            if self.stepped[root] == SAME_STEPS:
                before = "trained in train mode, and now steps" if count is not None and left is None else "steps"
                self.watch.tell(
                    MODE,
                    "warning",
                    spot,
                    f"{type(root).__name__} {before} in eval mode: its dropout is off",
                    "step",
                    cause=f"eval() was called for an evaluation at {text_of(left)}, and train() was not called after it" if left else None,
                    fix="model.train() after the evaluation",
                )

    def _left_in_eval(self, root: nn.Module) -> Spot | None:
        """The `eval()` of an evaluation whose function has returned, of this model or the one it wraps."""
        running = _running()
        modules = set(root.modules())
        return next((s for m, s in self.evaluated.items() if m in modules and not m.training and s.code not in running), None)


def _is_off(root: nn.Module) -> bool:
    """Whether a model has dropout, and all of it is off; a wrapper's own mode says nothing about what it wraps."""
    modes = [m.training for m in root.modules() if _drops(m)]
    return bool(modes) and not any(modes)


def _drops(module: nn.Module) -> bool:
    """Dropout as a module, or between the layers of an LSTM or GRU."""
    return (isinstance(module, nn.Dropout) and module.p > 0) or (isinstance(module, nn.RNNBase) and module.dropout > 0)


def _running() -> set[Any]:
    """The code of every running function."""
    found, frame = set(), sys._getframe(1)
    while frame is not None:
        found.add(frame.f_code)
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _inside_a_function() -> bool:
    """Whether the forward of a `torch.autograd.Function` runs, as compiled code and checkpointing do: autograd turns gradients off for it."""
    running, waiting = _running(), [Function]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        forward = getattr(kind.__dict__.get("forward"), "__func__", None)
        if forward is not None and getattr(inspect.unwrap(forward), "__code__", None) in running:
            return True
    return False
