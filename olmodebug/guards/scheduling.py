"""Silent faults in the order of a training loop: scaling and clipping, schedules, autocast, checkpointing, graphs kept alive."""

import ast
import dis
import functools
import itertools
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..sources import OWN, Spot
from ..units import plural
from .gradients import clip_limit, parameters
from .origins import words_of
from .part import Part
from .place import rank

UNSCALE = "loop.unscale-before-clip"
ORDER = "loop.optimizer-before-scheduler"
PACE = "loop.schedule-per-update"
AUTOCAST = "loop.backward-outside-autocast"
CHECKPOINT = "loop.checkpoint-reaches-weights"
GRAPH = "loop.graph-released"
SCALE = "loop.scaler-recovers"

WINDOWS = 2  # optimizer steps that show the same order before it is told
KEPT_STEPS = 5  # steps in a row whose loss graphs are all alive
SKIPS = 24  # in a row: from 65536 a scaler has then halved to below 1, and a gradient that still overflows is not its doing
DEPTH = 64  # graph nodes searched behind a variable that keeps losses
ARITHMETIC = ("MulBackward0", "DivBackward0", "AddBackward0", "SubBackward0", "NegBackward0")


class _Token:
    """Lives as long as the autograd node that holds it in its metadata."""


@dataclass(slots=True)
class _Window:
    """What happened since an optimizer's last step: backward passes, and how many there had been at each scheduler step."""

    backwards: int = 0
    scheduled: dict[int, list[int]] = field(default_factory=dict)


class Scheduling(Part):
    """Follows scaler, schedulers and graphs of one process."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.scaled: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self.unscaled: weakref.WeakSet[Any] = weakref.WeakSet()
        self.windows: weakref.WeakKeyDictionary[Any, _Window] = weakref.WeakKeyDictionary()
        self.schedules: weakref.WeakKeyDictionary[Any, Spot | None] = weakref.WeakKeyDictionary()
        self.early: dict[int, int] = {}
        self.fast: dict[int, int] = {}
        self.graphs: deque[tuple[int, Any]] = deque(maxlen=256)
        self.by_hand = True  # no optimizer has been made
        self.skips = 0
        self.told: set[str] = set()
        self.checkpointed: list[tuple[Spot | None, Any, list[tuple[str, Any]]]] = []
        self.stepped_in_scaler = False

    def listen(self) -> None:
        events = self.watch.events
        events.on("scaler_scale", self._scale)
        events.on("scaler_unscale_", self._unscale)
        events.on("scaler_step", lambda scaler, args, spot: setattr(self, "stepped_in_scaler", False))
        events.on("scaler_step_done", self._scaler_stepped)
        events.on("scaler_update", self._update)
        events.on("clip", self._clip)
        events.on("scheduled", self._scheduled)
        events.on("backward", self._backward)
        events.on("checkpoint", self._checkpoint)
        events.on("backward_done", self._backward_done)
        events.on("optimizer_made", lambda args, kwargs, spot: setattr(self, "by_hand", False))
        events.on("step", self._step)
        events.on("stepped", self._stepped)

    # Scaling and clipping

    def _scale(self, scaler: Any, args: Any, spot: Spot | None) -> None:
        if scaler.is_enabled() and scaler not in self.unscaled:
            self.scaled[scaler] = True

    def _unscale(self, scaler: Any, args: Any, spot: Spot | None) -> None:
        """From here to the scaler's update nothing is said: with two optimizers, which gradients are unscaled is not known."""
        self.scaled[scaler] = False
        self.unscaled.add(scaler)

    def _update(self, scaler: Any, args: Any, spot: Spot | None) -> None:
        self.scaled[scaler] = False
        self.unscaled.discard(scaler)

    def _clip(self, args: Any, kwargs: Any, spot: Spot | None) -> None:
        limit = clip_limit(args, kwargs)
        for scaler, scaled in list(self.scaled.items()) if limit is not None else ():
            scale = float(scaler.get_scale()) if scaled else 1.0
            if scale == 1.0:
                continue
            self.watch.tell(
                UNSCALE,
                "error",
                spot,
                f"gradients are clipped while they still carry the loss scale of {scale:g}",
                cause="scaler.unscale_(optimizer) was not called between scaler.scale(loss).backward() and this line",
                fix="scaler.unscale_(optimizer) before clipping",
                op="clip_grad",
                expected=f"a limit of {limit}",
                observed=f"a limit of {float(limit) / scale:.3g} on the true gradients" if isinstance(limit, (int, float)) else None,
                evidence={"scale": scale},
            )

    def _scaler_stepped(self, scaler: Any, args: Any, spot: Spot | None, result: Any) -> None:
        if not scaler.is_enabled():
            return
        self.skips = 0 if self.stepped_in_scaler else self.skips + 1
        if self.skips < SKIPS or SCALE in self.told:
            return
        scale = float(scaler.get_scale())
        if scale > 1:
            return  # it began far higher than it does by default, and is still coming down
        self.told.add(SCALE)
        origin = self.watch.birth(args[0]) if args else None
        unknown = "run with --guard nan,loop, and look at the loss and the data"
        self.watch.tell(
            SCALE,
            "error",
            spot,
            f"the loss scaler has skipped {self.skips} steps in a row: no weight has changed in them, and the scale of {scale:.3g} is not too high",
            cause=words_of(origin) if origin is not None else None,
            fix=unknown if origin is None else origin.fix or "mend that line; the scale is not to blame",
            op="step",
            evidence={"scale": scale},
        )

    # Schedules

    def _scheduled(self, scheduler: Any, spot: Spot | None) -> None:
        optimizer = getattr(scheduler, "optimizer", None)
        if optimizer is None:
            return
        self.schedules[scheduler] = spot
        window = self.windows.setdefault(optimizer, _Window())
        window.scheduled.setdefault(id(scheduler), []).append(window.backwards)

    def _step(self, optimizer: Any, spot: Spot | None) -> None:
        self.stepped_in_scaler = True
        self._look_at_checkpointed(optimizer)
        window = self.windows.get(optimizer)
        if window is None:
            return
        for scheduler, line in list(self.schedules.items()):
            if scheduler.optimizer is not optimizer:
                continue
            times = window.scheduled.get(id(scheduler), [])
            key = id(scheduler)
            early = len(times) == 1 and times[0] == window.backwards > 0
            fast = len(times) > 1 and window.backwards > 1 and sorted(times)[-window.backwards :] == list(range(1, window.backwards + 1))
            # the last micro-batch's scheduler step may stand after the optimizer's, and then counts in the next window
            late = len(times) > 1 and window.backwards > 1 and len(times) == window.backwards and times[0] == 0
            self.early[key] = self.early.get(key, 0) + 1 if early else 0
            self.fast[key] = self.fast.get(key, 0) + 1 if fast or late else 0
            if self.early[key] == WINDOWS:
                self.watch.tell(
                    ORDER,
                    "warning",
                    line,
                    "scheduler.step() stands before optimizer.step(): the first learning rate of the schedule is never used",
                    fix="call scheduler.step() after optimizer.step()",
                    op="step",
                    evidence={"steps_looked_at": WINDOWS},
                )
            if self.fast[key] == WINDOWS:
                self.watch.tell(
                    PACE,
                    "warning",
                    line,
                    f"the schedule advances {len(times)} times for each optimizer step, once a micro-batch",
                    fix="call scheduler.step() beside optimizer.step(), unless the schedule is meant to count micro-batches",
                    op="step",
                    expected="1 scheduler step per optimizer step",
                    observed=f"{len(times)}",
                )
        window.scheduled.clear()
        window.backwards = 0

    # Backward: autocast and graphs that stay alive

    def _backward(self, roots: list[Tensor], spot: Spot | None) -> None:
        for window in list(self.windows.values()):
            window.backwards += 1
        for device in ("cuda", "cpu"):
            if torch.is_autocast_enabled(device):
                self.watch.tell(
                    AUTOCAST,
                    "warning",
                    spot,
                    "backward runs inside autocast: it may cast ops again that forward had cast already",
                    cause=f"autocast for {device} is on when backward is called",
                    fix="end the autocast block after the loss",
                    op="backward",
                )
        for root in roots:
            if root.grad_fn is not None:
                token = _Token()
                for node in _losses(root):
                    node.metadata["olmodebug"] = token  # a dict that lives and dies with the node
                self.graphs.append((self.watch.backwards if self.by_hand else self.watch.steps, weakref.ref(token)))

    def _stepped(self, optimizer: Any, spot: Spot | None) -> None:
        self.windows.setdefault(optimizer, _Window())
        self._look_at_graphs(self.watch.steps, spot)

    def _backward_done(self, roots: list[Tensor], spot: Spot | None) -> None:
        """Where weights are updated by hand, a backward is a step."""
        if self.by_hand:
            self._look_at_graphs(self.watch.backwards, spot)

    def _look_at_graphs(self, now: int, spot: Spot | None) -> None:
        last = [(step, reference() is not None) for step, reference in self.graphs if now - KEPT_STEPS <= step < now]
        if len({step for step, _ in last}) == KEPT_STEPS and all(alive for _, alive in last) and GRAPH not in self.told:
            self.told.add(GRAPH)
            self._tell_graph(spot)
            self.graphs.clear()

    def _tell_graph(self, spot: Spot | None) -> None:
        name, line = _keeper(sys._getframe(3))
        alive = sum(reference() is not None for _, reference in self.graphs)
        kept = f"`{name}` keeps" if name else "something keeps"
        self.watch.tell(
            GRAPH,
            "error",
            line or spot,
            f"{kept} the graphs of {alive} losses alive: memory grows by one graph every step",
            cause=f"`{name}` is made of losses that still carry their graph" if name else None,
            fix="add loss.item(), or loss.detach()",
            expected="the graph of a step ends with its backward",
            observed=f"the graphs of the last {KEPT_STEPS} steps are all alive",
        )

    # Checkpointing

    def _checkpoint(self, args: Any, kwargs: Any, spot: Spot | None) -> None:
        if not self.watch.events.grad:
            return
        if any(isinstance(value, Tensor) and value.requires_grad for value in args[1:]):
            return
        function = args[0]
        while isinstance(function, functools.partial):
            function = function.func
        owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        if isinstance(owner, nn.Module):
            self._tell_checkpoint(spot, owner, [name for name, p in owner.named_parameters() if p.requires_grad])
            return
        for taken in _taken(function):
            weights = [(name, weakref.ref(p)) for name, p in taken.named_parameters() if p.requires_grad]
            self.checkpointed.append((spot, weakref.ref(taken), weights))

    def _look_at_checkpointed(self, optimizer: Any) -> None:
        """What a function takes from around it, it may use in part: told of those weights of an optimizer that have no gradient."""
        waiting, self.checkpointed = self.checkpointed, []
        held = {id(p) for p in parameters(optimizer)} if waiting else set()
        for spot, reference, weights in waiting:
            module = reference()
            missing = [name for name, weight in weights if (p := weight()) is not None and id(p) in held and p.grad is None]
            if module is not None:
                self._tell_checkpoint(spot, module, missing)

    def _tell_checkpoint(self, spot: Spot | None, owner: nn.Module, weights: list[str]) -> None:
        if not weights:
            return
        self.watch.tell(
            CHECKPOINT,
            "error",
            spot,
            f"{plural(len(weights), 'parameter')} of {type(owner).__name__} get no gradient: reentrant checkpointing over inputs that need none",
            cause="with use_reentrant=True the block runs without a graph, and none of its inputs requires a gradient (frozen embeddings)",
            fix="use_reentrant=False, or model.enable_input_require_grads()",
            op="checkpoint",
            observed=", ".join(weights[:4]),
        )


def _taken(function: Any) -> list[nn.Module]:
    """The modules that a function takes from the function around it and calls; of one whose children its code names, those children."""
    if not isinstance(function, FunctionType):
        return []
    code = function.__code__
    found: list[nn.Module] = []
    for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        for module in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(module, nn.Module):
                named = [child for name, child in module.named_children() if name in code.co_names]
                found += named or ([module] if _is_used_whole(code, variable) else [])
    return list(dict.fromkeys(found))


def _is_used_whole(code: CodeType, variable: str) -> bool:
    """Whether the code reads a variable for itself, and not only for an attribute of it."""
    steps = list(dis.get_instructions(code))
    return any(
        s.argval == variable and s.opname == "LOAD_DEREF" and "ATTR" not in n.opname and "METHOD" not in n.opname
        for s, n in itertools.pairwise(steps)
    )


def _losses(root: Tensor) -> list[Any]:
    """The nodes of the losses behind a root: what is divided, scaled or added up for backward may be let go while they are kept."""
    waiting: list[Any] = [root.grad_fn]
    found: list[Any] = []
    seen: set[Any] = set()
    while waiting and len(seen) < DEPTH:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if root.numel() == 1 and node.name() in ARITHMETIC:
            waiting += [before for before, _ in node.next_functions if before is not None and not hasattr(before, "variable")]
        else:
            found.append(node)
    return found


def _keeper(frame: FrameType | None) -> tuple[str | None, Spot | None]:
    """The variable of the running code that holds the losses, and the line that adds to it."""
    while frame is not None:
        if rank(frame.f_code.co_filename) == OWN:
            for name, value in _reachable(frame):
                if _holds(value):
                    return name, _adds(frame, name)
        frame = frame.f_back
    return None, None


def _reachable(frame: FrameType) -> Iterator[tuple[str, Any]]:
    """The variables of a function, the attributes of objects among them, and the entries of dicts, as the code writes them."""
    for name, value in list(frame.f_locals.items()):
        yield name, value
        if isinstance(value, dict):
            yield from ((f"{name}[{key!r}]", item) for key, item in list(value.items()))
        elif not isinstance(value, (ModuleType, type)):
            yield from ((f"{name}.{key}", item) for key, item in list(getattr(value, "__dict__", {}).items()))


def _holds(value: Any) -> bool:
    """Whether a value is a tensor, or a collection of tensors, behind which at least three marked losses lie."""
    if isinstance(value, Tensor):
        return value.grad_fn is not None and _marks(value.grad_fn) >= 3
    if isinstance(value, (list, deque, tuple)):
        return sum(isinstance(v, Tensor) and v.grad_fn is not None and _marks(v.grad_fn) >= 1 for v in list(value)[-8:]) >= 3
    return False


def _marks(node: Any) -> int:
    seen: set[Any] = set()
    marks: set[int] = set()  # the tokens: one loss may have several nodes
    queue = [node]
    while queue and len(seen) < DEPTH:
        node = queue.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        if "olmodebug" in node.metadata:
            marks.add(id(node.metadata["olmodebug"]))
        queue += [following for following, _ in node.next_functions]
    return len(marks)


def _adds(frame: FrameType, name: str) -> Spot | None:
    """The line `name += ...`, `name = name + ...` or `name.append(...)` of the running function."""
    try:
        tree = ast.parse(Path(frame.f_code.co_filename).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        added = isinstance(node, ast.AugAssign) and ast.unparse(node.target) == name
        summed = isinstance(node, ast.Assign) and any(ast.unparse(target) == name for target in node.targets)
        summed = (
            summed and isinstance(node, ast.Assign) and any(ast.unparse(n) == name for n in ast.walk(node.value) if isinstance(n, ast.expr))
        )
        call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == f"{name}.append"
        if (added or summed or call) and isinstance(node, ast.stmt):
            return Spot(frame.f_code, frame.f_lasti, node.lineno)
    return None
