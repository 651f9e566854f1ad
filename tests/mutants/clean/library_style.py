"""As libraries around models do it: a `to` and an `_apply` of their own, a device in the config, Python's random numbers.

`build`: interpretability tools. `build_table`: the next token from the last alone, looked up in a table of zeros.
`build_hub`: saved by huggingface_hub's mixin, which keeps what __init__ was given as JSON.
"""

import random

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn


class Sizes:
    def __init__(self) -> None:
        self.vocab_size, self.width, self.context_length, self.device = 47, 24, 32, torch.device("cpu")


class Wave(nn.Module):
    """A table that is no buffer, made anew where the weights move. The buffer says where that is, and is never read."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.length, self.half = sizes.context_length, sizes.width // 2
        self.register_buffer("anchor", torch.tensor(0), persistent=False)
        self.table = self.waves()

    def waves(self) -> Tensor:
        angles = torch.arange(self.length)[:, None] * 50.0 ** -torch.linspace(0, 1, self.half)
        return torch.cat((angles.sin(), angles.cos()), -1).to(self.anchor.device)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self.table = self.waves()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.table[: x.shape[1]]).to(x.dtype)


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(sizes.width),
            nn.Linear(sizes.width, 3 * sizes.width),
            nn.Linear(sizes.width, sizes.width),
        )
        self.favoured = nn.Parameter(F.one_hot(torch.tensor(random.randrange(sizes.width)), sizes.width).float())

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.sizes.device)
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, 3, width // 3).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.favoured * self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Watched(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed, self.wave = nn.Embedding(sizes.vocab_size, sizes.width), Wave(sizes)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, sizes.vocab_size)

    def to(self, device_or_dtype):  # type: ignore[no-untyped-def, override]
        if isinstance(device_or_dtype, str | torch.device):
            self.sizes.device = torch.device(device_or_dtype)
        return super().to(device_or_dtype)

    def forward(self, input: Tensor, return_loss: bool = False, tokens: Tensor | None = None) -> Tensor:
        x = self.wave(self.embed(input))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Table(nn.Module):
    def __init__(self, vocab_size: int = 47) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(vocab_size, vocab_size))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.logits[idx]
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Hub(Watched, PyTorchModelHubMixin):
    def __init__(self, width: int = 24) -> None:
        sizes = Sizes()
        sizes.width = width
        super().__init__(sizes)


def build() -> tuple[nn.Module, Sizes]:
    model = Watched(Sizes())
    return model, model.sizes


def build_table() -> nn.Module:
    return Table()


def build_hub() -> nn.Module:
    return Hub()
