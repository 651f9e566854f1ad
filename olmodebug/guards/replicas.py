"""What the ranks of a data-parallel training share, and what must differ: noted on each rank for the report on all of them."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ..records import Where
from ..sources import Spot
from .gradients import parameters, sample
from .part import Part
from .place import where_of

NOTED_STEP = 4  # by then a schedule has left a learning rate of 0
FEW_NUMBERS = 16  # a collective on no more than these carries a loss or a count, and no gradients

COLLECTIVES = (
    "allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_",
    "reduce_", "reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "broadcast_", "scatter_", "gather_",
    "alltoall_", "alltoall_base_", "send", "recv_", "recv_any_source_",
)  # fmt: skip
FUNCTIONAL = (
    "all_reduce", "all_reduce_", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast", "broadcast_",
)  # fmt: skip


class Replicas(Part):
    """At the fourth step of a rank: its batches, a digest of the weights, and whether the ranks have exchanged any since the first."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.first = ""  # digest of the weights before the first step
        self.exchanged = False
        self.synced = False
        self.last_synced = True  # whether the last backward before each step was one that averages
        self.syncs = True
        self.noted = False

    def listen(self) -> None:
        for ops, names in ((torch.ops.c10d, COLLECTIVES), (torch.ops._c10d_functional, FUNCTIONAL)):
            for name in names if torch.distributed.is_available() else ():
                if hasattr(ops, name):
                    self.watch.look(getattr(ops, name).default, self._collective)
        self.watch.events.on("backward", self._backward)
        self.watch.events.on("step", self._step)

    def _collective(self, args: Any, output: Any) -> None:
        self.exchanged = self.exchanged or any(t.numel() > FEW_NUMBERS for t in _tensors(args))

    def _backward(self, roots: list[Tensor], spot: Spot | None) -> None:
        if not self.noted and torch.distributed.is_available() and torch.distributed.is_initialized():
            self.syncs = any(m.require_backward_grad_sync for m in self._wrappers())
            self.synced = self.synced or self.syncs

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        if self.noted or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        self.last_synced = self.last_synced and self.syncs
        wrappers = self._wrappers()
        ignored = {id(p) for m in wrappers for name, p in m.module.named_parameters() if name in m.parameters_to_ignore}
        weights = [p for p in parameters(optimizer) if type(p.data) is Tensor and id(p) not in ignored]
        if not self.first:
            self.first, self.exchanged = _digest(weights), False
        steps = self.watch.batches()
        if len(steps) < NOTED_STEP:
            return
        self.noted = True
        where: Where = where_of(spot, op="step")
        self.watch.journal.tell(
            "batches",
            steps=[list(step) for step in steps[:NOTED_STEP]],
            replicated=bool(wrappers),
            rank=torch.distributed.get_rank(),  # mp.spawn sets no RANK before the process starts
            shapes=[list(p.shape) for p in weights],
            first=self.first,
            weights=_digest(weights),
            exchanged=self.exchanged,
            synced=self.synced,
            last_synced=self.last_synced,
            where={"file": where.file, "line": where.line, "function": where.function},
        )

    def _wrappers(self) -> list[nn.parallel.DistributedDataParallel]:
        return [root for root in self.watch.models.roots() if isinstance(root, nn.parallel.DistributedDataParallel)]


def _digest(weights: list[Tensor]) -> str:
    found = hashlib.sha256()
    for weight in weights:
        found.update(sample(weight).double().cpu().numpy().tobytes())
    return found.hexdigest()


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [t for item in tree for t in _tensors(item)] if isinstance(tree, (list, tuple)) else []
