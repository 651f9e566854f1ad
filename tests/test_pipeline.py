"""A model cut into pipeline stages, in one process: the stages give its logits, and what cannot be cut is refused in one line."""

import copy

import pytest
import torch
from torch import Tensor, nn

from olmodebug.errors import UsageError
from olmodebug.ranks.child import logits_of
from olmodebug.ranks.pipeline import Cut, Stage, find_cut, handed_on, keep_own_weights
from olmodebug.spec import Job, resolve

WIDTH, VOCAB = 12, 31


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + self.linear(x).tanh() * scale


class PairBlock(Block):
    """Returns a pair, as many do that may hand back a cache."""

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x, scale), None


class RememberingBlock(Block):
    """Reads what the first block left behind."""

    first: "RememberingBlock"

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        self.seen = x
        return super().forward(x, scale) + self.__dict__["first"].seen


class Model(nn.Module):
    def __init__(self, kind: type[Block] = Block, count: int = 3, factor: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([kind() for _ in range(count)])
        self.norm, self.head, self.factor = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False), factor
        self.head.weight = self.embed.weight
        for layer in self.layers:
            layer.__dict__["first"] = self.layers[0]

    def forward(self, input_ids: Tensor) -> Tensor:
        x, scale = self.embed(input_ids), torch.arange(input_ids.shape[1])[:, None] / 10.0
        for layer in self.layers:
            out = layer(x, scale=scale)
            x = out[0] if isinstance(out, tuple) else out
            x = x if self.factor == 1 else x * self.factor
        made: Tensor = self.head(self.norm(x))
        return made


IDS = torch.arange(14).view(2, 7)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    made: Tensor = model(ids)
    return made


def stages_of(model: nn.Module, cut: Cut, given: list[Tensor], call: object = logits) -> list[Stage]:
    made = [Stage(copy.deepcopy(model), cut, number, call) for number in range(len(cut.stages))]  # type: ignore[arg-type]
    for number, stage in enumerate(made):
        keep_own_weights(stage, cut, number, given[0], given[number])
    return made


@pytest.mark.parametrize("kind", [Block, PairBlock])
def test_stages_one_after_the_other_give_the_models_logits(kind: type[Block]) -> None:
    model = Model(kind)
    cut = find_cut(model, 2, IDS, logits)
    assert [list(blocks) for blocks in cut.stages] == [[0, 1], [2]]
    given = handed_on(model, cut, IDS, logits)
    assert torch.equal(given[-1], model(IDS))
    names = [{name for name, _ in stage.model.named_parameters()} for stage in stages_of(model, cut, given)]
    assert names[0] == {"embed.weight", "layers.0.linear.weight", "layers.0.linear.bias", "layers.1.linear.weight", "layers.1.linear.bias"}
    assert names[1] == {"embed.weight", "layers.2.linear.weight", "layers.2.linear.bias", "norm.weight", "norm.bias"}  # tied to the head


def test_the_gradients_of_all_stages_are_those_of_the_model() -> None:
    model = Model()
    cut = find_cut(model, 3, IDS, logits)
    stages = stages_of(model, cut, handed_on(model, cut, IDS, logits))
    made = IDS
    for stage in stages:
        made = stage(made, IDS)
    made.pow(2).mean().backward()
    model(IDS).pow(2).mean().backward()
    for name, parameter in model.named_parameters():
        held = [dict(stage.model.named_parameters()).get(name) for stage in stages]
        shares = [each.grad for each in held if each is not None and each.grad is not None]
        assert parameter.grad is not None
        assert torch.allclose(torch.stack(shares).sum(0), parameter.grad, atol=1e-7), name


@pytest.mark.parametrize("spec", ["olmo1-tiny", "transformers:LlamaForCausalLM"])
def test_real_models_are_cut_with_their_masks_and_positions(spec: str) -> None:
    subject = resolve(Job(spec=spec))
    ids = torch.tensor(subject.token_ids(2, 9, seed=0))
    call = logits_of(subject)
    cut = find_cut(subject.model, 2, ids, call)
    given = handed_on(subject.model, cut, ids, call)
    assert torch.equal(given[-1], call(subject.model, ids))


@pytest.mark.parametrize(
    ("model", "stages", "words"),
    [
        (nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)), 2, "no list of repeated blocks"),
        (Model(count=2), 3, "2 blocks cannot be cut into 3 stages"),
        (Model(RememberingBlock), 2, "takes more than hidden states"),
        (Model(factor=0.5), 2, "do not hand their hidden states straight on"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(model: nn.Module, stages: int, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        handed_on(model, find_cut(model, stages, IDS, logits), IDS, logits)
    assert "--strategy pp" in str(refused.value)
