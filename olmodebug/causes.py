"""Which findings have the cause of another: with the verified repair of the one, on a copy of the source, the other is gone."""

from collections.abc import Iterable, Iterator, Sequence

from .examine import Result
from .probe import Probe
from .relations.repair import Found, RepairedSource
from .report import root_groups
from .settle import settled
from .spec import Job
from .subject import Subject

MOST_REPAIRS = 4
# A probe that took longer is not run again to tell whether its finding stands alone.
LONGEST_SECONDS = 60.0

# A finding by its probe and its place among that probe's findings.
Key = tuple[str, int]


def common_causes(results: Sequence[Result], probes: Iterable[Probe], job: Job) -> list[tuple[Key, Key]]:
    """Pairs of a finding and one that follows from it, for errors at different lines; empty where no repair was verified.

    A probe counts as mended when it runs to its end on the repaired copy and finds no error.
    """
    named = {probe.name: probe for probe in probes}
    errors = [((r.outcome.probe, k), found, r) for r in results for k, found in enumerate(r.found) if found.severity == "error"]
    alone = [errors[group[0]] for group in root_groups([found for _, found, _ in errors])]
    joined: list[tuple[Key, Key]] = []
    for key, found, _ in [item for item in alone if item[1].fix_verified and item[1].edits][:MOST_REPAIRS]:
        followers = {follower for _, follower in joined}
        others = [
            (other, named[other[0]])
            for other, _, result in alone
            if other != key and other not in followers and other[0] in named and result.outcome.seconds <= LONGEST_SECONDS
        ]
        if others and key not in followers:
            joined += [(key, other) for other in _mended(found, others, job)]
    return joined


def _mended(found: Found, others: Sequence[tuple[Key, Probe]], job: Job) -> Iterator[Key]:
    with RepairedSource(job, found.edits) as subject:
        passes = {probe.name: _passes(probe, subject) for _, probe in others} if subject is not None else {}
    yield from (key for key, probe in others if passes.get(probe.name))


def _passes(probe: Probe, subject: Subject) -> bool:
    try:
        with settled(subject.model, seed=subject.seed):
            return all(found.severity != "error" for found in probe.function(subject))
    except Exception:  # not reached, not applicable, or broken in another way: nothing is established
        return False
