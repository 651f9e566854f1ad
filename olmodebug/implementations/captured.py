"""Named causes that are tried where two implementations part: on the tensors that were captured there.

Each shows two things on the captured values: that the subject's tensor is what one rule gives on the inputs that both
sides have, and that the reference's is what another rule gives on the same inputs. So the difference between the rules is
the difference between the runs, and it vanishes with the reference's rule.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compare import difference
from ..sources import Spot
from ..tracing.norms import NormCall, norm_calls
from .aligned import Aligned
from .anchors import Columns, Graph, first_bad, last_leading, same
from .hypotheses import Cause

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu with tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu of sigmoid (x * sigmoid(1.702 x))": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "squared relu": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "no activation": lambda x: x,
}
NEAR = 40  # how many ops behind the parting a tensor may lie to be looked at
BEFORE = 24  # tensors before it that are looked at: those of a norm or an activation written out in single ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """Where two runs part: the first node of each that the other does not have, and the two graphs."""

    aligned: Aligned
    left: Graph
    right: Graph
    node: int
    other: int | None

    @property
    def limit(self) -> float:
        return self.aligned.limit

    def flipped(self) -> "Parting | None":
        """The same seen from the reference; None where it has no first wrong node."""
        if self.other is None:
            return None
        aligned = self.aligned
        turned = replace(
            aligned,
            left=aligned.right,
            right=aligned.left,
            left_logits=aligned.right_logits,
            right_logits=aligned.left_logits,
            others=[],
            _graphs=(self.right, self.left),
        )
        return Parting(aligned=turned, left=self.right, right=self.left, node=self.other, other=self.node)

    def near(self, graph: Graph, start: int | None) -> Iterator[int]:
        """Nodes that went astray, from the first on."""
        if start is None:
            return
        for index in range(start, min(start + NEAR, len(graph.nodes))):
            node = graph.nodes[index]
            if node.data and not node.good and node.columns is not None:
                yield index

    def starts(self) -> Iterator[int]:
        """Nodes of the left that both sides have, from which the step that parts starts, the nearest first; the same tensor once."""
        queue, seen, told = [self.node], set[int](), set[int]()
        while queue and len(seen) < BEFORE:
            index = queue.pop(0)
            if index in seen:
                continue
            seen.add(index)
            node = self.left.nodes[index]
            queue += node.inputs
            fits = node.data and node.tensor.is_floating_point() and node.tensor.ndim >= 2
            if fits and node.anchor is not None and node.anchor not in told:
                told.add(node.anchor)
                yield index

    def spot(self, index: int) -> Spot | None:
        return self.left.recording.spots[self.left.nodes[index].event]


def parting_of(aligned: Aligned) -> Parting:
    """Where the two runs part; at the logits, where the subject has everything before them."""
    left, right = aligned.graphs()
    mine = first_bad(left)
    return Parting(aligned=aligned, left=left, right=right, node=last_leading(left) if mine is None else mine, other=first_bad(right))


def activation(parting: Parting) -> Cause | None:
    """Another activation function."""
    left, right = parting.left, parting.right
    inputs = [i for i in left.nodes[parting.node].inputs if left.nodes[i].anchor is not None and left.nodes[i].tensor.is_floating_point()]
    for source in inputs:
        x = left.nodes[source].tensor.double()
        if left.columns_of(x) is None:
            continue
        results = {name: left.columns_of(rule(x)) for name, rule in ACTIVATIONS.items()}
        found: dict[str, tuple[str, int]] = {}
        for side, graph, start in (("left", left, parting.node), ("right", right, parting.other)):
            for index in parting.near(graph, start):
                held = graph.nodes[index].columns
                names = [n for n, r in results.items() if r is not None and held is not None and same(r, held, parting.limit)]
                if names and side not in found:
                    found[side] = (names[0], index)
        if set(found) == {"left", "right"} and found["left"][0] != found["right"][0]:
            mine, theirs = found["left"], found["right"]
            return Cause(
                name="activation",
                text=f"the activation is {mine[0]} where the reference's is {theirs[0]}; applied to the same captured input, each gives exactly its side's output",
                fix=f"use {theirs[0]}",
                spot=parting.spot(mine[1]),
                module=left.event(mine[1]).where.module,
            )
    return None


def eps(parting: Parting) -> Cause | None:
    """The eps of a norm."""
    mine, theirs = norm_calls(parting.left.recording), norm_calls(parting.right.recording)
    if len(mine) != len(theirs):
        return None
    for one, other in zip(mine, theirs, strict=True):
        if _equal_eps(one, other):
            continue
        if one.width != other.width or not _near_parting(parting, one) or not _explained_by_eps(parting, other.eps):
            return None
        return eps_cause(one, other, "with the reference's eps on the same captured input, the norm gives the reference's output")
    return None


def eps_cause(one: NormCall, other: NormCall, shown: str) -> Cause:
    return Cause(
        name="eps",
        text=f"the {one.kind} adds eps {one.eps:.3g} where the reference adds {other.eps:.3g}; {shown}",
        fix=f"take eps from the configuration: {other.eps:.3g}",
        module=one.where.module,
        evidence={"eps": one.eps, "reference_eps": other.eps},
    )


def differing_eps(aligned: Aligned) -> tuple[NormCall, NormCall] | None:
    """The first pair of norms with another eps, whether or not these inputs show it; None where the two lists differ in length."""
    left, right = aligned.graphs()
    mine, theirs = norm_calls(left.recording), norm_calls(right.recording)
    if len(mine) != len(theirs):
        return None
    for one, other in zip(mine, theirs, strict=True):
        if one.width == other.width and one.kind == other.kind and not _equal_eps(one, other):
            return one, other
    return None


def _equal_eps(one: NormCall, other: NormCall) -> bool:
    return abs(one.eps - other.eps) <= 1e-3 * max(abs(one.eps), abs(other.eps))  # float32 keeps 1e-5 to seven places


def _near_parting(parting: Parting, call: NormCall) -> bool:
    where = parting.left.event(parting.node).where
    return call.where.module == where.module and call.where.function == where.function


def _explained_by_eps(parting: Parting, wanted: float) -> bool:
    """Whether the norm of the subject's own input with the reference's eps is a tensor of the reference."""
    left, right = parting.left, parting.right
    outputs = [right.nodes[i].columns for i in parting.near(right, parting.other)]
    for x in (left.nodes[i].tensor.double() for i in parting.starts()):
        centred = x - x.mean(-1, keepdim=True)
        for value in (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + wanted),
            centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + wanted),
        ):
            for weighted in _weighted(parting, value):
                made = left.columns_of(weighted)
                if made is not None and any(held is not None and same(made, held, parting.limit) for held in outputs):
                    return True
    return False


def _weighted(parting: Parting, value: Tensor) -> Iterator[Tensor]:
    """A normalised tensor, alone and times every norm weight of its width (plus its bias, where there is one)."""
    yield value
    for slot, weight in parting.aligned.weights.items():
        if weight.ndim == 1 and weight.shape[0] == value.shape[-1] and slot.endswith("weight"):
            bias = parting.aligned.weights.get(slot.removesuffix("weight") + "bias")
            yield value * weight + (bias if bias is not None and bias.shape == weight.shape else 0)


def softcap(parting: Parting) -> Cause | None:
    """A softcap that one side has and the other has not."""
    left, right = parting.left, parting.right
    for bare, capped, start, words in (
        (left, right, parting.other, "misses a softcap that the reference has"),
        (right, left, parting.node, "has a softcap that the reference has not"),
    ):
        for index in parting.near(capped, start):
            cap = _cap(capped, index, bare, parting.limit)
            if cap is None:
                continue
            at = index if capped is left else parting.node
            return Cause(
                name="softcap",
                text=f"the subject {words}: {cap:.6g} * tanh(x / {cap:.6g}); applied to the captured tensor, it gives the other side's",
                fix="apply the softcap that the configuration states, on every path",
                spot=parting.spot(at),
                module=left.event(at).where.module,
                evidence={"softcap": cap},
            )
    return None


def _cap(capped: Graph, index: int, bare: Graph, limit: float) -> float | None:
    """The cap of a tanh, where what it is taken of is a tensor of the other run divided by the cap, and cap times the tanh is
    there; None for any other op."""
    if capped.event(index).op != "tanh":
        return None
    inside = capped.recording.kept[capped.nodes[index].event].inputs[0].double()
    columns = capped.columns_of(inside)
    for node in bare.nodes if columns is not None else ():
        held = node.columns
        if held is None or not node.data or not held.positioned or node.tensor.numel() != inside.numel():
            continue
        assert columns is not None
        cap = held.scale / columns.scale
        if cap <= 1 or not same(columns.times(cap), held, limit):
            continue
        made = capped.columns_of(cap * torch.tanh(inside))
        if made is not None and _is_there(capped, made, limit):
            return cap
    return None


def _is_there(graph: Graph, columns: Columns, limit: float) -> bool:
    return any(n.columns is not None and same(columns, n.columns, limit) for n in graph.nodes)


def visible_keys(parting: Parting) -> Cause | None:
    """Another set of keys that a query may look at: a window, a mask that is not causal."""
    mine, theirs = _softmaxes(parting.left), _softmaxes(parting.right)
    for one, other in zip(mine, theirs, strict=False):
        p, q = parting.left.nodes[one].tensor.double(), parting.right.nodes[other].tensor.double()
        if p.numel() != q.numel():
            return None
        p, q = p.reshape(-1, parting.left.seq, parting.left.seq), q.reshape(-1, parting.left.seq, parting.left.seq)
        if difference(p, q, relative_limit=parting.limit) is None:
            continue
        seen, wanted = p > 0, q > 0
        if torch.equal(seen, wanted) or not _same_scores(p, q, parting.limit):
            return None
        return Cause(
            name="window" if not bool((seen | wanted).triu(1).any()) and (_window(seen) or _window(wanted)) else "mask",
            text=f"a query sees {_words(seen)} where the reference lets it see {_words(wanted)}; among the keys that both see, the weights stand in the same proportion",
            fix="let a query see itself and the keys before it, of a window the last W with itself: key > query - W",
            spot=parting.spot(parting.node),
            module=parting.left.event(one).where.module,
            evidence={"visible_pairs": int(seen.sum()), "reference_visible_pairs": int(wanted.sum())},
        )
    return None


def _softmaxes(graph: Graph) -> list[int]:
    seq = graph.seq
    return [
        i
        for i, n in enumerate(graph.nodes)
        if graph.event(i).op in ("_softmax", "_safe_softmax", "softmax") and n.leads and n.tensor.shape[-2:] == (seq, seq)
    ]


def _same_scores(p: Tensor, q: Tensor, limit: float) -> bool:
    """Whether the two differ only by which keys count: the share of every key that both see, among those that both see."""
    both = (p > 0) & (q > 0)
    a, b = torch.where(both, p, 0.0), torch.where(both, q, 0.0)
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    return difference(torch.nan_to_num(a), torch.nan_to_num(b), relative_limit=limit) is None


def _window(seen: Tensor) -> int | None:
    """The most keys that a late query sees, itself the last of them; None where nothing is cut off or it sees ahead."""
    causal = not bool(seen.triu(1).any())
    return int(seen[0, -1].sum()) if causal and not bool(seen[0, -1, 0]) else None


def _words(seen: Tensor) -> str:
    if bool(seen.triu(1).any()):
        ahead = int((seen[0, 0].nonzero().max()).item())
        return f"{ahead} keys ahead of itself" if ahead else "keys ahead of itself"
    window = _window(seen)
    return f"the last {window} keys" if window else "all keys up to itself"


ON_TENSORS: dict[str, Callable[[Parting], Cause | None]] = {
    "eps of a norm": eps,
    "activation (gelu, gelu with tanh, silu, relu)": activation,
    "visible keys (causal mask, window)": visible_keys,
    "softcap": softcap,
}
