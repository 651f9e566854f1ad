"""How tokens find their experts where two implementations part: what is made of a router's logits."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .aligned import traced
from .anchors import Graph, same
from .captured import Parting
from .hypotheses import Cause
from .repaired import vanishes
from .wiring import weights_read

SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid}


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The weights of the chosen experts as a rule on the router's logits."""

    score: str
    chosen: int
    normed: bool

    def __call__(self, logits: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """`[..., chosen]`, the largest first."""
        weights = SCORES[self.score](logits.double()).topk(self.chosen, -1).values
        return weights / weights.sum(-1, keepdim=True) if self.normed else weights

    def __str__(self) -> str:
        return f"the {self.score} of the router's logits, {'divided by their sum over the chosen experts' if self.normed else 'as it is'}"


def chosen_experts(parting: Parting) -> Cause | None:
    """Another number of experts for a token: with the weights of the others at zero, the side that chooses more agrees."""
    source, flipped = _router(parting), parting.flipped()
    twin = None if source is None else parting.left.nodes[source].anchor
    if source is None or twin is None or flipped is None:
        return None
    logits = parting.left.nodes[source].tensor
    counts = range(1, logits.shape[-1])
    mine, theirs = (
        next((f for k in counts if (f := _found(graph, logits, k, parting.limit)) is not None), None)
        for graph in (parting.left, parting.right)
    )
    if mine is None or theirs is None or mine[0].chosen == theirs[0].chosen:
        return None
    more = mine[0].chosen > theirs[0].chosen
    wider, fewer = (mine, theirs[0]) if more else (theirs, mine[0])

    def alone(x: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        return F.pad(fewer(x, vectors), (0, wider[0].chosen - fewer.chosen))

    if not vanishes(parting if more else flipped, source if more else twin, wider[1], alone):
        return None
    return Cause(
        name="chosen experts",
        text=f"a token goes to {mine[0].chosen} of the experts, in the reference to {theirs[0].chosen}; with the weights of the others at zero, the logits agree",
        fix=f"choose {theirs[0].chosen}, as the configuration says",
        spot=parting.spot(mine[1]),
        module=parting.left.event(mine[1]).where.module,
        op=parting.left.event(mine[1]).op,
    )


def routing(parting: Parting) -> Cause | None:
    """Weights of the chosen experts that are made by another rule."""
    left, right = parting.left, parting.right
    source = _router(parting)
    if source is None:
        return None
    logits = left.nodes[source].tensor
    for chosen in range(2, logits.shape[-1]):
        mine, theirs = (_found(graph, logits, chosen, parting.limit) for graph in (left, right))
        if mine is None or theirs is None or mine[0] == theirs[0]:
            continue
        if vanishes(parting, source, mine[1], theirs[0]):
            return Cause(
                name="routing",
                text=f"the weights of the {chosen} chosen experts are {mine[0]}, the reference's are {theirs[0]}; with the reference's rule in place, the logits agree",
                fix=f"weigh the experts with {theirs[0]}",
                spot=parting.spot(mine[1]),
                module=left.event(mine[1]).where.module,
                op=left.event(mine[1]).op,
            )
    return None


def end_of_choice(parting: Parting) -> Cause | None:
    """The experts with the smallest scores chosen for those with the largest, or the reverse: chosen as in the reference, the logits agree."""
    graph = parting.left
    chosen = [
        i for i, e in enumerate(graph.recording.events) if e.op == "topk" and graph.made_by(i) and graph.nodes[graph.made_by(i)[0]].leads
    ]
    mine, theirs = ({_largest(g, i) for i, e in enumerate(g.recording.events) if e.op == "topk"} for g in (graph, parting.right))
    if not chosen or len(mine) != 1 or len(theirs) != 1 or mine == theirs:
        return None
    (largest,) = theirs
    sources = {i: graph.nodes[graph.nodes[graph.made_by(i)[0]].inputs[0]] for i in chosen}
    dims = {i: int(graph.recording.kept[i].arguments.get("dim", -1)) for i in chosen}
    held: dict[int, Tensor] = {}

    def change(event: int, outputs: list[Tensor]) -> None:
        if event in sources:
            found = held[sources[event].event].topk(outputs[0].shape[dims[event]], dims[event], largest=largest)
            outputs[0].copy_(found.values)
            outputs[1].copy_(found.indices)
        for source in sources.values():
            if source.event == event:
                held[event] = outputs[source.output].detach().clone()

    run = traced(parting.aligned.left.subject, parting.aligned.case, change=change)
    if parting.aligned.gap(run.recording.result) is not None:
        return None
    words = ("largest", "smallest") if largest else ("smallest", "largest")
    node = graph.made_by(chosen[0])[0]
    return Cause(
        name="chosen experts",
        text=f"the {graph.nodes[node].tensor.shape[dims[chosen[0]]]} entries with the {words[1]} scores are chosen where the reference chooses those with the {words[0]}; chosen so, the logits agree",
        fix=f"topk(..., largest={largest})",
        spot=parting.spot(node),
        module=graph.event(node).where.module,
        op="topk",
    )


def _largest(graph: Graph, event: int) -> bool:
    return bool(graph.recording.kept[event].arguments.get("largest", True))


def _router(parting: Parting) -> int | None:
    """The logits of a router that both sides have, the last before the runs part."""
    weights = parting.aligned.weights
    experts = {part for slot in weights for part in slot.split(".") if re.fullmatch(r"expert\d+", part)}
    routers = {slot for slot, tensor in weights.items() if "expert" not in slot and tensor.ndim == 2 and tensor.shape[0] == len(experts)}
    uses = [i for i, slot in weights_read(parting.left, parting.aligned.left.layout) if slot in routers]
    return next((i for i in reversed(uses) if i <= parting.node and parting.left.nodes[i].anchor is not None), None)


def _found(graph: Graph, logits: Tensor, chosen: int, limit: float) -> tuple[Routing, int] | None:
    """The rule that gives the most processed weights of a run, and where they are first."""
    for normed in (True, False):
        for score in SCORES:
            rule = Routing(score=score, chosen=chosen, normed=normed)
            made = graph.columns_of(rule(logits, {}))
            for index, node in enumerate(graph.nodes):
                if made is not None and node.columns is not None and node.leads and same(made, node.columns, limit):
                    return rule, index
    return None


ON_ROUTING: dict[str, Callable[[Parting], Cause | None]] = {
    "the weights of the chosen experts": routing,
    "how many experts are chosen": chosen_experts,
    "which end of the scores is chosen": end_of_choice,
}
