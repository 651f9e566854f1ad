"""Gemma 3 written again: four norms a layer, two thetas, norms of q and k; and the class of transformers in its sizes."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

D, H, KV, HD, FF, L, V, WIN = 48, 6, 2, 10, 92, 4, 131, 5
KINDS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
LOCAL, GLOBAL, EPS, QSCALE = 10_000.0, 1_000_000.0, 1e-6, 14


class Norm(nn.Module):
    def __init__(self, n, eps=EPS):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(n))
        self.eps = eps

    def forward(self, x):
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return y * (1 + self.scale)


def angles(T, theta, device):
    inv = theta ** -(torch.arange(0, HD, 2, device=device).float() / HD)
    return torch.outer(torch.arange(T, device=device).float(), inv)


def rotate(x, ang):
    cos, sin = ang.cos(), ang.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attn(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.local = kind == "sliding_attention"
        self.q = nn.Linear(D, H * HD, bias=False)
        self.k = nn.Linear(D, KV * HD, bias=False)
        self.v = nn.Linear(D, KV * HD, bias=False)
        self.o = nn.Linear(H * HD, D, bias=False)
        self.qn, self.kn = Norm(HD), Norm(HD)

    def forward(self, x):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, H, HD).transpose(1, 2)
        k = self.k(x).view(B, T, KV, HD).transpose(1, 2)
        v = self.v(x).view(B, T, KV, HD).transpose(1, 2)
        q, k = self.qn(q), self.kn(k)
        ang = angles(T, LOCAL if self.local else GLOBAL, x.device)
        q, k = rotate(q, ang), rotate(k, ang)
        k = k.repeat_interleave(H // KV, dim=1)
        v = v.repeat_interleave(H // KV, dim=1)
        s = q @ k.transpose(-1, -2) / math.sqrt(QSCALE)
        i, j = torch.arange(T)[:, None], torch.arange(T)[None]
        ok = j <= i
        if self.local:
            ok = ok & (i - j < WIN)
        s = s.masked_fill(~ok, float("-inf"))
        y = s.softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(B, T, H * HD))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, FF, bias=False)
        self.up = nn.Linear(D, FF, bias=False)
        self.down = nn.Linear(FF, D, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class Layer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.attn, self.ffn = Attn(kind), FeedForward()
        self.pre_attn, self.post_attn = Norm(D), Norm(D)
        self.pre_ffn, self.post_ffn = Norm(D), Norm(D)

    def forward(self, x):
        x = x + self.post_attn(self.attn(self.pre_attn(x)))
        return x + self.post_ffn(self.ffn(self.pre_ffn(x)))


class Gemma(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Layer(k) for k in KINDS)
        self.final = Norm(D)

    def forward(self, tokens):
        x = self.embed(tokens) * D**0.5
        for layer in self.layers:
            x = layer(x)
        return self.final(x) @ self.embed.weight.T


def build():
    return Gemma()


def reference():
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=FF,
            num_hidden_layers=L,
            num_attention_heads=H,
            num_key_value_heads=KV,
            head_dim=HD,
            sliding_window=WIN,
            layer_types=KINDS,
            query_pre_attn_scalar=QSCALE,
            rms_norm_eps=EPS,
            max_position_embeddings=64,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        )
    )
