"""Every run of an execution starts from what the model held before it, and what the runs change is told."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..caches import TABLES, held, hold
from ..settle import settled
from ..subject import Subject
from ..tracing.copies import digest
from ..tracing.tracer import record


@contextmanager
def same_start(subject: Subject, changed: list[str] | None = None) -> Iterator[None]:
    """The buffers, plain attributes, gradients and random state are afterwards what they were; `changed` takes the names of
    the buffers and attributes that the run changed."""
    model = subject.model
    with settled(model, seed=subject.seed):
        before, known = held(model), dict(_state(model))
        values = {name: value.clone() for name, value in known.items() if isinstance(value, Tensor)}
        try:
            yield
        finally:
            if changed is not None:
                after = dict(_state(model))
                changed += [name for name in after if not _same(values.get(name, known.get(name)), after[name]) and name not in changed]
            hold(before)
            for name, value in values.items():
                if not _same(known[name], value):
                    known[name].data.copy_(value)


def _state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Buffers, and plain attributes that are tensors or single values, by name."""
    yield from model.named_buffers()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in TABLES and isinstance(value, Tensor | bool | int | float | str | None):
                yield f"{path}.{name}".removeprefix("."), value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def remembers(subject: Subject, run: Callable[[], Mapping[str, Tensor]]) -> bool:
    """Whether a run that begins where another ended gives other bits."""
    with same_start(subject):
        first, second = ([digest(t) for t in run().values()] for _ in range(2))
    return first != second


def another_input(subject: Subject, run: Callable[[], Any], index: int) -> str | None:
    """What the op at this place of a run reads that another run finds changed; None where both read the same."""
    found = []
    for _ in range(2):
        with same_start(subject):
            recording = record(subject.model, run, keep=lambda event: event.index == index)
        if index >= len(recording.events):
            return "another number of ops before it"
        found.append((recording.events[index], recording.kept[index].arguments))
    (event, one), (_, other) = found
    names = [name for name in one if not _same(one[name], other.get(name))]
    return ", ".join(event.parameters) or names[0] if names else None
