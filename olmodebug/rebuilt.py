"""The subject built again: from another seed, or on the meta device, with memory given to it afterwards."""

import copy
import inspect
from dataclasses import is_dataclass, replace

import torch
from torch import nn

from .casts import cast
from .first_run import inner_model
from .frequencies import THETA_NAMES, declared_once
from .own_code import quiet
from .settle import settled
from .subject import Subject


class CannotBuild(Exception):
    """The subject does not build that way; the text says why."""


def rebuilt(subject: Subject, seed: int) -> nn.Module | None:
    """A model from another seed, in the subject's dtype, on its device, in eval mode; None for a model handed over alive."""
    if subject.remake is None:
        return None
    with quiet(), settled(seed=seed):
        model = subject.remake(seed)
    built = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), subject.dtype)
    # Only what was cast after it was built is cast again: weights in 16 bits may stand beside tables in float32.
    dtype = subject.dtype if uniform(subject.model) and built != subject.dtype else None
    return cast(model, dtype, device=subject.device).eval()


def with_another_base(subject: Subject, usual: float, base: float) -> nn.Module | None:
    """A second model of the subject's class, from its config with another rotary base than the usual one; None where the
    class wants more than a config, or where the config has the usual base in no place of its own or in more than one."""
    if not declared_once(subject.config, usual):
        return None
    config = copy.deepcopy(subject.config)
    parameters = getattr(config, "rope_parameters", None)
    names = [name for name in THETA_NAMES if getattr(config, name, None) is not None]
    try:
        if isinstance(parameters, dict) and "rope_theta" in parameters:
            parameters["rope_theta"] = base
        elif len(names) == 1 and is_dataclass(config) and not isinstance(config, type):
            config = replace(config, **{names[0]: base})  # type: ignore[type-var]
        elif len(names) == 1:
            setattr(config, names[0], base)
        else:
            return None
        with quiet(), settled(seed=subject.seed):
            model = type(subject.model)(config)
    except Exception:  # this class is built in another way
        return None
    return cast(model, torch.float32, device=subject.device).eval() if _shapes(model) == _shapes(subject.model) else None


def materialised(subject: Subject, seed: int) -> nn.Module | None:
    """The model built on meta, given NaN for memory, reset as its class says, and loaded with the subject's weights.

    None for a model that was handed over alive; CannotBuild where its code does not run on meta.
    """
    if subject.remake is None:
        return None
    with quiet(), settled(seed=seed):
        try:
            with torch.device("meta"):
                model = subject.remake(seed)
        except Exception as error:
            cause = error.__cause__ or error
            raise CannotBuild(f"it cannot be built on meta: {type(cause).__name__}: {str(cause)[:120]}") from error
        if _shapes(model) != _shapes(subject.model):
            raise CannotBuild("on meta it is built with other parameters")
        # With this flag torch fills the memory of to_empty with NaN.
        torch.use_deterministic_algorithms(True, warn_only=True)
        model.to_empty(device="cpu")
        torch.use_deterministic_algorithms(False)
        reset(model)
    usual = dict(subject.model.named_buffers())
    for name, buffer in list(model.named_buffers()):
        if name in usual and buffer.dtype != usual[name].dtype:  # reset makes it as the class does, and the build cast it
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = buffer.to(usual[name].dtype)
    with quiet():
        model.load_state_dict(subject.model.state_dict(), strict=True)
    return model.eval()


def reset(model: nn.Module) -> None:
    """Call what a class offers for this: reset_parameters of each module, then init_weights and tie_weights of the model."""
    for module in model.modules():
        method = getattr(module, "reset_parameters", None)
        if callable(method) and not type(module).__module__.startswith("torch."):
            call_without_arguments(method)
    if hasattr(model, "from_pretrained"):  # transformers: its loader does this
        for module in model.modules():
            module._is_hf_initialized = False  # type: ignore[assignment]
        for name in ("initialize_weights", "tie_weights"):
            call_without_arguments(getattr(model, name, None))
        return
    call_without_arguments(getattr(inner_model(model), "init_weights", None))


def call_without_arguments(method: object) -> None:
    if not callable(method):
        return
    needed = [
        p for p in inspect.signature(method).parameters.values() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if not needed:
        method()


def uniform(model: nn.Module) -> bool:
    return len({p.dtype for p in model.parameters() if p.is_floating_point()}) == 1


def _shapes(model: nn.Module) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(p.shape)) for name, p in model.named_parameters(remove_duplicate=False)}
