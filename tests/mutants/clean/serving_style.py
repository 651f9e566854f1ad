"""Models written to be served: inference mode, a cache inside, one position's logits, nothing before the cache is made."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


class Table(nn.Module):
    """Rows for tokens that are no nn.Embedding."""

    def __init__(self, rows, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, width) * 0.05)

    def forward(self, ids):
        return F.embedding(ids, self.weight)


class Norm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


def phases(positions, width, theta=500.0):
    speed = theta ** (-torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(positions).float(), speed)
    return torch.polar(torch.ones_like(angles), angles)


def turn(x, table):
    """[batch, seq_len, heads, width], neighbours as pairs."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table[None, :, None]).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Grouped heads; keys and values of all tokens so far stay in the module."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.wq, self.wo = nn.Linear(c.dim, c.dim, bias=False), nn.Linear(c.dim, c.dim, bias=False)
        self.wk, self.wv = (nn.Linear(c.dim, c.kv_heads * c.width, bias=False) for _ in range(2))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(c.max_batch, c.max_seq_len, c.kv_heads, c.width), persistent=False)

    def forward(self, x, start_pos, table, mask):
        c, (batch, new, _) = self.c, x.shape
        end = start_pos + new
        q = turn(self.wq(x).view(batch, new, c.heads, c.width), table)
        k = turn(self.wk(x).view(batch, new, c.kv_heads, c.width), table)
        self.keys[:batch, start_pos:end] = k
        self.values[:batch, start_pos:end] = self.wv(x).view(batch, new, c.kv_heads, c.width)
        k = self.keys[:batch, :end].repeat_interleave(c.heads // c.kv_heads, 2).transpose(1, 2)
        v = self.values[:batch, :end].repeat_interleave(c.heads // c.kv_heads, 2).transpose(1, 2)
        scores = q.transpose(1, 2) @ k.transpose(2, 3) / c.width**0.5
        if mask is not None:
            scores = scores + mask
        weights = scores.float().softmax(-1).type_as(x)
        return self.wo((weights @ v).transpose(1, 2).reshape(batch, new, -1))


class Latent(nn.Module):
    """Keys and values are one narrow vector a token, and the queries meet it directly; another part of them is turned."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.wq = nn.Linear(c.dim, c.heads * (c.width + c.turned), bias=False)
        self.down, self.norm = nn.Linear(c.dim, c.rank + c.turned, bias=False), Norm(c.rank)
        self.up = nn.Parameter(torch.randn(c.heads, 2 * c.width, c.rank) * 0.2)
        self.wo = nn.Linear(c.heads * c.width, c.dim, bias=False)
        self.register_buffer("latents", torch.zeros(c.max_batch, c.max_seq_len, c.rank), persistent=False)
        self.register_buffer("keys", torch.zeros(c.max_batch, c.max_seq_len, c.turned), persistent=False)

    def forward(self, x, start_pos, table, mask):
        c, (batch, new, _) = self.c, x.shape
        end = start_pos + new
        plain, turned = self.wq(x).view(batch, new, c.heads, -1).split([c.width, c.turned], -1)
        latent, key = self.down(x).split([c.rank, c.turned], -1)
        self.latents[:batch, start_pos:end] = self.norm(latent)
        self.keys[:batch, start_pos:end] = turn(key.unsqueeze(2), table).squeeze(2)
        latents, keys = self.latents[:batch, :end], self.keys[:batch, :end]
        plain = torch.einsum("bshd,hdr->bshr", plain, self.up[:, : c.width])
        scores = torch.einsum("bshr,btr->bsht", plain, latents) + torch.einsum("bshd,btd->bsht", turn(turned, table), keys)
        scores = scores / (c.width + c.turned) ** 0.5
        if mask is not None:
            scores = scores + mask.unsqueeze(1)
        weights = scores.softmax(-1, dtype=torch.float32).type_as(x)
        seen = torch.einsum("bsht,btr->bshr", weights, latents)
        return self.wo(torch.einsum("bshr,hdr->bshd", seen, self.up[:, c.width :]).flatten(2))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention = Latent(c) if c.rank else Attention(c)
        self.up, self.gate, self.down = nn.Linear(c.dim, 88, bias=False), nn.Linear(c.dim, 88, bias=False), nn.Linear(88, c.dim, bias=False)
        self.attention_norm, self.mlp_norm = Norm(c.dim), Norm(c.dim)

    def forward(self, x, start_pos, table, mask):
        x = x + self.attention(self.attention_norm(x), start_pos, table, mask)
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Served(nn.Module):
    def __init__(self, c, last=False):
        super().__init__()
        self.params, self.last = c, last
        self.embed = Table(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm, self.head = Norm(c.dim), nn.Linear(c.dim, c.vocab_size, bias=False)
        self.table = phases(c.max_seq_len, c.turned if c.rank else c.width)

    @torch.inference_mode()
    def forward(self, tokens, start_pos):
        new = tokens.shape[1]
        x = self.embed(tokens)
        self.table = self.table.to(x.device)
        table = self.table[start_pos : start_pos + new]
        mask = None
        if new > 1:
            mask = torch.full((new, new), float("-inf"), device=tokens.device).triu(1)
            mask = torch.hstack([torch.zeros(new, start_pos, device=tokens.device), mask]).type_as(x)
        for layer in self.layers:
            x = layer(x, start_pos, table, mask)
        x = self.norm(x)
        return self.head(x[:, -1] if self.last else x).float()


class Cache(nn.Module):
    def __init__(self, batch, positions, c, dtype):
        super().__init__()
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(batch, c.kv_heads, positions, c.width, dtype=dtype))

    def update(self, places, k, v):
        self.keys[:, :, places] = k
        self.values[:, :, places] = v
        return self.keys, self.values


class PreparedAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, self.cache = c, None
        self.wqkv = nn.Linear(c.dim, c.dim + 2 * c.kv_heads * c.width, bias=False)
        self.wo = nn.Linear(c.dim, c.dim, bias=False)

    def forward(self, x, table, mask, input_pos):
        c, (batch, new, _) = self.c, x.shape
        q, k, v = self.wqkv(x).split([c.dim, c.kv_heads * c.width, c.kv_heads * c.width], -1)
        q, k, v = (t.view(batch, new, -1, c.width) for t in (q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (turn(q, table), turn(k, table), v))
        if self.cache is not None:
            k, v = self.cache.update(input_pos, k, v)
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(y.transpose(1, 2).reshape(batch, new, -1))


class Prepared(nn.Module):
    """Runs behind setup_caches only, which makes nothing where there is room already."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.norms = nn.ModuleList(Norm(c.dim) for _ in range(c.layers))
        self.layers = nn.ModuleList(PreparedAttention(c) for _ in range(c.layers))
        self.norm, self.head = Norm(c.dim), nn.Linear(c.dim, c.vocab_size, bias=False)
        self.max_batch_size = self.max_seq_length = -1
        self.table = None

    def setup_caches(self, max_batch_size, max_seq_length):
        if self.max_seq_length >= max_seq_length and self.max_batch_size >= max_batch_size:
            return
        self.max_batch_size, self.max_seq_length = max_batch_size, max_seq_length
        for layer in self.layers:
            layer.cache = Cache(max_batch_size, max_seq_length, self.config, self.head.weight.dtype)
        self.table = phases(self.config.max_seq_len, self.config.width)
        self.mask = torch.tril(torch.ones(max_seq_length, max_seq_length, dtype=torch.bool))

    def forward(self, idx, input_pos=None):
        assert self.table is not None, "make the caches first"
        mask, table = self.mask[None, None, input_pos], self.table[input_pos]
        x = self.embed(idx)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), table, mask, input_pos)
        return self.head(self.norm(x))


def config(**changes):
    plain = {"dim": 48, "heads": 6, "kv_heads": 2, "width": 8, "rank": 0, "turned": 4, "layers": 2, "vocab_size": 101}
    return SimpleNamespace(**(plain | {"max_batch": 8, "max_seq_len": 64} | changes))


def build():
    return Served(config())


def build_last():
    model = Served(config(rank=20), last=True)
    return model, SimpleNamespace(max_seq_len=64)


def build_prepared():
    return Prepared(config())
