"""The normalisations that a traced run goes through: their eps, their width and their place, also inside plain functions.

A norm is known by what it computes: a fused norm op, or `rsqrt` (or a root, or a power of -1/2) of a mean over the last
dimension plus a constant.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..casts import cast
from ..compare import roundings_limit
from ..records import Event, Where
from .tracer import Recording, record

FUSED = ("native_layer_norm", "_fused_rms_norm", "rms_norm")
ROOTS = ("rsqrt", "sqrt")
MEANS = ("mean", "var", "var_mean")
COPIES = ("_to_copy", "clone", "view", "_unsafe_view", "unsqueeze", "squeeze", "expand", "detach", "alias")
FLOAT32 = roundings_limit({"float32"})  # what may be inside
# Far above any activation, so that no sane eps is seen beside the mean square.
LARGE = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class NormCall:
    """One normalisation of a run: where its eps is added, the eps (0: none is), and the size of the dimension it is taken over."""

    where: Where
    event: int  # that adds the eps
    eps: float
    width: int
    kind: str


def norm_calls(recording: Recording) -> list[NormCall]:
    """Every norm of a run that was recorded with `keep=True`, in the order they run, where its eps can be read."""
    found = []
    written: dict[int, int] = {}  # storage -> the last event that wrote it
    for index, (event, kept) in enumerate(zip(recording.events, recording.kept, strict=True)):
        if event.op in FUSED:
            shape, eps = kept.arguments.get("normalized_shape"), kept.arguments.get("eps")
            if shape and isinstance(eps, float):
                kind = "layer norm" if event.op == "native_layer_norm" else "RMS norm"
                found.append(NormCall(where=event.where, event=index, eps=eps, width=int(shape[-1]), kind=kind))
        elif event.op in ROOTS or (event.op == "pow" and _number(kept.arguments.get("exponent")) == -0.5):
            call = _by_hand(recording, written, event)
            if call is not None:
                found.append(call)
        for info in event.outputs:
            if info.storage:
                written[info.storage] = index
    return found


def isolated(module: nn.Module, width: int, *, dtype: torch.dtype = torch.float64, scale: float = 1.0, rows: int = 7) -> Tensor:
    """What a norm module gives for `[1, rows, width]` random numbers of this scale; raises what the module raises."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, rows, width, generator=generator, dtype=torch.float64) * scale
    with torch.no_grad():
        out = module(x.to(device_of(module), dtype))
    if not isinstance(out, Tensor) or out.shape != x.shape:
        raise ValueError("it does not map a tensor to one of the same shape")
    return out.cpu()


def device_of(module: nn.Module) -> torch.device:
    """Where a module's tensors are; the CPU for one without any."""
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def survives_zeros(module: nn.Module, width: int) -> bool:
    """Whether a module gives finite numbers for zeros: an eps is added somewhere, in whatever way."""
    outputs = _at_scales(module, width, 0.0)
    return outputs is not None and bool(torch.isfinite(outputs[0]).all())


def norm_width(module: nn.Module) -> int | None:
    """The width of a module that may be a norm: all its parameters are vectors of one length; None for anything else."""
    sizes = {tuple(p.shape) for p in module.parameters()}
    if len(sizes) == 1 and len(next(iter(sizes))) == 1 and not list(module.children()):
        return next(iter(sizes))[0]
    return None


def acts_as_norm(module: nn.Module, width: int) -> bool:
    """Whether a module forgets the scale of what it is given and keeps its direction apart: f(1e6 x) = f(1e9 x), not constant."""
    outputs = _at_scales(module, width, LARGE, 1e3 * LARGE)
    if outputs is None:
        return False
    first, second = outputs
    size = float(first.abs().max())
    varied = bool((first.std(dim=-1) > 1e-3 * size).all())
    return size > 0 and varied and float((first - second).abs().max()) <= 1e-5 * size


def grows_with_input(module: nn.Module, width: int) -> bool:
    """Whether what a module gives is a thousand times as large for an input a thousand times as large: it normalises nothing."""
    outputs = _at_scales(module, width, 1.0, 1e3)  # far above 1 the skip of x + norm(x) would hide its norm
    if outputs is None:
        return False
    first, second = (out.double() for out in outputs)
    return bool(first.any()) and float((1e3 * first - second).abs().max()) <= 1e-5 * float(second.abs().max())


def unused_norms(recording: Recording) -> Iterator[tuple[NormCall, Event]]:
    """Norms of a run whose numbers reach none of the model's outputs, though the function, or the norm's module, in which they
    are computed goes on after them; each with the first op that does reach one."""
    if not recording.calls:
        return
    wanted = {info.storage for info in recording.calls[-1].outputs}
    living = [False] * len(recording.events)
    for event in reversed(recording.events):
        if not wanted.isdisjoint(info.storage for info in event.outputs):
            living[event.index] = True
            wanted.update(info.storage for info in event.inputs)
    for call in norm_calls(recording):
        spot = recording.spots[call.event]
        if living[call.event] or spot is None:
            continue
        inside = [c for c in recording.calls if c.module == call.where.module and c.first_event <= call.event <= c.last_event]
        prefix = call.where.module and f"{call.where.module}."  # a block or a model that has norm in its name is none
        leaf = not any(c.module != call.where.module and c.module.startswith(prefix) for c in recording.calls)
        named = bool(inside) and leaf and "norm" in inside[0].kind.lower()
        if not named and "norm" not in spot.function.rpartition(".")[2].lower():
            continue
        read = _read_before(recording, call.event)
        for event in recording.events[call.event + 1 :]:
            other = recording.spots[event.index]
            if named and event.index > inside[0].last_event:
                break
            if event.where.module != call.where.module or other is None or not (named or other.code is spot.code):
                if not named:
                    break  # the function is left
                continue
            if living[event.index] and read & {info.storage for info in event.inputs}:
                yield call, event
                break


def _read_before(recording: Recording, index: int) -> set[int]:
    """The storages that the function of an op had computed with until then: what it was given, and what it has not normalised."""
    found: set[int] = set()
    spot, module = recording.spots[index], recording.events[index].where.module
    for event, other in zip(reversed(recording.events[: index + 1]), reversed(recording.spots[: index + 1]), strict=True):
        if event.where.module != module or spot is None or other is None or other.code is not spot.code:
            break
        found |= {info.storage for info in event.inputs[:1]}
    return found


def could_hold_a_norm(recording: Recording) -> bool:
    """Whether any op of a run may be part of a norm: a mean, a root, a norm of torch's, or an op that is not torch's own."""
    return any(
        event.op in (*MEANS, *ROOTS, "std", "pow") or "norm" in event.op or "::" in event.op or not hasattr(torch.ops.aten, event.op)
        for event in recording.events
    )


def divides_by_square(module: nn.Module, width: int) -> bool:
    """Whether what a module gives is half as large for an input twice as large, which no norm means to do."""
    outputs = _at_scales(module, width, 1e2, 2e2, 4e2)
    if outputs is None:
        return False
    first, *others = outputs
    size = float(first.abs().max())
    return size > 0 and all(float((first - out * 2.0**i).abs().max()) <= 1e-3 * size for i, out in enumerate(others, 1))


def is_polynomial(module: nn.Module, width: int) -> bool:
    """Whether what a module gives along a line through 0 is a polynomial of the second degree, as of products of matrices: no
    activation, by whatever ops, is in it. The third difference is 0 then; the scale is one at which activations are no parabolas."""
    outputs = _at_scales(module, width, -1e3, 0.0, 1e3, 2e3)
    if outputs is None:
        return False
    before, at, behind, far = (out.double() for out in outputs)
    third = far - 3 * behind + 3 * at - before
    return bool(torch.isfinite(third).all()) and float(third.abs().max()) <= FLOAT32 * float(far.abs().max())


def _at_scales(module: nn.Module, width: int, *scales: float) -> list[Tensor] | None:
    """What a module gives for the same input at several scales; None where it wants other arguments, and so is no plain norm."""
    try:
        return [isolated(module, width, scale=scale) for scale in scales]
    except Exception:  # whatever another kind of module raises
        return None


def traced(module: nn.Module, run: Callable[[], Any]) -> Recording:
    """The ops of one isolated call, with their tensors."""
    return record(module, run, keep=True, catch=True)


def with_unit_weights(module: nn.Module) -> nn.Module:
    """A copy in float64 with weights of one and no bias."""
    twin = cast(copy.deepcopy(module), torch.float64).eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.fill_(0.0 if _added(name) else 1.0)
    return twin


def _added(name: str) -> bool:
    """Whether a norm adds this parameter, by the names that people give it."""
    return "bias" in name or name.rpartition(".")[2] in ("beta", "b", "shift", "offset")


def unit_rms(module: nn.Module, width: int) -> float | None:
    """The root mean square of its output before the weight; with weights w and with 1 + w both tried."""
    sizes = []
    for weight in (1.0, 0.0):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.fill_(0.0 if _added(name) else weight)
        sizes.append(float(isolated(module, width, scale=LARGE).pow(2).mean().sqrt()))
    if sizes[1] > 0:  # 1 + w
        return sizes[1]
    return sizes[0] if sizes[0] > 0 else None


def unbiased(recording: Recording, width: int) -> Event | None:
    """The op that divides by n - 1: a std or variance with torch's default correction, or a sum divided by that number."""
    for event, kept in zip(recording.events, recording.kept, strict=True):
        if event.op in ("div", "div_") and _number(kept.arguments.get("other")) == width - 1:
            return event
        correction = kept.arguments.get("correction", 1)
        if event.op in ("std", "var", "var_mean", "std_mean") and kept.arguments.get("unbiased", True) and correction in (None, 1):
            return event
    return None


def overflowing_squares(recording: Recording) -> Iterator[tuple[Event, float]]:
    """(event, largest input) of float16 squares that turn finite inputs into inf and go into a mean next."""
    for index, (event, kept) in enumerate(zip(recording.events, recording.kept, strict=True)):
        if event.op not in ("pow", "mul", "square") or not kept.outputs or kept.outputs[0].dtype != torch.float16:
            continue
        if event.op == "pow" and str(kept.arguments.get("exponent")) not in ("2", "2.0"):
            continue
        if event.op == "mul" and (len(kept.inputs) < 2 or not torch.equal(kept.inputs[0], kept.inputs[-1])):
            continue
        finite = all(bool(torch.isfinite(t).all()) for t in kept.inputs)
        if not finite or bool(torch.isfinite(kept.outputs[0]).all()):
            continue
        following = recording.events[index + 1 : index + 4]
        written = event.outputs[0].storage
        if any(e.op in ("mean", "sum") and e.inputs and e.inputs[0].storage == written for e in following):
            yield event, float(kept.inputs[0].abs().max())


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, float | int) and not isinstance(value, bool) else None


def _by_hand(recording: Recording, written: dict[int, int], root: Event) -> NormCall | None:
    before = written.get(root.inputs[0].storage) if root.inputs else None
    if before is None:
        return None
    added = _added_number(recording, before)
    index = before if added is None else written_before(recording, recording.events[before].inputs[0].storage, before)
    if index is None or recording.events[index].op not in MEANS:
        return None
    mean, event = recording.events[index], recording.events[before]
    if added is None:
        inside = written_before(recording, mean.inputs[0].storage, index) if mean.op == "mean" else None
        if inside is not None and (added := _added_number(recording, inside)) is not None:  # the mean of x^2 + eps
            event = recording.events[inside]
        elif _is_added_to(recording, root):
            return None
        else:
            event, added = root, 0.0
    dims = recording.kept[index].arguments.get("dim")
    shape = mean.inputs[0].shape
    if not shape or dims not in ([-1], [len(shape) - 1]):
        return None
    kind = "RMS norm" if mean.op == "mean" and not _of_centred(recording, index) else "layer norm"
    return NormCall(where=event.where, event=event.index, eps=added, width=shape[-1], kind=kind)


def _of_centred(recording: Recording, mean: int) -> bool:
    """Whether the squares that a mean is taken of are those of numbers whose mean was taken off."""
    squares = written_before(recording, recording.events[mean].inputs[0].storage, mean)
    if squares is None or not recording.kept[squares].inputs:
        return False
    x = recording.kept[squares].inputs[0].double()
    return x.ndim > 0 and float(x.mean(-1).abs().max()) <= FLOAT32 * float(x.abs().max())


def _added_number(recording: Recording, index: int) -> float | None:
    """The number that an op adds to a tensor; None for any other op."""
    added = recording.kept[index].arguments.get("other") if recording.events[index].op in ("add", "add_") else None
    return _number(added)


def _is_added_to(recording: Recording, root: Event) -> bool:
    """Whether a number is added to a root, or it is held above one, before it divides: an eps outside of the root."""
    made = {info.storage for info in root.outputs}
    for event in recording.events[root.index + 1 :]:
        if made & {info.storage for info in event.inputs}:
            if event.op not in COPIES:
                return event.op in ("add", "add_", "clamp", "clamp_min", "clamp_", "maximum")
            made |= {info.storage for info in event.outputs}
    return False


def written_before(recording: Recording, storage: int, index: int) -> int | None:
    """The last event before `index` that wrote into a storage; views are looked through."""
    for i in range(index - 1, max(-1, index - 40), -1):
        event = recording.events[i]
        if any(info.storage == storage for info in event.outputs) and event.op not in ("view", "unsqueeze", "_unsafe_view", "detach"):
            return i
    return None
