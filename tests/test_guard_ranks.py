"""Faults of training on several processes: a tie that FSDP2 wrapping does not keep, and ranks that mp.spawn starts."""

from pathlib import Path

import pytest

from .test_guard_run import run_script

TIED = """
    import sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(31, 16), nn.Linear(16, 16), nn.Linear(16, 31, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.body(self.embed(ids)))

    def rank(number, folder):
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
        torch.manual_seed(0)
        with torch.device("meta"):
            model = Model()
        WRAP
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(SEED)
        for _ in range(5):
            model(torch.randint(0, 31, (2, 5))).logsumexp(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        dist.destroy_process_group()

    if __name__ == "__main__":
        torch.multiprocessing.spawn(rank, args=(sys.path[0],), nprocs=2)
"""
EMPTIED_FIRST = 'model.to_empty(device="cpu")\n        fully_shard(model)'
SHARDED_FIRST = 'fully_shard(model)\n        model.to_empty(device="cpu")'


@pytest.mark.slow
@pytest.mark.parametrize(("wrap", "lost"), [(EMPTIED_FIRST, True), (SHARDED_FIRST, False)], ids=["emptied-first", "sharded-first"])
def test_a_tie_that_is_lost_on_the_way_into_fsdp2_is_told(tmp_path: Path, wrap: str, lost: bool) -> None:
    done, report = run_script(tmp_path, TIED.replace("WRAP", wrap).replace("SEED", "number"))
    assert done.returncode == int(lost), done.stderr[-2000:]
    assert [(f.probe, f.where.line) for f in report.findings] == ([("loop.ties-kept", 22)] if lost else [])


@pytest.mark.slow
def test_a_bad_token_on_a_spawned_rank_is_told_at_its_line(tmp_path: Path) -> None:
    text = TIED.replace("WRAP", SHARDED_FIRST).replace("SEED", "0").replace("randint(0, 31, (2, 5))", "randint(0, 31, (2, 5)) + 9 * number")
    done, report = run_script(tmp_path, text)
    assert done.returncode == 1
    bad = [f for f in report.findings if f.probe == "index.in-bounds"]
    assert [(f.severity, f.where.line, f.where.function) for f in bad] == [("error", 15, "Model.forward")]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "same"), [("0", True), ("number", False)])
def test_spawned_ranks_that_see_the_same_batches_are_told(tmp_path: Path, seed: str, same: bool) -> None:
    wrap = 'model.to_empty(device="cpu")\n        model.head.weight = model.embed.weight\n        model = nn.parallel.DistributedDataParallel(model)'
    done, report = run_script(tmp_path, TIED.replace("WRAP", wrap).replace("SEED", seed))
    assert [(f.probe, f.evidence["ranks"]) for f in report.findings] == ([("loop.ranks-see-different-data", "0, 1")] if same else [])
    assert done.returncode == int(same), done.stderr[-2000:]
