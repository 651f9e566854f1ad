"""Runs at the start of every Python process under `olmodebug run`: the guards are installed as soon as torch is imported.

A process that never imports torch pays for one finder on `sys.meta_path`. A `sitecustomize` of the user's own still runs.
"""

# ruff: noqa: PTH100, PTH118, PTH120
# os.path and not pathlib: every Python process of the script runs this, also those that never see torch
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Finds `torch` as it would be found without us, and installs the guards once its own code has run."""

    def __init__(self) -> None:
        self.searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, finder: _AfterTorch) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        module.__loader__ = self.loader
        if spec is not None:
            spec.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _install()


def _install() -> None:
    """Load olmodebug from its own place, without a change to `sys.path`; a fault of ours must not stop the script."""
    try:
        folder = os.environ["OLMODEBUG_GUARD_PACKAGE"]
        if "olmodebug" not in sys.modules:
            spec = importlib.util.spec_from_file_location(
                "olmodebug", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
            )
            if spec is None or spec.loader is None:
                return
            module = importlib.util.module_from_spec(spec)
            sys.modules["olmodebug"] = module
            spec.loader.exec_module(module)
        from olmodebug.guards.watch import install_from_environment

        install_from_environment()
    except Exception as error:
        sys.stderr.write(f"olmodebug: the guards could not be installed: {type(error).__name__}: {error}\n")


def _chain() -> None:
    """Take our folder off `sys.path` and run the `sitecustomize` that would have run without us."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get("OLMODEBUG_GUARD_FOLDER"):
    sys.meta_path.insert(0, _AfterTorch())
_chain()
