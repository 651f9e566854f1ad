"""The faults of the parity benchmark: what a device or a kernel may do wrong, what an implementation may, and what is legal.

A device fault replaces the output of one op, known by its name, phase and module; an implementation fault changes one
module of a copy of the model. `legal` ones must not be flagged. Layers are counted as in a model of four: a deeper one
gets its faults in its last four (`deep`), where the free run has drifted most.
"""

from __future__ import annotations

import copy
import math
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmodebug.model import ATTENTIONS

GENERATIONS = ("olmo1-tiny", "olmo2-tiny", "olmo3-tiny")
ALL = GENERATIONS
WRITTEN_FOR = 4  # layers


def deep(path: str, layers: int) -> str:
    """A module of a model of four layers as the one at that distance from the end of a deeper model."""
    return re.sub(r"layers\.(\d+)", lambda found: f"layers.{int(found[1]) + layers - WRITTEN_FOR}", path)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFault:
    """`change(arguments, output)` is what a faulty device gives for the op; `nth` of those that match."""

    name: str
    op: str
    module: str
    change: Callable[[list[Tensor], Tensor], Tensor]
    phase: str = "forward"
    nth: int = 0
    legal: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFault:
    """`change(model)` puts the fault into a copy of the reference; `module` is where it must be found first."""

    name: str
    module: str
    change: Callable[[nn.Module], None]
    generations: tuple[str, ...] = ALL
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


# Products, as a device might get them wrong


def _product(arguments: list[Tensor], chunk: int, order: Callable[[int], list[int]], keep: torch.dtype = torch.float32) -> Tensor:
    left, right = arguments[-2:]
    total = torch.zeros(*left.shape[:-1], right.shape[-1], dtype=keep)
    for c in order(math.ceil(left.shape[-1] / chunk)):
        part = slice(c * chunk, (c + 1) * chunk)
        total = (total.float() + left[..., part].float() @ right[..., part, :].float()).to(keep)
    return total.to(left.dtype)


def _in_order(count: int) -> list[int]:
    return list(range(count))


def _backwards(count: int) -> list[int]:
    return list(range(count))[::-1]


def _shuffled(count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()


def _lower(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float32 else dtype


def _tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _typical(out: Tensor) -> int:
    """The element of median size."""
    return int(out.float().abs().flatten().argsort()[out.numel() // 2])


def _element(factor: float) -> Callable[[list[Tensor], Tensor], Tensor]:
    def change(_: list[Tensor], out: Tensor) -> Tensor:
        out = out.clone()
        out.view(-1)[_typical(out)] *= factor
        return out

    return change


def _largest(factor: float) -> Callable[[list[Tensor], Tensor], Tensor]:
    def change(_: list[Tensor], out: Tensor) -> Tensor:
        out = out.clone()
        out.view(-1)[int(out.float().abs().argmax())] *= factor
        return out

    return change


def _column(factor: float) -> Callable[[list[Tensor], Tensor], Tensor]:
    def change(_: list[Tensor], out: Tensor) -> Tensor:
        out = out.clone()
        out[..., 3] *= factor
        return out

    return change


def _stale(amount: float) -> Callable[[list[Tensor], Tensor], Tensor]:
    def change(arguments: list[Tensor], out: Tensor) -> Tensor:
        left, right = arguments[-2:]
        move = torch.randn(right.shape, generator=torch.Generator().manual_seed(5))
        return (left.float() @ (right.float() * (1 + amount * move)).to(right.dtype).float()).to(out.dtype)

    return change


def _set(value: float) -> Callable[[list[Tensor], Tensor], Tensor]:
    def change(_: list[Tensor], out: Tensor) -> Tensor:
        out = out.clone()
        out.view(-1)[_typical(out)] = value
        return out

    return change


def _swap_rows(_: list[Tensor], out: Tensor) -> Tensor:
    out = out.clone()
    flat = out.view(-1, out.shape[-1])
    flat[[0, 1]] = flat[[1, 0]]
    return out


def _tail_dropped(arguments: list[Tensor], out: Tensor) -> Tensor:
    left, right = arguments[-2:]
    return (left[..., :-1].float() @ right[..., :-1, :].float()).to(out.dtype)


def _dropped(_: list[Tensor], out: Tensor) -> Tensor:
    return torch.where(torch.rand(out.shape, generator=torch.Generator().manual_seed(1)) < 5e-3, torch.zeros_like(out), out)


def _scaled(factor: float) -> Callable[[list[Tensor], Tensor], Tensor]:
    return lambda _, out: out * factor


def _low_softmax(arguments: list[Tensor], out: Tensor) -> Tensor:
    low = torch.bfloat16
    scores = arguments[0].to(low)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = torch.zeros_like(weights[..., :1])
    for k in range(weights.shape[-1]):
        total = total + weights[..., k : k + 1]
    return (weights / total).to(out.dtype)


def _exp2_softmax(arguments: list[Tensor], out: Tensor) -> Tensor:
    scores = arguments[0].float()
    weights = torch.exp2((scores - scores.amax(-1, keepdim=True)) * 1.4426950408889634)
    return (weights / weights.flip(-1).cumsum(-1)[..., -1:]).to(out.dtype)


def _serial_mean(arguments: list[Tensor], out: Tensor) -> Tensor:
    x = arguments[0].float()
    return (x.flip(-1).cumsum(-1)[..., -1:] / x.shape[-1]).to(out.dtype)


def _mean_of_fewer(arguments: list[Tensor], out: Tensor) -> Tensor:
    x = arguments[0].float()
    return (x.sum(-1, keepdim=True) / (x.shape[-1] - 1)).to(out.dtype)


def _coarse(bits: int) -> Callable[[list[Tensor], Tensor], Tensor]:
    def change(_: list[Tensor], out: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(out.float())
        return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent).to(out.dtype)

    return change


def _next_row(arguments: list[Tensor], out: Tensor) -> Tensor:
    out = out.clone()
    table, ids = arguments[0], arguments[1]
    out[0, 1] = table[(ids[0, 1] + 1) % len(table)]
    return out


MM, DOWN, UP, OUT = "mm", "layers.1.mlp.down_proj", "layers.2.mlp.up_proj", "layers.1.self_attn.o_proj"
WIDE = (torch.float32,)

DEVICE: tuple[DeviceFault, ...] = (
    DeviceFault(name="element x1.05", op=MM, module=DOWN, change=_element(1.05)),
    DeviceFault(name="element x2", op=MM, module=UP, change=_element(2.0)),
    DeviceFault(name="element x1024", op=MM, module="layers.0.self_attn.v_proj", change=_element(1024.0)),
    DeviceFault(name="element of another sign", op=MM, module=OUT, change=_element(-1.0)),
    DeviceFault(name="element zeroed", op=MM, module="layers.3.mlp.gate_proj", change=_element(0.0)),
    DeviceFault(name="largest element x1.05", op=MM, module=DOWN, change=_largest(1.05)),
    DeviceFault(name="element NaN", op=MM, module=UP, change=_set(math.nan)),
    DeviceFault(name="element inf", op=MM, module=OUT, change=_set(math.inf)),
    DeviceFault(name="column x1.02", op=MM, module=DOWN, change=_column(1.02)),
    DeviceFault(name="column zeroed", op=MM, module="layers.2.self_attn.k_proj", change=_column(0.0)),
    DeviceFault(name="rows swapped", op=MM, module=UP, change=_swap_rows),
    DeviceFault(name="last term of the sum dropped", op=MM, module=DOWN, change=_tail_dropped),
    DeviceFault(name="all x1.01", op=MM, module=OUT, change=_scaled(1.01)),
    DeviceFault(
        name="sums kept in 16 bits", op=MM, module=DOWN, change=lambda a, out: _product(a, 2, _in_order, _lower(out.dtype)).to(out.dtype)
    ),
    DeviceFault(name="TF32 products", op=MM, module=UP, change=lambda a, _: _tf32(a[-2]) @ _tf32(a[-1]), dtypes=WIDE),
    DeviceFault(name="stale weight 3e-2", op=MM, module=OUT, change=_stale(3e-2)),
    DeviceFault(name="stale weight 1e-2", op=MM, module="layers.2.mlp.down_proj", change=_stale(1e-2)),
    DeviceFault(name="dropout left on", op=MM, module=OUT, change=_dropped),
    DeviceFault(
        name="residual x0.99", op="add", module="layers.1", change=lambda a, out: (a[0].float() + 0.99 * a[1].float()).to(out.dtype)
    ),
    DeviceFault(name="softmax in bfloat16", op="_softmax", module="layers.1.self_attn", change=_low_softmax),
    DeviceFault(name="softmax x1.01", op="_softmax", module="layers.2.self_attn", change=_scaled(1.01)),
    DeviceFault(name="gelu instead of silu", op="silu", module="layers.1.mlp", change=lambda a, out: F.gelu(a[0].float()).to(out.dtype)),
    DeviceFault(name="cosines with eight bits", op="cos", module="rotary_emb", change=_coarse(8)),
    DeviceFault(name="embedding row off by one", op="embedding", module="embed_tokens", change=_next_row),
    DeviceFault(name="scores of two rows swapped", op="bmm", module="layers.1.self_attn", change=_swap_rows),
    DeviceFault(name="weighted sum x1.01", op="bmm", module="layers.2.self_attn", nth=1, change=_scaled(1.01)),
    DeviceFault(name="backward: element x1.05", op=MM, module=DOWN, phase="backward", change=_element(1.05)),
    DeviceFault(name="backward: column zeroed", op=MM, module=UP, phase="backward", change=_column(0.0)),
    DeviceFault(name="backward: silu x1.01", op="silu_backward", module="layers.1.mlp", phase="backward", change=_scaled(1.01)),
    DeviceFault(
        name="backward: softmax x1.01", op="_softmax_backward_data", module="layers.2.self_attn", phase="backward", change=_scaled(1.01)
    ),
    DeviceFault(
        name="backward: embedding x0.99", op="embedding_dense_backward", module="embed_tokens", phase="backward", change=_scaled(0.99)
    ),
    DeviceFault(
        name="backward: sums kept in 16 bits",
        op=MM,
        module=OUT,
        phase="backward",
        change=lambda a, out: _product(a, 2, _in_order, _lower(out.dtype)).to(out.dtype),
    ),
    DeviceFault(name="legal: chunks of 16", op=MM, module=DOWN, legal=True, change=lambda a, _: _product(a, 16, _in_order)),
    DeviceFault(name="legal: from the end, one by one", op=MM, module=UP, legal=True, change=lambda a, _: _product(a, 1, _backwards)),
    DeviceFault(name="legal: shuffled order", op=MM, module=OUT, legal=True, change=lambda a, _: _product(a, 4, _shuffled)),
    DeviceFault(name="legal: softmax by exp2, from the end", op="_softmax", module="layers.1.self_attn", legal=True, change=_exp2_softmax),
    DeviceFault(
        name="legal: backward, shuffled", op=MM, module=DOWN, phase="backward", legal=True, change=lambda a, _: _product(a, 4, _shuffled)
    ),
)
NORMED = (
    DeviceFault(name="mean of one fewer", op="mean", module="layers.1.post_attention_layernorm", change=_mean_of_fewer),
    DeviceFault(name="rsqrt with nine bits", op="rsqrt", module="layers.2.post_attention_layernorm", change=_coarse(9)),
    DeviceFault(name="legal: mean from the end", op="mean", module="layers.1.post_attention_layernorm", legal=True, change=_serial_mean),
)


# Implementations


def _layer(model: nn.Module, index: int) -> Any:
    return model.model.layers[index - WRITTEN_FOR]  # type: ignore[union-attr,index]


def _within(model: nn.Module, path: str) -> str:
    return deep(path, len(model.model.layers))  # type: ignore[union-attr,arg-type]


def _forward(module: Any, function: Callable[..., Any]) -> None:
    module.forward = types.MethodType(function, module)


def _theta(model: Any) -> None:
    for part in model.model.rotary_emb.values():
        part.rope_theta *= 5
        part.inv_freq = part.frequencies()


def _interleaved(model: Any) -> None:
    attention = _layer(model, 1).self_attn
    plain = attention.forward

    def forward(self: Any, hidden: Tensor, rotation: Any, visible: Any, cache: Any) -> Tensor:
        mixed = tuple(t[..., : t.shape[-1] // 2].repeat_interleave(2, dim=-1) for t in rotation)
        return plain(hidden, mixed, visible, cache)

    _forward(attention, forward)


def _shifted(model: Any) -> None:
    part = next(iter(model.model.rotary_emb.values()))
    plain = part.forward
    _forward(part, lambda self, position_ids, dtype: plain(position_ids + 1, dtype))


def _eps(value: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        _layer(model, 1).post_attention_layernorm.eps = value

    return change


def _scale(factor: Callable[[Any], float]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        attention = _layer(model, 2).self_attn
        attention.scaling = factor(attention)

    return change


def _mask(change_mask: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        attention = _layer(model, 1).self_attn
        plain = attention.forward
        _forward(attention, lambda self, hidden, rotation, visible, cache: plain(hidden, rotation, change_mask(visible), cache))

    return change


def _one_more(visible: Tensor) -> Tensor:
    seen = visible.clone()
    index = torch.arange(visible.shape[-1] - 1)
    seen[..., index, index + 1] = True
    return seen


def _diagonal_hidden(visible: Tensor) -> Tensor:
    seen = visible.clone()
    index = torch.arange(1, visible.shape[-1])
    seen[..., index, index] = False
    return seen


def _mlp(function: Callable[[Any, Tensor], Tensor], layer: int = 1) -> Callable[[Any], None]:
    return lambda model: _forward(_layer(model, layer).mlp, function)


def _residual(model: Any) -> None:
    layer = _layer(model, 1)
    plain = layer.forward
    _forward(layer, lambda self, hidden, *rest: plain(hidden, *rest) - 0.01 * hidden)


def _no_norm(path: str) -> Callable[[Any], None]:
    return lambda model: _forward(model.get_submodule(_within(model, path)), lambda self, hidden: hidden * 1.0)


def _attended(attention: Any) -> Callable[..., Tensor]:
    return ATTENTIONS[attention.config.attn_implementation]


def _attend_by(attention: Any, attend: Callable[..., Tensor]) -> None:
    """Give one layer an attention implementation of its own, under a name of its own."""
    name: Any = f"fault-{id(attend)}"
    ATTENTIONS[name] = attend
    attention.config = copy.copy(attention.config)
    object.__setattr__(attention.config, "attn_implementation", name)


def _head_swap(model: Any) -> None:
    attention = _layer(model, 1).self_attn
    plain = _attended(attention)

    def attend(*arguments: Any) -> Tensor:
        out = plain(*arguments)
        return torch.cat([out[:, 1:2], out[:, :1], out[:, 2:]], dim=1)

    _attend_by(attention, attend)


def _weight(path: str, change: Callable[[Tensor], None]) -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        with torch.no_grad():
            change(model.get_parameter(_within(model, path)))

    return apply


def _noisy(weight: Tensor) -> None:
    weight.mul_(1 + 3e-2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))


def _row(weight: Tensor) -> None:
    weight[3] *= 1.05


def _low_tables(model: Any) -> None:
    part = next(iter(model.model.rotary_emb.values()))
    plain = part.forward
    _forward(part, lambda self, position_ids, dtype: tuple(t.bfloat16().to(t.dtype) for t in plain(position_ids, dtype)))


def _low_scores(model: Any) -> None:
    attention = _layer(model, 1).self_attn

    def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, -math.inf)
        low = scores.bfloat16()
        return low.softmax(dim=-1).to(value.dtype) @ value

    _attend_by(attention, attend)


def _wrong_head(model: Any) -> None:
    """GQA tiled instead of repeated: query head h reads key head h modulo the number."""
    attention = _layer(model, 1).self_attn
    plain, groups = _attended(attention), attention.num_key_value_groups

    def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
        key, value = (t[:, ::groups].repeat(1, groups, 1, 1) for t in (key, value))
        return plain(query, key, value, visible, scaling)

    _attend_by(attention, attend)


def _unclipped(model: Any) -> None:
    _layer(model, 1).self_attn.clip_qkv = 0.05


class _HalfWrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return gradient * gate  # the term x * gate * (1 - gate) is missing


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0.97 * gradient


def _detached(model: Any) -> None:
    _forward(_layer(model, 1).mlp, lambda self, x: self.down_proj(F.silu(self.gate_proj(x)).detach() * self.up_proj(x)))


ATTENTION, MLP, NORM = "model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.1.post_attention_layernorm"
RMS = ("olmo2-tiny", "olmo3-tiny")

MODEL: tuple[ModelFault, ...] = (
    ModelFault(name="theta x5", module="model.rotary_emb", change=_theta),
    ModelFault(name="rotation interleaved", module=ATTENTION, change=_interleaved),
    ModelFault(name="positions off by one", module="model.rotary_emb", change=_shifted),
    ModelFault(name="eps 1e-3", module=NORM, change=_eps(1e-3)),
    ModelFault(name="eps ten times", module=NORM, change=_eps(1e-5), generations=RMS),
    ModelFault(name="no scale", module="model.layers.2.self_attn", change=_scale(lambda a: 1.0)),
    ModelFault(name="scale by hidden size", module="model.layers.2.self_attn", change=_scale(lambda a: (a.q_proj.in_features) ** -0.5)),
    ModelFault(name="mask off by one", module=ATTENTION, change=_mask(_one_more)),
    ModelFault(name="own position hidden", module=ATTENTION, change=_mask(_diagonal_hidden)),
    ModelFault(name="gate and up swapped", module=MLP, change=_mlp(lambda m, x: m.down_proj(F.silu(m.up_proj(x)) * m.gate_proj(x)))),
    ModelFault(name="gelu instead of silu", module=MLP, change=_mlp(lambda m, x: m.down_proj(F.gelu(m.gate_proj(x)) * m.up_proj(x)))),
    ModelFault(name="relu instead of silu", module=MLP, change=_mlp(lambda m, x: m.down_proj(F.relu(m.gate_proj(x)) * m.up_proj(x)))),
    ModelFault(name="gate without activation", module=MLP, change=_mlp(lambda m, x: m.down_proj(m.gate_proj(x) * m.up_proj(x)))),
    ModelFault(name="residual x0.99", module="model.layers.1", change=_residual),
    ModelFault(name="final norm missing", module="model.norm", change=_no_norm("model.norm")),
    ModelFault(
        name="query norm missing",
        module="model.layers.1.self_attn.q_norm",
        change=_no_norm("model.layers.1.self_attn.q_norm"),
        generations=RMS,
    ),
    ModelFault(name="heads swapped", module=ATTENTION, change=_head_swap),
    ModelFault(name="clip at another value", module=ATTENTION, change=_unclipped, generations=("olmo1-tiny",)),
    ModelFault(name="keys tiled, not repeated", module=ATTENTION, change=_wrong_head, generations=("olmo3-tiny",)),
    ModelFault(name="stale weight", module="model.layers.1.mlp.up_proj", change=_weight("model.layers.1.mlp.up_proj.weight", _noisy)),
    ModelFault(
        name="one row of a weight", module="model.layers.2.self_attn.o_proj", change=_weight("model.layers.2.self_attn.o_proj.weight", _row)
    ),
    ModelFault(name="rotation tables in bfloat16", module="model.rotary_emb", change=_low_tables),
    ModelFault(name="softmax in bfloat16", module=ATTENTION, change=_low_scores),
    ModelFault(
        name="backward: half a derivative",
        module=MLP,
        change=_mlp(lambda m, x: m.down_proj(_HalfWrong.apply(m.gate_proj(x)) * m.up_proj(x))),
    ),
    ModelFault(
        name="backward: gradient x0.97",
        module=MLP,
        change=_mlp(lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * _Scaled.apply(m.up_proj(x)))),
    ),
    ModelFault(name="backward: gate detached", module=MLP, change=_detached),
)
