"""The ways a model is spread over ranks here: DDP, FSDP2, tensor parallel, a pipeline, or the user's own wrapper.

Every strategy gives a model and a training step. The built-in step divides the loss by the number of labelled tokens of
the *global* batch, so that ranks with few of them do not count for more.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from ..errors import SubjectError, UsageError
from ..load import SubjectCodeError, load_attribute
from .pipeline import pipeline_step

STRATEGIES = ("ddp", "fsdp", "tp", "pp")
IGNORED = -100  # the label that does not count

# Adam's first update is the sign of the gradient: it hides one that is off by a factor. SGD shows it.
LEARNING_RATE, MOMENTUM = 0.1, 0.9

Batch = dict[str, Tensor]
Logits = Callable[[nn.Module, Tensor], Tensor]
Step = Callable[[nn.Module, optim.Optimizer, Batch], Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A model on the ranks and how it takes a step; `step` returns `loss` and `grad_norm` of this rank."""

    model: nn.Module
    step: Step


def spread(strategy: str, launch: str | None, model: nn.Module, mesh: Any, *, batch: Batch, logits: Logits) -> Spread:
    """The model under a strategy, or under the user's wrapper `file.py:wrap(model, mesh)`, which returns the parallel
    model, or it and a `train_step(model, optimizer, batch)` that gets the global batch."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if launch:
        wrap = load_attribute(launch)
        if not callable(wrap):
            raise SubjectError(f"--launch {launch} is no function; expected wrap(model, mesh)")
        try:
            made = wrap(model, mesh)
        except Exception as error:
            raise SubjectCodeError("wrap") from error
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1]):
            return Spread(model=made[0], step=made[1])
        if not isinstance(made, nn.Module):
            raise SubjectError(f"--launch {launch} returned a {type(made).__name__}; expected a model, or (model, train_step)")
    elif strategy == "ddp":
        made = nn.parallel.DistributedDataParallel(model)
    elif strategy == "fsdp":
        made = fully_sharded(_tensor_parallel(model, mesh["tp"]) if mesh.ndim > 1 else model, mesh["dp"] if mesh.ndim > 1 else mesh)
    elif strategy == "tp":
        made = _tensor_parallel(model, mesh)
    elif strategy == "pp":
        micro_batch, counted = len(batch["input_ids"]) // mesh.size(), int((batch["labels"][:, 1:] != IGNORED).sum())
        made, step = pipeline_step(model, batch, logits=logits, loss=summed_loss, micro_batch=micro_batch, counted=counted)
        return Spread(model=made, step=step)
    else:
        raise UsageError(f"--strategy {strategy}: expected {', '.join(STRATEGIES)}")
    shares_rows = _averages_gradients(made)
    if shares_rows and mesh.ndim == 1 and any(getattr(p, "device_mesh", mesh).ndim > 1 for p in made.parameters()):
        raise UsageError("the model lies on a mesh of two dimensions: give --mesh DPxTP, or return (model, train_step) from the wrapper")
    data = mesh["dp"] if mesh.ndim > 1 else mesh
    rank, world = data.get_local_rank(), data.size()
    rows = slice(rank, None, world) if shares_rows else slice(None)
    # Shards that are plain tensors do not tell that they are shards, and the first FSDP's are.
    knows_norm = not launch or (shares_rows and not isinstance(made, FullyShardedDataParallel))
    return Spread(
        model=made,
        step=global_mean_step(logits, rows=rows, world=world if shares_rows else 1, group=data.get_group(), knows_norm=knows_norm),
    )


def global_mean_step(logits: Logits, *, rows: slice, world: int, group: Any = None, knows_norm: bool = True) -> Step:
    """One step on these rows of the global batch. Gradients are averaged over the `world` ranks of a group by what wraps the model, so
    the sum of this rank's losses is divided by the labelled tokens of the whole batch and multiplied by `world`."""

    def step(model: nn.Module, optimizer: optim.Optimizer, batch: Batch) -> Mapping[str, Any]:
        optimizer.zero_grad()
        mine = {name: value[rows] for name, value in batch.items()}
        counted = int((batch["labels"][:, 1:] != IGNORED).sum())
        summed = summed_loss(logits(model, mine["input_ids"]), mine["labels"])
        (summed * world / counted).backward()
        loss = summed.detach().clone() / counted
        if world > 1:
            torch.distributed.all_reduce(loss, group=group)
        result = {"loss": loss} | ({"grad_norm": gradient_norm(model)} if knows_norm else {})
        optimizer.step()
        return result

    return step


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed cross-entropy of each position's logits `[batch, seq_len, vocab]` against the next label."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients. Sharded and plain ones may stand together, which torch's own function refuses."""
    squares = [p.grad.detach().double().pow(2).sum() for p in model.parameters() if p.grad is not None]
    whole = [s.full_tensor() if hasattr(s, "full_tensor") else s for s in squares]
    return torch.stack(whole).sum().sqrt()


def sgd(model: nn.Module) -> optim.Optimizer:
    """The optimizer of the compared step."""
    return optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, foreach=False)


def _averages_gradients(model: nn.Module) -> bool:
    """Whether the wrapper is one that gives each rank its own rows and averages gradients; all others see every row."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return isinstance(model, nn.parallel.DistributedDataParallel | FSDPModule | FullyShardedDataParallel)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The model's layers: the longest list of modules of one class."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    return max(lists, key=len, default=[])


def fully_sharded(model: nn.Module, mesh: Any) -> nn.Module:
    """The model under FSDP2: each block a group of its own, and what stands outside of them another."""
    from torch.distributed.fsdp import fully_shard

    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def _tensor_parallel(model: nn.Module, mesh: Any) -> nn.Module:
    """Attention and MLP split by the names that Llama's family uses. Where queries and keys are normed over all heads,
    the projections give their whole output, as in transformers' own plans for OLMo 2."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {}
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf == "self_attn" and hasattr(module, "q_proj"):
            _must_divide(name, module, mesh.size())
            whole = isinstance(getattr(module, "q_norm", None), nn.Module) and not isinstance(module.q_norm, nn.Identity)
            heads = {"output_layouts": Replicate()} if whole else {}
            merged = {"input_layouts": Replicate()} if whole else {}
            plan |= {f"{name}.{each}": ColwiseParallel(**heads) for each in ("q_proj", "k_proj", "v_proj")}  # type: ignore[arg-type]
            plan[f"{name}.o_proj"] = RowwiseParallel(**merged)  # type: ignore[arg-type]
        elif leaf == "mlp" and hasattr(module, "gate_proj"):
            plan |= {f"{name}.gate_proj": ColwiseParallel(), f"{name}.up_proj": ColwiseParallel(), f"{name}.down_proj": RowwiseParallel()}
    if not plan:
        raise UsageError("--strategy tp knows models with q_proj, k_proj, v_proj, o_proj and gate_proj, up_proj, down_proj; use --launch")
    return parallelize_module(model, mesh, plan)


def _must_divide(name: str, attention: Any, ranks: int) -> None:
    """UsageError where the heads of an attention cannot be dealt out to the ranks."""
    size = getattr(attention, "head_dim", None)
    for projection in ("q_proj", "k_proj"):
        heads = getattr(attention, projection).out_features // size if isinstance(size, int) and size else ranks
        if heads % ranks:
            raise UsageError(f"--strategy tp: {heads} heads of {name}.{projection} cannot be split over {ranks} ranks")
