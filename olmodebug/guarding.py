"""The guards in a program of one's own: `with olmodebug.guard(model) as watched:`, and callbacks for the usual trainers.

The same guards as `olmodebug run`, in this process and for a block. Nothing is printed or written; `watched.report()` is the
report of what was seen so far.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from torch import nn

from .environment import environment
from .errors import UsageError
from .guards.diagnosis import outcome_of
from .guards.journal import Journal
from .guards.settings import GUARDS
from .guards.watch import Watch
from .report import Finding, Report, SubjectInfo
from .units import plural


class guard:  # noqa: N801 - used like a function: with olmodebug.guard(model):
    """A context in which every op is guarded. `model` only gives the report its name; all models of the process are watched."""

    def __init__(self, model: nn.Module | None = None, *, guards: Sequence[str] = GUARDS) -> None:
        unknown = [name for name in guards if name not in GUARDS]
        if unknown:
            raise UsageError(f"guards={list(guards)}: expected some of {', '.join(GUARDS)}")
        self.model = model
        self.names = tuple(name for name in GUARDS if name in guards)
        self.journal = Journal(None)
        self.watch: Watch | None = None
        self.started = 0.0
        self.ended = "still running"

    def __enter__(self) -> "guard":
        if self.watch is not None:
            raise UsageError("this guard has been entered before; make a new one")
        self.started = time.perf_counter()
        self.watch = Watch(self.names, self.journal)
        self.watch.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.watch is None or self.watch.ended:
            return
        self.ended = "normally" if kind is None else kind.__name__
        self.watch.__exit__(kind, error, trace)

    def __repr__(self) -> str:
        name = f" {type(self.model).__name__}" if self.model is not None else ""
        return f"<guard{name}: {plural(len(self.findings), 'finding')}; {self.ended}>"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found so far."""
        return tuple(self.journal.findings)

    def report(self) -> Report:
        """What was found so far, as `olmodebug run` reports it."""
        seconds = round(time.perf_counter() - self.started, 3)
        ops = self.watch.mode.ops if self.watch else 0
        process: dict[str, Any] = {
            "pid": 0,
            "rank": None,
            "program": "",
            "torch": None,
            "ops": ops,
            "steps": self.watch.steps if self.watch else 0,
            "backwards": self.watch.backwards if self.watch else 0,
            "seconds": seconds,
            "findings": len(self.findings),
            "ended": self.ended,
        }
        section = {
            "guards": list(self.names),
            "ended": {"status": None, "signal": None, "text": self.ended},
            "processes": [process],
            "memory": self.watch.memory.failed if self.watch and self.watch.memory else None,
        }
        name = type(self.model).__name__ if self.model is not None else "a guarded block"
        return Report(
            subject=SubjectInfo(spec=name, kind=name if self.model is not None else ""),
            environment=environment(seed=0, command="olmodebug.guard()"),
            outcomes=tuple(outcome_of(guard, self.findings, [process], True, seconds) for guard in self.names),
            findings=self.findings,
            sections={"guard": section},
            seconds=seconds,
            created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        )


def huggingface_callback(*, guards: Sequence[str] = GUARDS) -> Any:
    """A `TrainerCallback` for transformers: `Trainer(..., callbacks=[cb])`, and after training `cb.guard.report()`.

    The Trainer has no hook for an exception: to have one explained, put `with olmodebug.guard(model)` around `trainer.train()`.
    """
    from transformers import TrainerCallback

    class GuardCallback(TrainerCallback):
        def __init__(self) -> None:
            self.guard = guard(guards=guards)

        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self.guard.model = others.get("model")
            self.guard.__enter__()

        def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self.guard.__exit__(None, None, None)

    return GuardCallback()


def lightning_callback(*, guards: Sequence[str] = GUARDS) -> Any:
    """A callback for Lightning: `Trainer(callbacks=[cb])`, and after fit `cb.guard.report()`."""
    from lightning.pytorch.callbacks import Callback

    class GuardCallback(Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.guard = guard(guards=guards)

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.guard.model = pl_module
            self.guard.__enter__()

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.guard.__exit__(None, None, None)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self.guard.__exit__(type(exception), exception, exception.__traceback__)

    return GuardCallback()


def olmo_core_callback(*, guards: Sequence[str] = GUARDS) -> Any:
    """A callback for OLMo-core's trainer: `trainer.add_callback("guard", cb)`, and after training `cb.guard.report()`."""
    from olmo_core.train.callbacks import Callback

    watched = guard(guards=guards)

    class GuardCallback(Callback):  # type: ignore[misc]
        @property
        def guard(self) -> Any:
            return watched

        def pre_train(self) -> None:
            watched.__enter__()

        def post_train(self) -> None:
            watched.__exit__(None, None, None)

        def on_error(self, exc: BaseException) -> None:
            watched.__exit__(type(exc), exc, exc.__traceback__)

    return GuardCallback()
