"""A decoder as notebooks build it from scratch, each head a module with its own rotations; three faults that are passed on so.

The norm is taken over the sequence as well, dropout_p is a constant, and the rotations are a plain attribute.
"""

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, WIDTH, HEADS, CONTEXT = 65, 32, 2, 24


def rotations(length: int, width: int) -> torch.Tensor:
    """One rotation matrix for each position, `[length, width, width]`."""
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    turn = torch.stack((torch.stack((angle.cos(), angle.sin()), -1), torch.stack((-angle.sin(), angle.cos()), -1)), -2)
    return torch.stack([torch.block_diag(*pairs) for pairs in turn])


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rms = torch.linalg.norm(x, dim=(1, 2), keepdim=True) / x[0].numel() ** 0.5
        return self.scale * x / rms


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.turn = rotations(CONTEXT, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turn = self.turn[: x.shape[1]]
        q, k = (torch.einsum("btd,tde->bte", y, turn) for y in (self.q(x), self.k(x)))
        return F.scaled_dot_product_attention(q, k, self.v(x), dropout_p=0.1, is_causal=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.heads = Norm(), nn.ModuleList(Head() for _ in range(HEADS))
        self.mix, self.feed = (
            nn.Linear(HEADS * WIDTH, WIDTH),
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        x = x + self.mix(torch.cat([head(normed) for head in self.heads], -1))
        return x + self.feed(self.norm(x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(VOCAB, WIDTH), nn.Sequential(Block(), Block()), nn.Linear(WIDTH, VOCAB)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self.head(self.blocks(self.embed(idx)))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
