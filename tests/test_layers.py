"""A module imports from its own layer or a lower one, and only the top layer prints, reads the environment, or exits."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import olmodebug

PACKAGE = Path(olmodebug.__file__).parent
PROBES = next(folder for folder in (PACKAGE.parent / "probes", PACKAGE / "probes") if (folder / "causality.py").is_file())

PLAIN, SUBJECT, INSTRUMENT, PROBE, TOPIC, COMMAND = range(6)
# An instrument is what is named nowhere here. Of layer 0 is what renderers may read: values, and text about them.
LAYERS = {
    **dict.fromkeys(("errors", "units", "records", "report", "files", "guards.decode", "guards.signatures"), PLAIN),
    **dict.fromkeys(
        (
            "model",
            "presets",
            "subject",
            "load",
            "spec",
            "spec_text",
            "convention",
            "sources",
            "settle",
            "casts",
            "deep_copies",
            "tiny",
            "draws",
            "device_errors",
            "caches",
            "first_run",
            "own_code",
            "settings",
        ),
        SUBJECT,
    ),
    **dict.fromkeys(("probe", "examine", "replaying", "causes"), PROBE),
    **dict.fromkeys(("api", "cli", "testing", "__main__", "__init__"), COMMAND),
}
DRAWING = {"rich", "jinja2", "markupsafe"}  # what render may import beside layer 0 and the standard library
TOUCHES = ("print", "sys.argv", "sys.exit", "exit", "os.environ", "os.getenv", "sys.stdout", "sys.stderr")
# Their subject is the environment itself: the machine, what a child process inherits, the allocator's settings as torch
# reads them, guards, which live in somebody else's process and are told there what to do, and the line that shows a
# training run while it goes, which is drawn on a terminal or not at all.
ENVIRONMENT = {"environment", "process", "forks", "supervise", "serve", "footprint.allocator", "guards", "render.training"}


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name inside the package, file): `render.layout`, `probes.causality`."""
    for file in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(file.relative_to(PACKAGE).with_suffix("").parts), file
    for file in sorted(PROBES.glob("*.py")):
        yield f"probes.{file.stem}", file


MODULES = dict(modules())


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


@cache
def layer(name: str) -> int:
    first = name.partition(".")[0]
    if first in ("probes", "render"):
        return TOPIC
    if first == "commands" or (ast.get_docstring(tree_of(name)) or "").startswith("`python -m"):
        return COMMAND  # a module that is run by its name is an entry point
    return LAYERS.get(name, LAYERS.get(first, INSTRUMENT))


def imports(name: str) -> Iterator[tuple[str, int]]:
    """(what is imported, line): modules of the package by their name inside it, all others by their own with a `/`."""
    package = name.split(".")[:-1]
    tree = tree_of(name)
    hooks = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_repr_html_"]  # a notebook's, run by it alone
    lazy = {id(node) for hook in hooks for node in ast.walk(hook)}
    for node in ast.walk(tree):
        if id(node) in lazy:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _inside(alias.name), node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
                targets = [".".join(base)] if ".".join(base) in MODULES else [".".join([*base, alias.name]) for alias in node.names]
            else:
                start = _inside(node.module or "")
                targets = (
                    [start] if start.startswith("/") or start in MODULES else [f"{start}.{alias.name}".strip(".") for alias in node.names]
                )
            for target in targets:
                yield target, node.lineno


def _inside(dotted: str) -> str:
    if dotted == "olmodebug" or dotted.startswith("olmodebug."):
        return dotted.partition(".")[2]
    return f"/{dotted}"


def test_a_module_imports_from_its_own_layer_or_a_lower_one() -> None:
    wrong = []
    for name in MODULES:
        for target, line in imports(name):
            if target in MODULES and layer(target) > layer(name):
                wrong.append(f"{name}:{line} (layer {layer(name)}) imports {target} (layer {layer(target)})")
            if name.startswith("probes.") and target.startswith("render."):
                wrong.append(f"{name}:{line} imports {target}: probes never draw")
    assert wrong == []


def test_a_renderer_knows_plain_values_and_rich_only() -> None:
    wrong = []
    for name in MODULES:
        if not name.startswith("render."):
            continue
        for target, line in imports(name):
            known = _root(target) in {*sys.stdlib_module_names, *DRAWING} if target.startswith("/") else target.startswith("render.")
            if not known and (target.startswith("/") or (target in MODULES and layer(target) != PLAIN)):
                wrong.append(f"{name}:{line} imports {target}")
    assert wrong == []


def test_layer_0_is_the_standard_library_alone() -> None:
    plain = [name for name in MODULES if layer(name) == PLAIN]
    assert len(plain) >= 5
    outside = [(name, target) for name in plain for target, _ in imports(name) if target.startswith("/")]
    assert [(name, target) for name, target in outside if _root(target) not in sys.stdlib_module_names] == []


def test_below_the_commands_nothing_prints_exits_or_reads_the_environment() -> None:
    wrong = []
    for name in MODULES:
        if layer(name) == COMMAND or {name, name.partition(".")[0]} & ENVIRONMENT:
            continue
        for node in ast.walk(tree_of(name)):
            text = ast.unparse(node.func) if isinstance(node, ast.Call) else ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if text in TOUCHES:
                wrong.append(f"{name}:{node.lineno}: {text}")  # type: ignore[attr-defined]
    assert wrong == []


def _root(target: str) -> str:
    return target[1:].partition(".")[0]
