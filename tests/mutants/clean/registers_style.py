"""Meta tokens prepended inside the model, sliding window + attention sinks, z-loss, label smoothing, dict output, keyword-only."""

import torch
import torch.nn.functional as F
from torch import nn


class Attn(nn.Module):
    def __init__(self, d, h, window, meta):
        super().__init__()
        self.h, self.window, self.meta = h, window, meta
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.sink = nn.Parameter(torch.zeros(h))
        slopes = 2.0 ** (-8.0 * torch.arange(1, h + 1) / h)
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = (t.view(B, T, self.h, D // self.h).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        i = torch.arange(T, device=x.device)
        dist = i[:, None] - i[None, :]
        ok = (dist >= 0) & ((dist < self.window) | (i[None, :] < self.meta))
        bias = -self.slopes.to(x.dtype)[:, None, None] * dist.clamp(min=0).to(x.dtype)
        bias = bias * (i[None, :] >= self.meta)
        s = q @ k.transpose(-1, -2) * (D // self.h) ** -0.5 + bias
        s = s.masked_fill(~ok, torch.finfo(s.dtype).min)
        s = torch.cat((s, self.sink.view(1, -1, 1, 1).expand(B, -1, T, 1)), -1)
        p = s.softmax(-1)[..., :-1]
        return self.o((p @ v).transpose(1, 2).reshape(B, T, D))


class Model(nn.Module):
    def __init__(self, vocab=80, d=36, h=6, layers=2, window=9, meta=3):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.meta = nn.Parameter(torch.randn(meta, d) * 0.02)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln1": nn.LayerNorm(d),
                    "attn": Attn(d, h, window, meta),
                    "ln2": nn.LayerNorm(d),
                    "fc": nn.Linear(d, 3 * d),
                    "proj": nn.Linear(3 * d, d),
                }
            )
            for _ in range(layers)
        )
        self.ln_f = nn.LayerNorm(d)
        self.out = nn.Linear(d, vocab, bias=False)
        self.out.weight = self.emb.weight
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, *, tokens, labels=None):
        B = tokens.shape[0]
        x = torch.cat((self.meta.expand(B, -1, -1), self.emb(tokens)), 1)
        for L in self.layers:
            x = x + L["attn"](L["ln1"](x))
            x = x + L["proj"](F.gelu(L["fc"](L["ln2"](x)), approximate="tanh"))
        logits = self.out(self.ln_f(x[:, self.meta.shape[0] :]))
        out = {"logits": logits}
        if labels is not None:
            lg, lb = logits[:, :-1].float(), labels[:, 1:]
            ce = F.cross_entropy(lg.flatten(0, 1), lb.flatten(), ignore_index=-100, label_smoothing=0.1)
            z = (torch.logsumexp(lg, -1) ** 2)[lb != -100].mean()
            out["loss"] = ce + 1e-4 * z
        return out


def build():
    return Model()
