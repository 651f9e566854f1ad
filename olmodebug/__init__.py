"""The doctor for language-model code.

`check(model)` says whether a causal language model is right, and where not, which line and why; `trace` records every op of a
run with its line; `shapes` gives the tree with named dimensions; `parity` compares two executions op by op; `memory` predicts what a
training step takes; `with guard(model):` watches a block of a training script. Importing this package loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import check, parity, shapes, trace
    from .footprint.api import memory
    from .footprint.records import MemoryEstimate
    from .guarding import guard
    from .report import Finding, Report
    from .testing import ProbeFailure, parametrize_with_probes

__all__ = [
    "Finding",
    "MemoryEstimate",
    "ProbeFailure",
    "Report",
    "check",
    "guard",
    "memory",
    "parametrize_with_probes",
    "parity",
    "shapes",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Public names on first use, so that the command line starts without torch."""
    import importlib

    if name in ("check", "parity", "shapes", "trace"):
        api = importlib.import_module(".api", __name__)
        # api imports the submodules of the same names, which the import system then binds here: bind the functions again
        globals().update(check=api.check, parity=api.parity, shapes=api.shapes, trace=api.trace)
        return globals()[name]
    if name == "guard":
        return importlib.import_module(".guarding", __name__).guard
    if name in ("memory", "MemoryEstimate"):
        return getattr(importlib.import_module({"memory": ".footprint.api"}.get(name, ".footprint.records"), __name__), name)
    if name in ("Finding", "Report"):
        return getattr(importlib.import_module(".report", __name__), name)
    if name in ("ProbeFailure", "parametrize_with_probes"):
        return getattr(importlib.import_module(".testing", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
