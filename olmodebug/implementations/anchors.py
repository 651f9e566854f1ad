"""Which tensors of one run are which tensors of another, by value, whatever the modules are called and however the numbers lie.

A tensor is read as a matrix `[positions, features]`: its batch and sequence dimensions, known by their sizes, make the
rows, everything else (heads, head_dim, width, keys of a score) the columns. Two tensors are the same where they have the
same set of columns: views, transposes, split and merged heads, repeated heads and reordered features all keep it, while a
position that holds another position's numbers does not. Columns are compared by their projection on one random vector and
then in full.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..records import Event
from ..tracing.tracer import Recording

# Ops that give memory whose contents nobody has written.
UNWRITTEN = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
# Ops whose numbers are the same whatever the tensor holds that they take their shape from.
CONSTANT = (*UNWRITTEN, "zeros_like", "new_zeros", "ones_like", "new_ones", "full_like", "new_full")
# How token ids become numbers: here the way of the data starts.
LOOKUPS = ("embedding", "index_select", "index")
MOST_NUMBERS = 4_000_000  # of one tensor; anchors of larger ones would cost more than they tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """A tensor's distinct columns in float64 `[positions, features]`, sorted by their projection; `numbers` is its size."""

    projection: Tensor
    matrix: Tensor
    scale: float
    positioned: bool

    def times(self, factor: float) -> "Columns":
        """Those of the tensor times a factor above 0."""
        return Columns(
            projection=self.projection * factor, matrix=self.matrix * factor, scale=self.scale * factor, positioned=self.positioned
        )


@dataclass(slots=True, kw_only=True)
class Node:
    """One output of one op: what it holds, which ops made what it was made of, and the tensor of the other run that it is."""

    event: int
    output: int
    columns: Columns | None
    tensor: Tensor
    inputs: list[int] = field(default_factory=list)
    data: bool = False  # depends on the token ids
    anchor: int | None = None  # the node of the other run
    reaches: bool = False  # something anchored is made of it
    leads: bool = False  # the logits are made of it

    @property
    def good(self) -> bool:
        return self.anchor is not None or self.reaches


@dataclass(slots=True, kw_only=True)
class Graph:
    """The tensors of a recording as nodes in the order they were made; `by_output[event]` are the nodes of an op."""

    recording: Recording
    nodes: list[Node]
    by_output: dict[int, list[int]]
    batch: int
    seq: int

    def event(self, node: int) -> Event:
        return self.recording.events[self.nodes[node].event]

    def value(self, node: int) -> Tensor:
        return self.nodes[node].tensor

    def made_by(self, index: int) -> list[int]:
        return self.by_output.get(index, [])

    def columns_of(self, tensor: Tensor) -> Columns | None:
        """The columns of a tensor that is made of this run's, as those of its nodes."""
        return columns_of(tensor, batch=self.batch, seq=self.seq)


def graph_of(recording: Recording, *, batch: int, seq: int, logits: Tensor | None = None) -> Graph:
    """The graph of a recording made with `keep=True`; what the logits are not made of is marked as such."""
    nodes: list[Node] = []
    by_output: dict[int, list[int]] = {}
    latest: dict[int, list[int]] = {}  # storage -> nodes written there, newest last
    for index, (event, kept) in enumerate(zip(recording.events, recording.kept, strict=True)):
        if event.phase != "forward":
            continue
        sources = []
        inside = False
        for info, value in zip(event.inputs, kept.inputs, strict=False):
            found = _source(nodes, latest.get(info.storage, []), value) if info.storage else None
            if found is not None:
                sources.append(found)
                inside = inside or nodes[found].data
        inside = (inside and event.op not in CONSTANT) or event.op in LOOKUPS and bool(event.parameters)
        for output, (info, value) in enumerate(zip(event.outputs, kept.outputs, strict=True)):
            columns = None if event.op in UNWRITTEN else columns_of(value, batch=batch, seq=seq)
            nodes.append(Node(event=index, output=output, columns=columns, tensor=value, inputs=sources, data=inside))
            by_output.setdefault(index, []).append(len(nodes) - 1)
            if info.storage:
                latest.setdefault(info.storage, []).append(len(nodes) - 1)
    _mark_leading(nodes, logits)
    return Graph(recording=recording, nodes=nodes, by_output=by_output, batch=batch, seq=seq)


def _mark_leading(nodes: list[Node], logits: Tensor | None) -> None:
    for node in reversed(nodes):
        if logits is not None and node.data and node.tensor.shape == logits.shape and torch.equal(node.tensor, logits):
            node.leads = True
            break
    else:
        for node in nodes:
            node.leads = True
        return
    for node in reversed(nodes):
        if node.leads:
            for source in node.inputs:
                nodes[source].leads = True


def _source(nodes: Sequence[Node], written: Sequence[int], value: Tensor) -> int | None:
    """The newest node of this storage with these numbers, in this shape or in another."""
    for node in reversed(written):
        known = nodes[node].tensor
        if known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value):
            return node
    return written[-1] if written else None


def columns_of(tensor: Tensor, *, batch: int, seq: int) -> Columns | None:
    """The distinct columns of a tensor; None for one that says nothing: empty, constant, not finite in any number."""
    if tensor.numel() < 2 or tensor.numel() > MOST_NUMBERS or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    rows = positions_first(tensor, batch=batch, seq=seq)
    positioned = rows is not None
    matrix = (rows if rows is not None else tensor.reshape(1, -1)).double()
    # What a mask puts out of sight is no number to compare: -inf and finfo.min stand for the same.
    matrix = torch.where(matrix.abs() > 1e30, torch.zeros((), dtype=torch.float64), matrix)
    matrix = torch.nan_to_num(matrix, nan=0.0)
    scale = float(matrix.abs().max())
    if scale == 0 or float((matrix - matrix.flatten()[0]).abs().max()) <= 1e-9 * scale:
        return None
    generator = torch.Generator().manual_seed(matrix.shape[0])
    direction = torch.rand(matrix.shape[0], generator=generator, dtype=torch.float64) + 0.5
    projection = direction @ matrix / matrix.shape[0]
    projection, order = projection.sort()
    fresh = torch.ones(len(projection), dtype=torch.bool)
    fresh[1:] = projection.diff() > 1e-9 * scale
    return Columns(projection=projection[fresh], matrix=matrix[:, order[fresh]], scale=scale, positioned=positioned)


def positions_first(tensor: Tensor, *, batch: int, seq: int) -> Tensor | None:
    """`[batch * seq, features]`; None where a sequence dimension cannot be found by its size."""
    sizes = list(tensor.shape)
    rows = next((d for d, size in enumerate(sizes) if size == batch), None)
    columns = next((d for d, size in enumerate(sizes) if size == seq), None)
    if columns is None:
        both = next((d for d, size in enumerate(sizes) if size == batch * seq), None)
        if both is None:
            return None
        return tensor.movedim(both, 0).reshape(batch * seq, -1)
    if rows is not None:
        return tensor.movedim((rows, columns), (0, 1)).reshape(batch * seq, -1)
    merged = next((d for d, size in enumerate(sizes) if d < columns and size > batch and size % batch == 0), None)
    if merged is not None and tensor.ndim >= 3:  # batch and heads in one, as bmm wants them
        split = tensor.unflatten(merged, (batch, sizes[merged] // batch))
        return split.movedim((merged, columns + 1), (0, 1)).reshape(batch * seq, -1)
    alone = tensor.movedim(columns, 0).reshape(1, seq, -1)
    return alone.expand(batch, seq, alone.shape[-1]).reshape(batch * seq, -1)


def same(left: Columns, right: Columns, limit: float) -> bool:
    """Whether two tensors have the same columns, up to `limit` of the larger one's largest magnitude."""
    if left.positioned != right.positioned or left.matrix.shape != right.matrix.shape:
        return False
    allowed = limit * max(left.scale, right.scale)
    if float((left.projection - right.projection).abs().max()) > 2 * allowed:  # it is a mean under weights of at most 1.5
        return False
    return float((left.matrix - right.matrix).abs().max()) <= allowed


def anchor(left: Graph, right: Graph, limit: float) -> None:
    """Join equal tensors of two graphs, and mark what anchored tensors are made of."""
    _join(left, right, limit)
    _join(right, left, limit)
    for graph in (left, right):
        for node in graph.nodes:
            node.reaches = False
        for index in range(len(graph.nodes) - 1, -1, -1):
            if graph.nodes[index].good:
                for source in graph.nodes[index].inputs:
                    graph.nodes[source].reaches = True


def _join(left: Graph, right: Graph, limit: float) -> None:
    """Give every node of the left the first node of the right that holds the same."""
    table: dict[tuple[bool, bool, int], list[int]] = {}
    for index, node in enumerate(right.nodes):
        if node.columns is not None:
            table.setdefault((node.data, node.columns.positioned, node.columns.matrix.shape[1]), []).append(index)
    stacked = {key: torch.stack([_column(right, i).projection for i in found]) for key, found in table.items()}
    for node in left.nodes:
        node.anchor = None
        if node.columns is None:
            continue
        key = (node.data, node.columns.positioned, node.columns.matrix.shape[1])
        if key not in stacked:
            continue
        gaps = (stacked[key] - node.columns.projection).abs().amax(1)
        for place in (gaps <= 4 * limit * node.columns.scale + 1e-12).nonzero().flatten().tolist():
            if same(node.columns, _column(right, table[key][place]), limit):
                node.anchor = table[key][place]
                break


def first_bad(graph: Graph) -> int | None:
    """Where this run leaves the other: the first node of the data's way that nothing anchored is made of any more."""
    fine: list[bool] = []  # whole numbers have no anchor: they are as good as what they were made of
    for index, node in enumerate(graph.nodes):
        known = all(fine[source] or not graph.nodes[source].data for source in node.inputs)
        counts = node.tensor.is_floating_point() or node.tensor.is_complex()
        fine.append(node.good if counts else known)
        if node.data and node.leads and not node.good and counts and known and graph.event(index).op not in UNWRITTEN:
            return index
    return None


def last_leading(graph: Graph) -> int:
    """The logits."""
    return max(index for index, node in enumerate(graph.nodes) if node.leads)


def _column(graph: Graph, index: int) -> Columns:
    found = graph.nodes[index].columns
    assert found is not None
    return found
