"""The text that a model writes by itself, beside what its forward says."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from olmodebug import check

Choose = Callable[[Tensor], Tensor]


class Writer(nn.Module):
    """A model of one layer that sees what came before, and writes with whatever it is given to choose a token by."""

    def __init__(self, choose: Choose, *, prompt: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.choose, self.prompt = nn.Embedding(41, 12), nn.Linear(12, 41), choose, prompt

    def forward(self, idx: Tensor) -> Tensor:
        states = self.embed(idx)
        return self.head(states + states.cumsum(1))

    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        length = idx.shape[1]
        for _ in range(max_new_tokens):
            idx = torch.cat([idx, self.choose(self(idx))], dim=1)
        return idx if self.prompt else idx[:, length:]


class Penalised(Writer):
    def generate(self, idx: Tensor, max_new_tokens: int, repetition_penalty: float = 1.2) -> Tensor:
        return super().generate(idx, max_new_tokens)


def sampled(logits: Tensor) -> Tensor:
    return torch.multinomial(logits[:, -1].softmax(-1), 1)


def greedy(logits: Tensor) -> Tensor:
    return logits[:, -1:].argmax(-1)


def one_before(logits: Tensor) -> Tensor:
    return torch.multinomial(logits[:, -2].softmax(-1), num_samples=1)


def raced(logits: Tensor) -> Tensor:
    odds = logits[:, -1].softmax(-1)
    return (odds / torch.empty_like(odds).exponential_(1)).argmax(-1, keepdim=True)


@pytest.mark.parametrize("writer", [Writer(sampled), Writer(greedy), Writer(greedy, prompt=False)])
def test_text_written_as_forward_says_is_silent(writer: Writer) -> None:
    report = check(writer, select_probes="generate")
    assert (report.verdict, report.findings) == ("pass", ())


def test_text_written_from_the_logits_of_another_position_is_told() -> None:
    (finding,) = check(Writer(one_before), select_probes="generate").findings
    assert (finding.severity, finding.where.function) == ("warning", "Writer.generate")
    assert "as number 1 after the prompt" in finding.message


@pytest.mark.parametrize(("writer", "reason"), [(Writer(raced), "a way of its own"), (Penalised(one_before), "repetition_penalty")])
def test_other_ways_to_draw_are_not_judged(writer: Writer, reason: str) -> None:
    report = check(writer, select_probes="generate")
    assert report.exit_code == 5
    assert reason in (report.outcomes[-1].reason or "")
