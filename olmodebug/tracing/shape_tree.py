"""The tree of a model with named dimensions: `q_proj  (B, T, hidden) -> (B, T, heads*head_dim)`.

Two forwards whose batches and lengths are four different primes settle which dimension is which: what changes with the
batch is B, what changes with the length is T, and what stays is a size of the model. Those are named from its
configuration, and where one number has two meanings (4096 is both hidden and heads*head_dim) the flow of the data
decides: a dimension that a view splits into heads, or that merges them, is heads*head_dim. On the meta device no weight
and no activation is ever allocated, so that a model of any size prints in seconds.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode  # no public name; without them such subjects are built whole

from ..errors import SubjectError
from ..first_run import from_model
from ..own_code import own_code, quiet
from ..records import Case, ModuleCall, ModuleShape, ShapeTree, TensorInfo
from ..spec import Job, bare_model, resolve
from ..subject import Subject
from ..units import bytes_text
from .size_names import Namer, head_merges, sizes_of
from .tracer import Recording, record

BATCHES = (3, 5)
LENGTHS = (11, 17, 13, 7, 5, 3, 2)  # the first two that the model's table of positions has room for
MOST_BYTES = 4 << 30  # of a model that has to be allocated: what a laptop can spare for a look at shapes


def tree_of_spec(job: Job) -> ShapeTree:
    """The tree of a subject that is built without memory where its code allows: on the meta device, else of fake tensors
    (whose device is a real one), else as usual. SubjectError and SubjectCodeError as from `resolve`."""
    with suppress(Exception):  # code that reads values, or names a device, cannot run so; the next way shows what is wrong
        return shape_tree(resolve(replace(job, meta=True)))
    model, config = bare_model(job)
    with suppress(Exception), FakeTensorMode():  # the same of the next way
        _make_fake(model)
        return shape_tree(from_model(model, spec=job.spec, config=config, vocab_size=job.vocab_size, seed=job.seed))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > MOST_BYTES:
        raise SubjectError(
            f"{job.spec} runs neither on the meta device nor on fake tensors, and its {bytes_text(size)} are not allocated for its shapes"
        )
    return shape_tree(resolve(job))


def _make_fake(model: nn.Module) -> None:
    """Fake tensors of the CPU in place of every parameter and buffer; a tied one stays tied. The fake mode must be on."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
                store[name] = made[id(tensor)]  # type: ignore[assignment]


def shape_tree(subject: Subject) -> ShapeTree:
    """The named shapes of every module call of one forward. A subject on the meta device stays there."""
    multiple = subject.convention.multiple
    longest = subject.max_positions or multiple * max(LENGTHS)
    lengths = [multiple * n for n in LENGTHS if multiple * n <= longest][:2] or [multiple]
    seqs = (lengths[0], lengths[-1])
    first, second = (_recorded(subject, batch, seq) for batch, seq in zip(BATCHES, seqs, strict=True))
    meanings = sizes_of(subject)
    namer = Namer(meanings, batches=BATCHES, seqs=seqs, merges=head_merges(first, subject, meanings))
    rows = list(_rows(subject.model, _calls(first), _calls(second), namer))
    parameters = {id(p): p for p in subject.model.parameters()}.values()
    return ShapeTree(
        subject=subject.spec,
        rows=tuple(folded(rows)),
        names=namer.used,
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        device="fake" if any(isinstance(p, FakeTensor) for p in parameters) else subject.device.type,
        dtype=str(subject.dtype).removeprefix("torch."),
        runs=tuple(zip(BATCHES, seqs, strict=True)),
    )


def folded(rows: list[ModuleShape]) -> Iterator[ModuleShape]:
    """The rows with runs of identical sibling subtrees folded into their first one."""
    i = 0
    while i < len(rows):
        size = _subtree(rows, i)
        block = rows[i : i + size]
        repeat, j = 1, i + size
        while j < len(rows) and _same(block, rows[j : j + _subtree(rows, j)]):
            repeat, j = repeat + 1, j + size
        head = replace(block[0], repeat=repeat)
        yield head
        yield from folded(block[1:])
        i = j


def _recorded(subject: Subject, batch: int, seq: int) -> Recording:
    case = Case(name=f"batch {batch}, seq_len {seq}", input_ids=subject.token_ids(batch, seq))
    with torch.no_grad(), quiet(), own_code(subject, case):
        return record(subject.model, lambda: subject.call(case))


def _calls(recording: Recording) -> dict[str, ModuleCall]:
    """The first call of every module."""
    calls: dict[str, ModuleCall] = {}
    for call in recording.calls:
        calls.setdefault(call.module, call)
    return calls


def _rows(model: nn.Module, first: dict[str, ModuleCall], second: dict[str, ModuleCall], namer: Namer) -> Iterator[ModuleShape]:
    for path, module in model.named_modules():
        direct = next(iter(module.parameters(recurse=False)), None)
        a, b = first.get(path), second.get(path)
        called = a is not None and b is not None
        yield ModuleShape(
            path=path,
            kind=type(module).__name__,
            depth=path.count(".") + 1 if path else 0,
            inputs=_named(namer, path, a.inputs, b.inputs) if a and b else (),
            outputs=_named(namer, path, a.outputs, b.outputs) if a and b else (),
            parameters=sum(p.numel() for p in {id(p): p for p in module.parameters()}.values()),
            parameter_bytes=sum(p.numel() * p.element_size() for p in {id(p): p for p in module.parameters()}.values()),
            dtype=str(direct.dtype).removeprefix("torch.") if direct is not None else "",
            called=called,
        )


def _named(namer: Namer, path: str, first: tuple[TensorInfo, ...], second: tuple[TensorInfo, ...]) -> tuple[str, ...]:
    return tuple(namer.shape(a, b, path) for a, b in zip(first, second, strict=False))


def _subtree(rows: list[ModuleShape], start: int) -> int:
    """How many rows the module at `start` and everything below it takes."""
    end = start + 1
    while end < len(rows) and rows[end].depth > rows[start].depth:
        end += 1
    return end - start


def _same(left: list[ModuleShape], right: list[ModuleShape]) -> bool:
    if len(left) != len(right) or left[0].depth != right[0].depth:
        return False
    if not (left[0].path.rpartition(".")[2].isdigit() and right[0].path.rpartition(".")[2].isdigit()):
        return False
    root_left, root_right = len(left[0].path), len(right[0].path)
    return all(
        (a.path[root_left:], a.kind, a.inputs, a.outputs, a.parameters, a.dtype)
        == (b.path[root_right:], b.kind, b.inputs, b.outputs, b.parameters, b.dtype)
        for a, b in zip(left, right, strict=True)
    )
