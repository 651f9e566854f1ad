"""Every form a report can take as text: `--format NAME`."""

from collections.abc import Callable

from ..report import Report
from .concise import concise
from .github import github
from .jsonl import jsonl
from .junit import junit
from .markdown import markdown
from .sarif import sarif

FORMATS: dict[str, Callable[[Report], str]] = {
    "concise": concise,
    "json": Report.to_json,
    "jsonl": jsonl,
    "junit": junit,
    "github": github,
    "sarif": sarif,
    "md": markdown,
}
