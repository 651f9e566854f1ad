"""Attention and feed-forward side by side, each with a norm of its own: `build` runs the one first, `reference` the other."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, HEADS, V = 48, 4, 131


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), self.g)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class FeedForwardFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.na, self.nb, self.attn, self.mlp = Norm(), Norm(), Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        fed = self.mlp(self.nb(x))
        return x + fed + self.attn(self.na(x))


class AttentionFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = Norm(), Norm(), Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.n_head = HEADS
        self.wte, self.h, self.ln_f = nn.Embedding(V, D), nn.ModuleList(layer() for _ in range(2)), Norm()

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx)
        for layer in self.h:
            x = layer(x)
        return self.ln_f(x) @ self.wte.weight.T


def build() -> nn.Module:
    return Model(FeedForwardFirst)


def reference() -> nn.Module:
    return Model(AttentionFirst)
