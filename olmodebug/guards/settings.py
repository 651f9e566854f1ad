"""Which guards watch, and the environment variables that carry that into a process and all its children."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError

GUARDS = ("index", "nan", "shape", "oom", "loop")

FOLDER_VARIABLE = "OLMODEBUG_GUARD_FOLDER"
GUARDS_VARIABLE = "OLMODEBUG_GUARD"
RECORD_VARIABLE = "OLMODEBUG_GUARD_RECORD"
PACKAGE_VARIABLE = "OLMODEBUG_GUARD_PACKAGE"

SECRET_NAME = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
SHORTEST_SECRET = 6  # characters; a shorter value ("1", "true") would blot out ordinary words


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The guards that are on, the folder that takes the journals, and the one that takes the first training step, if any."""

    guards: tuple[str, ...]
    folder: Path
    record: Path | None = None


def parse_guards(text: str) -> tuple[str, ...]:
    """`index,nan` as a tuple in the fixed order; UsageError on a word that is no guard."""
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in wanted if word not in GUARDS]
    if unknown or not wanted:
        raise UsageError(f"--guard {text}: expected some of {','.join(GUARDS)}")
    return tuple(name for name in GUARDS if name in wanted)


def child_environment(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a Python process installs the guards as soon as it imports torch."""
    bootstrap = str(Path(__file__).with_name("bootstrap"))
    path = [bootstrap, *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        FOLDER_VARIABLE: str(settings.folder),
        GUARDS_VARIABLE: ",".join(settings.guards),
        PACKAGE_VARIABLE: str(Path(__file__).parents[1]),
        **({RECORD_VARIABLE: str(settings.record)} if settings.record else {}),
    }


def settings_from(environ: Mapping[str, str]) -> Settings | None:
    """The settings that a parent left in the environment; None without any."""
    folder, guards = environ.get(FOLDER_VARIABLE), environ.get(GUARDS_VARIABLE)
    if not folder or not guards:
        return None
    record = environ.get(RECORD_VARIABLE)
    return Settings(guards=parse_guards(guards), folder=Path(folder), record=Path(record) if record else None)


def secrets_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The values that must never be written: those of variables whose name speaks of a key, token, secret or password."""
    values = {value for name, value in environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET}
    return tuple(sorted(values, key=len, reverse=True))


def redacted(text: str, secrets: Sequence[str]) -> str:
    """The text with every secret in it as `***`."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
