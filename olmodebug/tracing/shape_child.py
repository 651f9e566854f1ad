"""`python -m olmodebug.tracing.shape_child`: the tree of named shapes of a subject, in a process that may die of it.

It speaks the journal of `olmodebug.child`: a subject whose own code raises is a finding of `build.constructs` or
`build.runs`, and the tree is the section `shapes`.
"""

from typing import Any

from ..serve import Tell, serve


def run(order: dict[str, Any], tell: Tell) -> None:
    """Build the subject of an order without memory, run it, and tell its tree."""
    import time

    from ..environment import environment
    from ..errors import OlmodebugError
    from ..examine import BUILD, FIRST_RUN, unbuilt
    from ..load import SubjectCodeError
    from ..report import Outcome, SubjectInfo, plain
    from ..spec import Job
    from .shape_tree import tree_of_spec

    job = Job(**order["job"])
    tell("probes", names=[])
    tell("environment", value=plain(environment(seed=job.seed, command=order["command"])))
    tell("start", step=BUILD)
    started = time.perf_counter()
    try:
        tree = tree_of_spec(job)
    except OlmodebugError as error:
        tell("unusable", text=str(error))
        return
    except SubjectCodeError as error:
        for result in unbuilt(error, job, time.perf_counter() - started):
            tell("result", outcome=plain(result.outcome), findings=[plain(f) for f in result.findings])
        return
    for name in (BUILD, FIRST_RUN):
        tell("result", outcome=plain(Outcome(probe=name, status="passed")), findings=[])
    tell("section", topic="shapes", value=plain(tree))
    root = tree.rows[0]
    info = SubjectInfo(
        spec=job.spec, kind=root.kind, parameters=tree.parameters, parameter_bytes=tree.parameter_bytes, dtype=tree.dtype, convention=""
    )
    tell("subject", value=plain(info))


if __name__ == "__main__":
    serve(run)
