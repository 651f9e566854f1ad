"""One training step of a model noted in a rank's record: weights before, what modules got and gave, gradients, weights after."""

import contextlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten  # private by its name, and what torch's own documentation uses

from ..group import COLLECTIVE_NAMESPACES
from ..records import Where
from ..sources import short_path
from .record import RankWriter, plain_name

PIPELINE_STAGE = str(Path("torch", "distributed", "pipelining", "stage.py"))


class LeftOut(nn.Module):
    """Stands where a module was that another process has; what goes through it is not noted."""


class Notes:
    """The notes on one model. `prefix` stands before its names, where a step runs several models."""

    def __init__(self, model: nn.Module, writer: RankWriter, prefix: str = "") -> None:
        self.model, self.writer, self.prefix = model, writer, prefix
        self._calls: dict[str, int] = {}
        self._trial = False
        self._seen = False  # whether the data of this call is noted
        self._places = {
            f"{path}.{name}" if path else name: forward_of(module)
            for path, module in model.named_modules()
            for name, _ in module.named_parameters(recurse=False)
        }

    def start(self) -> None:
        """The weights as they are."""
        for name, parameter in self.model.named_parameters():
            self.writer.tensor("start", self._name(name), parameter)

    def watch(self, guarded: Callable[[Callable[..., None]], Callable[..., None]] = lambda hook: hook) -> list[Any]:
        """Hooks on every module, as handles that remove them; `guarded` may wrap each hook."""
        self._trial = is_trial()  # of a call that has begun already
        handles: list[Any] = [self.model.register_forward_pre_hook(guarded(self._begun), prepend=True, with_kwargs=True)]
        for name, module in self.model.named_modules():
            if (plain_name(name) or module is self.model) and not isinstance(module, LeftOut):
                handles.append(module.register_forward_hook(guarded(self._called(plain_name(name))), with_kwargs=True))
        return handles

    def gradients(self, only: Iterable[Tensor] | None = None) -> None:
        """The gradients as they are, of all parameters or of some. A flat shard without an element gets none, and none is its part."""
        chosen = None if only is None else {id(parameter) for parameter in only}
        for name, parameter in self.model.named_parameters():
            gradient = parameter if parameter.grad is None and not parameter.numel() else parameter.grad
            if gradient is not None and (chosen is None or id(parameter) in chosen):
                self.writer.tensor("gradient", self._name(name), gradient, where=self._places[name])

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """The weights that an optimizer holds, and what it keeps of each, after its step."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in held:
                continue
            self.writer.tensor("step", self._name(name), parameter)
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    self.writer.tensor("state", f"{self._name(name)}.{key}", value)

    def _name(self, name: str) -> str:
        return self.prefix + plain_name(name)

    def _begun(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._calls.clear()
        self._trial = is_trial()
        if self._trial:
            return
        if torch.is_grad_enabled():
            self._data(first_tensor((args, kwargs)))

    def _data(self, given: Tensor | None) -> None:
        self._seen = True
        if given is not None and not given.is_floating_point():  # hidden states from another stage are no data
            self.writer.tensor("data", f"{self.prefix}input_ids", given)

    def _called(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._trial or not torch.is_grad_enabled():  # no part of a training step
                return
            self._calls[name] = calls = self._calls.get(name, 0) + 1
            label = self.prefix + (name if calls == 1 else f"{name}#{calls}")
            given, made = first_tensor((args, kwargs)), first_tensor(output)
            where = forward_of(module)
            if not name and not self._seen:  # a hook that was made during the call missed its beginning
                self._data(given)
            self._seen = self._seen and bool(name)
            if given is not None and made is not None:
                self.writer.tensor("input", label, given, where=where)
                self.writer.tensor("forward", label, made, where=where)

        return hook


def is_trial() -> bool:
    """Whether torch's pipelines call a stage to learn the shapes that it gives, and not for a micro-batch."""
    frame, inside = inspect.currentframe(), False
    while frame is not None:
        if frame.f_code.co_filename.endswith(PIPELINE_STAGE):
            if frame.f_code.co_name == "forward_one_chunk":
                return False
            inside = True
        frame = frame.f_back
    return inside


def first_tensor(tree: Any) -> Tensor | None:
    """The first tensor in nested containers, output objects included; None without one."""
    leaves = tree_flatten(tree)[0]
    found = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if found is not None or len(leaves) != 1 or isinstance(leaves[0], Tensor):
        return found
    return next((value for value in getattr(leaves[0], "__dict__", {}).values() if isinstance(value, Tensor)), None)


def forward_of(module: nn.Module) -> Where:
    """The forward function of a module's class, where that is the user's own and not torch's."""
    forward = type(module).forward
    file = inspect.getsourcefile(forward) if inspect.isfunction(forward) else None
    if file is None or file.startswith(str(Path(nn.__file__).parents[1])):
        return Where()
    line = inspect.unwrap(forward).__code__.co_firstlineno
    return Where(function=forward.__qualname__, file=short_path(file), line=line)


def collective_of(func: Any, args: Any, kwargs: Any) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
    """The op of a collective that is about to start, the shape that it is given, and the ranks of its group; None for any
    other op."""
    if func.namespace not in COLLECTIVE_NAMESPACES or "wait" in func.__name__:
        return None
    given = first_tensor((args, kwargs))
    return func.__name__.partition(".")[0].strip("_"), tuple(given.shape) if given is not None else (), _group_of(args, kwargs)


def _group_of(args: Any, kwargs: Any) -> tuple[int, ...]:
    """The global ranks of a collective's group, from the group or the name that the op is given; none where it tells neither."""
    import torch.distributed as dist

    for value in (*args, *(kwargs or {}).values()):
        with contextlib.suppress(RuntimeError, ValueError, KeyError, TypeError):
            if isinstance(value, torch.ScriptObject):
                return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(value)))
            if isinstance(value, dist.ProcessGroup):
                return tuple(dist.get_process_group_ranks(value))
            if isinstance(value, str):  # a functional collective names its group, which only torch's own table knows
                return tuple(dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(value)))  # type: ignore[arg-type]
    return ()
