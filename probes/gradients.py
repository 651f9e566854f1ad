"""Every parameter takes part in training."""

import inspect
import linecache
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmodebug.double import KeepDouble
from olmodebug.executions.derivative import underived
from olmodebug.explain import forward_place, place_of, source_lines
from olmodebug.load import SubjectCodeError
from olmodebug.overwritten import overwritten
from olmodebug.own_code import own_code, quiet
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case, Where
from olmodebug.relations.invariance import run
from olmodebug.relations.repair import Found
from olmodebug.relations.slopes import TOLERANCE, Cut, Slope, Slopes, on_purpose
from olmodebug.report import Finding
from olmodebug.settle import settled
from olmodebug.sources import OWN, Spot, code_of
from olmodebug.state import keeper
from olmodebug.subject import Subject
from olmodebug.tracing.tracer import Recording, record
from olmodebug.units import listed

# A gradient times its weight in float64: below this there is nothing but rounding of sums of order one.
ROUNDING = 1e-16
RELATIVELY_NOTHING = 1e-6  # under which a closer look in full float64 is worth its time
# Ops that only take a part or another view of a parameter.
TAKES = ("select", "slice", "split", "unbind", "alias", "view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze",
         "detach", "chunk", "as_strided")  # fmt: skip
CHOICES = ("topk", "sort", "argmax", "multinomial", "bucketize", "one_hot")
MOST_STACKED = 256  # slices; a longer dimension is one of positions or ids, of which a batch uses some
MOST_LOOKED_INTO = 2  # parts of a layer whose cut is looked for, each time with a backward for every cut
LEAST_PART = 4  # outputs of a linear layer
# Weights that start at zero stand at most this many deep in one path: a head, an output projection, a gate, a scale.
FIRST_STEPS, FIRST_STEP_SIZE = 5, 1e-2
UNUSED, USE_IT = "no op of forward computes with it", "use it in forward, or remove it"
CUTS = ("detach", ".data", "no_grad", "stop_gradient")


@probe(after=("logits.finite",))
def reach_every_parameter(subject: Subject) -> Iterator[Finding]:
    """Every parameter gets a finite gradient from the next-token loss, and no gradient is zero throughout.

    Why: a parameter that gets none never learns, and nothing says so.
    Catches: a norm defined twice and used once; .detach() or .data on the way; a module that forward does not call.
    """
    twin = subject.fresh_twin(training=True)
    trainable = {name: p for name, p in twin.model.named_parameters() if p.requires_grad}
    if not trainable:
        not_applicable("no parameter requires a gradient")
    batch, seq = twin.sizes()
    with settled(seed=twin.seed), quiet(), torch.enable_grad():
        for seed in (14, 15):
            case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=seed))
            with own_code(twin, case):
                recording = record(twin.model, lambda: twin.call(case).logits)  # noqa: B023 - called at once
            logits = recording.result
            read = _computed_with(recording)
            if not logits.requires_grad:
                yield _no_gradient(twin, case)
                if unused := [name for name in trainable if name not in read]:
                    yield _finding(recording, twin, unused, "warning", "no gradient", UNUSED, USE_IT)
                return
            target = torch.tensor(case.input_ids, device=logits.device)[:, 1:]
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), target.reshape(-1))
            try:
                loss.backward()
            except RuntimeError as error:
                yield _backward_fails(twin, error, case)
                return
    for p in trainable.values():
        if p.grad is not None and p.grad.is_sparse:  # nn.Embedding(sparse=True)
            p.grad = p.grad.to_dense()
    bad = [name for name, p in trainable.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    if bad:
        yield _finding(recording, twin, bad, "error", "a gradient that is not finite", None, None)
    missing = [name for name, p in trainable.items() if p.grad is None]
    zero = [name for name, p in trainable.items() if p.grad is not None and not bool(p.grad.any())]
    at_start = {*missing, *zero}
    if missing or zero:  # heads that serve only the model's own loss, memories for the next segment
        reached = twin.reached_by_own_loss(case, missing + zero, training=True) | _serve_other_results(twin, case, missing + zero)
        missing, zero = ([name for name in names if name not in reached] for names in (missing, zero))
    if zero:  # what stands behind weights that start at zero
        zero = _still_zero(twin, case, zero)
    unused = [name for name in missing if name not in read]
    dropped = [name for name in missing if name in read and not _reaches_result(recording, name)]
    cut = [name for name in missing if name not in unused + dropped]
    if cut:
        share = sum(trainable[name].numel() for name in cut) / sum(p.numel() for p in trainable.values())
        cause = "forward reads it, and the path from there to the logits carries no gradient (detach, .data, no_grad, or a choice by index)"
        found = _finding(
            recording,
            twin,
            cut,
            "error" if share > 0.5 else "warning",
            "no gradient",
            cause,
            "let the gradient through, or freeze it openly",
        )
        yield _at_the_cut(found, subject, case, cut[0])
    if dropped:
        found = _finding(
            recording, twin, dropped, "warning", "no gradient", "nothing uses what forward computes with it", "use it, or remove it"
        )
        where = _reader(recording, dropped[0])
        yield replace(found, where=where, source=source_lines(where))
    if unused:
        yield _at_the_caller(_finding(recording, twin, unused, "warning", "no gradient", UNUSED, USE_IT), recording, twin, unused)
    if zero and not any("expert" in name for name in zero):
        yield _finding(recording, twin, zero, "warning", "a gradient of exactly zero", None, None)
    yield from _dead_slices(recording, twin, {name: p for name, p in trainable.items() if p.grad is not None and name not in zero + bad})
    yield from _dead_parts(recording, twin, case, zero + bad)
    yield from _cancelled(twin, case, {name: p for name, p in trainable.items() if name not in at_start and bool(p.any())})


@probe(after=("gradients.reach-every-parameter",), cost="quick")
def match_finite_differences(subject: Subject) -> Iterator[Finding]:
    """The gradient is the derivative of the loss: along a random direction both predict the same change.

    Why: a path that is cut in part trains, towards something else.
    Catches: .detach() on one branch of a residual, on one head or on attention weights; a wrong custom backward.
    """
    twin = subject.fresh_twin()
    trainable = [p for p in twin.model.parameters() if p.requires_grad]
    if not trainable:
        not_applicable("no parameter requires a gradient")
    if len({p.data_ptr() for p in trainable}) < len(trainable):
        not_applicable("two parameters share their memory, so that they cannot be moved one by one")
    if twin.dtype != torch.float64:
        not_applicable("it does not run in float64, and finite differences say little in float32")
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=31))
    run(twin, case)  # an exception of the model is a finding of its own
    try:
        slopes = Slopes(twin, case)
        # Along all parameters at once the share of one head is easily lost in the rest: where something cuts the graph, or
        # has a backward of its own, each part of a layer is asked alone.
        every = list(slopes.parameters)
        asked = slopes.groups() if slopes.cuts or slopes.custom else [every]
        missed = [(names, pair) for names in asked if (pair := slopes.parted(names)) is not None]
    except SubjectCodeError as error:
        not_applicable(f"it does not run forward and backward with every cast to float32 kept in float64: {error.__cause__}")
    for names, pair in sorted(missed, key=lambda item: -item[1][0].gap)[:MOST_LOOKED_INTO]:
        if (reason := slopes.made_up()) is not None:
            not_applicable(reason)
        cut = slopes.culprit(names, pair)
        if cut is not None and on_purpose(pair):
            not_applicable(f"the gradient is made up on purpose at line {cut.spot.line}: scaled, or straight through what has none")
        if cut is not None and len(slopes.without(cut)) > len(slopes.gradients):
            return  # it leaves a parameter without any gradient: reach-every-parameter tells it
        if cut is None and slopes.leaves_out and not slopes.custom:
            not_applicable("part of forward runs under no_grad, as a recurrence does that is trained through its last round alone")
        if cut is not None or min(slope.gap for slope in pair) > TOLERANCE:
            yield _not_the_derivative(slopes, names, pair, cut)
            return


def _not_the_derivative(slopes: Slopes, names: list[str], missed: tuple[Slope, Slope], cut: Cut | None) -> Found:
    """The finding for a gradient that misses the slope of the loss, at the cut or the backward that makes it do so."""
    twin, (first, second) = slopes.twin, missed
    cause, fix = None, None
    if cut is not None:
        where = place_of(cut.spot, op=cut.by)
        cause = f"{cut.by} cuts the gradient of one path here: with that path in the graph the gradient is right"
        fix = "let the gradient through, unless the cut is meant"
    elif (wrong := next((item for item in underived(twin, slopes.case) if item.alone), None)) is not None:
        where = wrong.where
        cause = f"{wrong.function}.backward is not the derivative of its forward: in {wrong.module} it gives {wrong.analytic:.4g} where forward has {wrong.numeric:.4g}"
        fix = "mend its backward; torch.autograd.gradcheck in float64 compares the two"
    else:
        with torch.enable_grad(), quiet():
            where = _cut(record(twin.model, lambda: twin.call(slopes.case).logits), twin, None)
    of = "" if len(names) == len(slopes.parameters) else f" of {names[0]}"
    return Found(
        probe="",
        severity="warning",
        message=f"the gradient{of} is not the derivative of the loss: it predicts a slope of {first.analytic:.4g} where the loss has {first.numeric:.4g}",
        where=where,
        source=source_lines(where),
        cause=cause,
        fix=fix,
        expected=f"{first.numeric:.6g} (central difference in float64)",
        observed=f"{first.analytic:.6g}",
        evidence={"a second direction": f"{second.analytic:.4g} where the loss has {second.numeric:.4g}"},
        case=slopes.case,
    )


def _no_gradient(twin: Subject, case: Case) -> Found:
    """Logits without a gradient: openly for inference where forward itself is decorated so, and a slip elsewhere."""
    forward = type(twin.model).forward
    mode = next((m for m in (torch.inference_mode, torch.no_grad) if _is_decorated(forward, m)), None)
    where = forward_place(twin.model, "") if mode is not None else Where()
    return Found(
        probe="",
        severity="note" if mode is not None else "error",
        message="the logits carry no gradient in train mode, so nothing can be trained",
        where=where,
        source=source_lines(where),
        cause=f"forward is decorated with torch.{mode.__name__}: a model for inference only"
        if mode is not None
        else "forward runs under no_grad, or detaches its result",
        fix=f"to train it, enter torch.{mode.__name__}() where it generates instead"
        if mode is not None
        else "remove torch.no_grad(), .detach() or .data from the forward pass",
        case=case,
    )


def _is_decorated(forward: Callable[..., object], mode: type) -> bool:
    """Whether a function is wrapped in one of torch's grad modes, which its wrapper holds as the maker of its context."""
    while (inner := getattr(forward, "__wrapped__", None)) is not None:
        if any(isinstance(getattr(held, "__self__", None), mode) for held in inspect.getclosurevars(forward).nonlocals.values()):
            return True
        forward = inner
    return False


def _serve_other_results(twin: Subject, case: Case, names: list[str]) -> set[str]:
    """Those of some parameters that get a gradient from a tensor that forward returns beside the logits, such as a memory
    for the next segment."""
    fresh = twin.fresh_twin(training=True)
    with settled(seed=fresh.seed), quiet(), torch.enable_grad():
        try:
            result = fresh.forward({fresh.convention.ids: torch.tensor(case.input_ids, device=fresh.device)})
        except Exception:  # it wants more than ids: nothing is said of it
            return set()
        beside = [t for t in result if isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 1] if isinstance(result, tuple) else []
        beside = [t for t in beside if t.requires_grad][1:]  # the first is the logits
        if not beside:
            return set()
        torch.autograd.backward([t.square().sum() for t in beside])
    parameters = dict(fresh.model.named_parameters())
    return {name for name in names if (grad := parameters[name].grad) is not None and bool(grad.any())}


def _reaches_result(recording: Recording, name: str) -> bool:
    """Whether anything computed with a parameter goes into the result, with or without a gradient."""
    reached: set[int] = set()
    for event in recording.events:
        reads = name in event.parameters and event.op not in TAKES
        if reads or any(tensor.storage in reached for tensor in event.inputs):
            reached |= {tensor.storage for tensor in event.outputs}
    return recording.storages.number(recording.result) in reached


def _reader(recording: Recording, name: str) -> Where:
    """The first op that computes with a parameter."""
    for event, spot in zip(recording.events, recording.spots, strict=True):
        if name in event.parameters and event.op not in TAKES:
            return place_of(spot, module=event.where.module, op=event.op)
    return Where()


def _still_zero(twin: Subject, case: Case, names: list[str]) -> list[str]:
    """Those of some parameters whose gradient stays zero when the others are trained a few steps: a head, a gate or an output
    projection that starts at zero lets none through at first, by design."""
    for gradients in _first_steps(twin, case):
        names = [name for name in names if name not in gradients or not bool(gradients[name].any())]
        if not names:
            break
    return names


def _first_steps(twin: Subject, case: Case) -> Iterator[dict[str, Tensor]]:
    """The gradients of the first steps of training on one batch, in a twin of its own."""
    fresh = twin.fresh_twin(training=True)
    parameters = {name: p for name, p in fresh.model.named_parameters() if p.requires_grad}
    target = torch.tensor(case.input_ids, device=fresh.device)[:, 1:]
    for _ in range(FIRST_STEPS):
        fresh.model.zero_grad(set_to_none=True)
        with settled(seed=fresh.seed), quiet(), torch.enable_grad():
            logits = fresh.call(case).logits
            F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), target.reshape(-1)).backward()
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        yield gradients
        with torch.no_grad():
            for name, grad in gradients.items():
                parameters[name].sub_(grad / grad.abs().max().clamp(min=torch.finfo(grad.dtype).tiny), alpha=FIRST_STEP_SIZE)


def _at_the_cut(found: Found, subject: Subject, case: Case, name: str) -> Found:
    """The finding at the line without whose cut the parameter gets a gradient, where there is one."""
    with suppress(SubjectCodeError):  # it does not run with every cast kept in float64
        if (cut := Slopes(subject.fresh_twin(), case).withholds(name)) is not None:
            where = place_of(cut.spot, module=found.where.module, op=cut.by)
            cause = f"{cut.by} cuts the path from there to the logits: without it {name} gets a gradient"
            return replace(found, where=where, source=source_lines(where), cause=cause)
    return found


def _at_the_caller(found: Found, recording: Recording, twin: Subject, unused: list[str]) -> Found:
    """The finding where the module should have been called, where a whole one never is."""
    called = {call.module for call in recording.calls}
    parameters = [name for name, _ in twin.model.named_parameters()]
    left_out, path = "", unused[0].rpartition(".")[0]
    while path and not any(name == path or name.startswith(path + ".") for name in called):
        if any(name.startswith(path + ".") and name not in unused for name in parameters):
            break
        left_out, path = path, path.rpartition(".")[0]
    if not left_out:
        return found
    owner = left_out.rpartition(".")[0]
    while owner and owner not in called:  # a list or a dict of modules has no forward that could call them
        owner = owner.rpartition(".")[0]
    where = forward_place(twin.model, owner)
    return replace(found, where=where, source=source_lines(where), cause=f"{left_out} is never called: {found.cause}")


def _dead_slices(recording: Recording, twin: Subject, parameters: dict[str, nn.Parameter]) -> Iterator[Found]:
    """Layers or projections stacked in one parameter, `[layers, ...]` or `[layers, 2, ...]`, of which some get no gradient.

    Where tokens choose among experts, a slice that nobody chose gets none rightly, and nothing is said.
    """
    if any(event.op in CHOICES for event in recording.events):
        return
    _, seq = twin.sizes()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        for dim in range(max(0, parameter.ndim - 2)):
            alive = parameter.grad.movedim(dim, 0).flatten(1).any(1)
            dead = [i for i, lives in enumerate(alive.tolist()) if not lives]
            # a table of positions: a batch uses the first of them, and what the last one gives has no next token
            by_position = dead in (list(range(seq, len(alive))), list(range(seq - 1, len(alive))))
            if not dead or len(dead) == len(alive) or len(alive) > MOST_STACKED or by_position:
                continue
            place = ", ".join([":"] * dim + [str(dead[0])])
            more = f" (and {len(dead) - 1} more of {len(alive)})" if len(dead) > 1 else ""
            cause = f"no op of forward computes with the slices {dead} of dimension {dim} of {name} {tuple(parameter.shape)}"
            yield _finding(
                recording,
                twin,
                [f"{name}[{place}]{more}"],
                "warning",
                "a gradient of exactly zero",
                cause,
                f"use every slice of {name}, or make it smaller",
                owner=name.rpartition(".")[0],
            )
            return


def _dead_parts(recording: Recording, twin: Subject, case: Case, known: list[str]) -> Iterator[Found]:
    """Projections fused in one linear layer, equal parts of its outputs, of which one gets no gradient.

    Single outputs may be dead, as behind a ReLU; half, a third or another equal part of them is what a split made.
    """
    if any(event.op in CHOICES for event in recording.events):
        return
    layers = {
        f"{path}.weight": module
        for path, module in twin.model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features % twin.vocab_size and f"{path}.weight" not in known  # heads aside
    }
    parts = {name: part for name, layer in layers.items() if (part := _dead_part(layer.weight.grad)) is not None}
    if not parts:
        return
    for gradients in _first_steps(twin, case):  # what stands behind a gate that starts at zero moves after some steps
        parts = {name: part for name, part in parts.items() if _dead_part(gradients.get(name)) == part}
    for name, (start, stop) in parts.items():
        if start == twin.vocab_size:
            continue  # rows beyond the vocabulary, to fill a tile
        owner = name.rpartition(".")[0]
        outputs = layers[name].out_features
        yield _finding(
            recording,
            twin,
            [f"{name}[{start}:{stop}]", *(f"{other}[{a}:{b}]" for other, (a, b) in parts.items() if other != name)],
            "warning",
            "a gradient of exactly zero",
            f"nothing depends on outputs {start} to {stop - 1} of the {outputs} of {owner}: what is split off there is not used",
            "use that part, or make the layer smaller",
            owner=owner.rpartition(".")[0],
        )
        return


def _dead_part(grad: Tensor | None) -> tuple[int, int] | None:
    """(start, stop) of the one run of rows without gradient, where it is an equal part of all: a half, a third and so on."""
    if grad is None or not bool(grad.any()):
        return None
    dead = (~grad.flatten(1).any(1)).nonzero().flatten().tolist()
    if len(dead) < LEAST_PART or dead[-1] - dead[0] + 1 != len(dead):
        return None
    return (dead[0], dead[-1] + 1) if grad.shape[0] % len(dead) == 0 and dead[0] % len(dead) == 0 else None


def _computed_with(recording: Recording) -> set[str]:
    """The parameters that an op of the run computes with; to take a view of one is not to use it."""
    return {name for event in recording.events if event.op not in TAKES for name in event.parameters}


def _cancelled(twin: Subject, case: Case, parameters: dict[str, nn.Parameter]) -> Iterator[Finding]:
    """Matrices whose gradient is nothing but rounding: what they contribute cancels out. (A key's bias does so by design.)"""
    effect = {
        name: float(p.grad.abs().max() * p.detach().abs().max()) for name, p in parameters.items() if p.grad is not None and p.ndim > 1
    }
    usual = sorted(effect.values())[len(effect) // 2] if effect else 0.0
    doubtful = [name for name, size in effect.items() if size <= RELATIVELY_NOTHING * usual and "expert" not in name]
    if not doubtful:
        return
    twin.model.zero_grad(set_to_none=True)
    target = torch.tensor(case.input_ids, device=twin.device)[:, 1:]
    try:
        with settled(seed=twin.seed), quiet(), torch.enable_grad(), KeepDouble(), own_code(twin, case):
            recording = record(twin.model, lambda: twin.call(case).logits, keep=True)
            logits = recording.result
            F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), target.reshape(-1)).backward()
    except SubjectCodeError:
        return  # it does not run with every cast kept in float64, and in float32 rounding is not told from a small gradient
    nothing = [n for n in doubtful if (g := parameters[n].grad) is not None and float((g * parameters[n].detach()).abs().max()) <= ROUNDING]
    if not nothing:
        return
    owner = nothing[0].rpartition(".")[0]
    holder = owner.rpartition(".")[0]
    size = max(float(p.grad.abs().max()) for n in nothing if (p := parameters[n]).grad is not None)
    cause, where = None, None
    for event, kept, spot in zip(recording.events, recording.kept, recording.spots, strict=True):
        if (
            event.op in ("div", "div_")
            and event.where.module in (holder, owner)
            and kept.outputs
            and bool((kept.outputs[0] - 1).abs().max() < 1e-12)
        ):
            cause = "weights divided by their own sum are 1 for every token, whatever the router says: one expert a token, renormalised"
            where = place_of(spot, module=event.where.module, op=event.op)
    fix = "do not renormalise where one expert is chosen; multiply its output by the router's probability" if cause else None
    found = _finding(recording, twin, nothing, "warning", f"a gradient of {size:.1g}, which is rounding", cause, fix)
    yield replace(found, where=where, source=source_lines(where)) if where else found


def _backward_fails(twin: Subject, error: RuntimeError, case: Case) -> Found:
    """A backward that raises; the second one does when a tensor of the first step's graph is kept and used again."""
    text = str(error).partition(". ")[0]
    if "modified by an inplace operation" in text and (found := _written_over(twin, text, case)) is not None:
        return found
    kept = "backward through the graph a second time" in text
    where, name = keeper(twin.model) if kept else (Where(), None)
    return Found(
        probe="",
        severity="error",
        message=f"backward raises RuntimeError: {text}",
        where=where,
        source=source_lines(where),
        cause=f"{name} keeps a tensor of the first step's graph, and the second step uses it again" if name else None,
        fix="keep it detached, or compute it anew in every forward" if name else None,
        raised=f"RuntimeError: {text}",
        case=case,
    )


def _written_over(twin: Subject, text: str, case: Case) -> Found | None:
    """The finding at the line that writes in place over what another line had kept for its backward; None where it is not seen."""
    with settled(seed=twin.seed), quiet():
        told = overwritten(twin.model, lambda: twin.call(case))
    if told is None:
        return None
    where = place_of(told.written, op=told.op)
    reader = "" if told.kept is None else f" that line {told.kept.line} computed with and keeps for its backward"
    return Found(
        probe="",
        severity="error",
        message=f"backward raises RuntimeError: {text}",
        where=where,
        source=source_lines(where),
        cause=f"{told.op} writes in place into the tensor {told.shape}{reader}",
        fix="make a new tensor: x = x + y for x += y, torch.where or index_put for an assignment to a part, the op without the final _",
        evidence={"kept at": str(place_of(told.kept))} if told.kept is not None else {},
        raised=f"RuntimeError: {text}",
        case=case,
    )


def _cut(recording: Recording, twin: Subject, module: str | None) -> Where:
    """Where the subject's own code cuts the graph: the one line with a detach op, else one that reads `.data` or enters
    no_grad in the class of the module, else the function that should use the module."""
    places = {
        (event.where.file, event.where.line): place_of(spot, module=event.where.module, op="detach")
        for event, spot in zip(recording.events, recording.spots, strict=True)
        if event.op == "detach" and event.phase == "forward" and spot is not None
    }
    written = {key: place for key, place in places.items() if any(word in linecache.getline(key[0] or "", key[1] or 0) for word in CUTS)}
    if len(written) == 1:
        return next(iter(written.values()))
    path = module or ""
    while True:
        owner = twin.model.get_submodule(path)
        code = code_of(type(owner).forward)
        own = code is not None and twin.sources.rank(code.co_filename) == OWN
        if own and code is not None:
            lines, start = inspect.getsourcelines(code)
            cut = next((start + i for i, text in enumerate(lines) if any(word in text for word in CUTS)), None)
            if cut is not None or not path or module is None:
                return place_of(Spot(code, 0, cut or code.co_firstlineno), module=path, op="detach" if cut else None)
            if path != module:
                return place_of(Spot(code, 0, code.co_firstlineno), module=path)
        if not path:
            return Where(module=module or "")
        path = path.rpartition(".")[0]


def _finding(
    recording: Recording,
    twin: Subject,
    names: list[str],
    severity: str,
    what: str,
    cause: str | None,
    fix: str | None,
    *,
    owner: str | None = None,
) -> Found:
    owner = names[0].rpartition(".")[0] if owner is None else owner
    read = names[0] in _computed_with(recording)
    left_out = not read and any(call.module == owner for call in recording.calls)  # its own forward runs and does without it
    where = forward_place(twin.model, owner) if left_out else _cut(recording, twin, owner)
    return Found(
        probe="",
        severity=severity,  # type: ignore[arg-type]
        message=f"{names[0]} gets {what}" + ("", ", and another one too", f", and {len(names) - 1} others too")[min(len(names), 3) - 1],
        where=where,
        source=source_lines(where),
        cause=cause,
        fix=fix,
        evidence={"parameters": listed(names, 4), "of": sum(1 for p in twin.model.parameters() if p.requires_grad)},
    )
