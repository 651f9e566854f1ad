"""Lists of layers: shared by mistake, and filled in legal ways."""

import importlib

import torch
from torch import Tensor, nn

from olmodebug.first_run import from_model

structure = importlib.import_module("olmodebug.probes.structure")


class Stack(nn.Module):
    """A model of a list of layers, some of which may be missing."""

    def __init__(self, layers: list[nn.Module | None]) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 8)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, 31)

    def forward(self, idx: Tensor) -> Tensor:
        hidden = self.embed(idx)
        for layer in self.layers:
            hidden = hidden if layer is None else hidden + layer(hidden)
        return self.head(hidden)


def findings(layers: list[nn.Module | None]) -> list[str]:
    return [finding.message for finding in structure.layers_are_distinct(from_model(Stack(layers)))]


def test_one_layer_three_times_is_told() -> None:
    assert findings([nn.Linear(8, 8)] * 3) == ["the 3 entries of layers are one and the same module: 72 parameters used 3 times"]


def test_layers_of_their_own_are_silent_and_so_are_empty_entries_and_layers_without_parameters() -> None:
    torch.manual_seed(0)
    assert findings([nn.Linear(8, 8), nn.Linear(8, 8)]) == []
    assert findings([None, None]) == []
    assert findings([nn.Tanh()] * 3) == []
