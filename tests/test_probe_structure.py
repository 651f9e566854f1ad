"""Lists of layers, shared by mistake or filled in legal ways, and ties that transformers was not told of."""

import importlib
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from olmodebug.first_run import from_model
from olmodebug.probe import NotApplicable

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


class Sizes(PretrainedConfig):
    model_type = "tied_by_name"

    def __init__(self, tie_word_embeddings: bool = True, **more: object) -> None:
        super().__init__(tie_word_embeddings=tie_word_embeddings, vocab_size=31, **more)


class Silent(PretrainedConfig):
    model_type = "tied_by_inheritance"

    def __init__(self, **more: object) -> None:
        super().__init__(vocab_size=31, **more)


class Forgotten(PreTrainedModel):
    """A transformers model that does not say what is tied."""

    config_class = Sizes

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.embed, self.lm_head = nn.Embedding(31, 8), nn.Linear(8, 31, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.embed(input_ids))


class Declared(Forgotten):
    _tied_weights_keys = {"lm_head.weight": "embed.weight"}


def test_a_tie_that_transformers_was_not_told_of_is_a_warning_with_its_cause() -> None:
    (found,) = structure.tied_as_configured(from_model(Forgotten(Sizes())))
    assert (found.severity, found.where.function) == ("warning", "Forgotten.__init__")
    assert "_tied_weights_keys" in found.cause
    assert list(structure.tied_as_configured(from_model(Declared(Sizes())))) == []
    for config in (Sizes(tie_word_embeddings=False), Silent(tie_word_embeddings=True)):
        with pytest.raises(NotApplicable) if isinstance(config, Silent) else nullcontext():
            assert list(structure.tied_as_configured(from_model(Forgotten(config)))) == []
