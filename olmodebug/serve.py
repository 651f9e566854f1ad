"""The child's side of `process`: read the message, work, and tell every event before the next step starts."""

import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tell = Callable[..., None]


def serve(work: Callable[[dict[str, Any], Tell], None]) -> None:
    """Run `work(message, tell)` and end the process; `tell(kind, **fields)` writes one event of the journal.

    An exception of ours becomes the event `fault`. What the subject does to the process (sys.exit, an abort) is left to
    the parent, with the stack on disk.
    """
    serve_message(work, json.load(sys.stdin))


def serve_message(work: Callable[[dict[str, Any], Tell], None], message: dict[str, Any]) -> None:
    """`serve` where the message is there already."""
    events = os.fdopen(message["events"], "w", encoding="utf-8")
    stacks = Path(message["stacks"]).open("w", encoding="utf-8")  # noqa: SIM115 - open as long as the process lives
    faulthandler.enable(file=stacks, all_threads=False)
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
    for path in reversed(message["path"]):
        if path not in sys.path:
            sys.path.insert(0, path)

    def tell(kind: str, **fields: Any) -> None:
        events.write(json.dumps({"event": kind, **fields}, allow_nan=False) + "\n")
        events.flush()

    try:
        work(message, tell)
    except Exception as error:  # the parent decides what it means; nothing may be lost
        tell("fault", text=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
    except BaseException as error:  # sys.exit or KeyboardInterrupt from the subject's own code: a death like any other
        traceback.print_exc()
        for frame in reversed(traceback.extract_tb(error.__traceback__)):  # as faulthandler writes it
            stacks.write(f'  File "{frame.filename}", line {frame.lineno} in {frame.name}\n')
        stacks.flush()
        sys.stderr.flush()
        os._exit(1)
    tell("end")
    events.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without the destructors of a subject that may have corrupted the process
