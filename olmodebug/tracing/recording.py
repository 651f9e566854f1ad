"""What a traced run gave: its events and module calls, and the tensors that were asked for."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ..records import Event, ModuleCall
from ..report import plain
from ..sources import Spot
from .copies import Storages


@dataclass(slots=True)
class Kept:
    """Copies of what one op read and wrote: its arguments by name (tensors cloned before the op ran) and its outputs."""

    arguments: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass(slots=True)
class KeptCall:
    """Copies of the tensors that went into and came out of one module call."""

    module: str
    kind: str
    spot: Spot | None
    inputs: list[Tensor]
    outputs: list[Tensor]
    first_event: int
    last_event: int


@dataclass(slots=True)
class Moment:
    """One op that has just run, with its live tensors: read them at once, keep none, write into none.

    `arguments` are by the schema's names, and `inputs` are the tensors among them; one that the op wrote into is a
    copy from before. Ops that the consumer runs itself are not recorded.
    """

    event: Event
    spot: Spot | None
    arguments: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass(slots=True)
class Recording:
    """One traced run. `kept` and `kept_calls` are empty unless tensors were asked for; where `keep` picked some ops,
    `kept` still has one entry for every event, an empty one for the others.

    `result` is what the run returned, `error` what it raised; `failed` is the event that was running then. Parameters
    among the kept tensors are lent, not copied: they follow whoever changes the model after the run.
    """

    events: list[Event] = field(default_factory=list)
    spots: list[Spot | None] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    kept_calls: list[KeptCall] = field(default_factory=list)
    result: Any = None
    error: BaseException | None = None
    failed: Event | None = None
    failed_arguments: dict[str, Any] | None = None
    storages: Storages = field(default_factory=Storages, repr=False)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def __repr__(self) -> str:
        return f"<Recording of {len(self.events)} ops in {len(self.calls)} module calls>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from ..render.notebook import events_fragment

        return events_fragment(repr(self), self.events)

    def to_dict(self) -> dict[str, Any]:
        """The events and module calls as JSON-able values."""
        return {"events": [asdict(event) for event in self.events], "calls": [asdict(call) for call in self.calls]}

    def to_json(self) -> str:
        """The same as strict JSON: non-finite numbers are the strings `nan`, `inf` and `-inf`."""
        return json.dumps(plain(self.to_dict()), allow_nan=False) + "\n"

    def dtypes(self) -> set[str]:
        """Every floating dtype that an op wrote."""
        return {info.dtype for event in self.events for info in event.outputs if "float" in info.dtype}
