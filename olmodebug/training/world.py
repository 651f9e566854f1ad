"""The ranks of a training run: which rows of a batch each takes, how the model is spread, and what all must agree on.

A batch means the same for every number of ranks: its windows are dealt out, each rank's loss counts by its share of the tokens,
and gradients are clipped by the norm of the whole. States are saved whole, so that a run goes on with any number of ranks.
"""

import faulthandler
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError

# Of the longest that a step may take: a rank that waits for another gives up before it counts as hanging itself.
PATIENCE_SHARE = 0.8
SECONDS_TO_TELL = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among the ranks of a run. A world of one needs no process group."""

    rank: int = 0
    size: int = 1
    strategy: str = "ddp"
    stacks: Path | None = None  # where the stack goes when this rank does not come to a collective in time
    patience_seconds: float = 0.0

    @property
    def leads(self) -> bool:
        """Whether this rank saves, evaluates and tells for all."""
        return self.rank == 0

    def rows(self, batch: Tensor) -> Tensor:
        """This rank's windows of a batch `[batch, seq_len]`: every window is one rank's."""
        return batch[self.rank :: self.size]

    def share(self, batch: Tensor) -> float:
        """This rank's part of the batch's predicted tokens. Windows are of one length, so it is that of the windows."""
        return len(self.rows(batch)) / len(batch)

    def spread(self, module: nn.Module) -> nn.Module:
        """The module as it is called on the ranks, whose backward leaves the gradients' mean over the ranks."""
        if self.size == 1:
            return module
        if self.strategy == "ddp":
            # An expert that no token of a rank chose gets no gradient there.
            return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
        from torch.distributed.device_mesh import init_device_mesh

        from ..ranks.parallel import fully_sharded

        device = next(module.parameters()).device.type
        return fully_sharded(module, init_device_mesh(device, (self.size,)))

    def sum(self, value: float) -> float:
        """The sum of a number over the ranks."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=_device())
        torch.distributed.all_reduce(total)
        return float(total)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return self.sum(float(flag)) > 0

    def watch(self) -> None:
        """A step begins: note where this rank is when it takes longer than the others wait for it."""
        if self.size > 1 and self.stacks is not None:
            late = self.stacks.open("a", encoding="utf-8")
            faulthandler.dump_traceback_later(self.patience_seconds + SECONDS_TO_TELL, file=late)


def join_world(order: Mapping[str, Any]) -> World:
    """Join the process group that the order describes; a world of one where it describes none.

    The ranks meet in a file that they share, or, under torchrun, at the address in the environment.
    """
    world = order["world"]
    if world["size"] == 1:
        return World()
    import torch.distributed as dist

    if world["strategy"] == "fsdp" and order["dtype"] == "float16":
        raise UsageError(
            "--strategy fsdp: the overflow of float16 gradients is not shared over the shards; use --dtype bfloat16, or --strategy ddp"
        )
    patience = order["timeout_seconds"] * PATIENCE_SHARE
    backend = "nccl" if str(order["job"]["device"]).startswith("cuda") else "gloo"
    meeting: dict[str, Any] = {"store": dist.FileStore(world["store"], world["size"])} if world["store"] else {}
    dist.init_process_group(backend, rank=world["rank"], world_size=world["size"], timeout=timedelta(seconds=patience), **meeting)
    return World(
        rank=world["rank"], size=world["size"], strategy=world["strategy"], stacks=Path(order["stacks"]), patience_seconds=patience
    )


def leave_world(world: World) -> None:
    """The ranks part: what follows is the leading one's alone."""
    if world.size > 1:
        faulthandler.cancel_dump_traceback_later()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def whole(value: Any) -> Any:
    """A sharded tensor with all of its elements, on every rank; anything else as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def replicated(value: Any) -> Any:
    """A sharded tensor laid out whole on every rank; anything else as it is."""
    if not hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import Replicate

    return value.redistribute(placements=[Replicate()] * value.device_mesh.ndim)


def gathered(tree: Any) -> Any:
    """A state (nested dicts and lists) with every sharded tensor whole, on the CPU."""
    return _mapped(tree, lambda value: whole(value).detach().cpu() if isinstance(value, Tensor) else value)


def dealt(state: dict[str, Any], like: Mapping[int, Tensor]) -> dict[str, Any]:
    """An optimizer's state that was saved whole, sharded as the parameters are: `like` gives them by their number."""

    def placed(value: Any, parameter: Tensor) -> Any:
        if not hasattr(parameter, "full_tensor") or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        return sharded_as(parameter, value)

    moments = {number: {name: placed(value, like[number]) for name, value in values.items()} for number, values in state["state"].items()}
    return {**state, "state": moments}


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Weights and buffers that were saved whole, into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: sharded_as(own[name], value) if name in own else value for name, value in state.items()})


def sharded_as(like: Tensor, value: Tensor) -> Tensor:
    """A whole tensor laid out as another one is."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(value, change) for value in tree)
    return change(tree)


def _device() -> torch.device:
    """Where a number must lie that the ranks add up."""
    return torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
