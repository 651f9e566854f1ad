"""`python -m olmodebug.implementations.child`: compare a subject with a reference, in a process that may die of either."""

import sys
from pathlib import Path
from typing import Any

from ..serve import Tell, serve

BUILD_SUBJECT, BUILD_REFERENCE, COMPARE = "building the subject", "building the reference", "comparing the two"


def run(order: dict[str, Any], tell: Tell) -> None:
    """Build both sides of an order and tell the report on them, or why there is none."""
    from ..environment import environment
    from ..errors import OlmodebugError, SubjectError
    from ..explain import explain
    from ..load import SubjectCodeError
    from ..report import Outcome, Report, SubjectInfo, plain
    from ..spec import Job, resolve
    from .comparison import OUTPUTS, compare
    from .mapping import read_map

    scripts = Path(order["scripts"]) if order["scripts"] else None
    job, seed = Job(**order["job"]), int(order["job"]["seed"])
    step = BUILD_SUBJECT
    try:
        tell("start", step=step)
        stated = read_map(Path(order["map"])) if order["map"] else None
        subject = resolve(job)
        step = BUILD_REFERENCE
        tell("start", step=step)
        _make_room(job.spec, order["reference"])
        reference = resolve(_reference_job(order, subject))
        reference.spec = order["shown"]
        step = COMPARE
        tell("start", step=step)
        report = compare(subject, reference, stated=stated, seed=seed, command=order["command"], scripts=scripts)
    except OlmodebugError as error:
        tell("unusable", text=str(error))
        return
    except SubjectCodeError as error:
        cause = error.__cause__ or error
        if step == BUILD_REFERENCE or (error.subject is not None and error.subject.spec == order["reference"] != job.spec):
            problem = SubjectError(f"the reference {order['reference']} does not run: {type(cause).__name__}: {cause}")
            tell("unusable", text=str(problem))
            return
        report = Report(
            subject=SubjectInfo(spec=job.spec),
            environment=environment(seed=seed, command=order["command"]),
            outcomes=(Outcome(probe=OUTPUTS, status="failed"),),
            findings=(explain(error).finding().told(),),
        )
    tell("report", value=plain(report))


def _make_room(subject: str, reference: str) -> None:
    """Forget the modules of the subject's folder that the reference's folder has too, so that the reference imports its own.

    Both live in one process, where a name such as `layers` can mean one module only: the subject keeps what it imported.
    """
    ours, theirs = (Path(spec.rpartition(":")[0]).resolve() for spec in (subject, reference))
    if ours.suffix != ".py" or theirs.suffix != ".py":
        return
    roots = [file.parent for file in (ours, theirs)]
    while (roots[0] / "__init__.py").is_file() and (roots[1] / "__init__.py").is_file():
        roots = [root.parent for root in roots]
    if roots[0] == roots[1]:
        return
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or name.startswith("_olmodebug_file_") or not Path(file).is_relative_to(roots[0]):
            continue
        top = roots[1] / name.partition(".")[0]
        if not Path(file).is_relative_to(roots[1]) and (top.with_suffix(".py").is_file() or (top / "__init__.py").is_file()):
            del sys.modules[name]


def _reference_job(order: dict[str, Any], subject: Any) -> Any:
    """A transformers class gets the sizes of the subject, unless its config is stated."""
    from ..spec import Job
    from .equivalent import config_for

    spec, config = order["reference"], dict(order["reference_config"])
    if spec.startswith("transformers:"):
        from ..errors import SubjectError
        from ..tiny import causal_lm_class

        try:
            kind, _ = causal_lm_class(spec.partition(":")[2])
        except ValueError as error:
            raise SubjectError(f"--reference: {error}") from None
        config = {**config_for(kind, subject), **config}
    return Job(spec=spec, config=config, seed=order["job"]["seed"], download=order["job"]["download"])


if __name__ == "__main__":
    serve(run)
