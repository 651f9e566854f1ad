"""Children of the tests are forks of a process that has the imports: a new interpreter costs seconds, and the tests start hundreds.

What a child does is what it does for a user, in a process of its own that may hang or die. Only `python -m` and the imports
are left out; tests marked `fresh` have them.
"""

import importlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from olmodebug.forks import Forked, Forks
from olmodebug.serve import Tell

CHILDREN = (
    "child executions.child executions.run executions.lift footprint.child footprint.dry_run footprint.estimate footprint.confirm "
    "implementations.child implementations.comparison tracing.shape_child tracing.shape_tree training.child training.loop ranks.child"
).split()
PROBES = tuple(f"olmodebug.probes.{path.stem}" for path in sorted((Path(__file__).parents[1] / "probes").glob("[!_]*.py")))
MODULES = ("torch", "transformers.modeling_utils", *(f"olmodebug.{name}" for name in CHILDREN), *PROBES)
BESIDE = ("torch", "olmodebug.ranks.child", "olmodebug.training.child")  # what a second child at a time is: a rank


class Pool:
    """As many servers of forks as there are children at a time."""

    def __init__(self) -> None:
        self.able, self.fresh = True, False
        self.servers: dict[Forks, Forked | None] = {}
        self.lock = threading.Lock()

    def start(
        self, module: str, message: Mapping[str, Any], environment: Mapping[str, str], *, events: int, output: int, tick: Callable[[], None]
    ) -> Forked | None:
        """What `Forks.start` does, in the folder and the environment of the caller; None where the test wants a fresh process."""
        if self.fresh or "CUDA_LAUNCH_BLOCKING" in environment:
            return None
        with self.lock:  # ranks start at a time
            server = next((each for each, last in self.servers.items() if last is not None and last.code is not None), None)
            server = server or Forks(BESIDE if self.servers else MODULES)
            self.servers[server] = None
        own = {"module": module, "folder": str(Path.cwd()), "environment": {**os.environ, **environment}}
        forked = server.start("tests.forked", {**message, "forked": own}, {}, events=events, output=output, tick=tick)
        self.servers[server] = forked
        return forked

    def close(self) -> None:
        for server in self.servers:
            server.close()


def run(message: dict[str, Any], tell: Tell) -> None:
    """In the fork: what the module that was asked for does, where and how it was asked for."""
    own = message.pop("forked")
    os.chdir(own["folder"])
    os.environ.clear()
    os.environ.update(own["environment"])
    module = importlib.import_module(own["module"])
    for name in ("tests", "tests.forked"):  # no child of a user's has them
        sys.modules.pop(name)
    module.run(message, tell)
