"""What each guard is to the watch: a part that listens from the first op on, and may have something to say at the end."""

from typing import Any


class Part:
    """One question that is asked of a script while it runs."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch

    def listen(self) -> None:
        """Ask to be told of ops and events."""
        raise NotImplementedError

    def finish(self) -> None:
        """What only the end of the process can tell: for most guards nothing."""
