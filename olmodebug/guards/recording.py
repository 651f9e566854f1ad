"""The first training step of a process, noted for a comparison across processes: `olmodebug run --record FOLDER`.

A step begins with the first forward of a model with trainable weights, and ends when that model is called again after an
optimizer has stepped, or with the process. What came before is no part of it where the script throws the gradients away.
Nothing of it changes what the script computes.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..ranks.calls import Collective
from ..ranks.notes import Notes, collective_of
from ..ranks.record import RankWriter
from .part import Part
from .place import line_here, where_of


class Recording(Part):
    """The notes of one process; a process that trains nothing leaves none."""

    def __init__(self, watch: Any, folder: Path) -> None:
        self.watch, self.folder = watch, folder
        self.writer: RankWriter | None = None
        self.notes: dict[int, Notes] = {}  # by the id of the model that is called
        self.known: set[int] = set()  # modules whose calls are noted already, or never will be
        self.handles: list[Any] = []
        self.dtypes: set[str] = set()
        self.optimizers: list[str] = []
        self.losses = 0
        self.driven = False  # whether another optimizer has stepped inside of the one that steps
        self.noted: set[int] = set()  # parameters whose gradient is noted
        self.done = False

    def listen(self) -> None:
        events = self.watch.events
        self._watch_calls()
        self.watch.undo.callback(self._remove)
        if torch.distributed.is_available():
            from torch.distributed.fsdp import FullyShardedDataParallel

            events.wrap(self.watch.undo, FullyShardedDataParallel, "clip_grad_norm_", events.clipping)
        events.on("backward", self._loss)
        events.on("zeroed", lambda args, kwargs, spot: self._thrown_away([p for group in args[0].param_groups for p in group["params"]]))
        events.on("module_zeroed", lambda args, kwargs, spot: self._thrown_away(args[0].parameters()))
        events.on("clip", lambda args, kwargs, spot: self._gradients())
        events.on("clipped", self._norm)
        events.on("step", lambda optimizer, spot: self._gradients())
        events.on("stepped", self._stepped)
        self.watch.preparers.append(self._collective)
        self.watch.observers.append(self._dtype)

    def _watch_calls(self) -> None:
        self.handles.append(register_module_forward_pre_hook(self._guarded(self._called)))

    def finish(self) -> None:
        """The process ends: a step that an optimizer took is whole."""
        if self.optimizers and not self.done:
            self._close()

    def _guarded(self, hook: Callable[..., None]) -> Callable[..., None]:
        """A hook whose own ops are not the script's, and whose fault does not stop it."""

        @functools.wraps(hook)
        def guarded(*args: Any) -> None:
            grad = torch.is_grad_enabled()
            if self.done or not grad:
                return
            before, self.watch.mode.quiet = self.watch.mode.quiet, True
            try:
                hook(*args)
            except Exception:
                self.done = True
                self.watch.fault(None)
            finally:
                self.watch.mode.quiet = before

        return guarded

    def _called(self, module: nn.Module, args: Any) -> None:
        """Any module is called: a model that was not seen before is noted from here on."""
        if id(module) in self.notes and self.optimizers:
            self._close()
        if id(module) in self.known:
            return
        self.known.update(id(each) for each in module.modules())
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return
        writer = self._writer()
        if writer is None:
            return
        notes = Notes(module, writer, f"{type(module).__name__}." if self.notes else "")
        self.notes[id(module)] = notes
        notes.start()
        self.handles += notes.watch(self._guarded)

    def _writer(self) -> RankWriter | None:
        if self.writer is None:
            rank, world = _rank_and_world()
            try:
                self.writer = RankWriter(self.folder, rank=rank, world=world, new=True)
            except FileExistsError:  # another process of the command has this rank already
                self.done = True
        return self.writer

    def _loss(self, roots: list[Tensor], spot: object) -> None:
        self.losses += 1
        if self._on() and self.writer is not None and len(roots) == 1 and roots[0].numel() == 1:
            self.writer.tensor("loss", "loss" if self.losses == 1 else f"loss#{self.losses}", roots[0].detach().double())

    def _thrown_away(self, parameters: Iterable[Tensor]) -> None:
        """Gradients are reset after a backward and before any step: that was a trial, and the step is still to come."""
        if not self._on() or not self.losses or self.optimizers or self.writer is None:
            return
        mine = {id(parameter) for notes in self.notes.values() for parameter in notes.model.parameters()}
        if not any(id(parameter) in mine and parameter.grad is not None for parameter in parameters):
            return
        self._remove()
        self.writer.discard()
        self.writer, self.losses = None, 0
        self.notes, self.known, self.noted, self.dtypes = {}, set(), set(), set()
        self._watch_calls()

    def _gradients(self) -> None:
        """Gradients as they are before they are clipped, or before the step where nothing clips them; each once."""
        for notes in self.notes.values() if self._on() else ():
            fresh = [p for p in notes.model.parameters() if p.grad is not None and id(p) not in self.noted]
            self.noted.update(map(id, fresh))
            notes.gradients(fresh)

    def _norm(self, args: Any, kwargs: Any, result: Any) -> None:
        if self._on() and self.writer is not None and isinstance(result, Tensor) and not self.optimizers:
            self.writer.tensor("norm", "grad_norm", result.detach().double())

    def _stepped(self, optimizer: torch.optim.Optimizer, spot: object) -> None:
        if not self._on():
            return
        inside = self.watch.events.stepping > 1  # as in ZeRO: whole weights are there when the outer one has ended
        if inside or not self.driven:
            self.optimizers.append(type(optimizer).__name__)
        self.driven = inside
        for notes in self.notes.values() if not inside else ():
            notes.after(optimizer)

    def _on(self) -> bool:
        return not self.done and bool(self.notes)

    def _collective(self, func: Any, args: Any, kwargs: Any) -> None:
        if not self._on() or self.writer is None:
            return
        try:
            call = collective_of(func, args, kwargs)
            if call is not None:
                op, shape, group = call
                self.writer.collective(Collective(op=op, shape=shape, group=group, where=where_of(line_here(sys._getframe(2)), op=op)))
        except Exception:
            self.done = True
            self.watch.fault(None)

    def _dtype(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        if self._on() and isinstance(output, Tensor) and output.dtype.is_floating_point:
            self.dtypes.add(str(output.dtype).removeprefix("torch."))

    def _close(self) -> None:
        self.done = True
        self._remove()
        if self.writer is not None:
            self.writer.close(dtypes=self.dtypes, optimizers=self.optimizers)
        self.notes = {}  # holds no model alive longer than the script does

    def _remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


def _rank_and_world() -> tuple[int, int]:
    """Of the process group where there is one, of torchrun's variables before, and 0 of 1 without either."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
