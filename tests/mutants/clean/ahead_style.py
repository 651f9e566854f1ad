"""Multi-token prediction heads: returns (logits, extra) and a loss over both; MLA with latent kv and decoupled rope."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, d, eps=1e-6):
        super().__init__()
        self.g = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.g, self.eps)


def rope(x, pos, theta=10000.0):
    d = x.shape[-1]
    inv = theta ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
    ang = pos[:, None].float() * inv
    c, s = ang.cos().to(x.dtype), ang.sin().to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)


class MLA(nn.Module):
    def __init__(self, d, h, nope=8, rd=4, vd=8, lora=12):
        super().__init__()
        self.h, self.nope, self.rd, self.vd, self.lora = h, nope, rd, vd, lora
        self.wq = nn.Linear(d, h * (nope + rd), bias=False)
        self.wkv_a = nn.Linear(d, lora + rd, bias=False)
        self.kv_norm = RMSNorm(lora)
        self.wkv_b = nn.Linear(lora, h * (nope + vd), bias=False)
        self.wo = nn.Linear(h * vd, d, bias=False)

    def forward(self, x, pos):
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.h, -1).transpose(1, 2)
        qn, qr = q.split([self.nope, self.rd], -1)
        qr = rope(qr, pos)
        kv, kr = self.wkv_a(x).split([self.lora, self.rd], -1)
        kr = rope(kr[:, None], pos)
        k, v = self.wkv_b(self.kv_norm(kv)).view(B, T, self.h, -1).transpose(1, 2).split([self.nope, self.vd], -1)
        s = (torch.einsum("bhtd,bhsd->bhts", qn, k) + torch.einsum("bhtr,bosr->bhts", qr, kr)) / math.sqrt(self.nope + self.rd)
        s = s.masked_fill(torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1), float("-inf"))
        o = torch.einsum("bhts,bhsd->bthd", s.softmax(-1, dtype=torch.float32).type_as(s), v)
        return self.wo(o.reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.n1, self.a, self.n2 = RMSNorm(d), MLA(d, h), RMSNorm(d)
        self.up, self.gate, self.down = nn.Linear(d, 2 * d, bias=False), nn.Linear(d, 2 * d, bias=False), nn.Linear(2 * d, d, bias=False)

    def forward(self, x, pos):
        x = x + self.a(self.n1(x), pos)
        y = self.n2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, vocab=101, d=40, h=5, layers=2, ahead=1):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(Block(d, h) for _ in range(layers))
        self.norm, self.head = RMSNorm(d), nn.Linear(d, vocab, bias=False)
        self.mtp_proj, self.mtp_block = nn.Linear(2 * d, d, bias=False), Block(d, h)
        self.mtp_n1, self.mtp_n2, self.mtp_norm = RMSNorm(d), RMSNorm(d), RMSNorm(d)
        self.apply(self._init)

    def _init(self, m):
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=0.02)

    def forward(self, input_ids, labels=None):
        T = input_ids.shape[1]
        pos = torch.arange(T, device=input_ids.device)
        x = self.embed(input_ids)
        for b in self.blocks:
            x = b(x, pos)
        logits = self.head(self.norm(x))
        if labels is None:
            return logits, None
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        if T > 2:
            z = self.mtp_proj(torch.cat((self.mtp_n1(x[:, :-1]), self.mtp_n2(self.embed(input_ids[:, 1:]))), -1))
            z = self.mtp_block(z, pos[:-1])
            extra = self.head(self.mtp_norm(z))
            loss = loss + 0.3 * F.cross_entropy(extra[:, :-1].flatten(0, 1), labels[:, 2:].flatten(), ignore_index=-100)
        return logits, loss


def build():
    torch.manual_seed(0)
    return Model()
