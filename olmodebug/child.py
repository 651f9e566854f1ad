"""`python -m olmodebug.child`: build the subject and run probes, in a process that may die of it.

The job comes as JSON on standard input; every event goes as one JSON line to the file descriptor that it names, flushed
before the next step starts, so that the parent knows what was running when a process dies or hangs.
"""

import os
from pathlib import Path
from typing import Any

from .serve import Tell, serve


def run(order: dict[str, Any], tell: Tell) -> None:
    """Build the subject of an order and run its probes, telling each result."""
    from .causes import common_causes
    from .environment import environment
    from .errors import OlmodebugError
    from .examine import Result, blocker, build, run_probe
    from .load import SubjectCodeError, load_file
    from .probe import Probe, probes_in, select, shipped_probes, with_own
    from .replaying import replay_probe
    from .report import plain
    from .spec import Job

    job = Job(**order["job"])
    try:
        probes = shipped_probes()
        for path in order["own_probes"]:
            probes = with_own(probes, probes_in(load_file(Path(path))))
        probes = select(probes, order["select"])
        tell("probes", names=[probe.name for probe in probes])
        machine = environment(seed=job.seed, command=order["command"], device=job.device)
        tell("environment", value=plain(machine))
        tell("start", step="build.constructs")
        building = build(job)
    except OlmodebugError as error:
        tell("unusable", text=str(error))
        return
    except SubjectCodeError as error:  # build() turns the subject's own into findings
        tell("unusable", text=f"--probes: a file of probes does not load: {type(error.__cause__).__name__}: {error.__cause__}")
        return
    for result in building.results:
        tell("result", outcome=plain(result.outcome), findings=[plain(f) for f in result.findings])
    subject = building.subject
    if subject is None:
        return
    done, failed = set(order["done"]), {name: name for name in order["failed"]}
    results: list[Result] = []
    for probe in probes:
        if probe.name in done:
            if (root := blocker(probe, failed)) is not None:
                failed.setdefault(probe.name, root)
            continue
        if order["quick"] and probe.cost == "slow":
            tell("result", outcome={"probe": probe.name, "status": "skipped", "reason": "slow, and --quick was given"}, findings=[])
            continue
        tell("start", step=probe.name)

        def run_it(probe: Probe = probe) -> Result:
            return run_probe(probe, subject, job=job, failed=failed, expected=order["expected"])

        result, again = replay_probe(probe, subject, order["stored"], run_it)
        results.append(result)
        if result.root is not None:
            failed[probe.name] = result.root
        tell(
            "result",
            outcome=plain(result.outcome),
            findings=[plain(f) for f in result.findings],
            records=[plain(f.records) for f in result.found],
            replayed=[plain(item) for item in again],
        )
        if subject.lost is not None:
            os._exit(1)  # nothing runs on the device in this process any more; the parent starts another for what is left
        for topic in list(subject.measured):
            tell("section", topic=topic, value=plain(subject.measured.pop(topic)))
    tell("subject", value=plain(subject.info()))
    tell("start", step="the causes of what was found")
    tell("causes", value=common_causes(results, probes, job))


if __name__ == "__main__":
    serve(run)
