"""What stands around a model: a shell that passes all arguments on, a batch in a dict, a row of the embedding for no token,
autocast inside of forward, a build that casts to bfloat16 after init_weights.

Clean: every test of the corpus must pass on each `build*` function here.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.h, self.norm1, self.norm2 = h, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d))

    def forward(self, x, cos, sin):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.h, d // self.h).permute(2, 0, 3, 1, 4)
        q, k = (
            torch.cat((z1 * cos - z2 * sin, z2 * cos + z1 * sin), -1).to(v.dtype) for z1, z2 in (z.float().chunk(2, -1) for z in (q, k))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """One row of the embedding more than there are tokens: it stands before the first one."""

    def __init__(self, vocab=67, d=40, h=5, layers=2, ctx=100):
        super().__init__()
        self.start, self.head_dim, self.ctx = vocab, d // h, ctx
        self.embed = nn.Embedding(vocab + 1, d)
        self.layers = nn.ModuleList(Block(d, h) for _ in range(layers))
        self.norm, self.output = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        self.register_buffer("cos", torch.empty(ctx, d // h // 2), persistent=False)
        self.register_buffer("sin", torch.empty(ctx, d // h // 2), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        inv_freq = 10000.0 ** (-torch.arange(0, self.head_dim, 2, device=self.cos.device) / self.head_dim)
        angles = torch.outer(torch.arange(self.ctx, device=self.cos.device), inv_freq)
        self.cos, self.sin = angles.cos(), angles.sin()
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens):
        x = self.embed(tokens) + 0.5 * self.embed(F.pad(tokens[:, :-1], (1, 0), value=self.start))
        for layer in self.layers:
            x = layer(x, self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]])
        return self.output(self.norm(x))


class Shell(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class FromBatch(Transformer):
    def forward(self, batch):
        logits = super().forward(batch["input_ids"])
        if "labels" not in batch:
            return {"logits": logits}
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        return {"logits": logits, "loss": loss}


class Autocast(Transformer):
    def forward(self, tokens):
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            return super().forward(tokens)


def build():
    return Shell(Transformer())


def build_from_batch():
    return FromBatch()


def build_autocast():
    return Autocast()


def build_bfloat16():
    return Transformer().to(torch.bfloat16)
