"""The optimizer of a recipe: which parameter goes where, and the rates of a step.

With `muon`, matrices inside the model get `torch.optim.Muon`, and embeddings, head and vectors AdamW, each kind at its own
rate. A shared parameter is in one group, once, and every trained parameter is in one.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..convention import first_embedding
from ..errors import UsageError
from .recipe import Recipe
from .world import dealt, replicated

Kind = Literal["matrix", "embedding", "vector"]


@dataclass(slots=True)
class Optimizers:
    """What updates a model, as one: `step`, `zero_grad`, the state of all."""

    each: list[torch.optim.Optimizer]

    def set_rates(self, share: float) -> None:
        """Every group at this share of its peak rate."""
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share

    def zero_grad(self) -> None:
        for optimizer in self.each:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.each]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.each, states, strict=True):
            numbered = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
            optimizer.load_state_dict(dealt(state, numbered))


def kinds(model: nn.Module, head: nn.Module | None = None) -> dict[Kind, list[Tensor]]:
    """The trained parameters by kind. An embedding is any `nn.Embedding`'s table, and the head's matrix is one, too."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    first = first_embedding(model)
    rows = first.num_embeddings if first is not None else None
    if head is not None:
        tables.add(id(head.weight))
    sorted_by_kind: dict[Kind, list[Tensor]] = {"matrix": [], "embedding": [], "vector": []}
    for parameter in model.parameters():  # a shared one comes once
        if not parameter.requires_grad:
            continue
        if id(parameter) in tables or (
            parameter.ndim == 2 and rows is not None and rows in parameter.shape and min(parameter.shape) != rows
        ):
            sorted_by_kind["embedding"].append(parameter)
        else:
            sorted_by_kind["matrix" if parameter.ndim == 2 and min(parameter.shape) > 1 else "vector"].append(parameter)
    return sorted_by_kind


def make_optimizers(model: nn.Module, recipe: Recipe, *, head: nn.Module | None = None) -> Optimizers:
    """The optimizers of a recipe for a model. UsageError where torch has no Muon."""
    by_kind = kinds(model, head)
    rates: dict[Kind, float] = {"matrix": recipe.learning_rate, "embedding": recipe.embedding_rate, "vector": recipe.norm_rate}
    with_muon = recipe.optimizer == "muon" and by_kind["matrix"]
    if with_muon and not hasattr(torch.optim, "Muon"):
        raise UsageError(
            f"--recipe {recipe.name} needs torch.optim.Muon, which torch {torch.__version__} does not have; use --recipe short"
        )
    adam: list[Kind] = ["embedding", "vector"] if with_muon else ["matrix", "embedding", "vector"]
    groups = [{"params": by_kind[kind], "lr": rates[kind], "peak": rates[kind]} for kind in adam if by_kind[kind]]
    made: list[torch.optim.Optimizer] = []
    if groups:
        made.append(torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.epsilon, weight_decay=recipe.weight_decay))
    if with_muon:
        matrices = [{"params": by_kind["matrix"], "lr": rates["matrix"], "peak": rates["matrix"]}]
        muon = torch.optim.Muon(matrices, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        muon.register_step_pre_hook(_with_whole_gradients)
        made.append(muon)
    return Optimizers(made)


def _with_whole_gradients(muon: torch.optim.Optimizer, *_: Any) -> None:
    """Gradients and momenta of sharded matrices, whole on every rank. Muon's iteration is in bfloat16: over shards its products are
    added up in bfloat16 too, and the update is another one than in one process."""
    for parameter in (p for group in muon.param_groups for p in group["params"]):
        parameter.grad = replicated(parameter.grad)
    for state in muon.state.values():
        state.update({name: replicated(value) for name, value in state.items()})


RESIDUAL_OUTPUTS = ("o_proj", "down_proj", "dense", "dense_4h_to_h")  # in the reference model, and in GPT-NeoX of transformers


@torch.no_grad()
def zero_residual_outputs(model: nn.Module) -> None:
    """Set the matrices that write into the residual stream to 0: every layer begins as the identity, and all get gradients."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in RESIDUAL_OUTPUTS:
            module.weight.zero_()
