"""Twins with a switch of the model thrown: its attention implementation, its gradient checkpointing, the size of its scores."""

from collections.abc import Iterator

import torch
from torch import nn

from .own_code import quiet
from .records import Case
from .settings import attention_choices, config_of
from .subject import Subject
from .tracing.attends import QUERY_KEY
from .tracing.tracer import record

# Attributes by which models without a config switch choose torch's fused attention, after nanoGPT.
FLASH_NAMES = ("flash", "use_flash", "use_sdpa", "use_flash_attn", "use_flash_attention")
# Fresh weights make scores near zero, where a softcap or a scale hardly shows; trained models have scores of this size.
TRAINED_SCORE = 20.0
# A dropout rate above zero at which none of the few thousand numbers of a small run is dropped.
LEAST_RATE = 1e-12


def attention_twins(subject: Subject) -> list[tuple[str, Subject]]:
    """(name, twin) of each attention that the model has a switch for and runs with."""
    names = attention_choices(subject.model)
    if names:
        twins = [(name, subject.twin(attention=name)) for name in names]
        return _distinct([(name, twin) for name, twin in twins if twin.dtype == torch.float64 and twin.runs()])
    twins = []
    for flash in (False, True):
        twin = subject.fresh_twin()
        switched = False
        for module in twin.model.modules():
            for name in FLASH_NAMES:
                if isinstance(vars(module).get(name), bool):
                    setattr(module, name, flash)
                    switched = True
        if switched and twin.runs():
            twins.append(("fused attention" if flash else "attention written out", twin))
    return _distinct(twins)


def _distinct(twins: list[tuple[str, Subject]]) -> list[tuple[str, Subject]]:
    """The twins that run other ops than those before them: a switch that is read once, when the model is built, or
    never, changes nothing, and a model compared with itself would always agree."""
    kept: dict[tuple[str, ...], tuple[str, Subject]] = {}
    for name, twin in twins:
        case = twin.first_case()
        with torch.no_grad(), quiet():
            recording = record(twin.model, lambda twin=twin, case=case: twin.call(case))  # type: ignore[misc]
        kept.setdefault(tuple(event.op for event in recording.events), (name, twin))
    return list(kept.values())


def dropout_rates(model: nn.Module) -> Iterator[tuple[str, object, str, float]]:
    """(name, holder, attribute, rate) of each dropout rate that forward may read: of modules, of plain attributes, of the
    config objects that modules hold."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        for holder in (module, config_of(module)):
            if holder is None or id(holder) in seen or not hasattr(holder, "__dict__"):
                continue
            seen.add(id(holder))
            for key, value in list(vars(holder).items()):
                dropout = isinstance(holder, nn.modules.dropout._DropoutNd) and key == "p"
                if isinstance(value, float) and 0.0 <= value < 1.0 and (dropout or "drop" in key.lower()):
                    yield (f"{name}.{key}" if name else key), holder, key, value


def set_dropout(model: nn.Module, rate: float) -> list[str]:
    """Set every dropout rate; the names of what was set."""
    names = []
    for name, holder, key, _ in dropout_rates(model):
        object.__setattr__(holder, key, rate)  # a config may be frozen
        names.append(name)
    return names


def with_dropout_on(subject: Subject) -> Iterator[tuple[str, Subject]]:
    """Twins in train mode with every attention implementation, that take the branches for dropout and drop nothing: where
    the rate is zero it becomes one that no draw falls below."""
    for name in (None, *attention_choices(subject.model)):
        twin = subject.fresh_twin(training=True, attention=name)
        rates = [(holder, key) for _, holder, key, rate in dropout_rates(twin.model) if rate == 0.0]
        for holder, key in rates:
            object.__setattr__(holder, key, LEAST_RATE)  # a config may be frozen
        if rates or name is not None:
            yield "train mode with dropout on" + (f", {name} attention" if name else ""), twin


def checkpointing_twin(subject: Subject, on: bool) -> Subject | None:
    """A twin in train mode with gradient checkpointing on or off; None where it has no such switch."""
    twin = subject.fresh_twin(training=True)
    model = twin.model
    if hasattr(model, "gradient_checkpointing_enable"):
        if not getattr(model, "supports_gradient_checkpointing", False):
            return None
        with quiet():
            (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()  # type: ignore[operator]
        return twin
    switched = False
    seen: set[int] = set()
    for module in model.modules():
        for holder in (module, config_of(module)):
            if holder is None or id(holder) in seen:
                continue
            seen.add(id(holder))
            for name in ("gradient_checkpointing", "use_checkpoint", "activation_checkpointing", "use_gradient_checkpointing"):
                if isinstance(getattr(holder, name, None), bool):
                    object.__setattr__(holder, name, on)
                    switched = True
    return twin if switched else None


def score_growth(twin: Subject, case: Case) -> float | None:
    """The factor on query and key weights that brings the largest score to TRAINED_SCORE; None where none was recognised."""
    if not any(QUERY_KEY.search(name) for name, _ in twin.model.named_parameters()):
        return None
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case), keep=True)
    largest = 0.0
    for event, kept in zip(recording.events, recording.kept, strict=True):
        if event.op in ("_softmax", "_safe_softmax") and kept.inputs[0].ndim >= 3:
            real = kept.inputs[0].double()
            real = real[torch.isfinite(real) & (real > -9e3)]  # below lie masks
            largest = max(largest, float(real.abs().max()) if real.numel() else 0.0)
    return (TRAINED_SCORE / largest) ** 0.5 if 0 < largest < TRAINED_SCORE else None


def with_grown_scores(twin: Subject, factor: float) -> Subject:
    copied = twin.fresh_twin()
    with torch.no_grad():
        for name, parameter in copied.model.named_parameters():
            if QUERY_KEY.search(name):
                parameter.mul_(factor)
    return copied
