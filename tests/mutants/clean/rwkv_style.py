"""RWKV 4 as a loop that keeps a running maximum: token shift, matrices of zero on both sides of a product, a norm of the
embeddings inside the first block, and a loss whose backward pulls the largest logit down (L2Wrap).

Clean: every test of the corpus must pass on each `build*` function here.
"""

import torch
import torch.nn.functional as F
from torch import nn


class TimeMix(nn.Module):
    def __init__(self, n, layer, layers):
        super().__init__()
        ratio = layer / max(layers - 1, 1)
        self.time_decay = nn.Parameter(-5 + 8 * (torch.arange(n) / (n - 1)) ** (0.7 + 1.3 * ratio))
        self.time_first = nn.Parameter(torch.ones(n) * -1.2 + (torch.arange(n) % 3 - 1) * 0.5)
        self.time_mix = nn.Parameter((torch.arange(n) / n).expand(3, 1, 1, n) ** (1 - ratio / 2))
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.key, self.value, self.receptance, self.output = (nn.Linear(n, n, bias=False) for _ in range(4))

    def forward(self, x):
        k, v, r = (x * mix + self.time_shift(x) * (1 - mix) for mix in self.time_mix)
        k, v, r = self.key(k), self.value(v), torch.sigmoid(self.receptance(r))
        w = -torch.exp(self.time_decay)
        num, den, top, out = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), torch.full_like(k[:, 0], -1e38), []
        for t in range(k.shape[1]):
            m = torch.maximum(top, k[:, t] + self.time_first)
            e1, e2 = torch.exp(top - m), torch.exp(k[:, t] + self.time_first - m)
            out.append((e1 * num + e2 * v[:, t]) / (e1 * den + e2))
            m = torch.maximum(top + w, k[:, t])
            e1, e2 = torch.exp(top + w - m), torch.exp(k[:, t] - m)
            num, den, top = e1 * num + e2 * v[:, t], e1 * den + e2, m
        return self.output(r * torch.stack(out, 1))


class ChannelMix(nn.Module):
    def __init__(self, n, layer, layers):
        super().__init__()
        self.time_mix = nn.Parameter((torch.arange(n) / n).expand(2, 1, 1, n) ** (1 - layer / layers))
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.key, self.receptance, self.value = (
            nn.Linear(n, 4 * n, bias=False),
            nn.Linear(n, n, bias=False),
            nn.Linear(4 * n, n, bias=False),
        )

    def forward(self, x):
        k, r = (x * mix + self.time_shift(x) * (1 - mix) for mix in self.time_mix)
        return torch.sigmoid(self.receptance(r)) * self.value(torch.square(torch.relu(self.key(k))))


class Block(nn.Module):
    def __init__(self, n, layer, layers):
        super().__init__()
        self.layer = layer
        if layer == 0:
            self.ln0 = nn.LayerNorm(n)
        self.ln1, self.ln2 = nn.LayerNorm(n), nn.LayerNorm(n)
        self.att, self.ffn = TimeMix(n, layer, layers), ChannelMix(n, layer, layers)

    def forward(self, x):
        x = self.ln0(x) if self.layer == 0 else x
        x = x + self.att(self.ln1(x))
        return x + self.ffn(self.ln2(x))


class L2Wrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, y):
        ctx.save_for_backward(y)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        (y,) = ctx.saved_tensors
        largest, ids = y.max(-1, keepdim=True)
        return grad_output, torch.zeros_like(y).scatter_(-1, ids, largest * 1e-4 / (y.shape[0] * y.shape[1]))


class RWKV(nn.Module):
    def __init__(self, n=20, layers=2, vocab=47, ctx_len=96):
        super().__init__()
        self.ctx_len, self.emb = ctx_len, nn.Embedding(vocab, n)
        self.blocks = nn.Sequential(*(Block(n, i, layers) for i in range(layers)))
        self.ln_out, self.head = nn.LayerNorm(n), nn.Linear(n, vocab, bias=False)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.orthogonal_(m.weight, gain=0.5)
        nn.init.uniform_(self.emb.weight, a=-1e-4, b=1e-4)
        for block in self.blocks:
            for m in (block.att.key, block.att.receptance, block.att.output, block.ffn.value, block.ffn.receptance):
                nn.init.zeros_(m.weight)

    def forward(self, idx, targets=None):
        assert idx.shape[1] <= self.ctx_len, f"{idx.shape[1]} tokens are more than ctx_len = {self.ctx_len}"
        logits = self.head(self.ln_out(self.blocks(self.emb(idx))))
        if targets is None:
            return logits
        return L2Wrap.apply(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits)


def build():
    return RWKV()
