"""What a watched process tells, on disk before the next op runs: one JSON line an event, one file a process.

Nothing is buffered, so the record is readable after `os._exit`, a signal or a segmentation fault.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..report import Finding, Severity, plain
from .settings import redacted, secrets_of

MOST_FINDINGS = 200  # of one process; a script that fails at every step must not fill the disk

Event = dict[str, Any]


class Journal:
    """The journal of this process; a forked child that tells something gets a file of its own."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.findings: list[Finding] = []
        self.seen: dict[tuple[object, ...], int] = {}
        self._pid = os.getpid()
        self._descriptor: int | None = None
        self._secrets = secrets_of(os.environ)

    def tell(self, event: str, **values: Any) -> None:
        """Append one event; a folder that cannot be written is no reason to stop the script."""
        if self.folder is None:
            return
        pid = os.getpid()
        if pid != self._pid:
            self._pid, self._descriptor = pid, None
        with contextlib.suppress(OSError):
            if self._descriptor is None:
                self._descriptor = os.open(self.folder / f"journal-{pid}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            body = {"event": event, **plain(values)}
            text = json.dumps(_redacted(body, self._secrets), allow_nan=False)
            os.write(self._descriptor, text.encode("utf-8", "backslashreplace") + b"\n")

    def find(self, finding: Finding) -> bool:
        """Record a finding once for a rule and a place; False when it is there already, and then it is counted."""
        key = _key(finding)
        self.seen[key] = self.seen.get(key, 0) + 1
        if self.seen[key] > 1 or len(self.findings) >= MOST_FINDINGS:
            return False
        finding = replace(finding, evidence=dict(finding.evidence))
        self.findings.append(finding)
        self.tell("finding", finding=plain(finding))
        return True

    def raised(self, finding: Finding) -> None:
        """The op of a finding raised; whether the script caught that is known at the end, or from how the command ended."""
        if self.seen.get(_key(finding), 0) == 1:
            self.tell("raised", probe=finding.probe, file=finding.where.file, line=finding.where.line)

    def handled(self, finding: Finding) -> None:
        """A finding whose exception the script caught: told after the fact, and less grave from here on."""
        for number, found in enumerate(self.findings):
            if _key(found) == _key(finding):
                self.findings[number] = softened(found)
                self.tell("handled", probe=found.probe, file=found.where.file, line=found.where.line)


def softened(finding: Finding) -> Finding:
    """An exception that the script caught: memory in a search for the largest batch is worth a note, a bad index a warning."""
    severity: Severity = "note" if finding.probe.startswith("memory.") else "warning"
    return replace(finding, severity=severity, message=f"{finding.message} (the script caught the exception and went on)")


def _key(finding: Finding) -> tuple[object, ...]:
    return finding.probe, finding.where.file, finding.where.line, finding.where.op, finding.severity


def read_journals(folder: Path) -> list[list[Event]]:
    """The events of every process, oldest process first; a last line that was cut short is left out."""
    files = sorted(folder.glob("journal-*.jsonl"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    journals = [list(_events(path)) for path in files]
    return sorted((j for j in journals if j), key=lambda events: float(events[0].get("time", 0.0)))


def _events(path: Path) -> Iterator[Event]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, Mapping) and "event" in event:
            yield dict(event)


def _redacted(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        return redacted(value, secrets)
    if isinstance(value, dict):
        return {key: _redacted(item, secrets) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item, secrets) for item in value]
    return value
