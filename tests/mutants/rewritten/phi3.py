"""Phi-3 written again, with projections of their own and half of each head turned; and the class of transformers in its sizes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM


@dataclass
class Args:
    width: int = 48
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 88
    layers: int = 3
    vocab: int = 131
    theta: float = 10000.0
    rotary: float = 0.5
    eps: float = 1e-5
    window: int = 6


class RMSNorm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        rms = (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return self.weight * (x / rms)


class Rotary(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.n = int(a.width // a.heads * a.rotary)
        self.register_buffer("freq", 1.0 / a.theta ** (torch.arange(0, self.n, 2).float() / self.n), persistent=False)

    def forward(self, x):
        # x [batch, seq, heads, head_dim]
        t = torch.arange(x.shape[1], device=x.device).float()
        ang = torch.einsum("t,f->tf", t, self.freq.float())[None, :, None, :]
        c, s = ang.cos().to(x.dtype), ang.sin().to(x.dtype)
        r, rest = x[..., : self.n], x[..., self.n :]
        r1, r2 = r[..., : self.n // 2], r[..., self.n // 2 :]
        return torch.cat([r1 * c - r2 * s, r2 * c + r1 * s, rest], -1)


class Attention(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a, self.hd = a, a.width // a.heads
        self.query = nn.Linear(a.width, a.heads * self.hd, bias=False)
        self.key = nn.Linear(a.width, a.kv_heads * self.hd, bias=False)
        self.value = nn.Linear(a.width, a.kv_heads * self.hd, bias=False)
        self.out = nn.Linear(a.heads * self.hd, a.width, bias=False)
        self.rot = Rotary(a)

    def forward(self, x):
        b, t, _ = x.shape
        a = self.a
        q = self.rot(self.query(x).view(b, t, a.heads, self.hd))
        k = self.rot(self.key(x).view(b, t, a.kv_heads, self.hd))
        v = self.value(x).view(b, t, a.kv_heads, self.hd)
        g = a.heads // a.kv_heads
        q = q.view(b, t, a.kv_heads, g, self.hd)
        scores = torch.einsum("bqngd,bknd->bngqk", q, k) * self.hd**-0.5
        pos = torch.arange(t, device=x.device)
        dist = pos[:, None] - pos[None, :]
        hide = (dist < 0) | (dist >= a.window)
        scores = scores + torch.zeros(t, t, dtype=x.dtype).masked_fill(hide, torch.finfo(x.dtype).min)
        probs = scores.softmax(-1)
        y = torch.einsum("bngqk,bknd->bqngd", probs, v)
        return self.out(y.reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.gate = nn.Linear(a.width, a.ffn, bias=False)
        self.up = nn.Linear(a.width, a.ffn, bias=False)
        self.down = nn.Linear(a.ffn, a.width, bias=False)

    def forward(self, x):
        return self.down(self.up(x) * F.silu(self.gate(x)))


class Block(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.ln1, self.ln2 = RMSNorm(a.width, a.eps), RMSNorm(a.width, a.eps)
        self.attn, self.mlp = Attention(a), MLP(a)

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Phi(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.wte = nn.Embedding(a.vocab, a.width)
        self.h = nn.ModuleList([Block(a) for _ in range(a.layers)])
        self.ln_f = RMSNorm(a.width, a.eps)
        self.head = nn.Linear(a.width, a.vocab, bias=False)

    def forward(self, input_ids):
        x = self.wte(input_ids)
        for blk in self.h:
            x = blk(x)
        return self.head(self.ln_f(x))


def build():
    return Phi(Args())


def reference():
    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=131,
            hidden_size=48,
            intermediate_size=88,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            original_max_position_embeddings=64,
            sliding_window=6,
            pad_token_id=None,
            eos_token_id=None,
            bos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        )
    )
