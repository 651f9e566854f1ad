"""Where an op was called from: module path, function and line, in forward, backward and recomputation.

A backward op stands at the line of the forward op that made its node; one of a backward that the subject wrote itself
stands at its own line.
"""

import sys
from types import CodeType, FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from ..records import Where
from ..sources import Sources, Spot, short_path


class Places:
    """Finds the place of every op of one run; the search for its line ends at the frame of `stop`."""

    def __init__(self, model: nn.Module, sources: Sources, stop: CodeType) -> None:
        self._sources, self._stop = sources, stop
        # Frames at which the search ends during backward: what stands above them called backward.
        self._engine = frozenset({stop, torch.autograd.backward.__code__, torch.autograd.grad.__code__})
        self._forward: dict[int, tuple[Where, Spot | None]] = {}
        self._files: dict[str, str] = {}
        self._owners = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}

    def spot(self, frame: FrameType | None) -> Spot | None:
        """The innermost own line at or above a frame."""
        return self._sources.spot(frame, self._stop)

    def of(self, op: str, module: str) -> tuple[Where, Spot | None, str]:
        """(place, spot, phase) of the op that the caller's caller runs while `module` is the innermost running module."""
        frame = sys._getframe(2)
        # The node whose backward is running, and the counter that numbers nodes as they are made, have no public
        # accessor; without them backward ops would lose their module and line, nothing else.
        node = torch._C._current_autograd_node()
        if node is None:
            spot, phase = self._sources.spot(frame, self._stop), "forward"
        else:
            spot, phase = self._sources.spot(frame, self._engine), "recompute" if self._in_checkpoint(frame) else "backward"
        if phase == "backward":
            return (*self._backward(node, op, spot), phase)
        where = self._place(module, spot, op)
        if torch.is_grad_enabled():
            self._forward.setdefault(torch.autograd._get_sequence_nr() - 1, (where, spot))
        return where, spot, phase

    def _backward(self, node: Any, op: str, spot: Spot | None) -> tuple[Where, Spot | None]:
        made = self._forward.get(node._sequence_nr())
        if made is None and hasattr(node, "variable"):  # the end of the graph, where a gradient is accumulated
            return self._place(self._owners.get(id(node.variable), ""), None, op), None
        module, spot = made[0].module if made else "", spot or (made[1] if made else None)
        return self._place(module, spot, op), spot

    def _place(self, module: str, spot: Spot | None, op: str) -> Where:
        if spot is None:
            return Where(module=module, op=op)
        file = self._files.get(spot.file)
        if file is None:  # asking for the working directory at every op costs more than all the rest
            file = self._files[spot.file] = short_path(spot.file)
        return Where(module=module, function=spot.function, file=file, line=spot.line, op=op)

    def _in_checkpoint(self, frame: FrameType | None) -> bool:
        """Whether the frames up to the call of backward pass through torch's activation checkpointing."""
        while frame is not None and frame.f_code not in self._engine:
            if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
                return True
            frame = frame.f_back
        return False
