"""Parameters that get gradients and that no optimizer holds, and what an optimizer decays against the script's own grouping."""

import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..report import Finding, Scalar
from ..sources import Spot
from ..units import listed, plural
from .excerpts import lines_at
from .gradients import has_plain_gradient, parameters, sample
from .models import alive
from .part import Part
from .place import where_of

ALL_HELD = "loop.every-parameter-optimized"
NORMS = "loop.norms-undecayed"

NAMES_SHOWN = 4


class Holding(Part):
    """Compares the parameters of the models with those of the optimizers."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.made: weakref.WeakKeyDictionary[Any, Spot | None] = weakref.WeakKeyDictionary()
        self.steps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.unheld: list[tuple[Any, Any, int, Tensor]] = []

    def listen(self) -> None:
        self.watch.events.on("optimizer_made", lambda args, kwargs, spot: self.made.__setitem__(args[0], spot))
        self.watch.events.on("step", self._step)

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        number = self.steps[optimizer] = self.steps.get(optimizer, 0) + 1
        if number == 1:
            self.unheld = [(weakref.ref(p), weakref.ref(p.grad), p.grad._version, sample(p).clone()) for p in self._outside()]  # type: ignore[union-attr]
            self._decayed(optimizer)
        if number == 3 and self.unheld:
            self._held(spot)

    def _outside(self) -> list[Tensor]:
        """Parameters with a gradient that no optimizer holds."""
        held = {id(p) for o in self.watch.models.search() for p in parameters(o)}
        roots = self.watch.models.roots()
        return [p for root in roots for p in root.parameters() if id(p) not in held and has_plain_gradient(p)]

    def _held(self, spot: Spot | None) -> None:
        """Told at the third step, of those that never changed though their gradient did: a model left over from before has none."""
        fresh = set()
        for reference, gradient, version, before in self.unheld:
            p = reference()
            if p is None or p.grad is None or not bool(p.grad.any()) or not torch.equal(sample(p), before):
                continue  # what changed is updated by somebody: by hand, or as a copy of other weights
            if p.grad is not gradient() or p.grad._version != version:
                fresh.add(id(p))
        every = self.watch.models.search()
        held = {id(p) for o in every for p in parameters(o)}
        roots = self.watch.models.roots()
        owned = {id(p) for root in roots for p in root.parameters()}
        for root in roots:
            named = [(n, p) for n, p in root.named_parameters() if p.requires_grad and p.grad is not None]
            missing = [(name, p) for name, p in named if id(p) not in held and id(p) in fresh]
            if not missing or len(named) < 2:
                continue
            stale = [o for o in every if o in self.steps and parameters(o) and not any(id(p) in owned for p in parameters(o))]
            self._tell_missing(root, missing, len(named), stale, spot)

    def _tell_missing(self, root: nn.Module, missing: list[Any], total: int, stale: list[Any], spot: Spot | None) -> None:
        made = self.made.get(stale[0]) if stale else next((s for o, s in self.made.items() if o in self.steps), None)
        where = where_of(made or spot)
        names = [name for name, _ in missing]
        shown = listed(names, NAMES_SHOWN)
        evidence: dict[str, Scalar] = {"missing": len(missing), "with_gradient": total, "model": type(root).__name__}
        if stale and len(missing) == total:
            self.watch.find(
                Finding(
                    probe=ALL_HELD,
                    severity="error",
                    message=f"the optimizer holds parameters of no model: all {total} parameters of {type(root).__name__} that get gradients never change",
                    cause="the optimizer was built before the model's parameters were replaced (to_empty, wrapping, tying or a new model)",
                    fix="build the optimizer after the last change of the model's parameters",
                    where=where,
                    source=lines_at(where),
                    observed=shown,
                    evidence=evidence,
                )
            )
            return
        self.watch.find(
            Finding(
                probe=ALL_HELD,
                severity="warning",
                message=f"no optimizer holds {plural(len(missing), 'parameter')} of {type(root).__name__} that {'gets' if len(missing) == 1 else 'get'} gradients: {shown}",
                cause=_unregistered(root),
                fix="give them to the optimizer; if they are meant to stay, requires_grad_(False) also saves their backward",
                where=where,
                source=lines_at(where),
                expected=f"all {total} parameters with a gradient in an optimizer",
                observed=f"{total - len(missing)} of them",
                evidence=evidence,
            )
        )

    def _decayed(self, optimizer: Any) -> None:
        """Only where the groups show that decay was meant to be chosen: one group for all is a legal default."""
        decays = {float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups}
        if len(decays) < 2 or 0.0 not in decays:
            return
        names = {id(p): n for root in self.watch.models.roots() for n, p in root.named_parameters()}
        tables = _lookup_tables(self.watch.models.roots())
        decayed = [(p, float(g.get("weight_decay", 0.0)) > 0) for g in optimizer.param_groups for p in g["params"]]
        of_norms = _of_norms(self.watch.models.roots())
        norms = [names.get(id(p), "?") for p, on in decayed if on and p.ndim == 1 and id(p) in of_norms]
        some = any(not on and id(p) in tables for p, on in decayed)  # one table without decay shows that tables were meant
        embeddings = [names.get(id(p), "?") for p, on in decayed if some and on and id(p) in tables]
        wrong = [*norms, *embeddings]
        counts = [plural(len(group), what) for group, what in ((norms, "norm weight"), (embeddings, "embedding table")) if group]
        if wrong:
            where = where_of(self.made.get(optimizer))
            self.watch.find(
                Finding(
                    probe=NORMS,
                    severity="note",
                    message=f"{' and '.join(counts)} in a group with weight decay, beside a group without: {', '.join(wrong[:NAMES_SHOWN])}",
                    fix=f"put {'one-dimensional parameters' if norms else 'every embedding table'} into the group with weight_decay 0",
                    where=where,
                    source=lines_at(where),
                )
            )


def _unregistered(module: nn.Module) -> str | None:
    """The plain list or dict of another module in which a module stands: nothing registers it there, so parameters() leaves it out."""
    for holder in gc.get_referrers(module):
        if not isinstance(holder, (list, tuple, dict)):
            continue
        for owner in (o for o in alive((nn.Module,)) if o is not module):
            name = next((n for n, value in vars(owner).items() if value is holder), None)
            if name is not None and not name.startswith("_"):
                kind, right = type(holder).__name__, "ModuleDict" if isinstance(holder, dict) else "ModuleList"
                return (
                    f"`{name}` of {type(owner).__name__} is a plain {kind}, whose modules are not registered as those of an nn.{right} are"
                )
    return None


def _of_norms(roots: list[nn.Module]) -> set[int]:
    """The parameters of norms, which say so in the name of their class or of the attribute that holds them."""
    named = ((name, type(m).__name__, p) for root in roots for name, m in root.named_modules() for p in m.parameters(recurse=False))
    return {id(p) for name, kind, p in named if "norm" in name.rpartition(".")[2].lower() or "norm" in kind.lower()}


def _lookup_tables(roots: list[nn.Module]) -> set[int]:
    """Embeddings that are nothing else: a table that is tied to an output head is a matrix too, and is decayed as one."""
    places: dict[int, list[bool]] = {}
    for root in roots:
        for module in root.modules():
            for p in module.parameters(recurse=False):
                places.setdefault(id(p), []).append(isinstance(module, nn.Embedding))
    return {key for key, kinds in places.items() if all(kinds)}
