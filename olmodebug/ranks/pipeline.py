"""A model cut into pipeline stages at its repeated blocks, and one step over them with torch's own schedule.

A stage runs the model's own forward on the ids, so that masks and positions are made as ever, with the blocks of the
other stages left out: its first block gets the hidden states that came from the stage before, and the forward ends where
its last block does.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim

from ..errors import UsageError
from ..footprint.blocks import blocks_of, hidden_of
from ..settle import settled
from .notes import LeftOut

Batch = dict[str, Tensor]
Logits = Callable[[nn.Module, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

ALIKE = 1e-4  # relative to the largest logit: a cut that leaves something out changes all of them


class _StageEnds(BaseException):
    """The last block of a stage has run; not an Exception, so that no forward handles it as a failure of its own."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _PassOn(LeftOut):
    """In the place of a block of another stage: hands the hidden states on, in the form in which the block would."""

    def __init__(self, block: nn.Module, place: int | str, length: int | None) -> None:
        super().__init__()
        self.__dict__["block"] = block  # no submodule: its weights are another stage's
        self.place, self.length = place, length

    def __getattr__(self, name: str) -> Any:  # a forward may read what kind of block it is
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[self.place] if isinstance(self.place, int) else kwargs[self.place]
        return hidden if self.length is None else (hidden, *[None] * (self.length - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Where a model is cut: the paths of its blocks, those of each stage, where a block takes its hidden states, and how many
    values it returns in a tuple, None for a bare tensor."""

    blocks: tuple[str, ...]
    stages: tuple[range, ...]
    place: int | str
    length: int | None


class Stage(nn.Module):
    """One stage; `model` is changed in place, and keeps of its weights those of this stage."""

    def __init__(self, model: nn.Module, cut: Cut, number: int, logits: Logits) -> None:
        super().__init__()
        self.model, self.logits, self.first = model, logits, number == 0
        self.received: Tensor | None = None
        self.place = cut.place
        mine = cut.stages[number]
        for index, path in enumerate(cut.blocks):
            if index not in mine:
                _put(model, path, _PassOn(model.get_submodule(path), cut.place, cut.length))
        if not self.first:
            model.get_submodule(cut.blocks[mine.start]).register_forward_pre_hook(self._give, with_kwargs=True)
        if mine.stop < len(cut.blocks):
            model.get_submodule(cut.blocks[mine.stop - 1]).register_forward_hook(self._end)

    def forward(self, given: Tensor, input_ids: Tensor) -> Tensor:
        """Hidden states `[rows, seq_len, width]`, and in the last stage logits; `given` are the ids in the first."""
        self.received = None if self.first else given
        try:
            return self.logits(self.model, input_ids)
        except _StageEnds as end:
            return end.hidden

    def _give(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(self.place, int):
            return (*args[: self.place], self.received, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, self.place: self.received}

    def _end(self, block: nn.Module, args: Any, output: Any) -> None:
        hidden = hidden_of(output)
        assert hidden is not None
        raise _StageEnds(hidden)


def find_cut(model: nn.Module, stages: int, ids: Tensor, logits: Logits) -> Cut:
    """Where to cut, found by one run; UsageError where the blocks do not hand on hidden states and nothing else."""
    blocks = blocks_of(model)
    if not blocks:
        raise UsageError("--strategy pp: the model has no list of repeated blocks to be cut at; use --launch")
    if len(blocks) < stages:
        raise UsageError(f"--strategy pp: {len(blocks)} blocks cannot be cut into {stages} stages; take fewer ranks")
    calls: list[tuple[str, Any, Any, Any]] = []
    handles = [
        block.register_forward_hook(lambda _, args, kwargs, output, path=path: calls.append((path, args, kwargs, output)), with_kwargs=True)
        for path, block in blocks
    ]
    try:
        with settled(model), torch.no_grad():
            logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    paths = tuple(path for path, _ in blocks)
    if tuple(call[0] for call in calls) != paths:
        raise UsageError(f"--strategy pp: the blocks from {paths[0]} on do not run once each and in their order; use --launch")
    places: set[int | str | None] = set()
    lengths: set[int | None] = set()
    for (before, _, _, output), (_, args, kwargs, _) in zip(calls, calls[1:], strict=False):
        hidden = hidden_of(output)
        rest = output[1:] if isinstance(output, tuple) else ()
        if hidden is None or not isinstance(output, Tensor | tuple) or any(value is not None for value in rest):
            raise UsageError(f"--strategy pp: {before} returns more than hidden states; use --launch")
        places.add(next((place for place, value in [*enumerate(args), *kwargs.items()] if value is hidden), None))
        lengths.add(len(output) if isinstance(output, tuple) else None)
    place, length = (places or {0}).pop(), (lengths or {None}).pop()
    if places or place is None or lengths:
        raise UsageError("--strategy pp: the blocks do not hand their hidden states straight on to the next; use --launch")
    edges = [round(number * len(blocks) / stages) for number in range(stages + 1)]
    return Cut(blocks=paths, stages=tuple(range(a, b) for a, b in zip(edges, edges[1:], strict=False)), place=place, length=length)


def handed_on(model: nn.Module, cut: Cut, ids: Tensor, logits: Logits) -> list[Tensor]:
    """What each stage is given, found by running one after the other in one process. UsageError where they do not give the
    model's own logits."""
    with settled(model), torch.no_grad():
        whole = logits(model, ids)
        logits(model, ids.flip(0, 1))  # whatever a block keeps for others is of other tokens from here on
    given = [ids]
    for number in range(len(cut.stages)):
        stage = Stage(copy.deepcopy(model), cut, number, logits)
        with settled(), torch.no_grad():
            given.append(stage(given[-1], ids))
    if given[-1].shape != whole.shape or float((given[-1] - whole).abs().max()) > ALIKE * float(whole.abs().max()):
        raise UsageError(
            "--strategy pp: cut between its blocks the model gives other logits: a block takes more than hidden states from those before "
            "it; use --launch"
        )
    return [ids, *(hidden.requires_grad_() for hidden in given[1:])]  # as they are in a step: torch reads it off its examples


def keep_own_weights(stage: Stage, cut: Cut, number: int, ids: Tensor, given: Tensor) -> None:
    """Of the weights outside the blocks a stage keeps those that its output depends on; the others stay as plain tensors."""
    with settled(stage.model):
        stage(given if stage.first else given.detach().clone().requires_grad_(), ids).sum().backward()
        used = {id(parameter) for parameter in stage.parameters() if parameter.grad is not None}
    own = tuple(f"{cut.blocks[index]}." for index in cut.stages[number])
    for path, module in list(stage.model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in used and not f"{path}.".startswith(own):
                value = parameter.detach()
                del module._parameters[name]
                module.register_buffer(name, value, persistent=False)


def pipeline_step(model: nn.Module, batch: Batch, *, logits: Logits, loss: Loss, micro_batch: int, counted: int) -> Any:
    """(the stage's model, a step): micro-batches of some rows go through the stages as torch's 1F1B schedule says. The sum of
    all losses is divided by the labelled tokens of the whole batch, and gradients of weights in several stages are summed."""
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    number, stages = dist.get_rank(), dist.get_world_size()
    ids = batch["input_ids"][:micro_batch]
    cut = find_cut(model, stages, ids, logits)
    given = handed_on(model, cut, ids, logits)
    stage = Stage(model, cut, number, logits)
    keep_own_weights(stage, cut, number, ids, given[number])
    shared, owned = _shared(model, stages, number)
    torch_stage = PipelineStage(stage, number, stages, ids.device, input_args=(given[number],), output_args=(given[number + 1],))
    schedule = Schedule1F1B(
        torch_stage, n_microbatches=len(batch["input_ids"]) // micro_batch, loss_fn=lambda o, t: loss(o, t) / counted, scale_grads=False
    )

    def step(model: nn.Module, optimizer: optim.Optimizer, batch: Batch) -> Mapping[str, Any]:
        optimizer.zero_grad()
        losses: list[Tensor] = []
        given = (batch["input_ids"],) if stage.first else ()
        target: dict[str, Any] = {"target": batch["labels"], "losses": losses} if number == stages - 1 else {}
        schedule.step(*given, input_ids=batch["input_ids"], **target)
        weights = dict(model.named_parameters())
        for name, group in shared.items():
            dist.all_reduce(weights[name].grad, group=group)
        squares = [p.grad.double().pow(2).sum() for name, p in weights.items() if p.grad is not None and name in owned]
        totals = torch.stack([torch.stack(squares).sum(), sum((each.detach() for each in losses), torch.zeros(()).double())])
        dist.all_reduce(totals)
        optimizer.step()
        return {"loss": totals[1], "grad_norm": totals[0].sqrt()}

    return model, step


def _shared(model: nn.Module, stages: int, number: int) -> tuple[dict[str, Any], set[str]]:
    """Weights that several stages hold, each with the group of them; and the names whose norm this stage adds."""
    import torch.distributed as dist

    names: list[list[str]] = [[] for _ in range(stages)]
    dist.all_gather_object(names, [name for name, _ in model.named_parameters()])
    holders: dict[str, list[int]] = {}
    for rank, mine in enumerate(names):
        for name in mine:
            holders.setdefault(name, []).append(rank)
    groups = {name: dist.new_group(ranks) for name, ranks in holders.items() if len(ranks) > 1}
    shared = {name: group for name, group in groups.items() if number in holders[name]}
    return shared, {name for name, ranks in holders.items() if ranks[0] == number}


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    setattr(model.get_submodule(holder), name, module)
