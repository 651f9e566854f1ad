"""`file.py:attribute` and `package.module:attribute` as objects, with the user's own errors left as they are."""

import ast
import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import SubjectError


class SubjectCodeError(Exception):
    """The subject's own code raised while it was imported, built or run; `__cause__` is what it raised.

    `subject` and `case` are the model and the inputs of a run, so that it can be traced again.
    """

    def __init__(self, stage: str, *, subject: Any = None, case: Any = None) -> None:
        super().__init__(stage)
        self.stage, self.subject, self.case = stage, subject, case


def load_attribute(spec: str) -> object:
    """The object that `file.py:attribute` or `package.module:attribute` names; dots are allowed in the attribute.

    A by-path module stays in `sys.modules` under a name made of its whole path, and its folder on `sys.path`, as when
    Python runs a script. SubjectError when the spec leads nowhere, SubjectCodeError when the module itself raises.
    """
    place, _, attribute = spec.rpartition(":")
    module = load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    value: object = module
    for name in attribute.split("."):
        if not hasattr(value, name):
            near = difflib.get_close_matches(name, [key for key in vars(value) if not key.startswith("_")], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise SubjectError(f"{place} has no attribute {attribute}{hint}")
        value = getattr(value, name)
    return value


def load_file(path: Path) -> ModuleType:
    """The module in a file, executed once per content of `sys.modules`; relative imports work inside a package."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=2)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise SubjectError(f"no such file: {path}{hint}")
    path = path.resolve()
    root, name = _package_of(path)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    package = name.partition(".")[0]
    if root != path.parent and package in sys.modules and str(root / package) not in getattr(sys.modules[package], "__path__", ()):
        raise SubjectError(f"{path} lies in a package called {package}, and another {package} is loaded already; rename the folder")
    if name in sys.modules:
        return sys.modules[name]
    if root != path.parent:
        return _run_import(lambda: importlib.import_module(name), path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        return _run_import(lambda: spec.loader.exec_module(module) or module, path)  # type: ignore[union-attr,func-returns-value]
    except BaseException:
        sys.modules.pop(name, None)
        raise


def candidates(path: Path) -> list[str]:
    """The functions and classes that a file defines at its top level, found without running it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def _package_of(path: Path) -> tuple[Path, str]:
    """The folder to put on `sys.path` and the module's name; a file outside a package is named after its whole path."""
    parts, folder = [path.stem], path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    if len(parts) > 1:
        return folder, ".".join(parts)
    return path.parent, "_olmodebug_file_" + "".join(c if c.isalnum() else "_" for c in str(path))


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(missing + "."):
            raise SubjectError(f"no module named {missing} (looking for {name}; the working directory is searched first)") from None
        raise SubjectCodeError("import") from error
    except Exception as error:
        raise SubjectCodeError("import") from error


def _run_import(action, path: Path) -> ModuleType:  # type: ignore[no-untyped-def]
    try:
        return action()
    except Exception as error:
        raise SubjectCodeError("import") from error
    except SystemExit as error:
        raise SubjectCodeError("import") from RuntimeError(f"{path.name} calls sys.exit({error.code}) while it is imported")
