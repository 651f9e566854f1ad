"""nanochat / modded-nanogpt: relu^2, functional rmsnorm without weight, value residuals, logit softcap, zero-initialised projections."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    sequence_len: int = 64
    vocab_size: int = 96
    n_layer: int = 3
    n_head: int = 4
    n_kv_head: int = 2
    n_embd: int = 48


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def apply_rotary_emb(x, cos, sin):
    d = x.shape[3] // 2
    x1, x2 = x[..., :d], x[..., d:]
    y1 = x1 * cos + x2 * sin
    y2 = x1 * (-sin) + x2 * cos
    return torch.cat([y1, y2], 3).to(x.dtype)


class CausalSelfAttention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.n_head, self.n_kv_head, self.hd = c.n_head, c.n_kv_head, c.n_embd // c.n_head
        self.c_q = nn.Linear(c.n_embd, self.n_head * self.hd, bias=False)
        self.c_k = nn.Linear(c.n_embd, self.n_kv_head * self.hd, bias=False)
        self.c_v = nn.Linear(c.n_embd, self.n_kv_head * self.hd, bias=False)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.lamb = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, v1, cos_sin):
        B, T, C = x.size()
        q = self.c_q(x).view(B, T, self.n_head, self.hd)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.hd)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.hd)
        if v1 is None:
            v1 = v
        v = (1 - self.lamb) * v + self.lamb * v1
        cos, sin = cos_sin
        q, k = norm(apply_rotary_emb(q, cos, sin)), norm(apply_rotary_emb(k, cos, sin))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, -1)), v1


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, c, i):
        super().__init__()
        self.attn, self.mlp = CausalSelfAttention(c, i), MLP(c)
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x, v1, x0, cos_sin):
        x = self.lambdas[0] * x + self.lambdas[1] * x0
        a, v1 = self.attn(norm(x), v1, cos_sin)
        x = x + a
        return x + self.mlp(norm(x)), v1


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(config.vocab_size, config.n_embd), "h": nn.ModuleList([Block(config, i) for i in range(config.n_layer)])}
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = self._rot(config.sequence_len * 10, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                fan_out, fan_in = m.weight.shape
                nn.init.normal_(m.weight, std=fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5))
            elif isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight, std=1.0)
        nn.init.zeros_(self.lm_head.weight)
        for b in self.transformer.h:
            nn.init.zeros_(b.mlp.c_proj.weight)
            nn.init.zeros_(b.attn.c_proj.weight)

    def _rot(self, n, hd, base=10000):
        inv = 1.0 / (base ** (torch.arange(0, hd, 2, dtype=torch.float32) / hd))
        f = torch.outer(torch.arange(n, dtype=torch.float32), inv)
        return f.cos()[None, :, None, :], f.sin()[None, :, None, :]

    def forward(self, idx, targets=None, loss_reduction="mean"):
        B, T = idx.size()
        assert self.cos.size(1) >= T
        cs = self.cos[:, :T], self.sin[:, :T]
        x = norm(self.transformer.wte(idx))
        x0, v1 = x, None
        for block in self.transformer.h:
            x, v1 = block(x, v1, x0, cs)
        x = norm(x)
        logits = 15 * torch.tanh(self.lm_head(x).float() / 15)
        if targets is not None:
            return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1, reduction=loss_reduction)
        return logits


def build():
    return GPT(Config())
