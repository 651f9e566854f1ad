"""minGPT: the feed-forward block as a lambda that is made in __init__, and a config filled in by the caller."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    def __init__(self, width, heads, block_size, dropout):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)
        self.heads = heads
        self.register_buffer("seen", torch.ones(block_size, block_size).tril().bool(), persistent=True)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = F.softmax(scores.masked_fill(~self.seen[:T, :T], float("-inf")), dim=-1, dtype=torch.float32).to(q.dtype)
        return self.drop(self.out((weights @ v).transpose(1, 2).reshape(B, T, C)))


class Block(nn.Module):
    def __init__(self, width, heads, block_size, dropout):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, block_size, dropout)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width), "drop": nn.Dropout(dropout)})
        m = self.mlp
        self.feed = lambda x: m.drop(m.down(F.gelu(m.up(x))))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.feed(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, width=36, heads=3, layers=2, vocab_size=101, block_size=48, dropout=0.1):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        self.h = nn.Sequential(*[Block(width, heads, block_size, dropout) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        logits = self.lm_head(self.ln_f(self.h(x)))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


def build():
    return GPT()
