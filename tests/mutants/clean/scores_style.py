"""Attention with another scale and another softmax: differential attention whose scale stands far before the product, queries and
keys of length one (nGPT), muP's 1 / head_dim, retention without a softmax that takes whole chunks only.

Clean: every test of the corpus must pass on each `build*` function here.
"""

import torch
import torch.nn.functional as F
from torch import nn


def rope(x):
    d, t = x.shape[-1], x.shape[-2]
    angles = torch.arange(t, device=x.device, dtype=torch.float32)[:, None] * 10000.0 ** (-torch.arange(0, d, 2, device=x.device) / d)
    cos, sin = angles.cos().type_as(x), angles.sin().type_as(x)
    x1, x2 = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1)


class Attention(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.h, self.hd = h, d // h
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.h, self.hd)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Differential(Attention):
    def __init__(self, d, h):
        super().__init__(d, h)
        self.lam, self.subln = nn.Parameter(torch.full((h, 1, 1), 0.3)), nn.RMSNorm(self.hd, eps=1e-5)

    def attend(self, q, k, v):
        q1, q2 = (rope(z) * z.shape[-1] ** -0.5 for z in q.chunk(2, -1))
        k1, k2 = (rope(z) for z in k.chunk(2, -1))
        hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        w1, w2 = ((a @ b.mT).masked_fill(hidden, float("-inf")).softmax(-1) for a, b in ((q1, k1), (q2, k2)))
        return self.subln((w1 - self.lam * w2) @ v) * 0.7


class OnTheSphere(Attention):
    def attend(self, q, k, v):
        q, k = F.normalize(rope(q), dim=-1), F.normalize(rope(k), dim=-1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.hd**0.5)


class MuP(Attention):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True, scale=1 / self.hd)


class Retention(Attention):
    """In chunks: inside of one as attention without a softmax, between them by a state."""

    chunk = 4

    def attend(self, q, k, v):
        t, c = q.shape[2], self.chunk
        assert t % c == 0, f"the sequence length {t} is not a multiple of the chunk size {c}"
        decay = torch.log(1 - 2.0 ** (-3 - torch.arange(self.h, device=q.device, dtype=q.dtype)))[:, None]
        i = torch.arange(c, device=q.device)
        inside = torch.exp((i[:, None] - i).clamp(min=0) * decay[..., None]) * (i[:, None] >= i)
        before, after = torch.exp((i + 1) * decay)[..., None], torch.exp((c - 1 - i) * decay)[..., None]
        q, k, state, out = rope(q) * self.hd**-0.5, rope(k), q.new_zeros(q.shape[0], self.h, self.hd, self.hd), []
        for at in range(0, t, c):
            qc, kc, vc = (z[:, :, at : at + c] for z in (q, k, v))
            out.append((qc @ kc.mT * inside) @ vc + (qc * before) @ state)
            state = state * torch.exp(c * decay)[..., None] + (kc * after).mT @ vc
        return torch.cat(out, 2)


class LM(nn.Module):
    def __init__(self, attention, vocab=65, d=32, h=4, layers=2):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(vocab, d), nn.RMSNorm(d, eps=1e-6), nn.Linear(d, vocab, bias=False)
        self.attn = nn.ModuleList(attention(d, h) for _ in range(layers))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(d, 3 * d), nn.SiLU(), nn.Linear(3 * d, d)) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(d, eps=1e-6) for _ in range(2 * layers))
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens):
        x = self.embed(tokens)
        for i, (attn, mlp) in enumerate(zip(self.attn, self.mlp, strict=True)):
            x = x + attn(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norm(x))


def build():
    return LM(Differential)


def build_normed():
    return LM(OnTheSphere)


def build_mup():
    return LM(MuP)


def build_chunked():
    return LM(Retention)
