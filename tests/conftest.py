"""What every test shares: one thread, hypothesis profiles, and the mark of tests that need a GPU."""

import os
from importlib.metadata import entry_points

import pytest
import torch
from hypothesis import settings

pytest_plugins = ["pytester"]
if not entry_points(group="pytest11", name="olmodebug"):  # a bare checkout: nothing has told pytest of the plugin
    pytest_plugins.append("_olmodebug_pytest")

settings.register_profile("quick", derandomize=True, deadline=None)
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
