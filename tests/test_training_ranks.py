"""`olmodebug train` on several ranks: the losses of one process, resumable with another number, and a bad end that names its rank."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from olmodebug.compare import roundings_limit
from olmodebug.group import Rank, first_to_fail, lost_a_peer
from olmodebug.process import Death
from olmodebug.training.world import World
from tests.command import run_here

ROOT = Path(__file__).parents[1]
SMALL = ("--batch-size", "4", "--seq-len", "16", "--dtype", "float32", "--timeout", "120")
MODEL = """
    import os, time
    import torch
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head, self.calls = nn.Embedding(300, 8), nn.Linear(8, 300, bias=False), 0

        def forward(self, input_ids):
            hidden = self.embed(input_ids)
            if self.training and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
                self.calls += 1
                if self.calls == 2:
                    {what}
            return self.head(hidden)
"""

IN_DOUBLE = """
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(48, 16)

        def forward(self, x):
            past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
            return x + self.down(self.up(self.norm(past)).relu())

    class Tiny(nn.Module):  # a biased head: its loss is the plain one, in the model's own dtype
        def __init__(self):
            super().__init__()
            self.embed, self.blocks, self.head = nn.Embedding(300, 16), nn.ModuleList(Block() for _ in range(2)), nn.Linear(16, 300)
            self.double()

        def forward(self, input_ids):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)
"""


def train(folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    """(exit status, the training section of the report with its findings)."""
    data = folder / "a.jsonl"
    data.write_text("".join(json.dumps({"text": f"the cat number {i} sees the dog number {7 * i}. " * 3}) + "\n" for i in range(40)))
    line = ["train", "--data", str(data), *SMALL, *arguments, "--json", "report.json"]
    if launcher:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launcher, "olmodebug", *line]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    else:
        done = run_here(folder, *line)
    assert (folder / "report.json").is_file(), done.stderr
    report = json.loads((folder / "report.json").read_text())
    [run] = report["sections"]["training"]["runs"]
    return done.returncode, {**run, "findings": [f for f in report["findings"] if f["severity"] == "error"]}


def losses(run: dict[str, Any]) -> list[float]:
    return [step["loss"] for step in run["steps"]]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The losses of each step, and what they lead to: a rounding in the sums of the first step is carried by those after it."""
    limit = roundings_limit({"float32"})
    assert len(losses(one)) == len(losses(other))
    for step, (a, b) in enumerate(zip(losses(one), losses(other), strict=True), start=1):
        assert a == pytest.approx(b, rel=limit * step), step
    after = [run["evaluated"]["validation_after"]["perplexity"] for run in (one, other)]
    assert after[0] == pytest.approx(after[1], rel=limit * len(losses(one)) * 10)


def test_ranks_share_a_batch_without_overlap_and_nothing_is_left_out() -> None:
    batch = torch.arange(7 * 5).reshape(7, 5)
    for size in (1, 2, 3, 7):
        worlds = [World(rank=rank, size=size) for rank in range(size)]
        dealt = torch.cat([world.rows(batch) for world in worlds])
        assert sorted(map(tuple, dealt.tolist())) == sorted(map(tuple, batch.tolist()))
        assert sum(world.share(batch) for world in worlds) == pytest.approx(1.0, abs=1e-12)


def test_the_rank_that_began_a_bad_end_is_named_and_not_the_one_that_lost_it() -> None:
    lost = Rank(number=0, raised={"lost_a_peer": True, "text": "Connection closed by peer"}, ended_at=1.0)
    died = Rank(number=1, death=Death(text="died of SIGABRT", signal=6), ended_at=2.0)
    late = Rank(number=2, death=Death(text="was still running"), abandoned=True, ended_at=3.0)
    assert first_to_fail([lost, died, late]) is died
    assert first_to_fail([lost, late]) is late
    assert first_to_fail([Rank(number=0, ended_at=1.0)]) is None
    assert lost_a_peer(RuntimeError("Connection closed by peer [127.0.0.1]:1")) and not lost_a_peer(ValueError("shape"))


def double_model(folder: Path, recipe: str, steps: int) -> tuple[str, ...]:
    """The arguments that train a model in float64 on batches that two ranks and three share unequally."""
    (folder / "double.py").write_text(textwrap.dedent(IN_DOUBLE))
    return ("double.py:Tiny", "--recipe", recipe, "--steps", str(steps), "--batch-size", "5")


def test_two_ranks_have_the_losses_of_one_process_in_float64(tmp_path: Path) -> None:
    common = double_model(tmp_path, "olmodebug", 4)
    code, alone = train(tmp_path, *common)
    assert code == 0
    code, both = train(tmp_path, *common, "--ranks", "2", "--strategy", "fsdp", "--output", str(tmp_path / "both"))
    assert code == 0
    assert losses(alone) == pytest.approx(losses(both), rel=1e-12)
    assert losses(alone)[3] < losses(alone)[0]
    state = torch.load(tmp_path / "both" / "resume.pt", weights_only=True)
    assert state["model"]["blocks.0.up.weight"].shape == (48, 16)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("recipe", ["short", "olmodebug"])
def test_every_strategy_and_recipe_has_the_losses_of_one_process(tmp_path: Path, strategy: str, recipe: str) -> None:
    common = double_model(tmp_path, recipe, 6)
    alone = train(tmp_path, *common)[1]
    spread = train(tmp_path, *common, "--ranks", "3", "--strategy", strategy)[1]
    assert losses(alone) == pytest.approx(losses(spread), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_in_float32_the_losses_of_one_process_to_its_rounding(tmp_path: Path, strategy: str) -> None:
    common = ("olmo1-tiny", "--config", "vocab_size=300", "--recipe", "short", "--steps", "4")
    assert_same(train(tmp_path, *common)[1], train(tmp_path, *common, "--ranks", "3", "--strategy", strategy)[1])


@pytest.mark.slow
def test_a_run_with_muon_goes_on_over_shards_as_it_began_in_one_process(tmp_path: Path) -> None:
    common = double_model(tmp_path, "olmodebug", 6)
    whole = train(tmp_path, *common)[1]
    partial = train_until(tmp_path, 3, *common, "--save-every", "3")
    code, resumed = train(tmp_path, *common, "--resume", partial, "--ranks", "2", "--strategy", "fsdp")
    assert code == 0
    assert losses(whole) == pytest.approx(losses(resumed), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(("--ranks", "2", "--strategy", "fsdp"), ()), ((), ("--ranks", "2", "--strategy", "ddp"))])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    whole = train(tmp_path, "olmo1-tiny", "--config", "vocab_size=300", "--recipe", "short", "--steps", "6")[1]
    state = str(tmp_path / "state")
    stopped = ("olmo1-tiny", "--config", "vocab_size=300", "--recipe", "short", "--steps", "6", "--save-every", "3")
    train(tmp_path, *stopped, "--output", state, *before)
    # the state of the whole run is that of its end; one from the middle is had by taking it away after the third step
    middle = torch.load(tmp_path / "state" / "resume.pt", weights_only=True)
    assert middle["step"] == 6
    partial = train_until(tmp_path, 3, *stopped, *before)
    code, resumed = train(tmp_path, *stopped, "--resume", partial, *after)
    assert code == 0
    assert_same(whole, resumed)


def train_until(folder: Path, step: int, *arguments: str) -> str:
    """The folder of a run that was killed after a step whose state was saved."""
    home = folder / "killed"
    data = folder / "a.jsonl"
    command = [sys.executable, "-m", "olmodebug", "train", "--data", str(data), *SMALL, *arguments, "--output", str(home)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(f"step {step + 1} of"):
                break
        process.kill()
    assert torch.load(home / "resume.pt", weights_only=True)["step"] >= step
    return str(home)


@pytest.mark.slow
def test_torchrun_starts_the_ranks_and_the_first_reports(tmp_path: Path) -> None:
    common = ("olmo1-tiny", "--config", "vocab_size=300", "--recipe", "short", "--steps", "4")
    alone = train(tmp_path, *common)[1]
    code, spread = train(tmp_path, *common, launcher=("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"))
    assert code == 0
    assert_same(alone, spread)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "words", "seconds"),
    [
        ("os.abort()", "rank 1 died of SIGABRT at step 2", "120"),
        ("raise ValueError('of my own')", "rank 1: step 2 raises: forward raises ValueError: of my own", "120"),
        ("time.sleep(1000)", "rank 1", "12"),
    ],
)
def test_a_rank_that_dies_raises_or_hangs_is_named_with_its_line(tmp_path: Path, what: str, words: str, seconds: str) -> None:
    (tmp_path / "model.py").write_text(textwrap.dedent(MODEL).format(what=what))
    code, run = train(tmp_path, "model.py:Tiny", "--steps", "4", "--ranks", "2", "--timeout", seconds)
    [finding] = run["findings"]
    assert code == 1 and words in finding["message"]
    assert finding["where"]["file"].endswith("model.py")
    assert len(run["steps"]) == 1
