"""A model that keeps something from one forward to the next: every run starts alike, and no kernel is blamed for it."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from olmodebug.environment import environment
from olmodebug.executions.bundle import Bundle, Writer, read_bundle
from olmodebug.executions.cases import cases_of
from olmodebug.executions.compare import compare
from olmodebug.executions.execution import parse
from olmodebug.executions.findings import findings
from olmodebug.executions.run import Options, run_parity
from olmodebug.first_run import from_model
from olmodebug.report import Finding, plain

ELSEWHERE: list[int] = []


class Small(nn.Module):
    """An embedding, a scale that some state decides, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.head = nn.Embedding(53, 24), nn.Linear(24, 60), nn.Linear(60, 53, bias=False)
        self.register_buffer("running", torch.ones(24))
        self.register_buffer("table", torch.ones(2, 24), persistent=False)
        self.calls = 0

    def scale(self, x: Tensor) -> Tensor:
        return x

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(self.scale(self.embed(input_ids)))))


class Statistic(Small):
    def scale(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.running.mul_(0.9).add_(0.1 * x.float().pow(2).mean((0, 1)).to(self.running.dtype))
        return x * torch.rsqrt(self.running + 1e-5)


class Counter(Small):
    def scale(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


class Table(Small):
    """What is kept is only what would be made again."""

    def scale(self, x: Tensor) -> Tensor:
        if self.table.shape[0] < x.shape[1]:
            self.table = torch.arange(float(x.shape[1])).cos()[:, None].expand(-1, 24).to(x.dtype).contiguous()
        return x * self.table[: x.shape[1]]


class Global(Small):
    def scale(self, x: Tensor) -> Tensor:
        ELSEWHERE.append(1)
        return x * (1 + 0.1 * len(ELSEWHERE))


class Noisy(Small):
    def scale(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * torch.rand(()))


def ran(kind: type[Small], execution: str, folder: Path) -> Bundle:
    subject, how = from_model(kind()), parse(execution)
    writer = Writer(folder=folder)
    head = {"execution": {**asdict(how), "flags": list(how.flags)}, "words": how.words, "weights": "bfloat16", "job": {"spec": "it"}}
    writer.open(head | {"environment": plain(environment(seed=0, command="test")), "subject": plain(subject.info())})
    judged = how.dtype != "float64"
    options = Options(judged=judged, journal=False, repeat=judged)
    run_parity(subject, how, cases_of(subject, ("long", "step")), writer, tell=lambda *_, **__: None, options=options, weights="bfloat16")
    writer.close()
    return read_bundle(folder)


def told(kind: type[Small], folder: Path) -> tuple[str, list[Finding], float]:
    """(verdict, findings, drift of the logits) of bfloat16 against float64."""
    left, right = ran(kind, "cpu,float64", folder / "left"), ran(kind, "cpu,bfloat16", folder / "right")
    comparison = compare(left, right)
    drift = next(row["drift"] for row in comparison.section["results"] if row["what"] == "logits")
    return comparison.section["verdict"], findings(comparison, right, scripts=None), drift


@pytest.mark.parametrize(("kind", "name"), [(Statistic, "running"), (Counter, "calls")])
def test_what_a_forward_changes_is_named_and_the_two_sides_agree(kind: type[Small], name: str, tmp_path: Path) -> None:
    verdict, found, drift = told(kind, tmp_path)
    assert verdict == "agrees"
    assert drift < 0.02  # roundings of bfloat16, and not another state on either side
    (finding,) = found
    assert (finding.probe, finding.severity) == ("parity.determinism", "warning")
    assert finding.message == f"called again on cpu bfloat16, the model gives other numbers: a forward in eval mode changes {name}"


@pytest.mark.parametrize("kind", [Table, Noisy])
def test_a_table_that_grows_and_a_random_number_are_no_finding(kind: type[Small], tmp_path: Path) -> None:
    verdict, found, drift = told(kind, tmp_path)
    assert (verdict, found) == ("agrees", [])
    assert drift < 0.02


def test_a_state_that_nobody_can_put_back_is_told_at_the_op_that_reads_it(tmp_path: Path) -> None:
    _, found, _ = told(Global, tmp_path)
    (finding,) = found
    assert (finding.probe, finding.where.op, finding.where.function) == ("parity.determinism", "mul", "Global.scale")
    assert "changes from one run to the next: other" in finding.message
    assert "no kernel is at fault" in (finding.cause or "")
