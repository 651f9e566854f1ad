"""How a layer puts attention and feed-forward together where two implementations part: what each reads, and what its result is added to."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..compare import difference
from ..sources import Spot
from ..tracing.norms import norm_calls
from .aligned import Side, traced
from .anchors import Graph
from .captured import Parting
from .hypotheses import Cause
from .norm_rules import USES, NormRule
from .wiring import line_naming, weights_read

Norm = Callable[[Tensor], Tensor]
Form = tuple[str, Callable[[Tensor, Norm, Norm, Tensor], Tensor]]
# What a part f makes of the stream x: which of its norms it reads x through, and what x is behind it (x, pre, post, f). A part
# with one norm has it in both places.
ONE_NORM: dict[str, Form] = {
    "x + f(norm(x))": ("pre", lambda x, pre, post, f: x + f),
    "norm(x + f(x))": ("", lambda x, pre, post, f: post(x + f)),
    "x + norm(f(x))": ("", lambda x, pre, post, f: x + post(f)),
    "norm(x) + f(norm(x))": ("pre", lambda x, pre, post, f: pre(x) + f),
    "x + f(x)": ("", lambda x, pre, post, f: x + f),
    "f(norm(x))": ("pre", lambda x, pre, post, f: f),
}
TWO_NORMS: dict[str, Form] = {
    "x + post(f(pre(x)))": ("pre", lambda x, pre, post, f: x + post(f)),
    "post(x + f(pre(x)))": ("pre", lambda x, pre, post, f: post(x + f)),
    "x + f(pre(x))": ("pre", lambda x, pre, post, f: x + f),
    "pre(x) + post(f(pre(x)))": ("pre", lambda x, pre, post, f: pre(x) + post(f)),
    "x + pre(f(post(x)))": ("post", lambda x, pre, post, f: x + pre(f)),
    "x + post(f(x))": ("", lambda x, pre, post, f: x + post(f)),
}
FORMS = ONE_NORM | TWO_NORMS
ON_THE_STREAM = {"norm(x) + f(norm(x))", "f(norm(x))", "pre(x) + post(f(pre(x)))"}  # the residual itself is another
FOUR = ("norm1", "post_norm1", "norm2", "post_norm2")
KINDS = {"RMS norm": "the root of the mean square", "layer norm": "the standard deviation, the mean taken off first"}
VIEWS = ("view", "_unsafe_view", "reshape", "expand", "transpose", "t", "clone", "detach", "alias", "_to_copy", "unsqueeze", "squeeze")
ATTENTION, FEED_FORWARD = ("q", "k", "v"), ("gate", "up", "router")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """The forms of both parts, and what the feed-forward reads: what attention left, or what the layer began with."""

    attention: str
    feed_forward: str
    reads: str = "in turn"  # or "parallel", "parallel with one norm"

    def __str__(self) -> str:
        if self.reads == "in turn":
            if self.attention == self.feed_forward:
                return f"{self.attention}, f the attention and then the feed-forward"
            return f"{self.attention}, f the attention, and then {self.feed_forward}, f the feed-forward"
        if self.attention in TWO_NORMS:
            return "x + post(attention(pre(x))) + post(feed_forward(pre(x))), both of the same x"
        norms = ("norm(x)", "norm(x)") if self.reads.endswith("one norm") else ("norm1(x)", "norm2(x)")
        return f"x + attention({norms[0]}) + feed_forward({norms[1]}), both of the same x"

    def fed(self, x: Tensor, h: Tensor, norms: "Norms") -> Tensor:
        """What the feed-forward reads."""
        part = norms.first if self.reads.endswith("one norm") else norms.second
        return part.read(h if self.reads == "in turn" else x, self.feed_forward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The norms of attention or of the feed-forward."""

    pre: Norm
    post: Norm

    def read(self, x: Tensor, form: str) -> Tensor:
        """What the part reads of the stream."""
        which = FORMS[form][0]
        return x if not which else self.pre(x) if which == "pre" else self.post(x)

    def joined(self, x: Tensor, form: str, given: Tensor) -> Tensor:
        """The stream behind the part."""
        return FORMS[form][1](x, self.pre, self.post, given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """The norms of one layer."""

    first: Part
    second: Part


@dataclass(slots=True, kw_only=True)
class Layer:
    """The nodes of one layer: what attention reads and gives, what the feed-forward reads and gives."""

    norms: Norms
    reads: int
    gives: int = -1
    fed: int = -1
    fed_gives: int = -1


@dataclass(slots=True, kw_only=True)
class Stream:
    """How one run is wired: the node that the stream starts at, its layers, and the node that the head reads."""

    graph: Graph
    width: int
    start: int
    head: int
    final: Norm
    forms: dict[str, Form] = field(default_factory=lambda: ONE_NORM)
    layers: list[Layer] = field(default_factory=list)
    wiring: Wiring | None = None

    def value(self, index: int) -> Tensor | None:
        """A tensor as `[batch, seq_len, width]`; None where it is none of the stream's size."""
        node, graph = self.graph.nodes[index], self.graph
        rows = (
            node.tensor.ndim in (2, 3)
            and node.tensor.shape[-1] == self.width
            and node.tensor.numel() == graph.batch * graph.seq * self.width
        )
        return node.tensor.reshape(graph.batch, graph.seq, self.width).double() if rows and node.data else None

    def given(self, entry: int, end: int) -> list[tuple[int, Tensor]]:
        """Tensors of the stream's size that are made of it through `entry` alone, before `end`."""
        inside: set[int] = {entry}
        found = []
        for index in range(entry + 1, end):
            sources = [i for i in self.graph.nodes[index].inputs if self.graph.nodes[i].data]
            if any(i in inside for i in sources) and all(i in inside or self.value(i) is None for i in sources):
                inside.add(index)
                value = self.value(index)
                if value is not None and self.graph.event(index).op not in VIEWS:
                    found.append((index, value))
        return found


def block_wiring(parting: Parting) -> Cause | None:
    """Norms before, behind or after a part, parts in turn or in parallel, a residual that is another tensor or none."""
    aligned = parting.aligned
    mine, theirs = (_stream(parting, graph, side) for graph, side in ((parting.left, aligned.left), (parting.right, aligned.right)))
    if mine is None or theirs is None or mine.wiring is None or theirs.wiring is None or mine.wiring == theirs.wiring:
        return None
    if aligned.gap(right=_rewired(parting, theirs, mine.wiring, aligned.right)) is None:
        shown = "wired so, the reference's own parts give the subject's logits"
    elif aligned.gap(left=_rewired(parting, mine, theirs.wiring, aligned.left)) is None:
        shown = "wired as the reference's, the subject's parts give its logits"
    else:
        return None
    spot, module = _place(parting, mine)
    return Cause(
        name=_name(mine.wiring, theirs.wiring),
        text=f"a layer is {mine.wiring}, where the reference's is {theirs.wiring}; {shown}",
        fix=f"make it {theirs.wiring}",
        spot=spot or parting.spot(parting.node),
        module=module or parting.left.event(parting.node).where.module,
    )


def _name(mine: Wiring, theirs: Wiring) -> str:
    if mine.reads != theirs.reads:
        return "parallel residual"
    differing = {
        a
        for one, other in ((mine, theirs), (theirs, mine))
        for a in (one.attention, one.feed_forward)
        if a not in (other.attention, other.feed_forward)
    }
    return "residual" if differing & ON_THE_STREAM else "norm placement"


# Reading a run


def _stream(parting: Parting, graph: Graph, side: Side) -> Stream | None:
    """The wiring of a run, where every layer has the same and the captured tensors show it."""
    weights = parting.aligned.weights
    width = weights["embed.weight"].shape[-1] if "embed.weight" in weights else 0
    calls = [c for c in norm_calls(graph.recording) if c.width == width]
    reads = [(i, s) for i, s in weights_read(graph, side.layout) if weights[s].ndim == 2]
    if not calls or not reads:
        return None
    for use, turned in itertools.product(list(USES)[:2], (False, True)):
        rule = NormRule(division=KINDS[calls[0].kind], use=use, eps=calls[0].eps)
        found = _read(parting, graph, reads, partial(_norm, rule, weights), turned)
        if found is not None:
            return found
    return None


def _norm(rule: NormRule, weights: dict[str, Tensor], slot: str | None) -> Norm:
    vectors = {} if slot is None else {"weight": weights[slot]}
    bias = weights.get(slot.removesuffix("weight") + "bias") if slot else None
    vectors |= {} if bias is None else {"bias": bias}
    return lambda x: rule(x, vectors)


def _read(parting: Parting, graph: Graph, reads: list[tuple[int, str]], norm: Callable[[str | None], Norm], turned: bool) -> Stream | None:
    weights = parting.aligned.weights
    layers = list(dict.fromkeys(slot.partition(".")[0] for _, slot in reads if slot.partition(".")[0].isdigit()))
    final = norm("norm.weight") if "norm.weight" in weights else norm(None)
    stream = Stream(graph=graph, width=weights["embed.weight"].shape[-1], start=-1, head=_base(graph, reads[-1][0]), final=final)
    for name in layers:
        slots = [
            s
            for s in weights
            if s.startswith(f"{name}.") and s.endswith("weight") and "norm" in s and s.split(".")[-2] not in ("q_norm", "k_norm")
        ]
        norms = _norms_of(name, slots, norm, turned)
        if norms is None:
            return None
        stream.forms = TWO_NORMS if len(slots) == len(FOUR) else ONE_NORM
        own = [(i, slot.split(".")[1]) for i, slot in reads if slot.startswith(f"{name}.")]
        first = [
            next((_base(graph, i) for i, kind in own if kind.startswith(kinds)), None) for kinds in (ATTENTION, (*FEED_FORWARD, "expert"))
        ]
        if first[0] is None or first[1] is None:
            return None
        stream.layers.append(Layer(norms=norms, reads=first[0], fed=first[1]))
    return _followed(parting, stream) if stream.layers else None


def _norms_of(layer: str, slots: list[str], norm: Callable[[str | None], Norm], turned: bool) -> Norms | None:
    """The norms of a layer that has none, one for both parts, one for each, or two for each; `turned`: the first is the feed-forward's."""
    if len(slots) == len(FOUR):
        four = [f"{layer}.{kind}.weight" for kind in FOUR]
        if turned or set(four) != set(slots):
            return None
        made = [norm(slot) for slot in four]
        return Norms(first=Part(pre=made[0], post=made[1]), second=Part(pre=made[2], post=made[3]))
    if len(slots) > 2:
        return None
    one, two = (norm(slot) for slot in ([*slots, *slots][:2] if slots else (None, None)))
    first, second = Part(pre=one, post=one), Part(pre=two, post=two)
    return Norms(first=second, second=first) if turned else Norms(first=first, second=second)


def _base(graph: Graph, index: int) -> int:
    """The tensor that an op reads, before it was viewed."""
    while True:
        sources = [i for i in graph.nodes[index].inputs if graph.nodes[i].data]
        if not sources:
            return index
        index = sources[-1] if len(sources) == 1 else sources[0]
        if graph.event(index).op not in VIEWS:
            return index


def _followed(parting: Parting, stream: Stream) -> Stream | None:
    """The stream with its wiring: the same forms in every layer, from the first to the head."""
    first = stream.layers[0]
    given = stream.value(first.reads)
    if given is None:
        return None
    for reads in ("pre", "post", ""):
        forms = [name for name, (which, _) in stream.forms.items() if which == reads]
        start = first.reads
        if reads and forms:
            normed = (
                i
                for i in range(start)
                if (x := stream.value(i)) is not None and _same(first.norms.first.read(x, forms[0]), given, parting.limit)
            )
            start = next(normed, -1)
        if start < 0:
            continue
        stream.start = start
        for wiring in _wirings(stream.forms, forms):
            if _follows(parting, stream, wiring):
                stream.wiring = wiring
                return stream
    return None


def _wirings(forms: Iterable[str], first: list[str]) -> Iterator[Wiring]:
    """The ways to put two parts together, the attention in one of the `first` forms."""
    for attention in first:
        yield from (Wiring(attention=attention, feed_forward=form) for form in forms)
        if attention in ("x + f(norm(x))", "x + post(f(pre(x)))"):
            if attention in ONE_NORM:
                yield Wiring(attention=attention, feed_forward=attention, reads="parallel with one norm")
            yield Wiring(attention=attention, feed_forward=attention, reads="parallel")


def _follows(parting: Parting, stream: Stream, wiring: Wiring) -> bool:
    """Whether every layer computes this from what it read; its layers' nodes are noted."""
    x = stream.value(stream.start)
    for layer, following in zip(stream.layers, [*stream.layers[1:], None], strict=True):
        end = following.reads if following else stream.head
        fed, wanted = stream.value(layer.fed), stream.value(end)
        if x is None or fed is None or wanted is None:
            return False
        after = stream.final if following is None else partial(following.norms.first.read, form=wiring.attention)
        found = _joined(parting.limit, stream, wiring, layer, x, (fed, wanted), end, after)
        if found is None:
            return False
        layer.gives, layer.fed_gives, x = found
    return True


def _joined(
    limit: float, stream: Stream, wiring: Wiring, layer: Layer, x: Tensor, wanted: tuple[Tensor, Tensor], end: int, after: Norm
) -> tuple[int, int, Tensor] | None:
    """(what attention gives, what the feed-forward gives, the stream behind the layer), where the forms fit what is read next."""
    for i, a in stream.given(layer.reads, layer.fed if wiring.reads == "in turn" else end):
        h = layer.norms.first.joined(x, wiring.attention, a)
        if not _same(wiring.fed(x, h, layer.norms), wanted[0], limit):
            continue
        for j, f in stream.given(layer.fed, end):
            y = layer.norms.second.joined(h, wiring.feed_forward, f)
            if _same(after(y), wanted[1], limit):
                return i, j, y
    return None


def _same(one: Tensor, other: Tensor, limit: float) -> bool:
    return one.shape == other.shape and difference(one, other, relative_limit=limit) is None


# Wiring it otherwise


def _rewired(parting: Parting, stream: Stream, wiring: Wiring, side: Side) -> Tensor | None:
    """The logits of a run whose parts are handed what another wiring hands them; None where a part would have to wait for one
    that runs later."""
    if wiring.reads == "in turn" and any(layer.fed <= layer.gives for layer in stream.layers):
        return None
    graph = stream.graph
    x = h = torch.zeros(0)
    places: dict[int, list[tuple[int, str]]] = {}
    for number, layer in enumerate(stream.layers):
        for what in ("reads", "gives", "fed", "fed_gives"):
            places.setdefault(graph.nodes[getattr(layer, what)].event, []).append((number, what))
    begins, ends = (graph.nodes[i].event for i in (stream.start, stream.head))

    def change(event: int, outputs: list[Tensor]) -> None:
        nonlocal x, h
        if event == begins:
            x = outputs[0].double().reshape(graph.batch, graph.seq, -1)
        for number, what in places.get(event, ()):
            norms = stream.layers[number].norms
            own = outputs[0].double().reshape(graph.batch, graph.seq, -1)
            if what == "reads":
                outputs[0].copy_(norms.first.read(x, wiring.attention).reshape(outputs[0].shape))
            elif what == "gives":
                h = norms.first.joined(x, wiring.attention, own)
            elif what == "fed":
                outputs[0].copy_(wiring.fed(x, h, norms).reshape(outputs[0].shape))
            else:
                x = norms.second.joined(h, wiring.feed_forward, own)
        if event == ends:
            outputs[0].copy_(stream.final(x).reshape(outputs[0].shape))

    result: Tensor = traced(side.subject, parting.aligned.case, change=change).recording.result
    return result


def _place(parting: Parting, stream: Stream) -> tuple[Spot | None, str | None]:
    """The line of the module around both parts that calls the first of them."""
    graph, layer = stream.graph, stream.layers[0]
    paths = [graph.event(i).where.module.split(".") for i in (layer.gives, layer.fed_gives)]
    shared = [a for n, a in enumerate(paths[0]) if paths[1][: n + 1] == paths[0][: n + 1]]
    if len(shared) == len(paths[0]):
        return None, None
    owner = parting.aligned.left.subject.model.get_submodule(".".join(shared))
    return line_naming(owner, paths[0][len(shared)]), ".".join(shared)


ON_BLOCKS: dict[str, Callable[[Parting], Cause | None]] = {
    "how a layer puts its parts together (norms, residuals, in turn or in parallel)": block_wiring
}
