"""The run records in `.olmodebug/`: what was asked, the report, and what the subject printed.

The folder ignores itself in git and keeps the newest runs, and older ones that still go on. A run that cannot be recorded still runs.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import ReportError
from .report import Report, read

KEPT_RUNS = 20
LOCK = "in-use"
_held: dict[Path, int] = {}  # open until the run is saved, or as long as this process lives


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run's folder; `folder` is None where none could be made, and `problem` says why."""

    id: str
    folder: Path | None
    problem: str | None = None

    def save(self, report: Report, job: dict[str, Any]) -> Report:
        """Record the report, and give it back: without an id where that cannot be done, for nobody will find it by one."""
        if self.folder is None:
            return replace(report, id="")
        try:
            (self.folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
            report.write(self.folder / "report.json")
        except OSError:
            return replace(report, id="")
        finally:
            if (descriptor := _held.pop(self.folder, None)) is not None:
                os.close(descriptor)
        return report


def new_run(base: Path, *, name: str | None = None) -> Run:
    """A fresh folder under `base`/.olmodebug/runs; old ones beyond the newest are removed."""
    name = name or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    home = base / ".olmodebug"
    folder = home / "runs" / name
    try:
        folder.mkdir(parents=True)
        (home / ".gitignore").write_text("*\n", encoding="utf-8")
    except OSError as error:
        return Run(id=name, folder=None, problem=f"this run is not recorded: {home} cannot be written ({error.strerror})")
    _hold(folder)
    with contextlib.suppress(OSError):
        for old in sorted((path for path in (home / "runs").iterdir() if path.is_dir()), key=_began)[:-KEPT_RUNS]:
            if not _is_held(old):
                shutil.rmtree(old, ignore_errors=True)
    return Run(id=name, folder=folder)


def _began(folder: Path) -> tuple[str, int]:
    """What runs are ordered by: the second in the name, and within one second, where the rest of the name is drawn, what was written last."""
    with contextlib.suppress(OSError):
        return folder.name[: len("20261128-212120")], folder.stat().st_mtime_ns
    return folder.name, 0  # another process has removed it since


def _hold(folder: Path) -> None:
    """Mark a folder as in use until its run is saved or this process ends, however it ends: others leave it alone so long."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        _held[folder] = descriptor


def _is_held(folder: Path) -> bool:
    """Whether some process is still at work in a folder; one that nobody has marked is not."""
    try:
        with (folder / LOCK).open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def find_run(base: Path, wanted: str | None) -> Path:
    """The folder of a run by its id or the end of it; the newest finished one for None. ReportError when there is none."""
    runs = base / ".olmodebug" / "runs"
    folders = sorted((path for path in runs.glob("*") if (path / "report.json").is_file()), key=_began)
    if not folders:
        raise ReportError(f"no run is recorded under {base}; olmodebug check makes one")
    if wanted is None:
        return folders[-1]
    matching = [path for path in folders if path.name == wanted or path.name.endswith(wanted)]
    if len(matching) != 1:
        newest = ", ".join(path.name for path in folders[-3:])
        raise ReportError(f"{'no' if not matching else 'more than one'} recorded run matches {wanted}; the newest are {newest}")
    return matching[0]


def load_report(base: Path, wanted: str | None) -> Report:
    """A report from a file, or from a recorded run by its id; the newest for None."""
    if wanted is not None and (Path(wanted).suffix == ".json" or Path(wanted).is_file()):
        return read(Path(wanted))
    return read(find_run(base, wanted) / "report.json")
