"""One watched process: the guards that are on, installed and removed as a whole, and what they found."""

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..environment import package_version
from ..group import lost_a_peer
from ..report import Finding, Severity
from ..sources import Spot
from . import index, place
from .accumulating import Accumulating
from .applying import SCALED, Applying
from .dispatch import Guarded, skip_compiler
from .evaluating import Evaluating
from .events import Events
from .excerpts import lines_at
from .filling import Filling
from .holding import Holding
from .idle import Idle
from .index import Bad
from .journal import Journal
from .labels import Labels
from .memory import Memory
from .misuse import Misuse
from .models import Models
from .nonfinite import NonFinite
from .origins import FINITE, Origin
from .part import Part
from .place import Place
from .rates import Rates
from .repeating import Repeating
from .replicas import Replicas
from .resetting import Resetting
from .rounding import Rounding
from .scheduling import Scheduling
from .settings import settings_from
from .tying import Tying

LOOP: tuple[type[Part], ...] = (
    Misuse,
    Filling,
    Rates,
    Resetting,
    Applying,
    Idle,
    Holding,
    Rounding,
    Tying,
    Scheduling,
    Accumulating,
    Labels,
    Evaluating,
    Repeating,
    Replicas,
)
MOST_FAULTS = 5  # tracebacks of our own faults that are written

_ALIVE: list["Watch"] = []  # the watch of this process under `olmodebug run`; the interpreter's end finds it here


class Watch:
    """The guards of one process. A context manager; under `olmodebug run` it stays on until the interpreter ends."""

    def __init__(self, guards: tuple[str, ...], journal: Journal, record: Path | None = None) -> None:
        self.guards = guards
        self.journal = journal
        self.observers: list[Callable[..., None]] = []
        self.preparers: list[Callable[..., None]] = []
        self.undo = contextlib.ExitStack()
        self.started = time.perf_counter()
        self.steps = 0
        self.backwards = 0
        self.faults = 0
        self.ended = False
        self.raised: list[tuple[Finding, str]] = []  # findings on ops that raised, and the exception's text: no frame is held
        self.refused: Finding | None = None  # on the arguments of the op that runs now
        self.spoiled = False  # a finding has told what makes weights huge or nan: the nan that comes of it is no second one
        self.events = Events(self.looking, self.fault)
        self.models = Models()
        self.parts: list[Part] = []
        self.looks: dict[int, list[Callable[[Any, Any], None]]] = {}
        self.nonfinite = NonFinite(self) if "nan" in guards else None
        if self.nonfinite is not None:
            self.parts.append(self.nonfinite)
        if "loop" in guards:
            self.parts += [part(self) for part in LOOP]
            self.observers.append(self._show)
        self.memory = Memory(self) if "oom" in guards else None
        if self.memory is not None:
            self.parts.append(self.memory)
        if record is not None:
            from .recording import Recording  # what a comparison across processes reads: loaded only where one is recorded

            self.parts.append(Recording(self, record))
        for part in self.parts:
            part.listen()
        self._count()
        self.mode = Guarded(self)

    def __enter__(self) -> "Watch":
        skip_compiler(_functions())
        self.events.install(self.undo)
        self.undo.enter_context(self.mode)
        return self

    def _count(self) -> None:
        def backward(roots: list[Tensor], spot: object) -> None:
            self.backwards += 1

        def stepped(optimizer: object, spot: object) -> None:
            self.steps += 1
            if self.steps & (self.steps - 1) == 0:  # 1, 2, 4, 8 ...: a killed script still tells about how far it came
                self.journal.tell("progress", **self._numbers())

        self.events.on("backward_done", backward)
        self.events.on("stepped", stepped)

    def name_of_tensor(self, tensor: Tensor) -> str | None:
        """The path of a parameter or buffer in the models that are alive."""
        return self.models.tensor(tensor)

    def batches(self) -> list[tuple[int, ...]]:
        """The tokens of every step so far, as numbers that are equal where they are."""
        return next((part.steps for part in self.parts if isinstance(part, Repeating)), [])

    def birth(self, optimizer: Any) -> Origin | None:
        """Where the gradients of an optimizer stopped being finite, if they did and the nan guard saw it."""
        return self.nonfinite.birth(optimizer) if self.nonfinite is not None else None

    def made_at(self, node: Any) -> Spot | None:
        """The line of the forward op that made a node of the graph; None where the nan guard did not see it."""
        return self.nonfinite.place_of_node(node) if self.nonfinite is not None else None

    def name_of_module(self, module: nn.Module | None) -> str:
        """The path of a module in the model that holds it."""
        return self.models.module(module)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo.close()
        self.finish(error)

    @contextlib.contextmanager
    def looking(self) -> Any:
        """Our own ops are no ops of the script."""
        before, self.mode.quiet = self.mode.quiet, True
        try:
            with torch.no_grad():
                yield
        finally:
            self.mode.quiet = before

    def fault(self, observer: Any) -> None:
        """A fault of our own, while it is handled: recorded with its traceback; what failed is off from here on."""
        self.faults += 1
        if observer in self.observers:
            self.observers.remove(observer)
        if self.faults <= MOST_FAULTS:
            self.journal.tell("fault", text=traceback.format_exc())

    def look(self, op: Any, listener: Callable[[Any, Any], None]) -> None:
        """Show the arguments and the result of one op to a listener."""
        self.looks.setdefault(id(op), []).append(listener)  # torch keeps its ops; their own hash is slow

    def _show(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        for listener in self.looks.get(id(func), ()):
            listener(args, output)

    def tell(self, probe: str, severity: Severity, at: Place | Spot | None, message: str, op: str | None = None, **values: Any) -> None:
        """Record a finding at a place."""
        where = at.at(op) if isinstance(at, Place) else place.where_of(at, op=op)
        self.find(Finding(probe=probe, severity=severity, message=message, where=where, source=lines_at(where), **values))

    def find(self, finding: Finding) -> None:
        """Record a finding; under the guards everything is written at once."""
        self.journal.find(finding)

    def index_is_bad(self, bad: Bad) -> str:
        """Record a bad index and return the sentence on it."""
        finding = index.explain_index(
            bad, place.here(sys._getframe(2)), index.built_at(bad.table, self.memory.origin if self.memory else None)
        )
        self.find(finding)
        self.refused = finding
        return f"{finding.message}: {finding.observed}, expected {finding.expected}"

    def index_wraps(self, bad: Bad) -> None:
        self.find(index.explain_wrap(bad, place.here(sys._getframe(2))))

    def improper(self, probabilities: Tensor, wrong: str) -> str:
        where = place.here(sys._getframe(2)).at("multinomial")
        message = f"multinomial is given {wrong}, which is no probability"
        self.refused = Finding(
            probe=index.PROBABILITIES,
            severity="error",
            message=message,
            where=where,
            source=lines_at(where),
            expected="finite numbers of at least 0",
            observed=f"{wrong} in {tuple(probabilities.shape)} {str(probabilities.dtype)[6:]}",
            fix="look at the logits before the softmax: a nan or inf there, or a temperature of 0",
        )
        self.find(self.refused)
        return message

    def op_raised(self, func: Any, args: Any, kwargs: Any, error: Exception) -> None:
        """An op raised: what is live is looked at while it lives; the rest can be asked of the exception later."""
        finding = self.refused
        if finding is None and self.memory is not None and isinstance(error, (RuntimeError, MemoryError)):
            finding = self.memory.ran_out(error)
        if finding is not None:
            self.raised.append((finding, str(error)))
            self.journal.raised(finding)

    def finish(self, error: BaseException | None) -> None:
        """What only the end can tell; once."""
        if self.ended:
            return
        self.ended = True
        for end in (*(part.finish for part in self.parts), lambda: self._explain(error), lambda: self._handled(error)):
            try:
                end()
            except Exception:
                self.fault(None)
        name = None if error is None else type(error).__name__
        self.journal.tell("end", exception=name, lost_a_peer=error is not None and lost_a_peer(error), **self._numbers())

    def _explain(self, error: BaseException | None) -> None:
        """An exception that ended the script, unless a guard has already said what it is."""
        told = any(f.severity == "error" and f.probe.startswith(("index.", "memory.")) for f in self.journal.findings)
        nan_told = any(f.probe == FINITE for f in self.journal.findings) and isinstance(error, ValueError) and "nan" in str(error)
        if error is None or told or nan_told:
            return
        refused = next((part.explain(error) for part in self.parts if isinstance(part, Misuse)), None)
        if refused is not None:
            if not any(f.probe == SCALED for f in self.journal.findings):
                self.find(refused)
            return
        if "shape" not in self.guards:
            return
        from .exceptions import explain_exception  # the tracer and its rules: loaded only by a script that failed

        finding = explain_exception(error)
        if finding is not None:
            self.find(finding)

    def _handled(self, error: BaseException | None) -> None:
        """What an op raised without ending the script, which caught it: a search for the largest batch, a row that is skipped."""
        if multiprocessing.parent_process() is not None:
            return  # a worker hands its exception to its parent, which may end of it
        texts, seen = [], set()
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            texts.append(str(error))
            error = error.__cause__ or error.__context__
        fatal = [finding.where for finding, text in self.raised if any(text in whole for whole in texts)]
        for finding, _ in self.raised:
            if finding.where not in fatal:
                self.journal.handled(finding)

    def _numbers(self) -> dict[str, Any]:
        seconds = round(time.perf_counter() - self.started, 3)
        return {"ops": self.mode.ops, "steps": self.steps, "backwards": self.backwards, "seconds": seconds}


def install_from_environment() -> None:
    """Start the guards of this process as the parent asked for them; called once torch has been imported."""
    settings = settings_from(os.environ)
    if settings is None or _ALIVE:
        return
    watch = Watch(settings.guards, Journal(settings.folder), settings.record)
    _ALIVE.append(watch)
    if multiprocessing.parent_process() is None:
        _tell_start(watch, settings.folder)
    watch.__enter__()
    atexit.register(_at_exit, watch, os.getpid())
    os.register_at_fork(after_in_child=lambda: _forked(watch))


def _tell_start(watch: Watch, folder: Path) -> None:
    stacks = None
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError):
            stacks = (folder / f"stacks-{os.getpid()}.txt").open("w", encoding="utf-8")
            faulthandler.enable(file=stacks)
            watch.undo.callback(lambda: None if stacks is None else stacks.flush())
    watch.journal.tell(
        "start",
        time=time.time(),
        pid=os.getpid(),
        rank=_number("RANK"),
        world=_number("WORLD_SIZE"),
        torch=torch.__version__,
        cuda=torch.version.cuda or torch.version.hip,
        transformers=package_version("transformers"),
        python=sys.version.split()[0],
        program=Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "",
    )


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else None


def _at_exit(watch: Watch, pid: int) -> None:
    """The interpreter ends: an exception that nobody caught is in `sys.last_value`, set before any excepthook runs."""
    if os.getpid() != pid:
        return
    error = getattr(sys, "last_value", None)
    watch.undo.close()
    watch.finish(error if isinstance(error, BaseException) else None)


def _forked(watch: Watch) -> None:
    """A forked worker (a data loader's) keeps the index guard and leaves the ends of the story to its parent."""
    watch.ended = True


def _functions() -> list[FunctionType]:
    """Every function of the guards that may run inside an op of a compiled script."""
    found: list[FunctionType] = []
    for name, module in list(sys.modules.items()):
        if not name.startswith(("olmodebug.guards", "olmodebug.ranks")):
            continue
        for value in list(vars(module).values()):
            if isinstance(value, FunctionType):
                found.append(value)
            elif isinstance(value, type) and value.__module__ == name:
                found += [item for item in vars(value).values() if isinstance(item, FunctionType)]
    return found
