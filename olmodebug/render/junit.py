"""A report as JUnit XML, which every continuous-integration server reads."""

import xml.etree.ElementTree as ET

from ..report import Finding, Outcome, Report
from .concise import place
from .layout import printable
from .plain import finding_text


def junit(report: Report) -> str:
    """One test case a probe: `failure` with the finding's text, `error` where a probe of ours broke, `skipped` with its reason."""
    cases = [_case(report, outcome) for outcome in report.outcomes]
    asked = {outcome.probe for outcome in report.outcomes}
    for finding in report.of("error"):  # found by no probe that has an outcome
        if finding.probe not in asked:
            cases.append(_case(report, Outcome(probe=finding.probe, status="failed")))
            asked.add(finding.probe)
    number = {kind: sum(case.find(kind) is not None for case in cases) for kind in ("failure", "error", "skipped")}
    suite = ET.Element(
        "testsuite",
        name=_clean(report.subject.spec),
        tests=str(len(cases)),
        failures=str(number["failure"]),
        errors=str(number["error"]),
        skipped=str(number["skipped"]),
        time=f"{report.seconds:.3f}",
        timestamp=report.created.removesuffix("Z"),
    )
    properties = ET.SubElement(suite, "properties")
    environment = report.environment
    for name in ("olmodebug", "python", "platform", "torch", "transformers", "device", "seed", "command"):
        ET.SubElement(properties, "property", name=name, value=_clean(str(getattr(environment, name))))
    ET.SubElement(properties, "property", name="id", value=report.id)
    suite.extend(cases)
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root, " ")
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="us-ascii").decode() + "\n"


def _case(report: Report, outcome: Outcome) -> ET.Element:
    topic, _, rule = outcome.probe.partition(".")
    case = ET.Element("testcase", classname=topic, name=rule, time=f"{outcome.seconds:.3f}")
    found = [finding for finding in report.findings if finding.probe == outcome.probe]
    joined = [finding for finding in report.findings if outcome.probe in finding.also]
    errors = [finding for finding in found if finding.severity == "error"]
    reason = outcome.reason or ""
    if outcome.status == "failed":
        first = next(iter(errors + joined), None)
        failure = ET.SubElement(case, "failure", type=first.probe if first else outcome.probe, message=_message(first, reason))
        failure.text = _clean("\n".join(map(finding_text, errors or joined)) or reason)
    elif outcome.status == "error":
        error = ET.SubElement(case, "error", type="olmodebug", message=_clean(reason.strip().rpartition("\n")[2]))
        error.text = _clean(reason)
    elif outcome.status != "passed":
        word = {"expected-failure": "expected failure: ", "not-applicable": "not applicable: "}.get(outcome.status, "")
        ET.SubElement(case, "skipped", message=_clean(word + reason))
    others = [finding for finding in found if finding.severity != "error"]
    if others:
        ET.SubElement(case, "system-out").text = _clean("\n".join(map(finding_text, others)))
    return case


def _message(finding: Finding | None, reason: str) -> str:
    if finding is None:
        return _clean(reason)
    return _clean(": ".join(filter(None, [place(finding.where), finding.message])))


def _clean(text: str) -> str:
    """XML knows no control characters, not even escaped."""
    return printable(text, "utf-8")
