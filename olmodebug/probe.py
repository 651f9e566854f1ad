"""What a probe is, how it says that it does not apply, and where probes are found.

A probe is a function of the subject that yields findings. Its name comes from its place: `no_future` in
`probes/causality.py` is `causality.no-future`.
"""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NoReturn, TypeVar

from .errors import UsageError
from .report import Finding

if TYPE_CHECKING:
    from .subject import Subject

Named = TypeVar("Named", "Probe", "Declared")
ProbeFunction = Callable[["Subject"], Iterable[Finding]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One question about a subject. `after`: probes whose failure makes this one meaningless, so that it is skipped."""

    name: str
    function: ProbeFunction
    after: tuple[str, ...] = ()
    cost: Literal["quick", "slow"] = "quick"
    order: int = 0

    @property
    def topic(self) -> str:
        return self.name.partition(".")[0]

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.function) or ""

    @property
    def title(self) -> str:
        """The first line of the docstring: what must hold."""
        return self.doc.partition("\n")[0]

    def __str__(self) -> str:
        return self.name


class NotApplicable(Exception):
    """The probe's question has no meaning for this subject; the text is the reason."""


class Skipped(Exception):
    """The probe could apply but cannot run here; the text is the reason."""


def not_applicable(reason: str) -> NoReturn:
    """Leave the probe: the subject has no such thing."""
    raise NotApplicable(reason)


def skip(reason: str) -> NoReturn:
    """Leave the probe: it cannot run here."""
    raise Skipped(reason)


def probe(*, after: tuple[str, ...] = (), cost: Literal["quick", "slow"] = "quick") -> Callable[[ProbeFunction], ProbeFunction]:
    """Mark a function as a probe."""

    def mark(function: ProbeFunction) -> ProbeFunction:
        topic = function.__module__.rpartition(".")[2]
        if topic.startswith("_olmodebug_file_"):
            topic = Path(inspect.getsourcefile(function) or "own.py").stem
        name = f"{topic}.{function.__name__.replace('_', '-')}"
        line = inspect.unwrap(function).__code__.co_firstlineno
        function.__olmodebug_probe__ = Probe(name=name, function=function, after=after, cost=cost, order=line)  # type: ignore[attr-defined]
        return function

    return mark


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What a probe's source says of it, read without importing it: enough to list and to select."""

    name: str
    doc: str
    cost: str = "quick"

    @property
    def title(self) -> str:
        return self.doc.partition("\n")[0]


def declared_probes() -> list[Declared]:
    """The shipped probes as their files declare them, in order of name; loads no torch."""
    from . import probes

    files = sorted({path.name: path for folder in probes.__path__ for path in Path(folder).glob("[!_]*.py")}.items())
    return sorted((item for _, path in files for item in declared_in(path)), key=lambda item: item.name)


def declared_in(path: Path) -> list[Declared]:
    """The probes that a file declares."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "probe":
                cost = next((ast.literal_eval(k.value) for k in mark.keywords if k.arg == "cost"), "quick")
                name = f"{path.stem}.{node.name.replace('_', '-')}"
                found.append(Declared(name=name, doc=inspect.cleandoc(ast.get_docstring(node) or ""), cost=cost))
    return found


def probes_in(module: ModuleType) -> list[Probe]:
    """The probes that a module defines, in the order of its lines."""
    found = [value.__olmodebug_probe__ for value in vars(module).values() if hasattr(value, "__olmodebug_probe__")]
    return sorted((p for p in found if p.function.__module__ == module.__name__), key=lambda p: p.order)


def shipped_probes() -> list[Probe]:
    """Every probe that comes with olmodebug: the ones others depend on first, then by topic."""
    from . import probes

    modules = [importlib.import_module(f"{probes.__name__}.{info.name}") for info in pkgutil.iter_modules(probes.__path__)]
    return ordered(probe for module in modules for probe in probes_in(module))


def with_own(probes: Iterable[Probe], own: Iterable[Probe]) -> list[Probe]:
    """Shipped and own probes together; a name given twice is a UsageError."""
    both = [*probes, *own]
    names = [item.name for item in both]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two probes are called {name}; rename one")
    return ordered(both)


def ordered(probes: Iterable[Probe]) -> list[Probe]:
    """Probes sorted by name, each behind those that it comes after."""
    waiting = {item.name: item for item in sorted(probes, key=lambda item: (item.topic, item.order))}
    done: dict[str, Probe] = {}

    def place(item: Probe) -> None:
        if item.name in done:
            return
        for earlier in item.after:
            if earlier in waiting and earlier != item.name:
                place(waiting[earlier])
        done[item.name] = item

    for item in waiting.values():
        place(item)
    return list(done.values())


def select(probes: Iterable[Named], expression: str | None) -> list[Named]:
    """The probes whose name fits an expression like pytest's `-k`: words joined by `and`, `or`, `not` and brackets.

    A word fits when it occurs in the name, without regard to case. UsageError when the expression cannot be read.
    """
    if not expression:
        return list(probes)
    words = list(_words(expression))

    def fits(name: str) -> bool:
        tokens = [word if word in ("and", "or", "not", "(", ")") else str(word.lower() in name.lower()) for word in words]
        try:
            return bool(eval(" ".join(tokens), {"__builtins__": {}}))  # only True, False, and, or, not and brackets
        except SyntaxError:
            raise UsageError(f"-k {expression!r} cannot be read; use words with and, or, not and brackets") from None

    return [item for item in probes if fits(item.name)]


def no_such_probe(expression: str, names: Iterable[str]) -> str:
    """The message for a -k that fits nothing, with near names."""
    import difflib

    near = difflib.get_close_matches(expression, list(names), n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; olmodebug probes lists them"
    return f"no probe matches {expression!r}{hint}"


def _words(expression: str) -> Iterator[str]:
    yield from expression.replace("(", " ( ").replace(")", " ) ").split()
