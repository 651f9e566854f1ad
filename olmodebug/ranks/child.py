"""`python -m olmodebug.ranks.child`: one rank of a training step, recorded. Rank 0 first takes the step alone, as the truth.

The single process runs in the same child, before any process group exists, so that nothing of the parallel code can
touch it.
"""

import faulthandler
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private

from ..group import lost_a_peer
from ..load import SubjectCodeError
from ..records import Case, Where
from ..serve import Tell, serve
from ..settle import settled
from ..sources import Sources, short_path
from ..spec import Job, resolve
from ..subject import Subject
from ..tracing.tracer import record
from .calls import Collective
from .last_op import LastOp
from .notes import Notes, collective_of
from .parallel import IGNORED, Batch, Logits, Step, global_mean_step, sgd, spread, summed_loss
from .record import RankWriter

ROWS_A_RANK = 2
SECONDS_TO_TELL = 3.0  # after a collective has timed out elsewhere


def run(order: dict[str, Any], tell: Tell) -> None:
    """Take the step of an order and write the record."""
    from ..errors import OlmodebugError
    from ..report import plain

    torch.set_num_threads(1)
    rank, world = order["rank"], order["world"]
    tell("start", step="building the model")
    try:
        subject = resolve(Job(**order["job"]))
    except OlmodebugError as error:
        tell("unusable", text=str(error))
        return
    except SubjectCodeError as error:
        tell("unusable", text=f"the model does not build or run; olmodebug check {order['job']['spec']} says why ({error.__cause__})")
        return
    twin, other = subject.fresh_twin(), subject.fresh_twin()
    for each in (twin, other):
        stir(each.model)
    batch = global_batch(twin, world)
    folder = Path(order["records"])
    if rank == 0:
        tell("start", step="taking the step in one process")
        case = twin.first_case()
        with settled(twin.model):
            dtypes = record(twin.model, lambda: twin.call(case)).dtypes()
        tell("dtypes", value=sorted(dtypes))
        tell("subject", value=plain(subject.info()))
        alone(twin, batch, folder / "single")
    tell("start", step="starting the process group")
    try:
        together(other, batch, folder / "ranks", order, tell)
    except OlmodebugError as error:
        tell("unusable", text=str(error))
    except Exception as error:  # whatever the parallel code raises is the finding of this rank
        original = error.__cause__ if isinstance(error, SubjectCodeError) and error.__cause__ else error
        spot = Sources(nn.Module()).spot_of(original)
        where = Where(function=spot.function, file=short_path(spot.file), line=spot.line) if spot else Where()
        lost = lost_a_peer(original) or (original.__cause__ is not None and lost_a_peer(original.__cause__))
        tell("raised", text=_words(original), where=plain(where), lost_a_peer=lost)


def _words(error: BaseException) -> str:
    """An exception in one line, with the one that it came of: torch's pipelines wrap what a stage raises."""
    inner = error.__cause__
    own = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return own if inner is None else f"{own.rstrip(':')} because of {_words(inner)}"


def global_batch(subject: Subject, world: int) -> Batch:
    """The batch that both runs see: `input_ids` and `labels`, `[ROWS_A_RANK * world, seq_len]`. Rows have unequal numbers
    of labels, so that a mean of means is not the mean."""
    rows, length = ROWS_A_RANK * world, subject.sizes()[1]
    even = -(-length // world) * world  # torch's sequence parallelism deals a sequence out in equal parts
    length = even if even <= (subject.usable_positions or even) else length
    ids = torch.tensor(subject.token_ids(rows, length, seed=subject.seed))
    labels = ids.clone()
    for row in range(rows):
        labels[row, 2 + (row + 1) * (length - 2) // rows :] = IGNORED
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Give every weight whose elements are all alike (biases of 0, norms of 1) a little noise: zeros hide what is added twice."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
            parameter.add_(noise.to(parameter.device, parameter.dtype))


def alone(subject: Subject, batch: Batch, folder: Path) -> None:
    """The step in one process, its record, and for each row of the batch the gradient of that row's summed loss."""
    model, writer, logits = subject.model, RankWriter(folder, rank=0, world=1), logits_of(subject)
    for row in range(len(batch["input_ids"])):
        model.zero_grad()
        labels = batch["labels"][row : row + 1]
        summed_loss(logits(model, batch["input_ids"][row : row + 1]), labels).backward()
        writer.tensor("count", f"row-{row}", (labels[:, 1:] != IGNORED).sum())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                writer.tensor(f"row-{row}", name, parameter.grad)
    writer.close(dtypes=recorded_step(model, sgd(model), batch, global_mean_step(logits, rows=slice(None), world=1), writer))


def together(subject: Subject, batch: Batch, folder: Path, order: dict[str, Any], tell: Tell) -> None:
    """This rank's part of the same step."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank, world = order["rank"], order["world"]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    store = dist.FileStore(order["store"], world)
    backend = "nccl" if subject.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=order["patience"]))
    sizes = tuple(order["mesh"])
    mesh = init_device_mesh(subject.device.type, sizes or (world,), mesh_dim_names=("dp", "tp") if sizes else None)
    late = Path(order["stacks"]).open("a", encoding="utf-8")  # noqa: SIM115 - open as long as the process lives
    faulthandler.dump_traceback_later(order["patience"] + SECONDS_TO_TELL, file=late)  # where this rank is when another gives up
    tell("start", step="wrapping the model")
    made = spread(order["strategy"], order["launch"], subject.model, mesh, batch=batch, logits=logits_of(subject))
    writer = RankWriter(folder, rank=rank, world=world, coordinate=tuple(mesh.get_coordinate() or ()), mesh=tuple(mesh.shape))
    tell("start", step="taking the training step")
    with LastOp(Path(order["records"]) / f"op-{rank}.txt") as last:
        dtypes = recorded_step(made.model, sgd(made.model), batch, made.step, writer, last)
    writer.close(dtypes=dtypes)
    tell("dtypes", value=sorted(dtypes))
    tell("start", step="leaving the process group")
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def recorded_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, step: Step, writer: RankWriter, last: LastOp | None = None
) -> set[str]:
    """One training step with everything noted: the rows seen, weights before, module inputs and outputs, the gradients
    that the optimizer got, the loss and the norm that the step reports, weights and optimizer state after. Returns the floating dtypes that any op
    of the step wrote."""
    notes = Notes(model, writer)
    notes.start()
    handles: list[Any] = [optimizer.register_step_pre_hook(lambda *_: notes.gradients()), *notes.watch()]
    try:
        with settled(seed=0), _Collectives(writer, Sources(model), last) as watched:
            result = step(model, optimizer, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, stage in (("loss", "loss"), ("grad_norm", "norm")):
        if isinstance(result, Mapping) and result.get(name) is not None:
            writer.tensor(stage, name, torch.as_tensor(result[name], dtype=torch.float64))
    notes.after(optimizer)
    return watched.dtypes


def logits_of(subject: Subject) -> Logits:
    """How the subject's logits are had from whatever wraps its model."""

    def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
        case = Case(name="step", input_ids=tuple(map(tuple, input_ids.tolist())))
        return replace(subject, model=model).call(case).logits

    return logits


class _Collectives(TorchDispatchMode):
    """Notes every collective before it starts, the place of the op that runs, and the floating dtypes that ops write."""

    def __init__(self, writer: RankWriter, sources: Sources, last: LastOp | None) -> None:
        super().__init__()
        self.writer, self.sources, self.last, self.dtypes = writer, sources, last, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = collective_of(func, args, kwargs)
        if call is not None:
            op, shape, group = call
            self.writer.collective(Collective(op=op, shape=shape, group=group, where=self._where(op)))
        elif self.last is not None:
            self.last.note(self._where(func.__name__.partition(".")[0]))
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.dtype.is_floating_point:
            self.dtypes.add(str(output.dtype).removeprefix("torch."))
        return output

    def _where(self, op: str) -> Where:
        spot = self.sources.spot(sys._getframe(2))
        return Where(function=spot.function, file=short_path(spot.file), line=spot.line, op=op) if spot else Where(op=op)


if __name__ == "__main__":
    serve(run)
