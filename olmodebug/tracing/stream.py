"""The residual stream through a block of a traced run: what goes in, what comes out, and what stands last."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..compare import difference
from ..explain import place_of
from ..records import Event, Where
from .norms import norm_width
from .tracer import Recording


def is_block(block: nn.Module) -> bool:
    """Whether attention and feed-forward stand in one module, or a mixer of tokens and the norm before it: two children
    with matrices or more, or one and a norm. Layers of an RNN stand in a row without residuals."""
    children = branches_of(block)
    normed = any(norm_width(child) for child in block.children())
    return len(children) >= 2 or (len(children) == 1 and normed and not any(isinstance(m, nn.RNNBase) for m in block.modules()))


def branches_of(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the children that have matrices."""
    return [(name, child) for name, child in block.named_children() if any(p.ndim >= 2 for p in child.parameters())]


def stream_of(recording: Recording, path: str) -> tuple[Tensor, Tensor] | None:
    call = next((c for c in recording.kept_calls if c.module == path), None)
    if call is None or not call.inputs or not call.outputs or call.inputs[0].shape != call.outputs[0].shape:
        return None
    return call.inputs[0], call.outputs[0]


def is_chained(recording: Recording, paths: Sequence[str]) -> bool:
    """Whether any of these blocks hands its output, as it is, to the next one."""
    streams = [stream_of(recording, path) for path in paths]
    return any(a is not None and b is not None and torch.equal(a[1], b[0]) for a, b in pairwise(streams))


def is_scaled(before: Tensor, after: Tensor, limit: float) -> bool:
    """Whether every channel is its input times one number that is the same at all positions, and not zero."""
    x, y = before.double().flatten(0, 1), after.double().flatten(0, 1)
    factor = (x * y).sum(0) / x.pow(2).sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return bool(factor.any()) and difference(x * factor, y, relative_limit=limit) is None


def ends_in_norm(recording: Recording, path: str) -> bool:
    """Whether the block's output comes straight from a norm: true post-norm."""
    call = next(c for c in recording.kept_calls if c.module == path)
    events = recording.events[call.first_event : call.last_event + 1]
    add = last_add(recording, path)
    if add is None:
        return True
    return any(e.op in ("rsqrt", "sqrt", "native_layer_norm", "_fused_rms_norm", "std", "pow") for e in events if e.index > add.index)


def is_norm_of_input(recording: Recording, path: str, after: Tensor, limit: float) -> bool:
    """Whether what the silent block returns is what a norm inside it wrote."""
    call = next(c for c in recording.kept_calls if c.module == path)
    rooted = False
    for index in range(call.first_event, call.last_event + 1):
        event = recording.events[index]
        rooted |= event.op in ("rsqrt", "native_layer_norm", "_fused_rms_norm", "std", "sqrt")
        if (
            rooted
            and event.op != "add"
            and any(
                out.shape == after.shape and out.is_floating_point() and difference(out, after, relative_limit=limit) is None
                for out in recording.kept[index].outputs
            )
        ):
            return True
    return False


def last_add(recording: Recording, path: str) -> Event | None:
    """The last addition of two hidden states inside a block."""
    call = next(c for c in recording.kept_calls if c.module == path)
    shape = tuple(call.outputs[0].shape)
    for event in reversed(recording.events[call.first_event : call.last_event + 1]):
        hidden = [info for info in event.inputs if info.shape == shape]
        if event.op in ("add", "add_") and len(hidden) == 2 and event.where.module == path:
            return event
    return None


def sum_that_is_lost(recording: Recording, path: str, branch: str, limit: float) -> Event | None:
    """The addition of a block's input and what one branch gave, where the block, in which no other branch gives anything,
    hands its input on all the same; None where the branch reaches the output, or adds nothing to the input."""
    stream = stream_of(recording, path)
    call = next((c for c in recording.kept_calls if c.module == f"{path}.{branch}"), None)
    if stream is None or call is None or not call.outputs or call.outputs[0].shape != stream[0].shape:
        return None
    before, after = stream
    if difference(before, after, relative_limit=limit) is not None:
        return None
    total = before + call.outputs[0]
    if difference(before, total, relative_limit=limit) is None:
        return None
    for event in recording.events[call.last_event + 1 :]:
        if event.op not in ("add", "add_") or event.where.module != path:
            continue
        if any(
            out.shape == total.shape and difference(out, total, relative_limit=limit) is None for out in recording.kept[event.index].outputs
        ):
            return event
    return None


def is_weighted(recording: Recording, add: Event) -> bool:
    """Whether what an addition takes was multiplied by a plain number just before: a residual with a weight, so by design."""
    read = {info.storage for info in add.inputs}
    for index in range(max(0, add.index - 4), add.index):
        event, other = recording.events[index], recording.kept[index].arguments.get("other")
        if event.op in ("mul", "mul_") and isinstance(other, float | int) and read & {info.storage for info in event.outputs}:
            return True
    return False


def last_call_place(recording: Recording, path: str) -> Where:
    """The last place inside the block's own forward."""
    call = next(c for c in recording.kept_calls if c.module == path)
    inner = [c for c in recording.kept_calls if c.module.startswith(path + ".") and c.last_event <= call.last_event and c.spot is not None]
    direct = [c for c in inner if "." not in c.module[len(path) + 1 :]]
    return place_of(direct[-1].spot, module=path) if direct else Where(module=path)
