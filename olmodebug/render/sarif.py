"""A report as SARIF 2.1.0, which code hosts show beside the lines."""

import hashlib
import json
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from ..report import Finding, Report
from .plain import finding_text

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(report: Report) -> str:
    """One run: a rule for each probe that was asked, a result for each finding."""
    names = list(dict.fromkeys([*(o.probe for o in report.outcomes), *(f.probe for f in report.findings)]))
    failing = {outcome.probe for outcome in report.outcomes if outcome.status == "expected-failure"}
    run: dict[str, Any] = {
        "tool": {
            "driver": {
                "name": "olmodebug",
                "version": report.environment.olmodebug,
                "rules": [{"id": name, "name": _pascal(name)} for name in names],
            }
        },
        "invocations": [_invocation(report)],
        "columnKind": "unicodeCodePoints",
        "results": [_result(finding, names, expected=finding.probe in failing) for finding in report.findings],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1, allow_nan=False) + "\n"


def _invocation(report: Report) -> dict[str, Any]:
    body: dict[str, Any] = {"executionSuccessful": report.exit_code in (0, 1), "exitCode": report.exit_code}
    if report.environment.command:
        body["commandLine"] = report.environment.command
    if report.created:
        body["startTimeUtc"] = report.created
    return body


def _result(finding: Finding, names: list[str], *, expected: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "ruleId": finding.probe,
        "ruleIndex": names.index(finding.probe),
        "level": finding.severity,
        "message": {"text": finding_text(finding).strip("\n")},
        "partialFingerprints": {"olmodebug/1": _fingerprint(finding)},
    }
    where = finding.where
    location: dict[str, Any] = {}
    if where.file:
        place: dict[str, Any] = {"artifactLocation": {"uri": _uri(where.file)}}
        if where.line:
            place["region"] = {"startLine": where.line}
            marked = next((line.text for line in finding.source if line.number == where.line), None)
            if marked is not None:
                place["region"]["snippet"] = {"text": marked}
        location["physicalLocation"] = place
    logical = [name for name in (where.module, where.function) if name]
    if logical:
        location["logicalLocations"] = [{"fullyQualifiedName": name} for name in logical]
    if location:
        body["locations"] = [location]
    if expected:
        body["suppressions"] = [{"kind": "external", "justification": "an expected failure of this run"}]
    return body


def _fingerprint(finding: Finding) -> str:
    """The same finding has the same one in a later run, though its numbers and the line may have moved."""
    where = finding.where
    parts = [finding.probe, where.file or "", where.function or "", where.module, where.op or ""]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _uri(file: str) -> str:
    path = PurePath(file)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())


def _pascal(probe: str) -> str:
    """`rope.relative-shift` as `RopeRelativeShift`, as the standard advises for a rule's readable name."""
    return "".join(word.capitalize() for word in probe.replace(".", "-").replace("_", "-").split("-"))
