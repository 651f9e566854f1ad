"""Rotary frequencies: what a config declares, and by which slip the frequencies of a table are others."""

import math
import re
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from .relations.patterns import Diagnosis
from .subject import Subject
from .tracing.dims import WIDTH_NAMES

KNOWN_TYPES = (None, "default", "linear")
# Names under which configurations keep the rotary base itself, the size of a head, and the divisor of positions.
THETA_NAMES = ("rope_theta", "rope_base", "rotary_emb_base", "rope_freq_base", "rotary_base", "theta")
HEAD_DIM_NAMES = ("head_dim", "head_size", "d_head", "kv_channels")
DIVISOR_NAMES = ("rope_condense_ratio",)
# lit-gpt's own dictionary for scalings of other kinds, and Meta's switch for theirs.
OTHER_SCALINGS = ("rope_adjustments", "use_scaled_rope")
# Parts of the names under which configurations keep a rotary base.
BASE_WORDS = re.compile("theta|(rope|rotary).*base|base_freq")


def declared_factor(subject: Subject) -> float | None:
    """The attention factor that the config declares; None where that is not said plainly."""
    scaling = subject.setting("rope_scaling", "rope_parameters")
    if scaling is None:
        return 1.0 if declared_bases(subject) else None
    read = scaling.get if isinstance(scaling, dict) else lambda name: getattr(scaling, name, None)
    if any(read(name) is not None for name in ("mscale", "mscale_all_dim")):
        return None
    factor = read("attention_factor")
    if isinstance(factor, int | float) and factor > 0:
        return float(factor)
    return 1.0 if read("rope_type") in ("default", "linear", "llama3") else None


def declared_bases(subject: Subject) -> list[tuple[float, float]]:
    """Every (theta, linear factor) that the config declares; empty when any part of it is not understood."""
    found: list[tuple[float, float]] = []
    parameters = subject.setting("rope_parameters")
    theta = subject.setting(*THETA_NAMES)
    scaling = subject.setting("rope_scaling")
    if any(subject.setting(name) for name in OTHER_SCALINGS):
        return []
    divisor = subject.setting(*DIVISOR_NAMES)
    if scaling is None and isinstance(divisor, int | float) and divisor != 1:
        scaling = {"rope_type": "linear", "factor": divisor}
    holders: list[Any] = [{"rope_theta": theta, **scaling} if isinstance(scaling, dict) else {"rope_theta": theta}]
    if scaling is not None and not isinstance(scaling, dict):
        return []
    if isinstance(parameters, dict):
        nested = [value for value in parameters.values() if isinstance(value, dict)]
        holders = nested or [{"rope_theta": theta, **parameters}]
    for holder in holders:
        base, kind = holder.get("rope_theta"), holder.get("rope_type", holder.get("type"))
        factor = holder.get("factor", 1.0) if kind == "linear" else 1.0
        if not isinstance(base, int | float) or base <= 1 or kind not in KNOWN_TYPES or not isinstance(factor, int | float):
            return []
        found.append((float(base), float(factor)))
    return found + [(base, 1.0) for base in _other_bases(subject.config) if base not in {theta for theta, _ in found}]


def _other_bases(config: Any) -> set[float]:
    """Bases that the config declares elsewhere: for local layers, or for the parts of a model made of several."""
    bases: set[float] = set()

    def search(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                search(item, str(key))
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > 1 and BASE_WORDS.search(name):
            bases.add(float(value))

    search(_content(config), "")
    return bases


def _content(config: Any) -> dict[str, Any]:
    """What a config holds, by name."""
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if is_dataclass(config):
        return {each.name: getattr(config, each.name) for each in fields(config)}
    return config if isinstance(config, dict) else getattr(config, "__dict__", {})


def declared_once(config: Any, base: float) -> bool:
    """Whether a number stands in one place of a config, and nothing in it could hold it unseen: a base from which others were
    derived stands in several."""

    def places(value: Any) -> int:
        if isinstance(value, dict | list | tuple):
            return sum(map(places, value.values() if isinstance(value, dict) else value))
        if is_dataclass(value) and not isinstance(value, type):
            return places(_content(value))
        unseen = hasattr(value, "__dict__") and not callable(value)
        return 2 if unseen else int(isinstance(value, int | float) and not isinstance(value, bool) and value == base)

    return places(_content(config)) == 1


def fits(frequencies: Tensor, theta: float, factor: float) -> bool:
    """Whether these are the frequencies `[pairs]`, in rad a position and falling, of a base and a linear factor."""
    return torch.allclose(frequencies, _ideal(frequencies.numel(), theta, factor), rtol=2e-3, atol=1e-6)


def _ideal(pairs: int, theta: float, factor: float) -> Tensor:
    return theta ** -(torch.arange(pairs, dtype=torch.float64) / pairs) / factor


def _is_round(base: float) -> bool:
    """Whether a base is one that people write, such as 10000 or 500000: one digit and zeros."""
    leading = base / 10 ** math.floor(math.log10(base))
    return abs(leading - round(leading)) < 0.01 * leading


def wrong_frequencies(subject: Subject, frequencies: Tensor, declared: list[tuple[float, float]]) -> tuple[str, Diagnosis]:
    """Which declared number is not the one in use."""
    pairs = frequencies.numel()
    theta, factor = declared[0]
    base = float(frequencies[0] / frequencies[1]) ** pairs
    regular = torch.allclose(frequencies / frequencies[0], _ideal(pairs, base, 1.0), rtol=1e-2, atol=1e-6)
    message = f"rotary frequencies are not those of the config: pair 1 turns by {float(frequencies[1]):.5g} rad a position, theta {theta:g}"
    message += f" and factor {factor:g} give {float(_ideal(pairs, theta, factor)[1]):.5g}"
    evidence: dict[str, Any] = {"theta in use": base if regular else None, "theta declared": theta, "rotary dimensions": 2 * pairs}
    head_dim, width = subject.setting(*HEAD_DIM_NAMES), subject.setting(*WIDTH_NAMES)
    named = next((name for name in THETA_NAMES if subject.setting(name) is not None), "rope_theta")
    if fits(frequencies, theta, 1.0) and factor != 1:
        cause, fix = f"rope_scaling declares the linear factor {factor:g} and has no effect on inv_freq", "divide inv_freq by the factor"
    elif isinstance(head_dim, int) and head_dim > 2 * pairs and fits(frequencies, theta ** (2 * pairs / head_dim), factor):
        cause = f"the exponent of inv_freq is divided by head_dim {head_dim}, and only {2 * pairs} dimensions are rotated (rotary_dim)"
        fix = "inv_freq = theta ** -(arange(0, rotary_dim, 2) / rotary_dim)"
    elif isinstance(width, int) and width > 2 * pairs and fits(frequencies, theta ** (2 * pairs / width), factor):
        cause = f"the exponent of inv_freq is divided by the model's width {width}, not by the {2 * pairs} rotated dimensions of a head"
        fix = "inv_freq = theta ** -(arange(0, rotary_dim, 2) / rotary_dim)"
    elif (slip := exponent_slip(frequencies, declared)) is not None:
        cause, fix = slip, "inv_freq = theta ** -(arange(0, rotary_dim, 2) / rotary_dim)"
    elif regular and abs(base - theta) > 0.01 * theta and abs(float(frequencies[0]) * factor - 1) < 1e-3 and _is_round(base):
        cause, fix = (
            f"the base in use is {base:.6g}; the config's {named} {theta:g} does not reach inv_freq",
            f"use config.{named} as the base",
        )
    else:
        return message, Diagnosis(evidence=evidence)
    return message, Diagnosis(cause=cause, fix=fix, evidence=evidence)


def exponent_slip(frequencies: Tensor, declared: list[tuple[float, float]]) -> str | None:
    """Which slip of the exponent turns a declared theta into these frequencies; None where none does."""
    rotary_dim = 2 * frequencies.numel()
    slips = (
        (2.0, f"is divided by half of the {rotary_dim} rotated dimensions"),
        (0.5, "counts the pairs in steps of one, not of two: arange(0, rotary_dim, 2)"),
        (float(rotary_dim), f"is not divided by the {rotary_dim} rotated dimensions"),
    )
    for theta, factor in declared:
        for power, words in slips:
            if power * math.log10(theta) < 300 and fits(frequencies, theta**power, factor):
                return f"the exponent of inv_freq {words}: the base in use is {theta:g} ** {power:g}"
    return None
