"""Hand-written data, tensor and sequence parallelism for the nanoGPT-style model, clean and broken, as people write it.

Each wrapper is `wrap(model, mesh)` for `--launch`; `MUTANTS` says what must be found on each broken one, `CLEAN` lists
the right ones.
"""
# ruff: noqa: N801

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """`place` must occur in the finding's module, function or op; one of `words` in its message or cause."""

    wrap: str
    row: str
    probe: str
    place: str
    words: tuple[str, ...]


# --- data parallel, gradients averaged by hand


def loss_of(model, idx, targets):
    logits, _ = model(idx, idx)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def average_gradients(model, *, skip=(), times=1.0):
    for name, p in model.named_parameters():
        if p.grad is not None and not any(s in name for s in skip):
            dist.all_reduce(p.grad)
            p.grad.mul_(times / dist.get_world_size())


def clip(model, max_norm=0.5):
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def my_rows(batch):
    rank, world = dist.get_rank(), dist.get_world_size()
    return batch["input_ids"][rank::world].contiguous(), batch["labels"][rank::world].contiguous()


def counted(labels):
    return (labels[:, 1:] != -100).sum()


def data_parallel(rows=my_rows, normalise="global", reduce=average_gradients, clip_first=False, lr_of_rank=None):
    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        idx, targets = rows(batch)
        summed = loss_of(model, idx, targets)
        share = dist.get_world_size() / counted(batch["labels"]) if normalise == "global" else 1 / counted(targets)
        loss = summed * share
        loss.backward()
        if clip_first:
            norm = clip(model)
            reduce(model)
        else:
            reduce(model)
            norm = clip(model)
        if lr_of_rank is not None:
            optimizer.param_groups[0]["lr"] = lr_of_rank(dist.get_rank())
        optimizer.step()
        return {"loss": loss.detach(), "grad_norm": norm}

    return train_step


def clean_data_parallel(model, mesh):
    return model, data_parallel()


def clean_micro_batches(model, mesh):
    """Two micro-batches a step, summed before the gradients are averaged."""

    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        idx, targets = my_rows(batch)
        for i in range(len(idx)):
            (loss_of(model, idx[i : i + 1], targets[i : i + 1]) * dist.get_world_size() / counted(batch["labels"])).backward()
        average_gradients(model)
        norm = clip(model)
        optimizer.step()
        return {"grad_norm": norm}

    return model, train_step


def per_rank_mean(model, mesh):
    return model, data_parallel(normalise="local")


def same_batch_everywhere(model, mesh):
    return model, data_parallel(rows=lambda batch: (batch["input_ids"][:2], batch["labels"][:2]))


def rows_dropped(model, mesh):
    rank = dist.get_rank()
    return model, data_parallel(rows=lambda batch: (batch["input_ids"][rank : rank + 1], batch["labels"][rank : rank + 1]))


def gradients_never_reduced(model, mesh):
    return model, data_parallel(reduce=lambda model: None)


def head_not_reduced(model, mesh):
    return model, data_parallel(reduce=lambda model: average_gradients(model, skip=("ln_f",)))


def summed_not_averaged(model, mesh):
    return model, data_parallel(reduce=lambda model: average_gradients(model, times=dist.get_world_size()), clip_first=False)


def averaged_twice(model, mesh):
    return model, data_parallel(reduce=lambda model: average_gradients(model, times=1 / dist.get_world_size()))


def clipped_before_reducing(model, mesh):
    return model, data_parallel(clip_first=True)


def learning_rate_by_rank(model, mesh):
    return model, data_parallel(lr_of_rank=lambda rank: 0.1 / (rank + 1))


def replicas_initialised_apart(model, mesh):
    torch.manual_seed(1234 + dist.get_rank())
    model.apply(model._init_weights)
    return model, data_parallel()


def no_sync_all_the_way(model, mesh):
    ddp = nn.parallel.DistributedDataParallel(model)
    step = data_parallel(reduce=lambda model: None)

    def train_step(model, optimizer, batch):
        with model.no_sync():
            return step(model, optimizer, batch)

    return ddp, train_step


def norm_of_the_shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    model = fully_shard(model, mesh=mesh)

    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        idx, targets = my_rows(batch)
        (loss_of(model, idx, targets) * dist.get_world_size() / counted(batch["labels"])).backward()
        local = [p.grad.to_local() for p in model.parameters()]
        norm = torch.sqrt(sum(g.pow(2).sum() for g in local))
        for g in local:
            g.mul_(min(1.0, 0.5 / float(norm)))
        optimizer.step()
        return {"grad_norm": norm}

    return model, train_step


# --- tensor parallel by hand: a column-parallel and a row-parallel linear around the MLP's GELU


class Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group=None):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group=None):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class ColumnParallelLinear(nn.Module):
    def __init__(self, linear, group=None):
        super().__init__()
        self.group, rank, world = group, dist.get_rank(group), dist.get_world_size(group)
        self.weight = nn.Parameter(linear.weight.detach().chunk(world, 0)[rank].clone())
        self.bias = nn.Parameter(linear.bias.detach().chunk(world, 0)[rank].clone())

    def forward(self, x):
        return F.linear(Copy.apply(x, self.group), self.weight, self.bias)


class ColumnParallelLinearUncopied(ColumnParallelLinear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    def __init__(self, linear, group=None):
        super().__init__()
        self.group, rank, world = group, dist.get_rank(group), dist.get_world_size(group)
        self.weight = nn.Parameter(linear.weight.detach().chunk(world, 1)[rank].clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x):
        return Reduce.apply(F.linear(x, self.weight), self.group) + self.bias


class RowParallelBiasTwice(RowParallelLinear):
    def forward(self, x):
        return Reduce.apply(F.linear(x, self.weight, self.bias))


class RowParallelBiasShared(RowParallelLinear):
    def forward(self, x):
        return Reduce.apply(F.linear(x, self.weight, self.bias / dist.get_world_size()))


class RowParallelUnreduced(RowParallelLinear):
    def forward(self, x):
        return F.linear(x, self.weight) + self.bias / dist.get_world_size()


class RowParallelWrongShard(RowParallelLinear):
    def __init__(self, linear):
        super().__init__(linear)
        world, rank = dist.get_world_size(), dist.get_rank()
        self.weight = nn.Parameter(linear.weight.detach().chunk(world, 1)[world - 1 - rank].clone())


def tensor_parallel(model, *, column=ColumnParallelLinear, row=RowParallelLinear):
    for block in model.transformer.h:
        block.mlp.c_fc = column(block.mlp.c_fc)
        block.mlp.c_proj = row(block.mlp.c_proj)
    return model


def clean_tensor_parallel(model, mesh):
    return tensor_parallel(model)


def bias_on_each_rank(model, mesh):
    return tensor_parallel(model, row=RowParallelBiasTwice)


def bias_divided_by_ranks(model, mesh):
    return tensor_parallel(model, row=RowParallelBiasShared)


def row_parallel_unreduced(model, mesh):
    return tensor_parallel(model, row=RowParallelUnreduced)


def shards_swapped(model, mesh):
    return tensor_parallel(model, row=RowParallelWrongShard)


def input_gradient_not_reduced(model, mesh):
    return tensor_parallel(model, column=ColumnParallelLinearUncopied)


def clean_rows_by_heads(model, mesh):
    """Two mesh dimensions of plain tensors: each pair of ranks has its rows, and splits the MLP between its two."""
    group = mesh["tp"].get_group()
    tensor_parallel(model, column=lambda linear: ColumnParallelLinear(linear, group), row=lambda linear: RowParallelLinear(linear, group))

    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        rank, world = mesh["dp"].get_local_rank(), mesh["dp"].size()
        rows = [batch[name][rank::world].contiguous() for name in ("input_ids", "labels")]
        loss = loss_of(model, *rows) / counted(batch["labels"])
        loss.backward()
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad, group=mesh["dp"].get_group())
        optimizer.step()
        return {}

    return model, train_step


def flat_shards(model, mesh):
    """The first FSDP: weights are flat pieces without a layout, and some ranks hold nothing of some."""
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def flat_weights(model, mesh):
    """The same with one flat weight in the place of all."""
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def own_mesh(model, mesh):
    own = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {f"transformer.h.0.mlp.{name}": style for name, style in (("c_fc", ColwiseParallel()), ("c_proj", RowwiseParallel()))}
    return fully_shard(parallelize_module(model, own["tp"], plan), mesh=own["dp"])


# --- sequence parallel: each rank norms its part of the sequence


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, length):
        world = dist.get_world_size()
        sizes = [len(part) for part in torch.arange(length).tensor_split(world)]
        ctx.sizes = sizes
        padded = F.pad(x, (0, 0, 0, max(sizes) - x.shape[1]))
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    @staticmethod
    def backward(ctx, grad):
        return grad.split(ctx.sizes, dim=1)[dist.get_rank()], None


class Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.tensor_split(dist.get_world_size(), dim=1)[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx, grad):
        length = torch.tensor(grad.shape[1])
        dist.all_reduce(length)
        return Gather.apply(grad, int(length))


class SequenceParallelNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x):
        part = Scatter.apply(x)
        return Gather.apply(F.layer_norm(part, self.weight.shape, self.weight, self.bias, 1e-5), x.shape[1])


def sequence_parallel(model, *, reduced):
    for block in model.transformer.h:
        block.ln_2 = SequenceParallelNorm(block.ln_2)

    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        loss = loss_of(model, batch["input_ids"], batch["labels"]) / counted(batch["labels"])
        loss.backward()
        if reduced:
            for block in model.transformer.h:
                for p in block.ln_2.parameters():
                    dist.all_reduce(p.grad)
        norm = clip(model)
        optimizer.step()
        return {"loss": loss.detach(), "grad_norm": norm}

    return model, train_step


def clean_sequence_parallel(model, mesh):
    return sequence_parallel(model, reduced=True)


def norm_gradients_not_reduced(model, mesh):
    return sequence_parallel(model, reduced=False)


# --- the loss over a split vocabulary


def vocabulary_summed_twice(model, mesh):
    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        idx, targets = batch["input_ids"], batch["labels"]
        logits, _ = model(idx, idx)
        flat, wanted = logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
        keep = wanted != -100
        total = flat.exp().sum(-1) * dist.get_world_size()  # as an all_reduce over logits that are whole already
        loss = (total.log() - flat.gather(1, wanted.clamp(min=0)[:, None])[:, 0])[keep].mean()
        loss.backward()
        norm = clip(model)
        optimizer.step()
        return {"loss": loss.detach(), "grad_norm": norm}

    return model, train_step


# --- ranks that do not keep step


def collective_on_one_rank(model, mesh):
    step = data_parallel()

    def train_step(model, optimizer, batch):
        if dist.get_rank() == 0:
            dist.all_reduce(torch.zeros(3))
            dist.barrier()
        return step(model, optimizer, batch)

    return model, train_step


def collective_at_the_end_on_one_rank(model, mesh):
    step = data_parallel()

    def train_step(model, optimizer, batch):
        result = step(model, optimizer, batch)
        if dist.get_rank() == 0:
            dist.all_reduce(result["loss"])
        return result

    return model, train_step


def rank_dies(model, mesh):
    step = data_parallel()

    def train_step(model, optimizer, batch):
        if dist.get_rank() == 1:
            os._exit(7)
        return step(model, optimizer, batch)

    return model, train_step


def rank_raises(model, mesh):
    step = data_parallel()

    def train_step(model, optimizer, batch):
        if dist.get_rank() == 1:
            raise ValueError("the shard of rank 1 is empty")
        return step(model, optimizer, batch)

    return model, train_step


def rank_sleeps(model, mesh):
    step = data_parallel()

    def train_step(model, optimizer, batch):
        if dist.get_rank() == 1:
            time.sleep(3600)
        return step(model, optimizer, batch)

    return model, train_step


def weights_copied_stale(model, mesh):
    """The optimizer steps on a copy, as when it is made before the model is replaced."""
    stale = copy.deepcopy(model)
    step = data_parallel()

    def train_step(model, optimizer, batch):
        old = torch.optim.SGD(stale.parameters(), lr=0.1)
        result = step(model, optimizer, batch)
        with torch.no_grad():
            for p, q in zip(model.parameters(), stale.parameters(), strict=True):
                p.copy_(q)
        old.step()
        return result

    return model, train_step


CLEAN = ("clean_data_parallel", "clean_micro_batches", "clean_tensor_parallel", "clean_sequence_parallel")

MUTANTS = (
    Mutant(
        wrap="bias_on_each_rank", row="D01", probe="ranks.forward-agrees", place="transformer.h.0.mlp.c_proj", words=("once on each rank",)
    ),
    Mutant(
        wrap="bias_divided_by_ranks",
        row="D02",
        probe="ranks.gradients-agree",
        place="mlp.c_proj",
        words=("times 0.5", "divided by the number of ranks"),
    ),
    Mutant(wrap="norm_gradients_not_reduced", row="D03", probe="ranks.gradients-agree", place="ln_2", words=("share",)),
    Mutant(wrap="vocabulary_summed_twice", row="D06", probe="ranks.loss-agrees", place="", words=("ln 2",)),
    Mutant(wrap="same_batch_everywhere", row="D07", probe="ranks.same-data", place="", words=("same rows",)),
    Mutant(wrap="rows_dropped", row="D07", probe="ranks.same-data", place="", words=("no rank",)),
    Mutant(wrap="per_rank_mean", row="L07", probe="ranks.gradients-agree", place="", words=("own mean",)),
    Mutant(wrap="no_sync_all_the_way", row="T06", probe="ranks.gradients-agree", place="", words=("own rows",)),
    Mutant(wrap="gradients_never_reduced", row="T06", probe="ranks.gradients-agree", place="", words=("own rows",)),
    Mutant(wrap="head_not_reduced", row="D03", probe="ranks.gradients-agree", place="transformer.ln_f", words=("own rows",)),
    Mutant(wrap="summed_not_averaged", row="D02", probe="ranks.gradients-agree", place="", words=("summed",)),
    Mutant(wrap="averaged_twice", row="D02", probe="ranks.gradients-agree", place="", words=("once too often",)),
    Mutant(wrap="clipped_before_reducing", row="T11", probe="ranks.gradients-agree", place="", words=("gradient",)),
    Mutant(wrap="norm_of_the_shard", row="T11", probe="ranks.norm-agrees", place="", words=("own shards",)),
    Mutant(wrap="replicas_initialised_apart", row="I05", probe="ranks.same-start", place="", words=("initialised apart",)),
    Mutant(wrap="row_parallel_unreduced", row="D01", probe="ranks.forward-agrees", place="mlp.c_proj", words=("all_reduce is missing",)),
    Mutant(wrap="shards_swapped", row="D01", probe="ranks.same-start", place="mlp.c_proj", words=("shards",)),
    Mutant(wrap="input_gradient_not_reduced", row="D03", probe="ranks.gradients-agree", place="ln_2", words=("gradient",)),
    Mutant(wrap="learning_rate_by_rank", row="T06", probe="ranks.step-agrees", place="", words=("after the step",)),
    Mutant(wrap="weights_copied_stale", row="T12", probe="ranks.step-agrees", place="", words=("changed no weight",)),
    Mutant(
        wrap="collective_on_one_rank", row="-", probe="ranks.step-completes", place="collective_on_one_rank", words=("same collectives",)
    ),
    Mutant(
        wrap="collective_at_the_end_on_one_rank",
        row="-",
        probe="ranks.step-completes",
        place="collective_at_the_end_on_one_rank",
        words=("rank 1 does not come to the collective that rank 0 is in",),
    ),
    Mutant(wrap="rank_dies", row="-", probe="ranks.step-completes", place="average_gradients", words=("exit status 7",)),
    Mutant(wrap="rank_raises", row="-", probe="ranks.step-completes", place="rank_raises", words=("rank 1 raised",)),
    Mutant(wrap="rank_sleeps", row="-", probe="ranks.step-completes", place="train_step", words=("rank 1",)),
)
