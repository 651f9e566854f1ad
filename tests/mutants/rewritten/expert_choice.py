"""Experts that choose their tokens, so that topk runs over the sequence: `build` and `reference` are the same model."""

import torch
from torch import Tensor, nn

D, EXPERTS, V = 48, 4, 131


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.weight = nn.Linear(D, EXPERTS, bias=False), nn.Parameter(torch.randn(EXPERTS, D, D) * D**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        share, token = shares.topk(max(1, x.shape[1] // 4), dim=1)
        out = torch.zeros_like(x)
        for k in range(EXPERTS):
            place = token[..., k, None].expand(-1, -1, D)
            out = out.scatter_add(1, place, share[..., k, None] * (x.gather(1, place) @ self.weight[k]))
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.moe, self.norm, self.lm_head = nn.Embedding(V, D), Experts(), nn.LayerNorm(D), nn.Linear(D, V, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.lm_head(self.norm(x + self.moe(x)))


def build() -> nn.Module:
    return Model()


def reference() -> nn.Module:
    return Model()
