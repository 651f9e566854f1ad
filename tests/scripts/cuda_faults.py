"""Faults that only a CUDA device shows, one by name: `python -m tests.scripts.cuda_faults NAME`.

Without the guards each ends in a device-side assert, an illegal access or an out-of-memory error of the device.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def embedding() -> None:
    nn.Embedding(97, 16, device="cuda")(torch.tensor([[3, 97, 5]], device="cuda")).sum().item()


def rotary_table() -> None:
    cos = torch.rand(64, 12, device="cuda")
    cos[torch.arange(65, device="cuda")].sum().item()


def label() -> None:
    F.cross_entropy(torch.randn(4, 10, device="cuda"), torch.tensor([1, 2, 10, -100], device="cuda")).item()


def gather() -> None:
    torch.randn(3, 7, device="cuda").log_softmax(-1).gather(1, torch.tensor([[-100], [2], [3]], device="cuda")).sum().item()


def multinomial() -> None:
    torch.multinomial(torch.tensor([0.5, float("nan"), 0.5], device="cuda"), 1).item()


def born_nan() -> None:
    layer = nn.Linear(16, 16, device="cuda")
    scores = layer(torch.randn(4, 16, device="cuda")).masked_fill(torch.ones(4, 16, dtype=torch.bool, device="cuda"), float("-inf"))
    scores.softmax(-1).sum().backward()


def memory() -> None:
    torch.cuda.set_per_process_memory_fraction(0.15)  # as on a smaller card: others may use the rest
    kept = []
    model = nn.Linear(4096, 50304, device="cuda")
    while True:
        kept.append(model(torch.randn(8192, 4096, device="cuda")).float().log_softmax(-1))


FAULTS: dict[str, Callable[[], None]] = {
    "embedding": embedding,
    "rotary-table": rotary_table,
    "label": label,
    "gather": gather,
    "multinomial": multinomial,
    "born-nan": born_nan,
    "memory": memory,
}

if __name__ == "__main__":
    FAULTS[sys.argv[1]]()
