"""A decoder from a research code base: nested configs, one fused weight matrix, mask functions that compose, T5 buckets or ALiBi,
grouped heads by `enable_gqa`, a preallocated cache with a pointer.

Clean: every test of the corpus must pass on each `build*` function here. The mutants are line edits of this file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class AttentionConfig:
    n_heads: int = 6
    n_kv_heads: int = 2
    head_dim: int = 8
    bias: str = "t5"  # "t5" (learned buckets, shared by all layers) or "alibi"
    num_buckets: int = 16
    max_distance: int = 40
    window: int | None = None
    dropout: float = 0.0


@dataclass
class FeedForwardConfig:
    hidden: int = 104
    activation: str = "relu2"  # or "gelu"


@dataclass
class ModelConfig:
    vocab_size: int = 109
    dim: int = 44
    n_layers: int = 3
    max_seq_len: int = 96
    norm_eps: float = 1e-5
    init_std: float = 0.02
    tie_embeddings: bool = True
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    ffn: FeedForwardConfig = field(default_factory=FeedForwardConfig)


MaskMod = Callable[[Tensor, Tensor, Tensor], Tensor]  # (batch, q_idx, kv_idx) -> bool


def causal(b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def sliding_window(size: int) -> MaskMod:
    def mask_mod(b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx - kv_idx < size

    return mask_mod


def padding(valid: Tensor) -> MaskMod:
    """valid [batch, kv_len], true for real tokens. A query without any key sees itself, or its softmax would be 0/0."""

    def mask_mod(b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return valid[b, kv_idx] | (q_idx == kv_idx)

    return mask_mod


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    def mask_mod(b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = mask_mods[0](b, q_idx, kv_idx)
        for mod in mask_mods[1:]:
            result = result & mod(b, q_idx, kv_idx)
        return result

    return mask_mod


def create_mask(mask_mod: MaskMod, batch: int, q_len: int, kv_len: int, offset: int, device: torch.device) -> Tensor:
    """[batch, 1, q_len, kv_len]"""
    b = torch.arange(batch, device=device)[:, None, None, None]
    q_idx = torch.arange(offset, offset + q_len, device=device)[None, None, :, None]
    kv_idx = torch.arange(kv_len, device=device)[None, None, None, :]
    return mask_mod(b, q_idx, kv_idx).expand(batch, 1, q_len, kv_len)


def t5_bucket(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Half of the buckets are exact, the other half grow logarithmically up to max_distance."""
    distance = distance.clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    large = exact + (ratio * (num_buckets - exact)).long()
    return torch.where(distance < exact, distance, large.clamp(max=num_buckets - 1))


def alibi_slopes(n_heads: int) -> Tensor:
    return torch.tensor([2.0 ** (-8.0 * (i + 1) / n_heads) for i in range(n_heads)])


class PositionBias(nn.Module):
    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.config = config
        if config.bias == "t5":
            self.table = nn.Embedding(config.num_buckets, config.n_heads)

    def forward(self, q_len: int, kv_len: int, offset: int, like: Tensor) -> Tensor:
        """[1, n_heads, q_len, kv_len]"""
        q_idx = torch.arange(offset, offset + q_len, device=like.device)
        kv_idx = torch.arange(kv_len, device=like.device)
        distance = q_idx[:, None] - kv_idx[None, :]
        if self.config.bias == "t5":
            buckets = t5_bucket(distance, self.config.num_buckets, self.config.max_distance)
            return self.table(buckets).permute(2, 0, 1)[None].to(like.dtype)
        slopes = alibi_slopes(self.config.n_heads).to(like.device)
        return (-slopes[:, None, None] * distance.abs())[None].to(like.dtype)


class Cache:
    """Room for max_len tokens of every layer; `pos` tokens are filled."""

    def __init__(self, config: ModelConfig, batch: int, max_len: int, device=None, dtype=None):
        a = config.attention
        shape = (config.n_layers, batch, a.n_kv_heads, max_len, a.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.pos = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.pos + k.shape[2]
        self.k[layer, :, :, self.pos : end] = k
        self.v[layer, :, :, self.pos : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def advance(self, steps: int) -> None:
        self.pos += steps


class LayerNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.gain, None, self.eps)


class Layer(nn.Module):
    """Attention and feed-forward side by side: one matrix in, one matrix out."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        a, f = config.attention, config.ffn
        self.config = config
        self.index = index
        self.sizes = (a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim, a.n_kv_heads * a.head_dim, f.hidden)
        self.norm = LayerNorm(config.dim, config.norm_eps)
        self.w_in = nn.Linear(config.dim, sum(self.sizes), bias=False)
        self.w_out = nn.Linear(a.n_heads * a.head_dim + f.hidden, config.dim, bias=False)

    def activation(self, x: Tensor) -> Tensor:
        if self.config.ffn.activation == "relu2":
            return F.relu(x).square()
        return F.gelu(x, approximate="tanh")

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor, cache: Cache | None) -> Tensor:
        a = self.config.attention
        B, T, _ = x.shape
        q, k, v, hidden = self.w_in(self.norm(x)).split(self.sizes, dim=-1)
        q = q.unflatten(-1, (a.n_heads, a.head_dim)).transpose(1, 2)
        k = k.unflatten(-1, (a.n_kv_heads, a.head_dim)).transpose(1, 2)
        v = v.unflatten(-1, (a.n_kv_heads, a.head_dim)).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.index, k, v)
        bias = bias.masked_fill(~mask, float("-inf"))
        dropout_p = a.dropout if self.training else 0.0
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, enable_gqa=True)
        o = o.transpose(1, 2).flatten(2)
        return x + self.w_out(torch.cat([o, self.activation(hidden)], dim=-1))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.bias = PositionBias(config.attention)
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.n_layers)])
        self.norm = LayerNorm(config.dim, config.norm_eps)
        self.unembed = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset()

    def reset(self) -> None:
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
        for layer in self.layers:
            nn.init.normal_(layer.w_out.weight, std=std / math.sqrt(2 * self.config.n_layers))

    def make_cache(self, batch_size: int, max_len: int | None = None) -> Cache:
        weight = self.embed.weight
        return Cache(self.config, batch_size, max_len or self.config.max_seq_len, weight.device, weight.dtype)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        B, T = ids.shape
        offset = cache.pos if cache is not None else 0
        kv_len = offset + T
        if kv_len > self.config.max_seq_len:
            raise ValueError(f"{kv_len} tokens, but max_seq_len is {self.config.max_seq_len}")
        mods: list[MaskMod] = [causal]
        if self.config.attention.window is not None:
            mods.append(sliding_window(self.config.attention.window))
        if attention_mask is not None:
            mods.append(padding(attention_mask.bool()))
        mask = create_mask(and_masks(*mods), B, T, kv_len, offset, ids.device)
        x = self.embed(ids)
        bias = self.bias(T, kv_len, offset, x)
        for layer in self.layers:
            x = layer(x, mask, bias, cache)
        if cache is not None:
            cache.advance(T)
        x = self.norm(x)
        return x @ self.embed.weight.T if self.unembed is None else self.unembed(x)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(ids).flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def build():
    config = ModelConfig()
    return Decoder(config), config


def build_alibi():
    config = ModelConfig(attention=AttentionConfig(bias="alibi", n_heads=4, n_kv_heads=4, head_dim=10), tie_embeddings=False)
    return Decoder(config), config


def build_window():
    config = ModelConfig(attention=AttentionConfig(window=5), ffn=FeedForwardConfig(activation="gelu"))
    return Decoder(config), config


def build_dropout():
    config = ModelConfig(attention=AttentionConfig(dropout=0.1))
    return Decoder(config), config
