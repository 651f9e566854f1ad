"""Where in the user's code the process is, found from its frames only when it is asked.

A frame is the user's own when its file is neither installed nor part of Python, torch or olmodebug; of installed code the
innermost frame that is not torch's is kept beside it ("inside modeling_llama.py:123").
"""

import sys
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from torch import nn

from ..records import Where
from ..sources import NEAR, OUTSIDE, OWN, Sources, Spot, short_path, traceback_frames

_RANKS: dict[str, int] = {}
_PLAIN = Sources(nn.Module())

CALL = "_call_impl"  # the frame of nn.Module that calls forward: its `self` is the module


def rank(file: str) -> int:
    """OWN, NEAR for installed packages other than torch, OUTSIDE for the rest."""
    known = _RANKS.get(file)
    if known is None:
        known = _PLAIN.rank(file)
        if known == OUTSIDE and "site-packages" in file and not _PLAIN.is_torch(file) and "/olmodebug/" not in file:
            known = NEAR
        _RANKS[file] = known
    return known


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place of the user's own, the installed code that runs inside it, and the modules that are open, outermost first."""

    spot: Spot | None = None
    inside: Spot | None = None
    modules: tuple[nn.Module, ...] = ()
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @property
    def where(self) -> Where:
        return self.at()

    def at(self, op: str | None = None) -> Where:
        """The place as a report gives it."""
        spot = self.spot or self.inside
        module = module_path(self.modules)
        if spot is None:
            return Where(module=module, op=op)
        return Where(module=module, function=spot.function, file=short_path(spot.file), line=spot.line, op=op)

    @property
    def inside_text(self) -> str | None:
        """`modeling_llama.py:123 in LlamaAttention.forward` where installed code runs inside the user's line."""
        if self.inside is None or self.spot is None:
            return None
        package = self.inside.file.rpartition("site-packages/")[2]
        return f"{package}:{self.inside.line} in {self.inside.function}"


def here(frame: FrameType | None = None) -> Place:
    """The place of the running code."""
    frames = []
    frame = frame or sys._getframe(1)
    while frame is not None:
        frames.append((frame, frame.f_lasti, frame.f_lineno))
        frame = frame.f_back
    return _place(frames[::-1])


def of(traceback: TracebackType | None) -> Place:
    """The place at which an exception was raised."""
    return _place(traceback_frames(traceback))


def line_here(frame: FrameType | None = None) -> Spot | None:
    """The innermost own frame, else the innermost installed one; cheaper than `here`, without the modules."""
    frame = frame or sys._getframe(1)
    near: Spot | None = None
    ranks = _RANKS
    while frame is not None:
        file = frame.f_code.co_filename
        known = ranks.get(file)
        if known is None:
            known = rank(file)
        if known == OWN:
            return Spot(frame.f_code, frame.f_lasti, frame.f_lineno)
        if known == NEAR and near is None:
            near = Spot(frame.f_code, frame.f_lasti, frame.f_lineno)
        frame = frame.f_back
    return near


def where_of(spot: Spot | None, *, module: str = "", op: str | None = None) -> Where:
    """A spot as the report gives it."""
    if spot is None:
        return Where(module=module, op=op)
    return Where(module=module, function=spot.function, file=short_path(spot.file), line=spot.line, op=op)


def text_of(spot: Spot | None) -> str:
    """`train.py:31`."""
    return f"{short_path(spot.file)}:{spot.line}" if spot else "an unknown line"


def module_path(modules: tuple[nn.Module, ...]) -> str:
    """The innermost open module by its name in the outermost one; the class's name where that is the outermost itself."""
    if not modules:
        return ""
    root, last = modules[0], modules[-1]
    if last is root:
        return type(root).__name__
    return next((name for name, module in root.named_modules() if module is last), type(last).__name__)


def _place(frames: list[tuple[FrameType, int, int]]) -> Place:
    """From frames, outermost first."""
    spot = inside = None
    modules: list[nn.Module] = []
    call = None
    for frame, instruction, line in frames:
        code = frame.f_code
        if code.co_name == CALL and "self" in frame.f_locals and isinstance(frame.f_locals["self"], nn.Module):
            values = frame.f_locals
            if not modules:
                call = (tuple(values.get("args", ())), dict(values.get("kwargs", {})))
            modules.append(values["self"])
            continue
        known = rank(code.co_filename)
        if known == OWN:
            spot, inside = Spot(code, instruction, line), None
        elif known == NEAR:
            inside = Spot(code, instruction, line)
    return Place(spot=spot, inside=inside, modules=tuple(modules), call=call)
