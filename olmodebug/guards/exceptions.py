"""An exception that torch raised and nobody caught, explained: the failing forward is run again under the tracer.

The operands are named by the model's own dimensions, each with the line that made it, and a repair that the rules of
`explain` suggest is tried: the function gets the edited code, the same call runs again, and the old code is put back.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private

from ..convention import Convention
from ..explain import Explanation, explain_run, operands
from ..group import COLLECTIVE_NAMESPACES
from ..load import SubjectCodeError
from ..own_code import quiet
from ..records import Case, Where
from ..relations.repair import Edit
from ..report import Finding, Scalar
from ..sources import OWN, Sources, Spot, short_path, traceback_frames
from ..subject import Subject
from ..tracing.tracer import Recording, record
from . import place
from .excerpts import lines_at
from .place import Place

FITS = "shape.fits"
RAISED = "process.survives"  # torch refused something else than what did not fit
SIZES = re.compile(r"size|shape|dimension|\bdim\b|dtype|scalar type|device|stride|elements|broadcast", re.IGNORECASE)
COLLECTIVES = "torch/distributed/distributed_c10d.py"

FRAME = re.compile(r'^ *File "(.+)", line (\d+), in (.+)$', re.MULTILINE)

KINDS = (RuntimeError, IndexError, TypeError, ValueError)


def explain_exception(error: BaseException) -> Finding | None:
    """The finding on an exception from a torch op; None for one that the script raised itself."""
    if not isinstance(error, KINDS) or not _from_torch(error):
        return None
    if "Original Traceback" in str(error):
        return _of_worker(error)
    error = _uncompiled(error)
    at = place.of(error.__traceback__)
    explanation = _explained(error, at)
    if explanation is None:
        where = at.at()
        text = operands(error, at.spot, {})
        first = str(error).strip().partition("\n")[0]
        cause, fix = _classes_last(error) or (None, None)
        return Finding(
            probe=FITS if SIZES.search(first) or isinstance(error, IndexError) else RAISED,
            severity="error",
            message=f"{type(error).__name__}: {first}" + (f" ({text})" if text else ""),
            where=where,
            source=lines_at(where),
            cause=cause,
            fix=fix,
            observed=text or None,
            raised=f"{type(error).__name__}: {first}",
        )
    found, evidence = explanation
    where = found.where if found.where.file else at.at(found.where.op)
    return Finding(
        probe=FITS,
        severity="error",
        message=found.message,
        cause=found.cause,
        fix=f"{found.fix} (tried: the same call runs with it)" if found.edits and _repaired(at, found.spot, found.edits) else found.fix,
        where=replace(where, module=place.module_path(at.modules) or where.module),
        source=lines_at(where),
        expected=found.expected,
        observed=found.observed,
        evidence={**found.evidence, **evidence},
        raised=found.raised or None,
    )


def _classes_last(error: BaseException) -> tuple[str, str] | None:
    """Cause and fix of a cross-entropy over logits `[..., classes]` of more than two dimensions."""
    frames = [frame for frame, _, _ in traceback_frames(error.__traceback__) if frame.f_code is torch.nn.functional.cross_entropy.__code__]
    logits, target = (frames[-1].f_locals.get(name) for name in ("input", "target")) if frames else (None, None)
    if (
        "Expected target size" not in str(error)
        or not isinstance(logits, Tensor)
        or not isinstance(target, Tensor)
        or logits.ndim < 3
        or target.shape != logits.shape[:-1]
    ):
        return None
    classes = f"cross_entropy takes dimension 1 for the classes, which stand last in the logits {tuple(logits.shape)}"
    return classes, "logits.flatten(0, -2) against target.flatten(), or move the classes to dimension 1"


def _of_worker(error: BaseException) -> Finding | None:
    """What a data loader's worker raised and handed over as text, placed at the worker's own line."""
    text = str(error).strip()
    frames = [(file, int(line), name) for file, line, name in FRAME.findall(text) if place.rank(file) == OWN]
    if not frames:
        return None
    file, line, name = frames[-1]
    where = Where(function=name, file=short_path(file), line=line)
    last = text.splitlines()[-1]
    return Finding(
        probe=FITS, severity="error", message=f"{last} (in a worker of the data loader)", where=where, source=lines_at(where), raised=last
    )


def _from_torch(error: BaseException) -> bool:
    """Raised inside torch, or by an op that our own frame called; a `raise` of the script or of a library is theirs."""
    frames = traceback_frames(error.__traceback__)
    if not frames:
        return False
    in_collective = any(frame.f_code.co_filename.endswith(COLLECTIVES) for frame, _, _ in frames)
    lost_a_peer = torch.distributed.is_available() and isinstance(error, torch.distributed.DistError)
    if in_collective or lost_a_peer or "gloo/transport" in str(error):
        return False  # a rank that lost its peers, also inside a backward that reduces: no operands are to blame
    file = frames[-1][0].f_code.co_filename
    if Sources(nn.Module()).is_torch(file):
        return True
    return "/olmodebug/guards/" in file or _is_op_line(frames[-1][0].f_code, frames[-1][1], error)


def _is_op_line(code: CodeType, instruction: int, error: BaseException) -> bool:
    """A builtin of torch has no frame: the script's own frame is innermost, and its instruction is no `raise`."""
    import dis

    running = next((i for i in dis.get_instructions(code) if i.offset == instruction), None)
    return isinstance(error, RuntimeError | IndexError) and running is not None and running.opname not in ("RAISE_VARARGS", "RERAISE")


def _uncompiled(error: BaseException) -> BaseException:
    """What the model itself raises in the same call, where it was compiled: its own lines are in that traceback."""
    at = place.of(error.__traceback__)
    compiled = (
        next((m for m in at.modules if isinstance(m, torch._dynamo.OptimizedModule)), None) if "torch._dynamo" in sys.modules else None
    )
    if compiled is None or at.call is None:
        return error
    args, kwargs = at.call
    try:
        with _same_randomness(), quiet(), _NoCollectives() as others:
            compiled._orig_mod(*args, **kwargs)  # private, and the only way to what was compiled
    except Exception as own:
        return error if others.needed else own
    return error


def _explained(error: BaseException, at: Place) -> tuple[Explanation, dict[str, Scalar]] | None:
    """The rules of `explain` on the outermost module's call, run again; None where there is no module or no ids."""
    if not at.modules or at.call is None:
        return None
    root, (args, kwargs) = _within_wrapper(at.modules[0]), at.call
    ids = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 2 and not v.is_floating_point()), None)
    if ids is None:
        return None
    subject = Subject(spec=type(root).__name__, model=root, convention=Convention(ids="input_ids"), config=getattr(root, "config", None))
    case = Case(name="the failing call", input_ids=tuple(tuple(row) for row in ids.tolist()))
    with _same_randomness(), _NoCollectives() as others:
        wrapped = SubjectCodeError("run", subject=subject, case=case)
        wrapped.__cause__ = error
        explanation = explain_run(subject, lambda: root(*args, **kwargs), wrapped, case=case)
        with quiet():
            recording = record(root, lambda: root(*args, **kwargs), sources=Sources(root), catch=True)
    return None if others.needed else (explanation, _made_at(recording))


def _within_wrapper(root: nn.Module) -> nn.Module:
    """The model inside DDP: a forward of the wrapper would prepare another reduction of gradients."""
    inner = root.module if isinstance(root, nn.parallel.DistributedDataParallel) else root
    assert isinstance(inner, nn.Module)
    return inner


class _NoCollectives(TorchDispatchMode):
    """Other ranks do not run this again: a collective in it would wait for them. It raises instead, and is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.needed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in COLLECTIVE_NAMESPACES:
            self.needed = True
            raise RuntimeError("a collective, in a forward that is run on one rank alone")
        return func(*args, **(kwargs or {}))


def _made_at(recording: Recording) -> dict[str, Scalar]:
    """The line that made each operand of the failing op: the last op before it that wrote to that memory."""
    made: dict[str, Scalar] = {}
    if recording.failed is None:
        return made
    for number, operand in enumerate(recording.failed.inputs):
        event = next(
            (e for e in reversed(recording.events) if any(o.storage == operand.storage and o.shape == operand.shape for o in e.outputs)),
            None,
        )
        if event is not None and operand.storage:
            made[f"operand_{number}"] = f"{operand} from {event.op} at {_line(event.where)}"
    return made


def _line(where: Where) -> str:
    return f"{where.file}:{where.line}" if where.file else where.module or "an unknown line"


@contextlib.contextmanager
def _same_randomness() -> Iterator[None]:
    """The script may catch the exception and go on: its random numbers stay its own."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _repaired(at: Place, spot: Spot | None, edits: tuple[Edit, ...]) -> bool:
    """Whether the same call runs through with the edited function; the function gets its own code back."""
    if spot is None or at.call is None or {edit.file for edit in edits} != {spot.file}:
        return False
    function = _function_of(at, spot.code)
    text = Path(spot.file).read_text(encoding="utf-8")
    for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
        text = edit.apply(text)
    code = _code_like(compile(text, spot.file, "exec"), spot.code)
    if function is None or code is None or code.co_freevars != spot.code.co_freevars:
        return False
    args, kwargs = at.call
    before = function.__code__
    function.__code__ = code
    try:
        with _same_randomness(), quiet(), torch.no_grad(), _NoCollectives():
            _within_wrapper(at.modules[0])(*args, **kwargs)
        return True
    except Exception:  # the repair does not help: the finding stands without the mark
        return False
    finally:
        function.__code__ = before


def _function_of(at: Place, code: CodeType) -> FunctionType | None:
    for module in at.modules:
        for cls in type(module).__mro__:
            for value in vars(cls).values():
                if isinstance(value, FunctionType) and value.__code__ is code:
                    return value
    return None


def _code_like(outer: CodeType, wanted: CodeType) -> CodeType | None:
    """The code of the function with the same name and first line."""
    for constant in outer.co_consts:
        if isinstance(constant, CodeType):
            if (constant.co_qualname, constant.co_firstlineno) == (wanted.co_qualname, wanted.co_firstlineno):
                return constant
            found = _code_like(constant, wanted)
            if found is not None:
                return found
    return None
