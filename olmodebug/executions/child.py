"""`python -m olmodebug.executions.child`: one execution of a subject in a process that may die of it, written to a bundle."""

import os
import platform
from pathlib import Path
from typing import Any

from ..device_errors import is_lost
from ..serve import Tell, serve

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory", "failed to allocate")


def run(message: dict[str, Any], tell: Tell) -> None:
    """Build the subject, run it on the cases under judgement, and write its bundle."""
    import torch

    from ..environment import environment
    from ..errors import OlmodebugError
    from ..explain import explain
    from ..load import SubjectCodeError
    from ..report import plain
    from ..spec import Job, resolve
    from .bundle import Writer
    from .cases import cases_of
    from .execution import Execution
    from .run import Options, run_parity

    execution = Execution(**{**message["execution"], "flags": tuple(message["execution"]["flags"])})
    tell("start", step="build")
    try:
        _device(execution.device)
        _compiler(execution)
        subject = resolve(Job(**message["job"]))
        cases = cases_of(subject, tuple(message["only"]))
        writer = Writer(folder=Path(message["bundle"]), budget_bytes=message["budget_bytes"])
        head = {"execution": {**message["execution"]}, "words": execution.words, "weights": message["weights"]}
        head |= {"job": message["job"], "subject": plain(subject.info())}
        head |= {"environment": plain(environment(seed=subject.seed, command=message["command"], device=execution.device))}
        head |= {"machine": {"platform": platform.platform(), "threads": torch.get_num_threads()}}
        writer.open(head)
    except OlmodebugError as error:
        tell("unusable", text=str(error))
        return
    except SubjectCodeError as error:
        tell("finding", value=plain(explain(error).finding().told()), step="build")
        return
    tell("head", value=head)
    options = Options(judged=message["judged"], repeat=message["repeat"])
    try:
        if message["derivative"]:
            tell("start", step="derivative")
            tell(
                "underived", values=None if (wrong := _underived(subject, message["scripts"])) is None else [plain(item) for item in wrong]
            )
        if message["reference"] is not None:
            tell("start", step="module by module in float64")
            tell("departures", values=_departures(message["reference"], message["job"], message["scripts"]))
        run_parity(subject, execution, cases, writer, tell=tell, options=options, weights=message["weights"])
        writer.close()
    except OlmodebugError as error:
        tell("unusable", text=str(error))
    except Exception as error:
        text = str(error).strip()
        if is_lost(error):
            tell("died", of="device", text=text.partition("\n")[0])
        elif isinstance(error, MemoryError) or any(word in text for word in OUT_OF_MEMORY):
            tell("died", of="memory", text=text.partition("\n")[0])
        elif execution.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            tell("finding", value=plain(_uncompilable(error, execution.compile)), step="run")
        elif (theirs := _finding(error, subject)) is not None:
            tell("finding", value=plain(theirs), step="run")
        else:
            raise
    else:
        used = _peak_bytes()
        tell("done", peak_bytes=used)


def _finding(error: Exception, subject: Any) -> Any:
    """What the subject's own code raised, as a finding; None when it is not theirs."""
    from ..explain import place_of, source_lines
    from ..report import Finding
    from ..sources import Sources, is_ours

    spot = Sources(subject.model).spot_of(error)
    if spot is None or is_ours(error):
        return None
    where = place_of(spot)
    text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return Finding(
        probe="parity.runs", severity="error", message=f"this execution raises {text}", where=where, source=source_lines(where), raised=text
    )


def _uncompilable(error: Exception, backend: str) -> Any:
    """What torch.compile itself raised, as a finding: the model runs without it."""
    from ..report import Finding

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return Finding(
        probe="parity.runs",
        severity="error",
        message=f"uncompiled the model runs, compiled with {backend} it raises {type(error).__name__}: {lines[0] if lines else 'without words'}",
        fix="look at the innermost frame of the subject that torch names; torch.compiler.disable keeps a function out of the graph",
        raised=f"{type(error).__name__}: {lines[0] if lines else ''}",
        evidence={"backend": backend} | ({"last line": lines[-1][:200]} if len(lines) > 1 else {}),
    )


def _underived(subject: Any, scripts: str | None) -> list[Any] | None:
    """Custom backwards that are not the derivative of their forward, asked of a float64 copy of a model that is small enough;
    None where there can be no such copy."""
    from ..records import Case
    from .derivative import underived
    from .run import MOST_DERIVED

    if sum(p.numel() for p in subject.model.parameters()) > MOST_DERIVED:
        return None
    twin = subject.fresh_twin()
    if str(twin.dtype) != "torch.float64":
        return None
    batch, length = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, length, seed=13))
    return underived(twin, case, scripts=Path(scripts) if scripts else None)


def _departures(reference: dict[str, Any], own: dict[str, Any], scripts: str | None) -> list[dict[str, Any]] | None:
    """Modules that do not compute what the other subject's module of that name computes, both in float64; None where that
    cannot be asked: too large, or no module shares its name."""
    from ..records import Case
    from ..report import plain
    from .lift import departures
    from .run import MOST_DERIVED

    left, right = (resolve_job(values) for values in (reference, own))
    names = [{name for name, _ in side.model.named_modules() if name} for side in (left, right)]
    if sum(p.numel() for p in right.model.parameters()) > MOST_DERIVED or not names[0] & names[1]:
        return None
    batch, length = right.sizes()
    case = Case(name="a batch", input_ids=right.token_ids(batch, length, seed=13))
    found = departures(left.fresh_twin(), right.fresh_twin(), case, scripts=Path(scripts) if scripts else None)
    return [
        {
            "module": d.module,
            "kind": d.kind,
            "where": plain(d.where),
            "what": d.what,
            "gap": min(d.gap.max_abs, 1e300) if d.gap else None,
            "script": d.script,
        }
        for d in found
    ]


def resolve_job(values: dict[str, Any]) -> Any:
    from ..spec import Job, resolve

    return resolve(Job(**values))


def _device(name: str) -> None:
    from ..spec import device_named

    device_named(name)


def _compiler(execution: Any) -> None:
    """UsageError where inductor would find no compiler for its code."""
    from ..errors import UsageError
    from .compiled import compiler_of

    if execution.compile == "inductor" and execution.device == "cpu" and compiler_of(os.environ) is None:
        looked = os.environ.get("CXX") or "g++, clang++"
        raise UsageError(
            f"{execution}: torch.compile needs a C++ compiler to generate code, and there is none ({looked}); install one or set CXX, "
            "or ask for compile=aot_eager: the same graphs without generated code"
        )


def _peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    serve(run)
