"""gpt-fast: setup_caches, input_pos, preallocated kv caches, a causal mask buffer."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelArgs:
    block_size: int = 64
    vocab_size: int = 128
    n_layer: int = 2
    n_head: int = 4
    dim: int = 32
    intermediate_size: int = 80
    n_local_heads: int = 2
    head_dim: int = 8
    rope_base: float = 10000
    norm_eps: float = 1e-5


class KVCache(nn.Module):
    def __init__(self, bs, n, h, d):
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(bs, h, n, d))
        self.register_buffer("v_cache", torch.zeros(bs, h, n, d))

    def update(self, input_pos, k, v):
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        return self.k_cache, self.v_cache


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x):
        return x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x.float()).type_as(x) * self.weight


def precompute_freqs_cis(n, d, base):
    freqs = 1.0 / (base ** (torch.arange(0, d, 2)[: d // 2].float() / d))
    freqs = torch.outer(torch.arange(n), freqs)
    c = torch.polar(torch.ones_like(freqs), freqs)
    return torch.stack([c.real, c.imag], dim=-1)


def apply_rotary_emb(x, freqs_cis):
    xs = x.float().reshape(*x.shape[:-1], -1, 2)
    f = freqs_cis.view(1, xs.size(1), 1, xs.size(3), 2)
    out = torch.stack([xs[..., 0] * f[..., 0] - xs[..., 1] * f[..., 1], xs[..., 1] * f[..., 0] + xs[..., 0] * f[..., 1]], -1)
    return out.flatten(3).type_as(x)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.wqkv = nn.Linear(c.dim, (c.n_head + 2 * c.n_local_heads) * c.head_dim, bias=False)
        self.wo = nn.Linear(c.dim, c.dim, bias=False)
        self.kv_cache = None
        self.c = c

    def forward(self, x, freqs_cis, mask, input_pos=None):
        B, T, _ = x.shape
        c = self.c
        kv = c.n_local_heads * c.head_dim
        q, k, v = self.wqkv(x).split([c.dim, kv, kv], dim=-1)
        q, k, v = q.view(B, T, c.n_head, -1), k.view(B, T, c.n_local_heads, -1), v.view(B, T, c.n_local_heads, -1)
        q, k = apply_rotary_emb(q, freqs_cis), apply_rotary_emb(k, freqs_cis)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.kv_cache is not None and input_pos is not None:
            k, v = self.kv_cache.update(input_pos, k, v)
        k = k.repeat_interleave(c.n_head // c.n_local_heads, dim=1)
        v = v.repeat_interleave(c.n_head // c.n_local_heads, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).contiguous().view(B, T, c.dim))


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(c.dim, c.intermediate_size, bias=False) for _ in range(2))
        self.w2 = nn.Linear(c.intermediate_size, c.dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention, self.feed_forward = Attention(c), FeedForward(c)
        self.ffn_norm, self.attention_norm = RMSNorm(c.dim), RMSNorm(c.dim)

    def forward(self, x, input_pos, freqs_cis, mask):
        h = x + self.attention(self.attention_norm(x), freqs_cis, mask, input_pos)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.freqs_cis = None
        self.causal_mask = None
        self.max_seq_length = -1
        self.max_batch_size = -1

    def setup_caches(self, max_batch_size, max_seq_length):
        self.max_seq_length = max_seq_length
        for b in self.layers:
            b.attention.kv_cache = KVCache(max_batch_size, max_seq_length, self.config.n_local_heads, self.config.head_dim)
        self._tables(max_seq_length)

    def _tables(self, n):
        self.freqs_cis = precompute_freqs_cis(n, self.config.head_dim, self.config.rope_base)
        self.causal_mask = torch.tril(torch.ones(n, n, dtype=torch.bool))

    def forward(self, idx, input_pos=None):
        if self.freqs_cis is None or self.freqs_cis.device != idx.device:
            with torch.device(idx.device):
                self._tables(max(self.config.block_size, self.max_seq_length))
        if input_pos is None:
            input_pos = torch.arange(idx.shape[1], device=idx.device)
            mask = self.causal_mask[None, None, : idx.shape[1], : idx.shape[1]]
            f = self.freqs_cis[: idx.shape[1]]
            x = self.tok_embeddings(idx)
            for layer in self.layers:
                x = layer(x, None, f, mask)
        else:
            mask = self.causal_mask[None, None, input_pos]
            f = self.freqs_cis[input_pos]
            x = self.tok_embeddings(idx)
            for layer in self.layers:
                x = layer(x, input_pos, f, mask)
        return self.output(self.norm(x))


def build():
    return Transformer(ModelArgs())
