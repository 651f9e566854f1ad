"""Which line of the subject's own source is running, with torch's and transformers' internals left out.

A file is the subject's own when a module class of the model is defined in it, or when it is neither installed nor part
of Python: helper functions that the user wrote count, wherever they are.
"""

import inspect
import linecache
import os
import site
import sys
import sysconfig
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, TracebackType

from torch import nn

OUTSIDE, NEAR, OWN = 0, 1, 2

# Modules of this package whose exceptions are a subject's: the reference models, and the words about what a call gave.
SUBJECTS = ("model.py", "training/architectures.py", "convention.py", "subject.py", "first_run.py", "caches.py", "devices.py")
JUDGES = ("guards", "probes")  # folders whose exceptions are no instrument's: they raise in somebody else's name

_PACKAGE = str(Path(__file__).parent)
_PROBES = str(Path(__file__).parents[1] / "probes")  # where the shipped probes are in a checkout
_TORCH = str(Path(nn.__file__).parents[1])  # torch/nn/__init__.py
_PYTHON = tuple(dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")))
_INSTALLED = tuple(dict.fromkeys([*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib")]))
_PACKAGE_FOLDERS = ("site-packages", "dist-packages")  # an environment may see the packages of another one, through a .pth file


@dataclass(frozen=True, slots=True)
class Spot:
    """A place in a running function: its code, the instruction, and the line; cheap to keep, precise on demand."""

    code: CodeType
    instruction: int
    line: int

    @property
    def function(self) -> str:
        return self.code.co_qualname.replace(".<locals>", "")

    @property
    def file(self) -> str:
        return self.code.co_filename

    @property
    def span(self) -> tuple[int, int, int, int] | None:
        """(first line, last line, first column, last column) of the expression that was running."""
        positions = list(self.code.co_positions())
        first, last, start, end = positions[self.instruction // 2]
        if first is None or last is None or start is None or end is None:
            return None
        return first, last, start, end


def code_of(function: object) -> CodeType | None:
    """The code that somebody wrote for a function, behind the decorators that wrap it; None for what is not in Python."""
    return getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)


class Sources:
    """Sorts frames into the subject's own and all others."""

    def __init__(self, model: nn.Module) -> None:
        self._ranks: dict[str, int] = {}
        self._packages: set[str] = set()
        for kind in {type(module) for module in model.modules()}:
            for cls in kind.__mro__:
                if cls.__module__.partition(".")[0] in ("torch", "builtins"):
                    continue
                file = _file_of(cls)
                if file and not file.startswith(_TORCH):
                    package = cls.__module__.partition(".")[0]
                    if package != "transformers" or ".models." in cls.__module__ or "_file_" in cls.__module__:
                        self._ranks[file] = OWN
                    self._packages.add(package)

    def rank(self, file: str) -> int:
        """OWN for the subject's source, NEAR for other files of its package, OUTSIDE for everything else."""
        rank = self._ranks.get(file)
        if rank is None:
            rank = self._ranks[file] = self._judge(file)
        return rank

    def is_torch(self, file: str) -> bool:
        """Whether a file is part of torch."""
        return file.startswith(_TORCH)

    def spot(self, frame: FrameType | None, stop: CodeType | Collection[CodeType] = ()) -> Spot | None:
        """The innermost own frame at or above `frame`, else the innermost near one; the search ends at `stop`."""
        near: Spot | None = None
        ranks, ends = self._ranks, (stop,) if isinstance(stop, CodeType) else stop
        while frame is not None:
            code = frame.f_code
            if code in ends:
                break
            rank = ranks.get(code.co_filename)
            if rank is None:
                rank = self.rank(code.co_filename)
            if rank == OWN:
                return Spot(code, frame.f_lasti, frame.f_lineno)
            if rank == NEAR and near is None:
                near = Spot(code, frame.f_lasti, frame.f_lineno)
            frame = frame.f_back
        return near

    def spot_of(self, error: BaseException) -> Spot | None:
        """The innermost own frame in an exception's traceback."""
        best: Spot | None = None
        near: Spot | None = None
        for frame, instruction, line in traceback_frames(error.__traceback__):
            rank = self.rank(frame.f_code.co_filename)
            if rank == OWN:
                best = Spot(frame.f_code, instruction, line)
            elif rank == NEAR:
                near = Spot(frame.f_code, instruction, line)
        return best or near

    def _judge(self, file: str) -> int:
        if file.startswith(("<", _PACKAGE, _PROBES, _TORCH)):
            return OUTSIDE
        package = _installed_package(file)
        if package is not None:
            return NEAR if package in self._packages else OUTSIDE
        return OUTSIDE if file.startswith(_PYTHON) else OWN


def _installed_package(file: str) -> str | None:
    """The package that an installed file belongs to; None for a file that is not installed."""
    for root in _INSTALLED:
        if file.startswith(root + os.sep):
            return Path(file).relative_to(root).parts[0]
    parts = Path(file).parts
    for i in range(len(parts) - 2, 0, -1):
        if parts[i] in _PACKAGE_FOLDERS:
            return parts[i + 1]
    return None


def traceback_frames(traceback: TracebackType | None) -> list[tuple[FrameType, int, int]]:
    """(frame, instruction, line) from the outermost call to the innermost."""
    frames = []
    while traceback is not None:
        frames.append((traceback.tb_frame, traceback.tb_lasti, traceback.tb_lineno))
        traceback = traceback.tb_next
    return frames


def is_ours(error: BaseException) -> bool:
    """Whether an exception was raised by an instrument while it watched: the innermost frame is one of this package that
    is no part of a subject and of how it is called. What an op raises has torch's own frame innermost."""
    frames = traceback_frames(error.__traceback__)
    file = Path(frames[-1][0].f_code.co_filename) if frames else Path()
    if not file.is_relative_to(_PACKAGE):
        return False
    inside = file.relative_to(_PACKAGE)
    return inside.parts[0] not in JUDGES and inside.as_posix() not in SUBJECTS


def excerpt(file: str | None, line: int | None, *, around: int = 1) -> tuple[tuple[int, str], ...]:
    """The line and its neighbours as (number, text); empty when the file cannot be read."""
    if not file or not line:
        return ()
    numbers = range(max(1, line - around), line + around + 1)
    return tuple((number, text.rstrip("\n")) for number in numbers if (text := linecache.getline(file, number)))


def short_path(file: str) -> str:
    """A path relative to the working directory where it lies below it, else as it is."""
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return file


def _file_of(cls: type) -> str | None:
    try:
        return inspect.getsourcefile(cls)
    except (TypeError, OSError):
        module = sys.modules.get(cls.__module__)
        return getattr(module, "__file__", None)
