"""Recurrent language models: an LSTM, a minGRU by scan, and a gated linear attention written as a loop."""

import torch
import torch.nn.functional as F
from torch import nn


class LSTMLM(nn.Module):
    def __init__(self, vocab=70, d=24):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.drop = nn.Dropout(0.1)
        self.rnn = nn.LSTM(d, d, 2, batch_first=True, dropout=0.1)
        self.out = nn.Linear(d, vocab)

    def forward(self, x, hidden=None):
        y, hidden = self.rnn(self.drop(self.emb(x)), hidden)
        return self.out(self.drop(y)), hidden


class MinGRU(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.z, self.hh = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x):
        z, h = torch.sigmoid(self.z(x)), self.hh(x)
        log_a = F.logsigmoid(-self.z(x))
        a_star = log_a.cumsum(1)
        # h_t = sum_s exp(a*_t - a*_s) z_s h_s
        T = x.shape[1]
        diff = a_star[:, :, None] - a_star[:, None]
        w = torch.exp(diff.masked_fill(~torch.ones(T, T, dtype=torch.bool, device=x.device).tril()[None, :, :, None], float("-inf")))
        return (w * (z * h)[:, None]).sum(2)


class GLA(nn.Module):
    def __init__(self, d, h=2):
        super().__init__()
        self.h = h
        self.q, self.k, self.v, self.g, self.o = (nn.Linear(d, d, bias=False) for _ in range(5))

    def forward(self, x):
        B, T, D = x.shape
        q, k, v, g = (f(x).view(B, T, self.h, -1) for f in (self.q, self.k, self.v, self.g))
        g = torch.sigmoid(g)
        S = x.new_zeros(B, self.h, D // self.h, D // self.h)
        ys = []
        for t in range(T):
            S = S * g[:, t, :, :, None] + k[:, t, :, :, None] * v[:, t, :, None]
            ys.append((q[:, t, :, None] @ S)[:, :, 0])
        return self.o(torch.stack(ys, 1).reshape(B, T, D))


class Recurrent(nn.Module):
    def __init__(self, kind, vocab=70, d=24, layers=2):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.conv = nn.Conv1d(d, d, 4, groups=d, padding=3)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(layers))
        self.mix = nn.ModuleList(kind(d) for _ in range(layers))
        self.final = nn.LayerNorm(d)
        self.out = nn.Linear(d, vocab, bias=False)

    def forward(self, input_ids):
        x = self.emb(input_ids)
        x = x + self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        for n, m in zip(self.norms, self.mix, strict=False):
            x = x + m(n(x))
        return self.out(self.final(x))


def build_lstm():
    return LSTMLM()


def build_mingru():
    return Recurrent(MinGRU)


def build():
    return Recurrent(GLA)
