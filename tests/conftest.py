"""What every test shares: one thread, hypothesis profiles, forked children, and the mark of tests that need a GPU."""

import contextlib
import gc
import os
import random
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from olmodebug import process
from olmodebug.executions import check as executions
from olmodebug.forks import forks
from tests.forked import Pool

pytest_plugins = ["pytester"]
if not entry_points(group="pytest11", name="olmodebug"):  # a bare checkout: nothing has told pytest of the plugin
    pytest_plugins.append("_olmodebug_pytest")

# On a busy machine a few draws may take half a minute: that says nothing of the code.
settings.register_profile("quick", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("OLMODEBUG_HYPOTHESIS_PROFILE", "quick"))

torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings, and bits stay the same


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say why."""
    if torch.cuda.is_available():
        return
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"no CUDA device (torch {torch.__version__} is {build})"))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Every child of a command that is run in this process is a fork of one that has the imports."""
    pool = Pool()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(process.run_child.__kwdefaults__, "forks", pool)
        patch.setattr(executions, "forks", lambda *modules: forks(*modules) if pool.fresh else contextlib.nullcontext(pool))
        yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _forked_children(pool: Pool, request: pytest.FixtureRequest) -> None:
    """A test marked `fresh` gets a new interpreter for each child, as a user does."""
    pool.fresh = request.node.get_closest_marker("fresh") is not None


@pytest.fixture(autouse=True)
def _drawn_alike() -> None:
    """What a test draws is the same wherever it runs in the order, alone and beside others."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- the subjects under test draw from the global state
    torch.manual_seed(0)


@pytest.fixture
def imports_restored(tmp_path: Path) -> Iterator[None]:
    """Forgets the modules of the test's own folder; a library that came with them stays, or there would be two of it."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture(scope="module")
def _only_young_objects() -> Iterator[None]:
    """What lives already is hidden from `gc.get_objects`: guards look through all objects, and here half a million are pytest's and torch's."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
