"""A decoder as torchtitan and Meta's Llama write it: a complex rotary table in a buffer, RMSNorm, SwiGLU, no config object.

Clean. Nothing declares how many positions the table has.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def precompute(dim, end, theta=10000.0):
    f = 1.0 / (theta ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim))
    f = torch.outer(torch.arange(end), f).float()
    return torch.polar(torch.ones_like(f), f)


def apply_rotary(xq, xk, freqs):
    q = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    k = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    freqs = freqs[: xq.shape[1]].view(1, xq.shape[1], 1, -1)
    return torch.view_as_real(q * freqs).flatten(3).type_as(xq), torch.view_as_real(k * freqs).flatten(3).type_as(xk)


class Attention(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.h = h
        self.hd = d // h
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x, freqs):
        B, T, C = x.shape
        q, k, v = (w(x).view(B, T, self.h, self.hd) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rotary(q, k, freqs)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.attention = Attention(d, h)
        self.attention_norm = nn.RMSNorm(d)
        self.ffn_norm = nn.RMSNorm(d)
        self.w1, self.w2, self.w3 = nn.Linear(d, 3 * d, bias=False), nn.Linear(3 * d, d, bias=False), nn.Linear(d, 3 * d, bias=False)

    def forward(self, x, freqs):
        x = x + self.attention(self.attention_norm(x), freqs)
        y = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Transformer(nn.Module):
    def __init__(self, vocab=131, d=48, h=4, n=2, max_seq_len=64):
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, d)
        self.layers = nn.ModuleList(Block(d, h) for _ in range(n))
        self.norm = nn.RMSNorm(d)
        self.output = nn.Linear(d, vocab, bias=False)
        self.register_buffer("freqs_cis", precompute(d // h, max_seq_len), persistent=False)

    def forward(self, tokens):
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.freqs_cis)
        return self.output(self.norm(x))


def build():
    return Transformer()
