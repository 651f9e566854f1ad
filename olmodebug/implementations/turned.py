"""Named causes about q and k before the scores: the angles that they are turned by, and where their norm stands."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..settle import settled
from ..tracing.norms import norm_calls
from ..tracing.rotation import Angles, angle_tables
from ..units import listed
from .aligned import Aligned, traced
from .anchors import Graph, positions_first, same
from .captured import Parting
from .hypotheses import Cause
from .wiring import weights_read

# Cosines and sines of float32 tables against those in float64, theta 1e4..1e6, 4..128 rotated numbers, 67 positions, are apart
# by up to 8e-6 in sum; frequencies read from them by 2e-7 of their size, thetas by 5e-6; mean lengths of pairs by
# 4e-9, in bfloat16 by 1.5e-4.
TABLE_LIMIT = 1e-4
SAME_FREQUENCY = 1e-4
SAME_THETA = SAME_LENGTH = 1e-3
# What multiplies queries with keys; fused attention is taken apart in these runs.
PRODUCTS = ("bmm", "baddbmm")
REACH, NORMED = 60, 16  # how far behind a projection, and of how many tensors made of it, a norm's is looked for


def angles(parting: Parting) -> Cause | None:
    """Another theta, exponent or scaling of RoPE: with the reference's cosines and sines the difference vanishes."""
    aligned = parting.aligned
    seq = parting.left.seq
    mine, theirs = angle_tables(parting.left.recording, seq), angle_tables(parting.right.recording, seq)
    if len(mine) != len(theirs) or not mine or any(a.cos.shape != b.cos.shape for a, b in zip(mine, theirs, strict=True)):
        return None
    differing = [(a, b) for a, b in zip(mine, theirs, strict=True) if _apart(a, b) > TABLE_LIMIT]
    if not differing:
        return None
    with settled(aligned.left.subject.model), _tables_in_buffers(aligned.left.subject.model, mine, theirs, seq):
        grafted = traced(aligned.left.subject, aligned.case, change=_substitute(mine, theirs, seq))
    if aligned.gap(grafted.recording.result) is not None:
        return None
    one, other = differing[0]
    name, text, fix = _described(aligned, one, other)
    return Cause(
        name=name,
        text=f"{text}; with the reference's cosines and sines in place, the logits agree",
        fix=fix,
        spot=one.spot,
        module=one.where.module,
        op=one.where.op,
    )


def _described(aligned: Aligned, one: Angles, other: Angles) -> tuple[str, str, str]:
    mine, theirs = one.frequencies, other.frequencies
    pairs = len(mine)
    if float((mine / theirs - 1).abs().max()) < SAME_FREQUENCY:
        lengths = [float(torch.hypot(t.cos, t.sin).mean()) for t in (one, other)]
        if abs(lengths[0] / lengths[1] - 1) > SAME_LENGTH:
            text = f"the cosines and sines of RoPE are {lengths[0] / lengths[1]:.6g} times the reference's"
            return "RoPE factor", text, "scale the cosines and sines by the attention factor of the configuration, once, or not at all"
        return (
            "RoPE positions",
            "the angles of RoPE belong to other positions than the reference's",
            "count positions as the reference does",
        )
    bases = [_base(mine), _base(theirs)]
    if bases[0] is not None and bases[1] is not None:
        width = 2 * pairs
        head = _head_dim(aligned)
        for wide, which in ((head, "head_dim"), (2 * width, "twice the rotated width")):
            if wide and wide != width and abs(bases[0] ** (wide / width) / bases[1] - 1) < SAME_THETA:
                text = f"the exponent of the RoPE frequencies is divided by {which} {wide} where the reference divides by the rotated width {width}"
                return "RoPE exponent", text, f"divide by the rotated width: theta ** (-2i / {width})"
        text = f"RoPE's theta is {bases[0]:.6g} where the reference's is {bases[1]:.6g}"
        return "RoPE theta", text, f"take theta from the configuration: {bases[1]:.6g}"
    ratio = mine / theirs
    if float((ratio / ratio[0] - 1).abs().max()) < SAME_FREQUENCY:
        text = f"every RoPE frequency is {float(ratio[0]):.6g} times the reference's"
        return "RoPE scaling", text, "apply the scaling of the configuration to the frequencies, once"
    text = "the RoPE frequencies are scaled otherwise than the reference's: " + ", ".join(
        f"pair {i}: {float(mine[i]):.4g} for {float(theirs[i]):.4g}"
        for i in range(pairs)
        if abs(float(mine[i] / theirs[i]) - 1) > SAME_FREQUENCY
    )
    return "RoPE scaling", text, "apply the scaling of the configuration (YaRN, linear) to the layers that it names"


def _base(frequencies: Tensor) -> float | None:
    """theta, where the frequencies are theta ** (-i / pairs); None where they are no such series."""
    pairs = len(frequencies)
    if pairs < 2 or abs(float(frequencies[0]) - 1) > SAME_FREQUENCY or bool((frequencies <= 0).any()):
        return None
    slopes = -frequencies[1:].log() / torch.arange(1, pairs, dtype=frequencies.dtype)
    if float((slopes / slopes[0] - 1).abs().max()) > SAME_THETA:
        return None
    return math.exp(float(slopes[0]) * pairs)


def _head_dim(aligned: Aligned) -> int | None:
    query = next((t for s, t in aligned.weights.items() if s.endswith(".q.weight")), None)
    heads = aligned.left.layout.heads
    return None if query is None or not heads else query.shape[0] // heads


def _substitute(mine: list[Angles], theirs: list[Angles], seq: int) -> Callable[[int, list[Tensor]], None]:
    """A writer that turns every tensor made of our cosines and sines into the same one of theirs."""
    known, wanted = _stacked(mine), _stacked(theirs)

    def change(index: int, outputs: list[Tensor]) -> None:
        for output in outputs:
            tensor = torch.view_as_real(output) if output.is_complex() else output
            if tensor.is_floating_point() and tensor.numel() <= seq * 4096:
                _exchange(tensor, known, wanted, seq)

    return change


def _stacked(tables: list[Angles]) -> Tensor:
    """`[seq_len, columns]`: cosines, sines and negative sines of all tables, without those that do not move."""
    return torch.cat([part for t in tables for part in (t.cos, t.sin, -t.sin)], dim=1)


def _exchange(tensor: Tensor, known: Tensor, wanted: Tensor, seq: int) -> bool:
    """Write the wanted column for the known one, where all columns of the tensor are known; whether it was done."""
    axis = next((d for d, size in enumerate(tensor.shape) if size == seq), None)
    if axis is None or tensor.numel() == 0:
        return False
    moved = tensor.movedim(axis, 0)
    flat = moved.reshape(seq, -1).double()
    gaps = (flat.T[:, None, :] - known.T[None]).abs().amax(-1)
    nearest = gaps.min(1)
    if float(nearest.values.max()) > TABLE_LIMIT or float((flat - flat[:1]).abs().max()) == 0:
        return False
    moved.copy_(wanted[:, nearest.indices].reshape(moved.shape).to(tensor.dtype))
    return True


class _tables_in_buffers:  # noqa: N801 - a context manager, named as one reads it
    """Tables that the model keeps in buffers hold the reference's values inside the block, for the first positions."""

    def __init__(self, model: nn.Module, mine: list[Angles], theirs: list[Angles], seq: int) -> None:
        self.known, self.wanted, self.seq, self.saved = _stacked(mine), _stacked(theirs), seq, list[tuple[Tensor, Tensor]]()
        self.model = model

    def __enter__(self) -> None:
        for buffer in self.model.buffers():
            tensor = torch.view_as_real(buffer) if buffer.is_complex() else buffer
            axis = next((d for d, size in enumerate(tensor.shape) if size >= self.seq), None)
            if not tensor.is_floating_point() or axis is None or tensor.ndim < 2:
                continue
            before = tensor.clone()
            if _exchange(tensor.narrow(axis, 0, self.seq), self.known, self.wanted, self.seq):
                self.saved.append((tensor, before))

    def __exit__(self, *_: object) -> None:
        for tensor, before in self.saved:
            tensor.copy_(before)


def rotated_width(parting: Parting) -> Cause | None:
    """Another share or the other end of each head is turned (partial rotary): each side's rule on the same q gives its side's tensor."""
    left, right = parting.left, parting.right
    mine, theirs = angle_tables(left.recording, left.seq), angle_tables(right.recording, right.seq)
    heads = parting.aligned.left.layout.heads
    query = next((t for s, t in parting.aligned.weights.items() if s.endswith(".q.weight")), None)
    if not mine or not theirs or not heads or query is None:
        return None
    width, turned, wanted = query.shape[0] // heads, 2 * mine[0].cos.shape[1], 2 * theirs[0].cos.shape[1]
    if max(turned, wanted) > width or turned == wanted == width:
        return None
    for node in left.nodes[: parting.node + 1]:
        if not node.data or node.anchor is None or node.tensor.numel() != left.batch * left.seq * query.shape[0]:
            continue
        rows = positions_first(node.tensor, batch=left.batch, seq=left.seq)
        if rows is None:
            continue
        x = rows.double().view(left.batch, left.seq, heads, width)
        for rope, (end, of) in itertools.product((_halves, _pairs), ENDS.items()):
            if turned == wanted and end == "first":
                continue
            if _holds(right, rope(x, theirs[0]), parting.limit) and _holds(left, of(rope, x, mine[0]), parting.limit):
                return Cause(
                    name="partial rotary",
                    text=f"RoPE turns {'' if end == 'first' else 'the last '}{turned} of the {width} numbers of a head where the reference turns {'' if end == 'first' else 'the first '}{wanted}; each rule applied to the same captured projection gives exactly its side's tensor",
                    fix=f"turn the first {wanted} of {width}: partial_rotary_factor {wanted / width:.6g}",
                    spot=parting.spot(parting.node),
                    module=left.event(parting.node).where.module,
                    evidence={"rotated": turned, "reference_rotated": wanted},
                )
    return None


def _holds(graph: Graph, value: Tensor, limit: float, *, leads: bool = False) -> bool:
    """Whether a tensor made of the tokens has these numbers, one that the logits are made of where `leads` is asked."""
    columns = graph.columns_of(value)
    nodes = [n for n in graph.nodes if n.data and (n.leads or not leads)]
    return columns is not None and any(n.columns is not None and same(columns, n.columns, limit) for n in nodes)


def norm_of_queries(parting: Parting) -> Cause | None:
    """QK-norm before or after RoPE, over all heads at once or over each."""
    aligned, left, right = parting.aligned, parting.left, parting.right
    layer = next((s.partition(".")[0] for s in aligned.weights if s.endswith("q_norm.weight")), None)
    tables = _distinct(parting)
    heads = aligned.right.layout.heads
    if layer is None or not tables or not heads:
        return None
    weight = aligned.weights[f"{layer}.q_norm.weight"]
    uses = [i for i, slot in weights_read(right, aligned.right.layout) if slot == f"{layer}.q.weight"]
    calls = norm_calls(right.recording)
    if not uses or not calls:
        return None
    projected = next((i for i in range(uses[-1], min(uses[-1] + 12, len(right.nodes))) if _wide(right, i, aligned)), None)
    if projected is None:
        return None
    x = right.nodes[projected].tensor.double().reshape(right.batch, right.seq, -1)
    eps = next((c.eps for c in calls if c.width in (weight.shape[0], x.shape[-1], x.shape[-1] // heads)), calls[0].eps)
    results = [pair for table in tables for factor in (weight, 1 + weight) for pair in _rules(x, factor, heads, table, eps)]
    names: list[str] = []
    for graph in (left, right):
        held = [n.columns for n in graph.nodes if n.data and n.columns is not None]
        fits = [name for name, value in results if (c := graph.columns_of(value)) and any(same(c, h, parting.limit) for h in held)]
        if not fits:
            return None
        names.append(fits[0])
    if names[0] == names[1]:
        return None
    order = names[0].partition(",")[0] != names[1].partition(",")[0]
    return Cause(
        name="QK-norm order" if order else "QK-norm width",
        text=f"q and k are made by: {names[0]}; in the reference by: {names[1]}; each rule applied to the same captured projection gives exactly its side's tensor",
        fix=f"do as the reference does: {names[1]}",
        spot=parting.spot(parting.node),
        module=left.event(parting.node).where.module,
    )


@dataclass(frozen=True, slots=True)
class State:
    """What RoPE does to the queries, keys or values of a layer, and the number of the table of its angles."""

    words: str
    table: int | None = None


def turned_at_all(parting: Parting) -> Cause | None:
    """q, k or v of a layer that is turned, left as it was projected, turned the other way or by other angles, where the reference does otherwise."""
    weights = parting.aligned.weights
    tables = _distinct(parting)
    layers = [s.partition(".")[0] for s in weights if s.endswith(".q.weight")]
    if not tables:
        return None
    for layer in [layer for layer in layers if f"{layer}.k.weight" in weights]:
        kinds = [kind for kind in ("q", "k", "v") if f"{layer}.{kind}.weight" in weights]
        mine, theirs = ({kind: _state(parting, graph, layer, kind, tables) for kind in kinds} for graph in (parting.left, parting.right))
        if None in (mine["q"], mine["k"], theirs["q"], theirs["k"]):
            return None
        wrong = {kind: (a, b) for kind in kinds if (a := mine[kind]) is not None and (b := theirs[kind]) is not None and a != b}
        if wrong:
            return _turned_otherwise(parting, layer, wrong, tables)
    return None


def _distinct(parting: Parting) -> list[Angles]:
    """The tables of angles of both runs, each once."""
    found: list[Angles] = []
    for table in [*angle_tables(parting.right.recording, parting.right.seq), *angle_tables(parting.left.recording, parting.left.seq)]:
        if not any(t.cos.shape == table.cos.shape and _apart(t, table) <= TABLE_LIMIT for t in found):
            found.append(table)
    return found


def _apart(one: Angles, other: Angles) -> float:
    return float((one.cos - other.cos).abs().max() + (one.sin - other.sin).abs().max())


def _state(parting: Parting, graph: Graph, layer: str, kind: str, tables: list[Angles]) -> State | None:
    """What RoPE does to the queries, keys or values of a layer; None where that is not seen."""
    projected = list(_projected(parting, graph, layer, kind))
    ways = list(itertools.product(range(len(tables)), (("turned", 1), ("turned the other way", -1)), (_halves, _pairs)))
    for x, _ in projected:  # in the order they are made: turned back, what is turned already is there too
        for number, (words, sign), rope in ways:
            if _holds(graph, rope(x, replace(tables[number], sin=sign * tables[number].sin)), parting.limit, leads=True):
                return State(words, number)
    return State("not turned") if any(_scored(graph, x, parting.limit) for x, plain in projected if plain) else None


def _turned_otherwise(parting: Parting, layer: str, wrong: dict[str, tuple[State, State]], tables: list[Angles]) -> Cause:
    words = {mine.words for mine, _ in wrong.values()}
    name, does, fix = "RoPE direction", "turns both forward", "x * cos + rotate_half(x) * sin, where rotate_half gives (-x2, x1)"
    if all(theirs.words == "not turned" for _, theirs in wrong.values()):
        names = listed(list(wrong), 3)
        name, does, fix = (
            "RoPE not wanted",
            f"leaves {'it' if len(wrong) == 1 else 'them'} as projected",
            f"leave {names} of this layer without RoPE",
        )
    elif "not turned" in words:
        name, does, fix = "RoPE missing", "turns both", "apply RoPE to q and to k"
    elif all(mine.words == theirs.words for mine, theirs in wrong.values()):
        return _other_angles(parting, layer, wrong, tables)
    said = f"q and k are {wrong['q'][0].words}" if set(wrong) == {"q", "k"} and len(words) == 1 else None
    said = said or " and ".join(f"{kind} is {mine.words}" for kind, (mine, _) in wrong.items())
    return Cause(
        name=name,
        text=f"{said} by the angles of RoPE in layer {layer} where the reference {does}; seen on the captured projections",
        fix=fix,
        spot=parting.spot(parting.node),
        module=parting.left.event(parting.node).where.module,
    )


def _other_angles(parting: Parting, layer: str, wrong: dict[str, tuple[State, State]], tables: list[Angles]) -> Cause:
    """Layers that are turned by the angles that the reference has for other layers."""
    mine, theirs = (tables[number] for state in next(iter(wrong.values())) if (number := state.table) is not None)
    bases = [_base(table.frequencies) for table in (mine, theirs)]
    known = None not in bases
    said = f"with theta {bases[0]:.6g} where the reference takes {bases[1]:.6g}" if known else "by other angles than in the reference"
    return Cause(
        name="RoPE theta" if known else "RoPE scaling",
        text=f"{' and '.join(wrong)} of layer {layer} {'is' if len(wrong) == 1 else 'are'} turned {said}; seen on the captured projections",
        fix="give every kind of layer its own frequencies, as the configuration says",
        spot=parting.spot(parting.node),
        module=parting.left.event(parting.node).where.module,
    )


def _projected(parting: Parting, graph: Graph, layer: str, kind: str) -> Iterator[tuple[Tensor, bool]]:
    """What the projection gave, and what a norm made of it, `[batch, seq, heads, width]`; whether it is as it was projected."""
    aligned = parting.aligned
    layout = (aligned.left if graph is parting.left else aligned.right).layout
    heads = layout.heads
    query = aligned.weights[f"{layer}.q.weight"]
    slot = f"{layer}.{kind}.weight"
    if not heads or query.shape[0] % heads:
        return
    shape = (graph.batch, graph.seq, -1, query.shape[0] // heads)
    piece = layout.slots[slot]
    readers = {s for s, p in layout.slots.items() if p.parameter == piece.parameter}  # a fused one is known by any of its slots
    use = next((i for i, read in weights_read(graph, layout) if read in readers), None)
    given = None if use is None else positions_first(graph.nodes[use].tensor, batch=graph.batch, seq=graph.seq)
    if use is None or given is None or given.shape[0] != graph.batch * graph.seq:
        return
    if piece.rows is not None:
        if given.shape[1] <= max(piece.rows):
            return
        given = given[:, torch.tensor(piece.rows)]
    yield given.double().reshape(shape), True
    made: set[int] = set() if piece.rows is not None else {use}
    for index in range(use + 1, min(use + REACH, len(graph.nodes))):
        node = graph.nodes[index]
        if not node.data or not node.tensor.is_floating_point() or node.tensor.numel() != given.numel():
            if made & set(node.inputs):  # the numbers that a norm divides by
                made.add(index)
            continue
        rows = positions_first(node.tensor, batch=graph.batch, seq=graph.seq)
        if rows is None or rows.shape != given.shape:
            continue
        plain = bool(torch.equal(rows, given))
        if plain or made & set(node.inputs):
            made.add(index)
            if not plain and node.leads:
                yield rows.double().reshape(shape), False
        if len(made) > NORMED:
            return


def _scored(graph: Graph, value: Tensor, limit: float) -> bool:
    """Whether a product of queries with keys reads this tensor, or a multiple of it."""
    columns = graph.columns_of(value)
    read = {source for i, node in enumerate(graph.nodes) if graph.event(i).op in PRODUCTS for source in node.inputs}
    for held in (graph.nodes[source].columns for source in read):
        if columns is not None and held is not None and columns.matrix.shape == held.matrix.shape:
            if same(columns.times(held.scale / columns.scale), held, limit):
                return True
    return False


def _wide(graph: Graph, index: int, aligned: Aligned) -> bool:
    node = graph.nodes[index]
    width = next(t.shape[0] for s, t in aligned.weights.items() if s.endswith(".q.weight"))
    return node.data and node.tensor.numel() == graph.batch * graph.seq * width


def _rules(x: Tensor, weight: Tensor, heads: int, table: Angles, eps: float) -> Iterator[tuple[str, Tensor]]:
    """q after norm and RoPE, by the order of the two, the width of the norm and the style of the rotation, `[batch, seq, heads, width]`."""
    batch, seq, size = x.shape
    width = size // heads

    def norm_all(t: Tensor) -> Tensor:
        flat = t.reshape(batch, seq, size)
        return (flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)).view(batch, seq, heads, width) * _by_head(
            weight, heads, width
        )

    def norm_each(t: Tensor) -> Tensor:
        return t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps) * _by_head(weight, heads, width)

    split = x.view(batch, seq, heads, width)
    for style, rope in (("halves", _halves), ("pairs", _pairs)):
        for words, norm in (("over all heads at once", norm_all), ("over each head", norm_each)):
            yield f"norm before RoPE, {words}" + ("" if style == "halves" else ", in pairs"), rope(norm(split), table)
            yield f"RoPE before norm, {words}" + ("" if style == "halves" else ", in pairs"), norm(rope(split, table))


def _by_head(weight: Tensor, heads: int, width: int) -> Tensor:
    return weight.view(heads, width) if weight.shape[0] == heads * width else weight


def _halves(x: Tensor, table: Angles) -> Tensor:
    n = table.cos.shape[1]
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    cos, sin = table.cos[None, :, None], table.sin[None, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _pairs(x: Tensor, table: Angles) -> Tensor:
    n = table.cos.shape[1]
    a, b, rest = x[..., : 2 * n : 2], x[..., 1 : 2 * n : 2], x[..., 2 * n :]
    cos, sin = table.cos[None, :, None], table.sin[None, :, None]
    return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2), rest], dim=-1)


def _of_the_end(rope: Callable[[Tensor, Angles], Tensor], x: Tensor, table: Angles) -> Tensor:
    """The last numbers of each head turned, the first as they were."""
    n = 2 * table.cos.shape[1]
    return torch.cat([x[..., :-n], rope(x[..., -n:], table)], dim=-1)


ENDS: dict[str, Callable[[Callable[[Tensor, Angles], Tensor], Tensor, Angles], Tensor]] = {
    "first": lambda rope, x, table: rope(x, table),
    "last": _of_the_end,
}
ON_ROTATION: dict[str, Callable[[Parting], Cause | None]] = {
    "theta, exponent or scaling of RoPE": angles,
    "how much of a head RoPE turns (partial rotary)": rotated_width,
    "whether RoPE turns q and k, and which way": turned_at_all,
    "norm of q and k before or after RoPE, over a head or over all": norm_of_queries,
}
