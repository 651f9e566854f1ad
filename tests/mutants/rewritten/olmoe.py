"""OLMoE written again, its experts modules of a list; and the class of transformers in its sizes."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import OlmoeConfig, OlmoeForCausalLM

dim, n_heads, n_kv, hidden, n_layers, vocab = 48, 6, 3, 40, 3, 131
n_experts, top_k, eps, base = 7, 3, 1e-5, 10000.0
head = dim // n_heads


class RMS(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.g = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.g, eps)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(dim, n_experts, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(n_experts))

    def forward(self, x):
        flat = x.reshape(-1, dim)
        p = self.router(flat).softmax(dim=-1)
        w, idx = p.topk(top_k, dim=-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, slot = (idx == e).nonzero(as_tuple=True)
            out.index_add_(0, rows, expert(flat[rows]) * w[rows, slot, None])
        return out.view_as(x)


def rope(x):
    B, N, T, d = x.shape
    t = torch.arange(T, device=x.device, dtype=torch.float32)
    f = 1.0 / base ** (torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
    e = torch.cat([t[:, None] * f, t[:, None] * f], -1)
    half = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
    return x * e.cos().to(x.dtype) + half * e.sin().to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq = nn.Linear(dim, n_heads * head, bias=False)
        self.wk = nn.Linear(dim, n_kv * head, bias=False)
        self.wv = nn.Linear(dim, n_kv * head, bias=False)
        self.wo = nn.Linear(n_heads * head, dim, bias=False)
        self.q_norm, self.k_norm = RMS(n_heads * head), RMS(n_kv * head)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q = rope(q.view(B, T, n_heads, head).transpose(1, 2))
        k = rope(k.view(B, T, n_kv, head).transpose(1, 2))
        v = v.view(B, T, n_kv, head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = RMS(dim), RMS(dim)
        self.attn, self.moe = SelfAttention(), MoE()

    def forward(self, x):
        h = x + self.attn(self.n1(x))
        return h + self.moe(self.n2(h))


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block() for _ in range(n_layers))
        self.norm = RMS(dim)
        self.out = nn.Linear(dim, vocab, bias=False)

    def forward(self, idx):
        x = self.tok(idx)
        for b in self.blocks:
            x = b(x)
        return self.out(self.norm(x))


def build():
    return LM()


def reference():
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=vocab,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv,
            num_experts=n_experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=False,
            max_position_embeddings=64,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
