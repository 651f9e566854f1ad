"""ReZero gates that start at zero, a table of positions `[positions, 1, width]`, sequence-first inside."""

import torch
from torch import nn


class ReZero(nn.Module):
    """ReZero gates and (T, B) inputs."""

    def __init__(self, vocab=71, d=30, h=3, layers=3):
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab, d), nn.Parameter(torch.randn(128, 1, d) * 0.02)
        self.attn = nn.ModuleList(nn.MultiheadAttention(d, h) for _ in range(layers))
        self.ff = nn.ModuleList(nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d)) for _ in range(layers))
        self.alpha = nn.Parameter(torch.zeros(layers, 2))
        self.head = nn.Linear(d, vocab)

    def forward(self, input_ids):
        ids = input_ids.t()
        T = ids.shape[0]
        x = self.emb(ids) + self.pos[:T]
        mask = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        for i, (a, f) in enumerate(zip(self.attn, self.ff, strict=False)):
            x = x + self.alpha[i, 0] * a(x, x, x, attn_mask=mask, need_weights=False)[0]
            x = x + self.alpha[i, 1] * f(x)
        return self.head(x).transpose(0, 1)


def build():
    return ReZero()
