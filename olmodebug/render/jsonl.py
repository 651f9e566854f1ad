"""A report as JSON lines: one record a line, for tools that read as they go."""

import json
from typing import Any

from ..report import Report


def jsonl(report: Report) -> str:
    """First the run (`"record": "report"`), then a line for each outcome, finding and section."""
    body: dict[str, Any] = json.loads(report.to_json())
    outcomes, findings, sections = (body.pop(name) for name in ("outcomes", "findings", "sections"))
    records = [{"record": "report", **body}]
    records += [{"record": "outcome", **outcome} for outcome in outcomes]
    records += [{"record": "finding", **finding} for finding in findings]
    records += [{"record": "section", "topic": topic, "value": value} for topic, value in sections.items()]
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
