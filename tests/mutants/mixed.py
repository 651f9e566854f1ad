"""Wrappers that mix: accumulation under DDP, precision policies, tensor parallelism, replicated
shards, checkpointed activations. Each is `wrap(model, mesh)` for `--launch`; the model is the nanoGPT-style one, or
transformers' Llama for what splits heads.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tests.mutants.parallel import Mutant, counted, loss_of, my_rows
from tests.mutants.pipeline import GPTStage, summed


def step_of(*, backward=None, after=None, loss=loss_of):
    """A step on this rank's rows, with the loss over the labels of all ranks."""

    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        ids, labels = my_rows(batch)
        share = dist.get_world_size() / counted(batch["labels"])
        if backward is None:
            (loss(model, ids, labels) * share).backward()
        else:
            backward(model, ids, labels, share)
        if after is not None:
            after(model)
        optimizer.step()
        return {}

    return train_step


# --- DDP with accumulated gradients


def accumulate(model, ids, labels, share):
    for i in range(len(ids)):
        model.require_backward_grad_sync = i == len(ids) - 1
        (loss_of(model, ids[i : i + 1], labels[i : i + 1]) * share).backward()


def accumulate_under_no_sync(model, ids, labels, share):
    with model.no_sync():
        for i in range(len(ids) - 1):
            (loss_of(model, ids[i : i + 1], labels[i : i + 1]) * share).backward()
    (loss_of(model, ids[-1:], labels[-1:]) * share).backward()


def accumulate_flag_late(model, ids, labels, share):
    """The flag is set after the forward, which has read it already: the last micro-batch does not synchronise."""
    for i in range(len(ids)):
        loss = loss_of(model, ids[i : i + 1], labels[i : i + 1]) * share
        model.require_backward_grad_sync = i == len(ids) - 1
        loss.backward()
        model.require_backward_grad_sync = False


def clean_accumulation(model, mesh):
    return DistributedDataParallel(model), step_of(backward=accumulate_under_no_sync)


def clean_accumulation_by_flag(model, mesh):
    return DistributedDataParallel(model), step_of(backward=accumulate)


def flag_set_after_the_forward(model, mesh):
    model = DistributedDataParallel(model)
    model.require_backward_grad_sync = False
    return model, step_of(backward=accumulate_flag_late)


# --- FSDP2 with a policy for precision


def sharded(model, mesh, **options):
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def clean_reduced_in_float64(model, mesh):
    return sharded(model, mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float64)), step_of()


def clean_in_bfloat16(model, mesh):
    return sharded(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)), step_of()


def reduced_and_not_averaged(model, mesh):
    """The gradients are averaged by the wrapper, and multiplied by the ranks once more."""

    def more(model):
        for p in model.parameters():
            p.grad.mul_(dist.get_world_size())

    return sharded(model, mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float64)), step_of(after=more)


def clean_offloaded(model, mesh):
    return sharded(model, mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)), step_of()


# --- compiled


def clean_compiled(model, mesh):
    return torch.compile(DistributedDataParallel(model), backend="aot_eager"), step_of()


def clean_compiled_in_shards(model, mesh):
    for block in model.transformer.h:
        block.compile(backend="aot_eager")
    return sharded(model, mesh), step_of()


# --- shards with replicas, on four ranks


def hybrid(model):
    return sharded(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def clean_hybrid(model, mesh):
    return hybrid(model), step_of()


def hybrid_initialised_apart(model, mesh):
    torch.manual_seed(dist.get_rank() // 2)  # one seed a replica, and nothing broadcasts
    model.apply(model._init_weights)
    return hybrid(model), step_of()


# --- replicas of a pipeline, on four ranks


def replicated_pipeline(model, dims, *, reduced=True):
    """Two stages by two replicas; `dims` names the dimensions of the mesh, the outer one first."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=dims)
    number, replica = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    blocks = range(len(model.transformer.h))[number : None if number else 1]
    stage = GPTStage(model, blocks, first=number == 0, last=number == 1)

    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        ids, labels = batch["input_ids"][replica::2], batch["labels"][replica::2]
        share = 1 / counted(batch["labels"])
        schedule = ScheduleGPipe(
            PipelineStage(model, number, 2, torch.device("cpu"), group=mesh.get_group("pp")),
            n_microbatches=2,
            loss_fn=lambda logits, target: summed(logits, target) * share,
            scale_grads=False,
        )
        if number == 0:
            schedule.step(ids)
        else:
            schedule.step(target=labels)
        tied = model.transformer.wte.weight if number == 0 else model.lm_head.weight
        dist.all_reduce(tied.grad, group=mesh.get_group("pp"))
        if reduced:
            for p in model.parameters():
                dist.all_reduce(p.grad, group=mesh.get_group("dp"))
        optimizer.step()
        return {}

    return stage, train_step


def clean_replicas_of_a_pipeline(model, mesh):
    return replicated_pipeline(model, ("dp", "pp"))


def clean_pipeline_of_replicas(model, mesh):
    return replicated_pipeline(model, ("pp", "dp"))


def replicas_of_a_pipeline_apart(model, mesh):
    return replicated_pipeline(model, ("pp", "dp"), reduced=False)


# --- activations recomputed


def clean_checkpointed(model, mesh):
    for name, block in enumerate(model.transformer.h):
        model.transformer.h[name] = checkpoint_wrapper(block)
    assert isinstance(model.transformer.h[0], CheckpointWrapper)
    return DistributedDataParallel(model), step_of()


def checkpointed_gradients_never_reduced(model, mesh):
    for name, block in enumerate(model.transformer.h):
        model.transformer.h[name] = checkpoint_wrapper(block)
    return model, step_of()


# --- tensor and sequence parallel


def llama_loss(model, ids, labels):
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def all_rows(model, optimizer, batch):
    optimizer.zero_grad()
    (llama_loss(model, batch["input_ids"], batch["labels"]) / counted(batch["labels"])).backward()
    optimizer.step()
    return {}


def tensor_parallel(model, mesh, plan):
    return parallelize_module(model, mesh, plan)


def clean_tensor_parallel_mlp(model, mesh):
    """Tensor parallel MLPs whose input and output are split along the sequence, between norms and attention that see it whole."""
    plan = {}
    for i in range(len(model.model.layers)):
        name = f"model.layers.{i}"
        plan |= {
            f"{name}.mlp": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),), use_local_output=True),
            f"{name}.mlp.gate_proj": ColwiseParallel(),
            f"{name}.mlp.up_proj": ColwiseParallel(),
            f"{name}.mlp.down_proj": RowwiseParallel(),
        }
    return tensor_parallel(model, mesh, plan), all_rows


def clean_sequence_parallel_by_plan(model, mesh):
    """Norms and the residual stream split along the sequence, attention and MLP by heads and columns."""
    whole, split = Replicate(), Shard(1)
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=whole),
        "model.layers.0": PrepareModuleInput(input_layouts=(whole,), desired_input_layouts=(split,), use_local_output=True),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=split, output_layouts=whole),
    }
    for i in range(len(model.model.layers)):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        gathered = {"input_kwarg_layouts": {"hidden_states": split}, "desired_input_kwarg_layouts": {"hidden_states": whole}}
        plan |= {f"{attention}.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        plan |= {f"{mlp}.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
        plan |= {f"model.layers.{i}.{name}": SequenceParallel() for name in ("input_layernorm", "post_attention_layernorm")}
        plan |= {
            attention: PrepareModuleInput(**gathered),
            f"{attention}.o_proj": RowwiseParallel(output_layouts=split),
            mlp: PrepareModuleInput(input_layouts=(split,), desired_input_layouts=(whole,)),
            f"{mlp}.down_proj": RowwiseParallel(output_layouts=split),
        }
    return tensor_parallel(model, mesh, plan), all_rows


def sequence_parallel_norm_not_reduced(model, mesh):
    """A norm that sees its rank's part of the sequence, as a plain module: nothing sums its gradient."""
    model, step = clean_sequence_parallel_by_plan(model, mesh)
    norm = model.model.layers[1].post_attention_layernorm
    plain = type(norm)(norm.weight.shape[0], eps=norm.variance_epsilon)
    plain.weight = nn.Parameter(norm.weight.to_local().detach().clone())
    model.model.layers[1].post_attention_layernorm = plain
    return model, step


def row_parallel_without_its_sum(model, mesh):
    """The output of the second half of the MLP stays each rank's share."""
    model, step = clean_tensor_parallel_mlp(model, mesh)
    down = model.model.layers[1].mlp.down_proj
    weight = nn.Parameter(down.weight.to_local().detach().clone())
    plain = nn.Linear(*reversed(weight.shape), bias=False)
    plain.weight = weight
    model.model.layers[1].mlp.down_proj = plain
    return model, step


LLAMA = "transformers:LlamaForCausalLM"
OF_LLAMA = (
    "clean_tensor_parallel_mlp",
    "row_parallel_without_its_sum",
    "clean_sequence_parallel_by_plan",
    "sequence_parallel_norm_not_reduced",
)
ON_FOUR = (
    "clean_hybrid",
    "hybrid_initialised_apart",
    "clean_replicas_of_a_pipeline",
    "clean_pipeline_of_replicas",
    "replicas_of_a_pipeline_apart",
)
CLEAN = (
    "clean_accumulation",
    "clean_accumulation_by_flag",
    "clean_reduced_in_float64",
    "clean_in_bfloat16",
    "clean_offloaded",
    "clean_compiled",
    "clean_compiled_in_shards",
    "clean_hybrid",
    "clean_replicas_of_a_pipeline",
    "clean_pipeline_of_replicas",
    "clean_checkpointed",
    "clean_tensor_parallel_mlp",
    "clean_sequence_parallel_by_plan",
)

MUTANTS = (
    Mutant(wrap="flag_set_after_the_forward", row="T06", probe="ranks.gradients-agree", place="", words=("own rows",)),
    Mutant(wrap="reduced_and_not_averaged", row="D02", probe="ranks.gradients-agree", place="", words=("summed over ranks",)),
    Mutant(wrap="hybrid_initialised_apart", row="I05", probe="ranks.same-start", place="transformer.wte", words=("initialised apart",)),
    Mutant(wrap="replicas_of_a_pipeline_apart", row="T06", probe="ranks.gradients-agree", place="", words=("each rank keeps its share",)),
    Mutant(wrap="checkpointed_gradients_never_reduced", row="T06", probe="ranks.gradients-agree", place="", words=("own rows",)),
    Mutant(
        wrap="row_parallel_without_its_sum",
        row="D01",
        probe="ranks.forward-agrees",
        place="model.layers.1.mlp",
        words=("all_reduce is missing",),
    ),
    Mutant(
        wrap="sequence_parallel_norm_not_reduced",
        row="D03",
        probe="ranks.gradients-agree",
        place="model.layers.1.post_attention_layernorm",
        words=("each rank keeps its share",),
    ),
)
