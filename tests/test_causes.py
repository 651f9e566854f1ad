"""A finding that goes away with the verified repair of another is told under it, and no other is."""

from dataclasses import replace
from pathlib import Path

import olmodebug
from olmodebug.causes import common_causes
from olmodebug.examine import Result, build, run_probe
from olmodebug.probe import Probe, select, shipped_probes
from olmodebug.records import Where
from olmodebug.report import Finding, merge_by_root
from olmodebug.spec import Job
from tests.mutants.catalog import MUTANTS, materialize

PROBES = "no-future or eval-repeats or left-padded-rows-decode or left-content-ignored"


def ran(job: Job) -> tuple[list[Result], list[Probe]]:
    probes, subject = select(shipped_probes(), PROBES), build(job).subject
    assert subject is not None
    return [run_probe(probe, subject, job=job) for probe in probes], probes


def test_what_the_repair_of_one_finding_mends_too_follows_from_it(tmp_path: Path) -> None:
    mutant = next(m for m in MUTANTS if m.name == "hf/eager-without-mask")
    job = Job(spec=f"{materialize(mutant, tmp_path)}:{mutant.build}")
    results, probes = ran(job)
    failed = {result.outcome.probe for result in results if result.outcome.status == "failed"}
    assert failed == {"causality.no-future", "cache.left-padded-rows-decode", "padding.left-content-ignored"}
    joined = [((cause[0], cause[1]), follower[0]) for cause, follower in common_causes(results, probes, job)]
    # The mask is not read at all, so that padding is seen with a causal mask put in as well: that finding stands alone.
    assert joined == [(("causality.no-future", 0), "cache.left-padded-rows-decode")]
    unverified = [replace(r, found=tuple(replace(f, fix_verified=False) for f in r.found)) for r in results]
    assert common_causes(unverified, probes, job) == []
    report = olmodebug.check(job.spec, select_probes=PROBES)
    assert [f.probe for f in report.of("error") if "cache.left-padded-rows-decode" in f.also] == ["causality.no-future"]
    assert not any(f.probe == "cache.left-padded-rows-decode" for f in report.findings)


def test_a_joined_finding_brings_along_what_had_joined_it() -> None:
    def finding(probe: str, line: int, severity: str = "error") -> Finding:
        return Finding(probe=probe, severity=severity, message="m", where=Where(file="m.py", line=line))  # type: ignore[arg-type]

    findings = [finding("a.a", 1), finding("b.b", 2), finding("c.c", 2), finding("d.d", 3, "warning")]
    merged = merge_by_root(findings, [(0, 1), (3, 0)])
    assert [(f.probe, f.also) for f in merged] == [("a.a", ("b.b", "c.c")), ("d.d", ())], "a warning swallows no error"
    assert merge_by_root(findings, [(0, 1), (0, 2)]) == merge_by_root(findings, [(0, 1)])
