"""Silent faults between the model and its optimizer: parameters left out, gradients carried over, updates lost, ties broken."""

import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..report import Finding, Scalar
from ..sources import Spot, short_path
from ..units import plural
from .excerpts import lines_at
from .place import where_of

ALL_HELD = "loop.every-parameter-optimized"
RESET = "loop.gradients-reset"
SURVIVES = "loop.updates-survive-rounding"
TIES = "loop.ties-kept"
NORMS = "loop.norms-undecayed"
MODE = "loop.trains-in-train-mode"

SAMPLED = 1024  # elements of a parameter that are compared before and after a step
SAMPLED_PARAMETERS = 24
SAMPLED_STEPS = (1, 2, 4, 8)
LOST = 0.5  # of the sampled elements with a gradient: below, most of the update is rounded away
NAMES_SHOWN = 4
WATCHED = 3  # parameters of an optimizer whose gradients are followed from step to step


class Optimizing:
    """Follows every optimizer of one process."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.made: weakref.WeakKeyDictionary[Any, Spot | None] = weakref.WeakKeyDictionary()
        self.steps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.applied: dict[int, list[tuple[Any, Any, int]]] = {}
        self.step_lines: dict[int, Spot | None] = {}
        self.carried: dict[int, Spot | None] = {}
        self.before: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.moved: dict[int, list[tuple[float, float, str, str]]] = {}
        self.lines: dict[int, Spot | None] = {}  # where an optimizer was made; the optimizer itself may be gone at the end
        self.emptied: list[tuple[Any, list[tuple[str, str]], Spot | None]] = []
        self.was_training: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self.unheld: list[tuple[Any, Any, int]] = []

    def listen(self) -> None:
        events = self.watch.events
        events.on("optimizer_made", lambda args, kwargs, spot: self.made.__setitem__(args[0], spot))
        events.on("backward", self.backward)
        events.on("zeroed", lambda args, kwargs, spot: self._reset(id(args[0])))
        events.on("module_zeroed", self._module_zeroed)
        events.on("step", self.step)
        events.on("stepped", self.stepped)
        events.on("emptied", lambda module, shared, spot: self.emptied.append((weakref.ref(module), shared, spot)))

    # Gradients that nobody reset

    def backward(self, roots: list[Tensor], spot: Spot | None) -> None:
        """Before a backward: are the gradients that were applied still there, unchanged?"""
        for key, followed in list(self.applied.items()):
            states = [_gradient_state(*item) for item in followed]
            if "gone" in states:
                self._reset(key)
            elif key not in self.carried and states and all(state == "same" for state in states):
                self.carried[key] = spot
            elif key not in self.carried:
                del self.applied[key]

    def _reset(self, key: int) -> None:
        self.applied.pop(key, None)
        self.carried.pop(key, None)

    def _module_zeroed(self, args: Any, kwargs: Any, spot: Spot | None) -> None:
        owned = {id(parameter) for parameter in args[0].parameters()}
        for key, followed in list(self.applied.items()):
            if any((parameter := reference()) is None or id(parameter) in owned for reference, _, _ in followed):
                self._reset(key)

    def step(self, optimizer: Any, spot: Spot | None) -> None:
        number = self.steps[optimizer] = self.steps.get(optimizer, 0) + 1
        key = id(optimizer)
        if key in self.carried:
            self._tell_carried(key, self.carried[key], self.step_lines.get(key), number)
        self._reset(key)
        if number == 1:
            self.unheld = [(weakref.ref(p), weakref.ref(p.grad), p.grad._version) for p in self._outside()]  # type: ignore[union-attr]
        if number == 3 and self.unheld:
            self._held(spot)
        if number == 1:
            self._decayed(optimizer)
            self._ties()
        self._modes(optimizer, spot)
        if number in SAMPLED_STEPS:
            self.before[key] = _samples(optimizer)

    def stepped(self, optimizer: Any, spot: Spot | None) -> None:
        key = id(optimizer)
        self._compare(optimizer, self.before.pop(key, []))
        followed = sorted((p for p in _parameters(optimizer) if _plain_gradient(p)), key=lambda p: p.numel())[:WATCHED]
        self.applied[key] = [(weakref.ref(p), weakref.ref(p.grad), p.grad._version) for p in followed]  # type: ignore[union-attr]
        self.step_lines[key] = spot

    def _tell_carried(self, key: int, spot: Spot | None, before: Spot | None, number: int) -> None:
        where = where_of(spot, op="backward")
        line = f" at {short_path(before.file)}:{before.line}" if before else ""
        self.watch.find(
            Finding(
                probe=RESET,
                severity="error",
                message=f"backward adds to the gradients of the step before: nothing reset them after optimizer.step(){line}",
                cause="the same gradient tensors, unchanged since they were applied and not zero, were there when this backward began",
                fix="optimizer.zero_grad() after optimizer.step(), or before the first backward of a step",
                where=where,
                source=lines_at(where),
                expected=f"gradients of step {number} alone",
                observed=f"gradients of steps 1 .. {number} added up"
                if number == 2
                else f"gradients of step {number - 1} in those of step {number}",
                evidence={"optimizer_step": number},
            )
        )

    # Parameters that no optimizer holds

    def _outside(self) -> list[Tensor]:
        """Parameters with a gradient that no optimizer holds."""
        held = {id(p) for o in _optimizers() for p in _parameters(o)}
        return [p for root in self.watch.models.roots(again=True) for p in root.parameters() if id(p) not in held and _plain_gradient(p)]

    def _held(self, spot: Spot | None) -> None:
        """Told at the third step, of those whose gradient has changed since the first: a model left over from before has none."""
        fresh = set()
        for reference, gradient, version in self.unheld:
            p = reference()
            if p is not None and p.grad is not None and (p.grad is not gradient() or p.grad._version != version) and bool(p.grad.any()):
                fresh.add(id(p))
        optimizers = _optimizers()
        held = {id(p) for o in optimizers for p in _parameters(o)}
        roots = self.watch.models.roots(again=True)
        owned = {id(p) for root in roots for p in root.parameters()}
        for root in roots:
            named = [(n, p) for n, p in root.named_parameters() if p.requires_grad and p.grad is not None]
            missing = [(name, p) for name, p in named if id(p) not in held and id(p) in fresh]
            if not missing or len(named) < 2:
                continue
            stale = [o for o in optimizers if o in self.steps and _parameters(o) and not any(id(p) in owned for p in _parameters(o))]
            self._tell_missing(root, missing, len(named), stale, spot)

    def _tell_missing(self, root: nn.Module, missing: list[Any], total: int, stale: list[Any], spot: Spot | None) -> None:
        made = self.made.get(stale[0]) if stale else next((s for o, s in self.made.items() if o in self.steps), None)
        where = where_of(made or spot)
        names = [name for name, _ in missing]
        shown = ", ".join(names[:NAMES_SHOWN]) + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
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
                message=f"{plural(len(missing), 'parameter')} of {type(root).__name__} get gradients, and no optimizer holds them: {shown}",
                fix="give them to the optimizer; if they are meant to stay, requires_grad_(False) also saves their backward",
                where=where,
                source=lines_at(where),
                expected=f"all {total} parameters with a gradient in an optimizer",
                observed=f"{total - len(missing)} of them",
                evidence=evidence,
            )
        )

    # Updates that rounding takes away

    def _compare(self, optimizer: Any, before: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        rate = max((float(group.get("lr", 0.0)) for group in optimizer.param_groups), default=0.0)
        moved = counted = 0
        dtype = ""
        for parameter, old, gradient in before:
            asked = gradient != 0
            counted += int(asked.sum())
            moved += int(((_sample(parameter) != old) & asked).sum())
            dtype = str(parameter.dtype)[6:]
        if counted and rate > 0:
            name = type(optimizer).__name__
            self.lines[id(optimizer)] = self.made.get(optimizer)
            self.moved.setdefault(id(optimizer), []).append((moved / counted, rate, dtype, name))

    def finish(self) -> None:
        """The verdict on lost updates: only where most were lost in every step that was looked at."""
        for key, shares in self.moved.items():
            low = [item for item in shares if item[2] in ("bfloat16", "float16")]
            if len(low) < 2 or max(share for share, *_ in low) >= LOST:
                continue
            share, rate, dtype, name = max(low)
            where = where_of(self.lines[key])
            self.watch.find(
                Finding(
                    probe=SURVIVES,
                    severity="warning",
                    message=f"at most {share:.0%} of the {dtype} weights that had a gradient moved in a step: the rest of the update is rounded away",
                    cause=f"{name} updates {dtype} weights in place: a change below half a unit in the last place is lost",
                    fix="keep float32 master weights (autocast over a float32 model), or an optimizer with stochastic rounding",
                    where=where,
                    source=lines_at(where),
                    expected="nearly all weights move",
                    observed=", ".join(f"{s:.1%}" for s, *_ in low),
                    evidence={"learning_rate": rate, "steps_looked_at": len(low)},
                )
            )

    # Ties, decay and mode

    def _ties(self) -> None:
        for reference, shared, spot in self.emptied:
            module = reference()
            if module is None:
                continue
            tensors = dict(module.named_parameters(remove_duplicate=False))
            lost = [(a, b) for a, b in shared if a in tensors and b in tensors and tensors[a] is not tensors[b]]
            if lost:
                self._tell_ties(type(module).__name__, lost[0], "to_empty gives every place of a shared parameter memory of its own", spot)
        for root in self.watch.models.roots():
            output = getattr(root, "get_output_embeddings", None)
            tied = getattr(getattr(root, "config", None), "tie_word_embeddings", False)
            if output is None or tied is not True:
                continue
            head, embedding = output(), root.get_input_embeddings()
            left, right = getattr(head, "weight", None), getattr(embedding, "weight", None)
            if left is None or right is None or left.shape != right.shape or type(left) is not nn.Parameter:
                continue
            if left is not right and left.data_ptr() != right.data_ptr() and not self.emptied:
                names = (self.watch.name_of_tensor(right) or "input embedding", self.watch.name_of_tensor(left) or "output embedding")
                self._tell_ties(
                    type(root).__name__, names, "config.tie_word_embeddings is true, and the two have memory of their own", None
                )

    def _tell_ties(self, model: str, names: tuple[str, str], cause: str, spot: Spot | None) -> None:
        where = where_of(spot) if spot else where_of(None, module=model)
        self.watch.find(
            Finding(
                probe=TIES,
                severity="error",
                message=f"{names[0]} and {names[1]} of {model} were one parameter and train apart",
                cause=cause,
                fix="tie them again after the change: model.tie_weights(), or head.weight = embedding.weight, before the optimizer is built",
                where=where,
                source=lines_at(where),
            )
        )

    def _decayed(self, optimizer: Any) -> None:
        """Only where the groups show that decay was meant to be chosen: one group for all is a legal default."""
        decays = {float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups}
        if len(decays) < 2 or 0.0 not in decays:
            return
        names = {id(p): n for root in self.watch.models.roots() for n, p in root.named_parameters()}
        wrong = [
            names.get(id(p), "?")
            for group in optimizer.param_groups
            if float(group.get("weight_decay", 0.0)) > 0
            for p in group["params"]
            if p.ndim == 1 and "norm" in names.get(id(p), "").lower()
        ]
        if wrong:
            where = where_of(self.made.get(optimizer))
            self.watch.find(
                Finding(
                    probe=NORMS,
                    severity="note",
                    message=f"{plural(len(wrong), 'norm weight')} in a group with weight decay, beside a group without: {', '.join(wrong[:NAMES_SHOWN])}",
                    fix="put one-dimensional parameters into the group with weight_decay 0",
                    where=where,
                    source=lines_at(where),
                )
            )

    def _modes(self, optimizer: Any, spot: Spot | None) -> None:
        """A model with dropout that trained in train mode and now steps in eval mode, twice in a row."""
        held = {id(p) for p in _parameters(optimizer)}
        for root in self.watch.models.roots():
            if not any(id(p) in held for p in root.parameters()):
                continue
            count = self.was_training.get(root)
            if root.training:
                self.was_training[root] = 0
            elif count is not None:
                self.was_training[root] = count + 1
                dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in root.modules())
                if count + 1 == 2 and dropout:
                    where = where_of(spot, op="step")
                    self.watch.find(
                        Finding(
                            probe=MODE,
                            severity="warning",
                            message=f"{type(root).__name__} trained in train mode, and now steps in eval mode: its dropout is off",
                            fix="model.train() after the evaluation",
                            where=where,
                            source=lines_at(where),
                        )
                    )


def _optimizers() -> list[Any]:
    return [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _plain_gradient(parameter: Tensor) -> bool:
    grad = parameter.grad
    return grad is not None and grad.layout == torch.strided and type(grad) is Tensor


def _gradient_state(parameter: Any, gradient: Any, version: int) -> str:
    """`same` where the very tensor that was applied is still the gradient, unchanged and not zero; `gone`, `changed`."""
    p = parameter()
    if p is None or p.grad is None or not bool(p.grad.any()):
        return "gone"
    return "same" if p.grad is gradient() and p.grad._version == version else "changed"


def _samples(optimizer: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    chosen = sorted((p for p in _parameters(optimizer) if _plain_gradient(p)), key=lambda p: -p.numel())[:SAMPLED_PARAMETERS]
    chosen = [p for p in chosen if p.dtype in (torch.bfloat16, torch.float16) and type(p.data) is Tensor]
    return [(p, _sample(p).clone(), _sample(p.grad).clone()) for p in chosen if p.grad is not None]


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLED)]
