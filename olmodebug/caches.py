"""Caches that a model keeps itself, or that its caller makes and hands over: a fresh one for each sequence."""

import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .convention import MAKER_NAMES, RESET_NAMES, SETUP_NAMES
from .settings import CONFIG_NAMES, LAYER_NAMES

if TYPE_CHECKING:
    from .subject import Subject

# Sizes that a method which makes a cache asks for, and the length where the config declares none.
BATCH_NAME = r"b(atch|sz|s$|$)"
SIZE_NAMES = BATCH_NAME + r"|.*(len|size|positions|tokens)"
ROOM = 256

# A module, its attributes, and its tables of parameters, buffers and modules.
Held = tuple[nn.Module, dict[str, Any], dict[str, dict[str, Any]]]
TABLES = ("_parameters", "_buffers", "_modules")


def keeps_its_cache(subject: "Subject") -> bool:
    """Whether the model keeps keys and values itself, and is told where new tokens stand or when a new sequence starts."""
    form = subject.convention
    counts = form.use_cache is not None and form.cache is None and method_of(subject.model, RESET_NAMES) is not None
    return form.start is not None or (form.places is not None and makes_new_caches(subject)) or counts


def makes_new_caches(subject: "Subject") -> bool:
    """Whether it has a method that makes its cache anew, or empties it."""
    return method_of(subject.model, (*SETUP_NAMES, *RESET_NAMES)) is not None


def new_cache(subject: "Subject", batch_size: int, length: int) -> None:
    """Have a model that keeps its cache itself make a fresh one, or forget the last one, where it has a method for that."""
    setup, reset = method_of(subject.model, SETUP_NAMES), method_of(subject.model, RESET_NAMES)
    if reset is not None:
        try:
            _with_sizes(reset, batch_size, length)
        except (RuntimeError, AttributeError):  # nothing is there yet that it could empty
            if setup is None and subject.convention.places is None:
                raise
    if subject.convention.sets_up:  # some make none where the last one is large enough, whatever is in it
        if not subject.bare:
            subject.bare.extend(held(subject.model))
        hold(subject.bare)
    if setup is not None:
        usual = torch.get_default_dtype()
        try:  # what it makes without naming a dtype is made in that of the weights, as in the model's own dtype
            if subject.dtype in (torch.float32, torch.float64):
                torch.set_default_dtype(subject.dtype)
            asked = [p.name for p in inspect.signature(setup).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][:2]
            with torch.device(subject.device):
                setup(*(subject.dtype if "dtype" in name else size for name, size in zip(asked, (batch_size, length), strict=False)))
        finally:
            torch.set_default_dtype(usual)


def handed_cache(subject: "Subject", batch_size: int) -> Any:
    """A fresh cache that the caller has to make: by the model's own method, or of the cache class beside the model; else an
    empty dict."""
    reset = method_of(subject.model, RESET_NAMES)
    maker, room = method_of(subject.model, MAKER_NAMES), subject.max_positions or ROOM
    if reset is not None:
        _with_sizes(reset, batch_size, room)
    if maker is not None:
        return _with_sizes(maker, batch_size, room)
    forward = inspect.unwrap(type(subject.model).forward)
    for name, kind in getattr(forward, "__globals__", {}).items():
        if isinstance(kind, type) and "cache" in name.lower():
            with suppress(Exception):  # a cache of another kind, as one of a single layer
                return kind(**_sizes_for(subject, kind, batch_size, room))
    return {}


def makes_its_kind(model: nn.Module) -> bool:
    """Whether the model makes the cache that its caller hands over, and asks nothing for it."""
    maker = method_of(model, MAKER_NAMES)
    return maker is not None and all(p.default is not p.empty for p in inspect.signature(maker).parameters.values())


def _with_sizes(method: Callable[..., Any], batch_size: int, room: int) -> Any:
    """Call a method of the model that makes or forgets a cache, with the sizes that it asks for."""
    sizes = [p for p in inspect.signature(method).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return method(*(batch_size if re.match(BATCH_NAME, p.name) else room for p in sizes[:2] if re.match(SIZE_NAMES, p.name)))


def _sizes_for(subject: "Subject", kind: type, batch_size: int, room: int) -> dict[str, Any]:
    """What a cache class must be given, as far as its names say it; KeyError where they do not."""
    layers = subject.setting(*LAYER_NAMES)
    known = dict.fromkeys(LAYER_NAMES, layers) | dict.fromkeys(CONFIG_NAMES, subject.config) | {"model": subject.model}
    given = {}
    for p in inspect.signature(kind).parameters.values():
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            sizes = batch_size if re.match(BATCH_NAME, p.name) else room
            given[p.name] = sizes if re.match(SIZE_NAMES, p.name) else known[p.name]
    return given


def method_of(model: nn.Module, names: Sequence[str]) -> Callable[..., Any] | None:
    """The first method of a model under one of these names."""
    return next((method for name in names if callable(method := getattr(model, name, None))), None)


def held(model: nn.Module) -> list[Held]:
    """What the modules of a model hold now."""
    return [(m, dict(vars(m)), {name: dict(vars(m)[name]) for name in TABLES}) for m in model.modules()]


def hold(held: Sequence[Held]) -> None:
    """Give modules back the attributes that they held, but for their mode."""
    for module, attributes, tables in held:
        mode, known = module.training, vars(module)
        for name in set(known) - set(attributes):
            del known[name]
        known.update(attributes)
        for name, table in tables.items():
            known[name].clear()
            known[name].update(table)
        module.training = mode
