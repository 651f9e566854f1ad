"""`python -m olmodebug.ranks.child`: one rank of a training step, recorded. Rank 0 first takes the step alone, as the truth.

The single process runs in the same child, before any process group exists, so that nothing of the parallel code can
touch it.
"""

import faulthandler
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private
from torch.utils._pytree import tree_flatten

from ..group import lost_a_peer
from ..load import SubjectCodeError
from ..records import Case, Where
from ..serve import Tell, serve
from ..settle import settled
from ..sources import Sources, short_path
from ..spec import Job, resolve
from ..subject import Subject
from ..tracing.tracer import record
from .parallel import IGNORED, Batch, Logits, Step, global_mean_step, sgd, spread, summed_loss
from .record import Collective, RankWriter, plain_name

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
        tell("start", step="one process")
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
        lost = lost_a_peer(original)
        tell(
            "raised", text=f"{type(original).__name__}: {str(original).strip().partition(chr(10))[0]}", where=plain(where), lost_a_peer=lost
        )


def global_batch(subject: Subject, world: int) -> Batch:
    """The batch that both runs see: `input_ids` and `labels`, `[ROWS_A_RANK * world, seq_len]`. Rows have unequal numbers
    of labels, so that a mean of means is not the mean."""
    rows, length = ROWS_A_RANK * world, subject.sizes()[1]
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
    recorded_step(model, sgd(model), batch, global_mean_step(logits, rows=slice(None), world=1), writer)
    writer.close()


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
    made = spread(order["strategy"], order["launch"], subject.model, mesh, logits=logits_of(subject))
    writer = RankWriter(folder, rank=rank, world=world, coordinate=tuple(mesh.get_coordinate() or ()), mesh=tuple(mesh.shape))
    tell("start", step="the training step")
    dtypes = recorded_step(made.model, sgd(made.model), batch, made.step, writer)
    writer.close()
    tell("dtypes", value=sorted(dtypes))
    tell("start", step="leaving the process group")
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def recorded_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, step: Step, writer: RankWriter) -> set[str]:
    """One training step with everything noted: the rows seen, weights before, module inputs and outputs, the gradients
    that the optimizer got, the loss and the norm that the step reports, weights and optimizer state after. Returns the floating dtypes that any op
    of the step wrote."""
    for name, parameter in model.named_parameters():
        writer.tensor("start", plain_name(name), parameter)

    def gradients(*_: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                writer.tensor("gradient", plain_name(name), parameter.grad, where=places[name])

    places = {
        f"{path}.{name}" if path else name: _forward_of(m)
        for path, m in model.named_modules()
        for name, _ in m.named_parameters(recurse=False)
    }
    handles: list[Any] = [optimizer.register_step_pre_hook(gradients)]
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if plain_name(name) or module is model:
            handles.append(module.register_forward_hook(_noted_call(writer, plain_name(name), calls), with_kwargs=True))
    try:
        with settled(seed=0), _Collectives(writer, Sources(model)) as watched:
            result = step(model, optimizer, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, stage in (("loss", "loss"), ("grad_norm", "norm")):
        if isinstance(result, Mapping) and result.get(name) is not None:
            writer.tensor(stage, name, torch.as_tensor(result[name], dtype=torch.float64))
    for name, parameter in model.named_parameters():
        writer.tensor("step", plain_name(name), parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                writer.tensor("state", f"{plain_name(name)}.{key}", value)
    return watched.dtypes


def logits_of(subject: Subject) -> Logits:
    """How the subject's logits are had from whatever wraps its model."""

    def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
        case = Case(name="step", input_ids=tuple(map(tuple, input_ids.tolist())))
        return replace(subject, model=model).call(case).logits

    return logits


def _noted_call(writer: RankWriter, name: str, calls: dict[str, int]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        label = name if calls[name] == 1 else f"{name}#{calls[name]}"
        given, made = first_tensor((args, kwargs)), first_tensor(output)
        where = _forward_of(module)
        if given is not None and made is not None:
            if not name:
                writer.tensor("data", "input_ids", given)
            writer.tensor("input", label, given, where=where)
            writer.tensor("forward", label, made, where=where)

    return hook


def first_tensor(tree: Any) -> Tensor | None:
    """The first tensor in nested containers, output objects included; None without one."""
    leaves = tree_flatten(tree)[0]
    found = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if found is not None or len(leaves) != 1 or isinstance(leaves[0], Tensor):
        return found
    return next((value for value in getattr(leaves[0], "__dict__", {}).values() if isinstance(value, Tensor)), None)


def _forward_of(module: nn.Module) -> Where:
    """The forward function of a module's class, where that is the user's own and not torch's."""
    forward = type(module).forward
    file = inspect.getsourcefile(forward) if inspect.isfunction(forward) else None
    if file is None or file.startswith(str(Path(nn.__file__).parents[1])):
        return Where()
    line = inspect.unwrap(forward).__code__.co_firstlineno
    return Where(function=forward.__qualname__, file=short_path(file), line=line)


class _Collectives(TorchDispatchMode):
    """Notes every collective before it starts, and the floating dtypes that ops write."""

    def __init__(self, writer: RankWriter, sources: Sources) -> None:
        super().__init__()
        self.writer, self.sources, self.dtypes = writer, sources, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            op = func.__name__.partition(".")[0].strip("_")
            spot = self.sources.spot(sys._getframe(1))
            where = Where(function=spot.function, file=short_path(spot.file), line=spot.line, op=op) if spot else Where(op=op)
            given = first_tensor((args, kwargs))
            self.writer.collective(Collective(op=op, shape=tuple(given.shape) if given is not None else (), where=where))
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.dtype.is_floating_point:
            self.dtypes.add(str(output.dtype).removeprefix("torch."))
        return output


if __name__ == "__main__":
    serve(run)
