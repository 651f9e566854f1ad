"""Hand-written pipelines of two stages for the nanoGPT-style model and for transformers' Llama, clean and broken.

Each is `wrap(model, mesh)` for `--launch`, on two ranks; `MUTANTS` says what must be found on each broken one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from tests.mutants.parallel import Mutant, counted
from tests.mutants.parallel import clip as clip_to

MICRO_BATCHES = 4


def summed(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


class GPTStage(nn.Module):
    """The blocks of one stage under their own names; the first stage embeds, the last one has the head."""

    def __init__(self, model, blocks, *, first, last):
        super().__init__()
        whole = model.transformer
        self.transformer = nn.ModuleDict({"h": nn.ModuleDict({str(i): whole.h[i] for i in blocks})})
        if first:
            self.transformer.update({"wte": whole.wte, "wpe": whole.wpe})
        if last:
            self.transformer.update({"ln_f": whole.ln_f})
            self.lm_head = model.lm_head
        self.first, self.last = first, last

    def forward(self, x):
        if self.first:
            x = self.transformer.wte(x) + self.transformer.wpe(torch.arange(x.shape[1]))
        for block in self.transformer.h.values():
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x)) if self.last else x


class LlamaStage(nn.Module):
    def __init__(self, model, blocks, *, first, last):
        super().__init__()
        whole = model.model
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({str(i): whole.layers[i] for i in blocks})
        self.model.rotary_emb = whole.rotary_emb
        if first:
            self.model.embed_tokens = whole.embed_tokens
        if last:
            self.model.norm, self.lm_head = whole.norm, model.lm_head
        self.first, self.last = first, last

    def positions(self, x):
        return torch.arange(x.shape[1])[None]

    def forward(self, x):
        positions = self.positions(x)
        if self.first:
            x = self.model.embed_tokens(x)
        angles = self.model.rotary_emb(x, positions)
        for layer in self.model.layers.values():
            x = layer(x, position_embeddings=angles, position_ids=positions)
        return self.lm_head(self.model.norm(x)) if self.last else x


class LlamaStageWithoutPositions(LlamaStage):
    def positions(self, x):
        return super().positions(x) if self.first else torch.zeros(1, x.shape[1], dtype=torch.long)


def sum_tied(stage):
    """The embedding and the head are one weight on two ranks."""
    weight = stage.transformer.wte.weight if stage.first else stage.lm_head.weight
    dist.all_reduce(weight.grad)


def pipelined(
    model, *, kind=GPTStage, starts=(0, 1), ends=(1, None), schedule=ScheduleGPipe, times=1, tied=sum_tied, clip=None, labels_of=lambda x: x
):
    rank = dist.get_rank()
    layers = model.transformer.h if kind is GPTStage else model.model.layers
    blocks = range(len(layers))[starts[rank] : ends[rank]]
    stage = kind(model, blocks, first=rank == 0, last=rank == 1)

    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        ids, labels = batch["input_ids"], labels_of(batch["labels"])
        share = times / counted(labels)
        step = schedule(
            PipelineStage(model, rank, 2, torch.device("cpu")),
            n_microbatches=MICRO_BATCHES,
            loss_fn=lambda logits, target: summed(logits, target) * share,
            scale_grads=False,
        ).step
        losses = []
        if rank == 0:
            step(ids)
        else:
            step(target=labels, losses=losses)
        if tied is not None:
            tied(model)
        result = {"loss": sum(loss.detach() for loss in losses)} if losses else {}
        if clip is not None:
            result["grad_norm"] = clip(model)
        optimizer.step()
        return result

    return stage, train_step


def clean_pipeline(model, mesh):
    return pipelined(model)


def clean_pipeline_1f1b(model, mesh):
    return pipelined(model, schedule=Schedule1F1B)


def clean_pipeline_of_llama(model, mesh):
    return pipelined(model, kind=LlamaStage, tied=None)


def whole_norm(model):
    """The norm over all stages; the weight that both hold counts once."""
    own = [p for name, p in model.named_parameters() if "wte" not in name]
    square = torch.stack([p.grad.pow(2).sum() for p in own]).sum()
    dist.all_reduce(square)
    norm = square.sqrt()
    nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
    return norm


def clean_pipeline_clipped(model, mesh):
    return pipelined(model, clip=whole_norm)


def losses_of_micro_batches_added(model, mesh):
    return pipelined(model, times=MICRO_BATCHES)


def tied_gradients_apart(model, mesh):
    return pipelined(model, tied=None)


def block_in_no_stage(model, mesh):
    return pipelined(model, starts=(0, 2))


def block_in_both_stages(model, mesh):
    return pipelined(model, ends=(2, None))


def stage_initialised_anew(model, mesh):
    if dist.get_rank() == 1:
        torch.manual_seed(1)
        model.transformer.h[1].apply(model._init_weights)
    return pipelined(model)


def positions_not_sent(model, mesh):
    return pipelined(model, kind=LlamaStageWithoutPositions, tied=None)


def norm_of_the_stage(model, mesh):
    return pipelined(model, clip=clip_to)


def labels_of_the_first_micro_batch(model, mesh):
    """Every micro-batch is held against the labels of the one before it."""
    return pipelined(model, labels_of=lambda labels: labels.roll(1, 0))


def by_hand(model, order):
    """All forwards and then all backwards with send and recv, without torch's schedules; `order` is that of what is sent."""
    rank = dist.get_rank()
    stage = GPTStage(model, range(1) if rank == 0 else range(1, len(model.transformer.h)), first=rank == 0, last=rank == 1)

    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        ids, labels = batch["input_ids"].chunk(MICRO_BATCHES), batch["labels"].chunk(MICRO_BATCHES)
        width = model.transformer.h.values().__iter__().__next__().ln_1.weight.shape[0]
        if rank == 0:
            sent = [model(mine) for mine in ids]
            for i in order:
                dist.send(sent[i].detach(), dst=1)
            for i in order:
                gradient = torch.empty_like(sent[i])
                dist.recv(gradient, src=1)
                sent[i].backward(gradient)
        else:
            received, share = [], 1 / counted(batch["labels"])
            for mine in ids:
                hidden = torch.empty(*mine.shape, width, dtype=torch.float64)
                dist.recv(hidden, src=0)
                received.append(hidden.requires_grad_())
            for hidden, target in zip(received, labels, strict=True):
                (summed(model(hidden), target) * share).backward()
            for hidden in received:
                dist.send(hidden.grad, dst=0)
        sum_tied(model)
        optimizer.step()
        return {}

    return stage, train_step


def clean_pipeline_by_hand(model, mesh):
    return by_hand(model, range(MICRO_BATCHES))


def sent_in_another_order(model, mesh):
    return by_hand(model, list(reversed(range(MICRO_BATCHES))))


LLAMA = "transformers:LlamaForCausalLM"
OF_LLAMA = ("clean_pipeline_of_llama", "positions_not_sent")
CLEAN = ("clean_pipeline", "clean_pipeline_1f1b", "clean_pipeline_of_llama", "clean_pipeline_clipped", "clean_pipeline_by_hand")

MUTANTS = (
    Mutant(
        wrap="losses_of_micro_batches_added",
        row="L05",
        probe="ranks.gradients-agree",
        place="",
        words=("4 micro-batches are summed, and not divided by 4",),
    ),
    Mutant(
        wrap="tied_gradients_apart",
        row="D03",
        probe="ranks.gradients-agree",
        place="transformer.wte",
        words=("neither stage has it",),
    ),
    Mutant(wrap="block_in_no_stage", row="-", probe="ranks.same-start", place="transformer.h.1", words=("in no stage",)),
    Mutant(
        wrap="block_in_both_stages",
        row="-",
        probe="ranks.forward-agrees",
        place="transformer.h.1",
        words=("are the output of transformer.h.1",),
    ),
    Mutant(
        wrap="stage_initialised_anew", row="I05", probe="ranks.same-start", place="transformer.h.1", words=("not the weight of the model",)
    ),
    Mutant(wrap="positions_not_sent", row="-", probe="ranks.forward-agrees", place="model.layers.1.self_attn", words=("differs",)),
    Mutant(wrap="norm_of_the_stage", row="T11", probe="ranks.norm-agrees", place="", words=("norm of its own weights",)),
    Mutant(wrap="labels_of_the_first_micro_batch", row="-", probe="ranks.gradients-agree", place="", words=("gradient",)),
    Mutant(wrap="sent_in_another_order", row="-", probe="ranks.forward-agrees", place="transformer.h.1", words=("in another order",)),
)
