"""The tree of a model with named dimensions: `q_proj  (B, T, hidden) -> (B, T, heads*head_dim)`.

Two forwards with pairwise different batch and sequence sizes settle which dimension is which: what changes with the batch
is B, what changes with the length is T, and what stays is a size of the model, named from its configuration. On the meta
device no weight and no activation is ever allocated, so that a model of any size prints in seconds.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from .dims import KV_HEAD_NAMES, MLP_NAMES, WIDTH_NAMES
from .records import Case, ModuleCall, ModuleShape, ShapeTree, TensorInfo
from .subject import HEAD_NAMES, VOCAB_NAMES, Subject, own_code, quiet
from .tracer import record

FIRST, SECOND = (3, 11), (5, 17)  # (batch, seq_len), pairwise different primes


def shape_tree(subject: Subject) -> ShapeTree:
    """The named shapes of every module call of one forward. A subject on the meta device stays there."""
    longest = subject.max_positions or max(FIRST[1], SECOND[1])
    runs = [_calls(subject, batch, min(seq, longest)) for batch, seq in (FIRST, SECOND)]
    namer = Namer(subject, seqs=(min(FIRST[1], longest), min(SECOND[1], longest)))
    rows = list(_rows(subject.model, runs[0], runs[1], namer))
    parameters = {id(p): p for p in subject.model.parameters()}.values()
    return ShapeTree(
        subject=subject.spec,
        rows=tuple(folded(rows)),
        names=namer.used(),
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        device=subject.device.type,
    )


class Namer:
    """Names for the dimensions of two runs: B and T by how a size changes, the rest by what the configuration calls it."""

    def __init__(self, subject: Subject, *, seqs: tuple[int, int]) -> None:
        self.batches, self.seqs = (FIRST[0], SECOND[0]), seqs
        self.sizes = _model_sizes(subject)
        self._used: dict[str, int] = {}

    def shape(self, first: tuple[int, ...], second: tuple[int, ...]) -> str:
        """`(B, T, hidden)` from the shapes of the two runs."""
        if len(first) != len(second):
            return str(first)
        inner = ", ".join(self.dimension(a, b) for a, b in zip(first, second, strict=True))
        return f"({inner},)" if len(first) == 1 else f"({inner})"

    def dimension(self, first: int, second: int) -> str:
        """The name of one dimension: a product with B or T, a sum with T, or a size of the model."""
        if first == second:
            return self._fixed(first)
        (b1, b2), (t1, t2) = self.batches, self.seqs
        for name, x, y in (("B*T", b1 * t1, b2 * t2), ("B", b1, b2), ("T", t1, t2)):
            if first % x == 0 and second % y == 0 and first // x == second // y:
                return name if first == x else f"{name}*{self._fixed(first // x)}"
        if first - t1 == second - t2:
            return f"T{first - t1:+d}"
        return str(first)

    def used(self) -> dict[str, int]:
        """The model's own sizes that occur in the tree, by name."""
        return dict(self._used)

    def _fixed(self, size: int) -> str:
        if size in self.sizes:
            name = self.sizes[size]
            self._used[name] = size
            return name
        return str(size)


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


def _calls(subject: Subject, batch: int, seq: int) -> dict[str, ModuleCall]:
    case = Case(name=f"batch {batch}, seq_len {seq}", input_ids=subject.token_ids(batch, seq))
    with torch.no_grad(), quiet(), own_code(subject, case):
        recording = record(subject.model, lambda: subject.call(case))
    calls: dict[str, ModuleCall] = {}
    for call in recording.calls:
        calls.setdefault(call.module, call)
    return calls


def _rows(model: nn.Module, first: dict[str, ModuleCall], second: dict[str, ModuleCall], namer: Namer) -> Iterator[ModuleShape]:
    counted: set[int] = set()
    for path, module in model.named_modules():
        own = [p for p in module.parameters() if id(p) not in counted]
        direct = next(iter(module.parameters(recurse=False)), None)
        if not list(module.children()):
            counted |= {id(p) for p in own}
        a, b = first.get(path), second.get(path)
        called = a is not None and b is not None
        yield ModuleShape(
            path=path,
            kind=type(module).__name__,
            depth=path.count(".") + 1 if path else 0,
            inputs=_named(namer, a.inputs, b.inputs) if a and b else (),
            outputs=_named(namer, a.outputs, b.outputs) if a and b else (),
            parameters=sum(p.numel() for p in {id(p): p for p in module.parameters()}.values()),
            parameter_bytes=sum(p.numel() * p.element_size() for p in {id(p): p for p in module.parameters()}.values()),
            dtype=str(direct.dtype).removeprefix("torch.") if direct is not None else "",
            called=called,
        )


def _named(namer: Namer, first: tuple[TensorInfo, ...], second: tuple[TensorInfo, ...]) -> tuple[str, ...]:
    return tuple(namer.shape(a.shape, b.shape) for a, b in zip(first, second, strict=False))


def _model_sizes(subject: Subject) -> dict[int, str]:
    """Size -> name, for the sizes of the configuration and the products that projections have."""
    heads, width, kv = (subject.setting(*names) for names in (HEAD_NAMES, WIDTH_NAMES, KV_HEAD_NAMES))
    head_dim = subject.setting("head_dim")
    if not isinstance(head_dim, int) and isinstance(heads, int) and isinstance(width, int) and heads:
        head_dim = width // heads
    kv = kv if isinstance(kv, int) else heads
    products = []
    if isinstance(head_dim, int) and isinstance(heads, int):
        products = [(heads * head_dim, "heads*head_dim"), (3 * heads * head_dim, "3*heads*head_dim")]
        products += [(head_dim // 2, "head_dim/2")] if head_dim % 2 == 0 else []
        products += (
            [(kv * head_dim, "kv_heads*head_dim"), ((heads + 2 * kv) * head_dim, "(heads+2*kv_heads)*head_dim")]
            if isinstance(kv, int)
            else []
        )
    meanings: list[tuple[object, str]] = [
        (subject.setting(*VOCAB_NAMES), "vocab"),
        (width, "hidden"),
        (subject.setting(*MLP_NAMES), "intermediate"),
        (heads, "heads"),
        (kv, "kv_heads"),
        (head_dim, "head_dim"),
        *products,
    ]
    names: dict[int, str] = {}
    for size, name in meanings:
        if isinstance(size, int) and size > 1:
            names.setdefault(size, name)
    rows = subject.embedding_rows
    if rows and rows not in names:
        names[rows] = "vocab rows"
    return names


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
