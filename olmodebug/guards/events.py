"""What a training loop does, told as it happens: backward passes, optimizer steps, clipping, scaling, schedules, checkpoints.

Torch's public functions are wrapped while the guards are on and put back afterwards. A wrapper calls what it wraps with the
same arguments and returns the same value; listeners only look.
"""

import contextlib
import functools
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.data
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import CheckpointFunction

from ..sources import Spot
from .place import line_here

Listener = Callable[..., None]


class Events:
    """The listeners by event; `install` wraps torch, and the exit stack that it is given puts everything back."""

    def __init__(self, quiet: Callable[[], Any], fault: Callable[[Any], None]) -> None:
        self.fault = fault
        self.listeners: dict[str, list[Listener]] = defaultdict(list)
        self.quiet = quiet
        self.stepping = 0
        self.retains = False  # whether the last backward kept its graph
        self.grad = True  # whether gradients were recorded where the last event happened; listeners run without

    def on(self, event: str, listener: Listener) -> None:
        self.listeners[event].append(listener)

    def tell(self, event: str, *values: Any) -> None:
        """Tell all listeners; their own ops are not guarded."""
        listeners = self.listeners.get(event)
        if listeners:
            self.grad = torch.is_grad_enabled()
            with self.quiet():
                for listener in list(listeners):
                    try:
                        listener(*values)
                    except Exception:  # a fault of ours must not stop the script
                        listeners.remove(listener)
                        self.fault(listener)

    def install(self, undo: contextlib.ExitStack) -> None:
        """Wrap what the listeners need to hear of."""
        self.wrap(undo, torch.autograd, "backward", self._backward)
        undo.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        undo.callback(register_optimizer_step_post_hook(self._after_step).remove)
        self.wrap(undo, torch.optim.Optimizer, "zero_grad", self.told("zeroed"))
        self.wrap(undo, nn.Module, "zero_grad", self.told("module_zeroed"))
        self.wrap(undo, nn.Module, "eval", self.told("module_eval"))
        for name in ("clip_grad_norm_", "clip_grad_value_"):
            wrapped = self.wrap(undo, torch.nn.utils.clip_grad, name, self.clipping)
            self._put(undo, torch.nn.utils, name, wrapped)
        for name in ("scale", "unscale_", "step", "update"):
            self.wrap(undo, torch.amp.GradScaler, name, self._scaler(name))
        for kind in _scheduler_kinds():
            self.wrap(undo, kind, "step", self._scheduled)
        self._wrap_checkpoints(undo)
        self.wrap(undo, torch.optim.Optimizer, "__init__", self.told("optimizer_made"))
        self.wrap(undo, torch.utils.data.DataLoader, "__iter__", self.told("loader_iter"))
        self.wrap(undo, nn.Module, "to_empty", self._emptied)

    def wrap(self, undo: contextlib.ExitStack, holder: Any, name: str, make: Callable[[Any], Any]) -> Any:
        """Put a wrapper in the place of a function until `undo` closes; returns the wrapper."""
        original = vars(holder)[name]
        wrapper = functools.wraps(original)(make(original))
        self._put(undo, holder, name, wrapper)
        return wrapper

    def _wrap_checkpoints(self, undo: contextlib.ExitStack) -> None:
        """Reentrant checkpoints, below the public function, of which a script may hold the original since before."""
        original = CheckpointFunction.apply

        def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
            self.tell("checkpoint", (function, *args), {}, line_here(sys._getframe(1)))
            return original(function, preserve_rng_state, *args)

        CheckpointFunction.apply = staticmethod(apply)  # type: ignore[method-assign, assignment]
        undo.callback(delattr, CheckpointFunction, "apply")  # it is inherited again

    def _put(self, undo: contextlib.ExitStack, holder: Any, name: str, value: Any) -> None:
        undo.callback(setattr, holder, name, vars(holder)[name])
        setattr(holder, name, value)

    def _backward(self, original: Any) -> Any:
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            spot = line_here(sys._getframe(1))
            roots = [tensors] if isinstance(tensors, Tensor) else [t for t in tensors if isinstance(t, Tensor)]
            keeps, creates = [*args[1:3], None, None][:2]  # (grad_tensors, retain_graph, create_graph), as Tensor.backward gives them
            keeps = kwargs.get("retain_graph", keeps)
            self.retains = bool(kwargs.get("create_graph", creates) if keeps is None else keeps)
            self.tell("backward", roots, spot)
            result = original(tensors, *args, **kwargs)
            self.tell("backward_done", roots, spot)
            return result

        return backward

    def told(self, event: str) -> Callable[[Any], Any]:
        """A wrapper that tells the arguments and the line before the call."""

        def make(original: Any) -> Any:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                self.tell(event, args, kwargs, line_here(sys._getframe(1)))
                return original(*args, **kwargs)

            return wrapper

        return make

    def clipping(self, original: Any) -> Any:
        """A wrapper of what clips the gradients of parameters, or of a module as the first FSDP does, that tells of them before and after."""

        def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(parameters, (Tensor, nn.Module, list, tuple)):  # a generator can be read once; torch makes a list of it, too
                parameters = list(parameters) or parameters
            told = list(parameters.parameters()) if isinstance(parameters, nn.Module) else parameters
            self.tell("clip", (told, *args), kwargs, line_here(sys._getframe(1)))
            result = original(parameters, *args, **kwargs)
            self.tell("clipped", (told, *args), kwargs, result)
            return result

        return clip

    def _scaler(self, name: str) -> Callable[[Any], Any]:
        def make(original: Any) -> Any:
            def wrapper(scaler: Any, *args: Any, **kwargs: Any) -> Any:
                spot = line_here(sys._getframe(1))
                self.tell(f"scaler_{name}", scaler, args, spot)
                result = original(scaler, *args, **kwargs)
                self.tell(f"scaler_{name}_done", scaler, args, spot, result)
                return result

            return wrapper

        return make

    def _scheduled(self, original: Any) -> Any:
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code.co_filename
            # a schedule that drives others, or a library that counts for itself (accelerate steps once a process), is no loop
            inner = "/torch/optim/" in caller or "/accelerate/" in caller
            if not inner:
                self.tell("scheduled", scheduler, line_here(sys._getframe(1)))
            return original(scheduler, *args, **kwargs)

        return step

    def _emptied(self, original: Any) -> Any:
        def to_empty(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            shared = shared_parameters(module)
            result = original(module, *args, **kwargs)
            self.tell("emptied", module, shared, line_here(sys._getframe(1)))
            return result

        return to_empty

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.stepping += 1
        self.tell("step", optimizer, _caller())

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.tell("stepped", optimizer, _caller())
        self.stepping = max(0, self.stepping - 1)


def shared_parameters(module: nn.Module) -> list[tuple[str, str]]:
    """Pairs of names of one parameter that stands in two places."""
    first: dict[int, str] = {}
    pairs = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            pairs.append((first[id(parameter)], name))
        first.setdefault(id(parameter), name)
    return pairs


def _caller() -> Spot | None:
    return line_here(sys._getframe(2))


def _scheduler_kinds() -> list[type]:
    from torch.optim import lr_scheduler

    kinds: list[type] = [lr_scheduler.LRScheduler, *lr_scheduler.LRScheduler.__subclasses__()]
    return [kind for kind in dict.fromkeys(kinds) if "step" in vars(kind) and kind.__module__ == lr_scheduler.__name__]
