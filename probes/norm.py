"""Norms give what they promise, with the configured eps, and stand where they should."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from olmodebug.compare import difference, roundings_limit
from olmodebug.convention import first_embedding
from olmodebug.explain import place_of, source_lines
from olmodebug.footprint.blocks import blocks_of, final_norm, hidden_of, silence_branches
from olmodebug.own_code import quiet
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case, Where
from olmodebug.relations.invariance import run
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.sources import Spot, code_of
from olmodebug.subject import Subject
from olmodebug.tracing.dims import WIDTH_NAMES
from olmodebug.tracing.lookup import embedding_table
from olmodebug.tracing.norms import (
    FUSED,
    NormCall,
    acts_as_norm,
    could_hold_a_norm,
    device_of,
    divides_by_square,
    grows_with_input,
    norm_calls,
    norm_width,
    overflowing_squares,
    survives_zeros,
    traced,
    unbiased,
    unit_rms,
    unused_norms,
    with_unit_weights,
)
from olmodebug.tracing.stream import (
    branches_of,
    ends_in_norm,
    is_block,
    is_chained,
    is_norm_of_input,
    is_scaled,
    is_weighted,
    last_add,
    last_call_place,
    stream_of,
    sum_that_is_lost,
)
from olmodebug.tracing.tracer import Recording, record

EPS_NAMES = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layernorm_epsilon",
    "layernorm_eps",
    "norm_eps",
    "norm_epsilon",
    "rms_norm_epsilon",
    "layer_norm_rms_epsilon",
    "eps",
)
# What says by its name that it is a norm over the last dimension.
NAMED_NORM = re.compile(r".*(rms|layer)_?norm(\dd|gated)?", re.IGNORECASE)
# Norms cast to float32 inside, and unit scale is judged on squares.
UNIT_LIMIT = roundings_limit({"float32"})
# Activations of a few hundred are ordinary in trained models; their squares leave float16, whose largest number is 65504.
BIG_ACTIVATION = 600.0
# Switches of BLOOM and Falcon, and of MiniMax, that take the residual behind the norm on purpose.
POST_RESIDUAL_NAMES = ("apply_residual_connection_post_layernorm", "postnorm")
FINAL_SCALES = (1e6, 1e9)


@probe()
def unit_scale(subject: Subject) -> Iterator[Finding]:
    """A norm divides by the root of the mean square, or the standard deviation, of the n values it has: not by its square,
    not by the root of their sum, and not by that of n - 1 of them.

    Why: the output is off by half a percent at width 100, by sqrt(n), or grows as its input shrinks.
    Catches: x.std(-1) or x.var(-1) with torch's default correction in a LayerNorm written by hand; a forgotten sqrt; a sum
    for the mean.
    """
    seen: set[type] = set()
    norms = 0
    for path, module in subject.model.named_modules():
        width = norm_width(module)
        if width is None or width < 2 or type(module) in seen:
            continue
        twin = with_unit_weights(module)
        if divides_by_square(twin, width):
            seen.add(type(module))
            norms += 1
            yield _wrong_divisor(
                path,
                twin,
                width,
                ("div", "div_", "reciprocal", "mul", "mul_"),
                f"{path} turns inputs twice as large into outputs half as large: it divides by the variance, not by its root",
                "the root of the variance or of the mean square is not taken",
                "x / torch.sqrt(variance + eps), or x * torch.rsqrt(variance + eps)",
                "outputs that do not depend on the scale of the input",
            )
            continue
        if not acts_as_norm(twin, width):
            continue
        norms += 1
        seen.add(type(module))
        size = unit_rms(twin, width)
        if size is not None and "rms" in type(module).__name__.lower() and _is_unit_vector(module, size, width):
            found = _wrong_divisor(
                path,
                twin,
                width,
                ("sum", "linalg_vector_norm", "norm", "pow", "mul"),
                f"{path} gives a root mean square of {size:.4g} for width {width}, which is 1/sqrt(width): a vector of length 1",
                "it divides by the root of the sum of squares, and an RMS norm divides by that of their mean",
                "x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)",
                "root mean square 1",
            )
            yield replace(found, severity="warning")  # a unit vector with a scale of its own is a design, under another name
            continue
        if size is None or abs(size - ((width - 1) / width) ** 0.5) > UNIT_LIMIT or abs(size - 1.0) <= UNIT_LIMIT:
            continue
        x = torch.randn(1, 3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device_of(twin))
        event = unbiased(traced(twin, lambda: twin(x)), width)  # noqa: B023 - called at once
        if event is None:
            continue
        where = replace(event.where, module=path)
        yield Found(
            probe="",
            severity="warning",
            message=f"{path} gives a mean square of {size**2:.6f} for width {width}, which is (n-1)/n: it is unbiased, as a norm's own is not",
            where=where,
            source=source_lines(where),
            cause=f"the sum of squares is divided by n - 1 = {width - 1} here"
            if event.op.startswith("div")
            else f"{event.op} divides by n - 1 unless it is told otherwise",
            fix="divide by n, as mean(-1) does" if event.op.startswith("div") else f"{event.op}(..., correction=0), or F.layer_norm",
            expected="variance 1",
            observed=f"variance {size**2:.6f}",
            evidence={"width": width, "(n-1)/n": (width - 1) / width},
        )
    if not norms:
        not_applicable("no module was recognised as a norm")


def _is_unit_vector(module: nn.Module, size: float, width: int) -> bool:
    """Whether a norm gives vectors of length one, and its weights as they are do not make that good."""
    plain = all(bool((p == p.flatten()[0]).all()) and p.flatten()[0].item() in (0.0, 1.0) for p in module.parameters())
    return plain and abs(size * width**0.5 - 1.0) <= UNIT_LIMIT


def _wrong_divisor(
    path: str, twin: nn.Module, width: int, ops: tuple[str, ...], message: str, cause: str, fix: str, expected: str
) -> Found:
    """What a norm divides by is wrong; the place is that of the first of these ops that it runs."""
    x = torch.randn(1, 3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device_of(twin))
    recording = traced(twin, lambda: twin(x))
    event = next((e for name in ops for e in recording.events if e.op == name), None)
    where = replace(event.where, module=path) if event is not None else Where(module=path)
    return Found(
        probe="",
        severity="error",
        message=message,
        where=where,
        source=source_lines(where),
        cause=cause,
        fix=fix,
        expected=expected,
        evidence={"width": width},
    )


@probe()
def takes_effect(subject: Subject) -> Iterator[Finding]:
    """What is called a norm normalises: its numbers are used, and what it gives does not grow with what it is given.

    Why: without its norms a model trains until its activations have grown, and with weights from elsewhere it gives random words.
    Catches: return x * weight, where y = x * rsqrt(...) was meant; a norm that lost its division.
    """
    twin = subject.twin()
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq))
    recording = _recorded(twin, case)
    seen: set[object] = set()
    for path, module in twin.model.named_modules():
        width, kind = norm_width(module), type(module)
        if (
            width is None
            or width < 2
            or kind in seen
            or not NAMED_NORM.fullmatch(kind.__name__)
            or next(module.buffers(), None) is not None  # statistics that it keeps
            or not grows_with_input(with_unit_weights(module), width)
        ):
            continue
        seen.add(kind)
        where = next((e.where for e in recording.events if e.where.module == path), Where(module=path))
        yield _without_effect(
            where,
            case,
            f"{path}, of class {kind.__name__}, hands on an input 1000 times as large 1000 times as large: it normalises nothing",
        )
    for call, goes_on in unused_norms(recording):
        if (place := (call.where.file, call.where.line)) not in seen:
            seen.add(place)
            yield _without_effect(
                goes_on.where,
                case,
                f"what {call.where.function} normalises at line {call.where.line} is never used",
                f"line {goes_on.where.line} goes on with numbers that were not normalised",
            )
    declared = [name for name in EPS_NAMES if isinstance(subject.setting(name), float)]
    if declared and not seen and not could_hold_a_norm(recording):
        # An eps may be an optimizer's, or stand in a config made for other models: something must call itself a norm.
        if spot := next((spot for spot in recording.spots if spot is not None and NAMED_NORM.match(spot.function)), None):
            yield _without_effect(
                place_of(spot),
                case,
                f"the config declares {declared[0]}, and no op of a forward could be part of a norm: none takes a mean or a root",
            )


def _without_effect(where: Where, case: Case, message: str, cause: str | None = None) -> Found:
    return Found(
        probe="",
        severity="error",
        message=message,
        where=where,
        source=source_lines(where),
        cause=cause,
        fix="return what was normalised: weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)) for an RMS norm",
        case=case,
    )


@probe()
def eps_as_configured(subject: Subject) -> Iterator[Finding]:
    """Every norm over the hidden size uses the eps that the configuration declares.

    Why: at small activations a wrong eps shrinks the output; weights trained with another give random words.
    Catches: an eps argument that is not passed on, so that the default of the norm's class counts; one that is never added.
    """
    declared = {value for name in EPS_NAMES if isinstance(value := subject.setting(name), float)}
    twin = subject.twin()
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq))
    calls = [
        call
        for call in norm_calls(_recorded(twin, case))
        if call.eps or not survives_zeros(twin.model.get_submodule(call.where.module), call.width)
    ]
    if not declared:
        yield from _eps_left_out(twin, calls, case)
        not_applicable("its config declares no eps")
    if not calls:
        not_applicable("no norm with an eps was recognised in a run")
    width = _hidden_width(subject)
    main = [call for call in calls if call.width == width]
    wrong = [call for call in main if not any(_near(call.eps, eps) for eps in declared)]
    seen: set[tuple[str | None, int | None, float]] = set()
    for call in wrong:
        key = (call.where.file, call.where.line, call.eps)
        if key not in seen:
            seen.add(key)
            finding = _wrong_eps(call, declared, len(main), [c for c in wrong if c.eps == call.eps], case)
            # Where other norms of the model do use the declared eps, this one may be meant to be unlike them.
            yield finding if len(wrong) == len(main) else replace(finding, severity="warning")
    beside = [call for call in calls if call.width != width and not any(_near(call.eps, eps) for eps in declared)]
    odd = [call for call in beside if any(_is_beside(call, other) for other in calls if other not in beside)]
    for call in {(call.where.file, call.where.line, call.eps): call for call in reversed(odd)}.values():
        found = _wrong_eps(call, declared, len(calls), [c for c in odd if c.eps == call.eps], case)
        where = _made_at(twin.model, call.where)
        yield replace(
            found, severity="warning", where=where, source=source_lines(where), cause=f"{call.where.module} is made with {call.eps:g}"
        )


def _made_at(model: nn.Module, where: Where) -> Where:
    """The line of its owner's __init__ that makes a module; the given place where it is not seen."""
    owner, _, leaf = where.module.rpartition(".")
    code = code_of(type(model.get_submodule(owner)).__init__)
    try:
        lines, first = inspect.getsourcelines(code) if code else ([], 0)
    except OSError:
        return where
    line = next((first + k for k, text in enumerate(lines) if re.search(rf"self\.{re.escape(leaf)}\s*[:=]", text)), None)
    return place_of(Spot(code, 0, line), module=where.module) if code and line else where


def _is_beside(call: NormCall, other: NormCall) -> bool:
    """Whether two norms are one class in one module, as those on queries and on keys, so that one eps is meant for both."""
    mine, its = call.where, other.where
    return mine.module != its.module and (mine.file, mine.line, mine.module.rpartition(".")[0]) == (
        its.file,
        its.line,
        its.module.rpartition(".")[0],
    )


@probe()
def final_norm_applied(subject: Subject) -> Iterator[Finding]:
    """A model that owns a norm behind its last block uses it: the logits do not grow with the scale of the last hidden states.

    Why: without it the logits grow with depth and training, and the norm's weight is never trained.
    Catches: a final norm that is made in __init__ and forgotten in forward.
    """
    twin = subject.fresh_twin()
    name = final_norm(twin.model)
    blocks = blocks_of(twin.model)
    if name is None or not blocks:
        not_applicable("no norm behind the last block was recognised")
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq))
    recording = _recorded(twin, case)
    owned = {name} | {f"{name}.{part}" for part in ("weight", "bias", "scale")}
    called = any(call.module == name for call in recording.calls) or any(owned & set(e.parameters) for e in recording.events)
    if called:
        return
    small, large = (_scaled_last(twin, case, blocks[-1][1], scale) for scale in FINAL_SCALES)
    if small is None or large is None or difference(small, large, relative_limit=0.5) is None:
        return  # something else normalises them, or a cap does
    spot = next((c.spot for c in reversed(recording.kept_calls) if c.module == blocks[-1][0]), None)
    where = Where(module=blocks[-1][0].rpartition(".")[0].rpartition(".")[0])
    if spot is not None:
        where = place_of(spot, module=where.module)
    grown = float(large.abs().max() / small.abs().max())
    yield Found(
        probe="",
        severity="error",
        message=f"the final norm {name} is never used: the logits grow {grown:.3g} times when the last hidden states grow 1000 times",
        where=where,
        source=source_lines(where),
        cause=f"forward reads no parameter of {name} and calls no such module between the last block and the head",
        fix=f"apply {name} to the hidden states after the last block",
        expected="logits that do not depend on the scale of the last hidden states",
        observed=f"logits {grown:.3g} times as large",
        case=case,
    )


@probe()
def residual_stream_kept(subject: Subject) -> Iterator[Finding]:
    """A block whose branches give nothing hands its input on unchanged, unless it ends in a norm (post-norm).

    Why: a residual stream that is normalised or dropped on the way loses the gradient's straight path through the depth.
    Catches: x = norm(x); x = x + attn(x); x = mlp(norm(x)) without the addition; the mlp added to what came before attention.
    """
    blocks = blocks_of(subject.model)
    if len(blocks) < 2 or not is_block(blocks[0][1]):
        not_applicable("no repeated blocks with attention and feed-forward in one module were recognised")
    if any(subject.setting(name) is True for name in POST_RESIDUAL_NAMES):
        not_applicable("its config puts the norm into the residual stream")
    twin, usual = subject.fresh_twin(), subject.twin()
    for _, block in blocks_of(twin.model):
        if not silence_branches(block):
            not_applicable("its blocks have no matrices")
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq))
    silent, loud = _recorded(twin, case), _recorded(usual, case)
    limit = roundings_limit(silent.dtypes())
    first = blocks[0][0]
    streams = [stream_of(silent, path) for path, _ in blocks]
    if any(stream is None for stream in streams):
        not_applicable("its blocks do not map hidden states to hidden states of the same shape")
    if not is_chained(loud, [path for path, _ in blocks]):
        not_applicable("the output of a block is not the input of the next: the residual stream runs outside of them")
    changed = [s for s in streams if s is not None and difference(s[0], s[1], relative_limit=limit) is not None]
    if not changed:
        yield from _lost_branch(subject, first, case)
        return
    before, after = changed[0]
    if is_scaled(before, after, limit):
        return  # a depth scale or a gate on the residual
    add = last_add(loud, first)
    if bool((after == 0).all()):
        what, cause = "zeros: the residual is not added", "the last step of the block replaces the stream by its branch"
        fix = "x = x + mlp(norm(x))"
        place = last_call_place(loud, first)
    elif (
        len(changed) == 1
        and changed[0] is streams[0]
        and (_owns_more(blocks[0][1], blocks[1][1]) or _calls_more(loud, first, blocks[1][0]))
    ):
        return  # a norm of the embeddings that stands in the first block
    elif add is not None and not is_weighted(loud, add) and not ends_in_norm(loud, first) and is_norm_of_input(silent, first, after, limit):
        what, cause = (
            "its input normalised: the residual stream goes through a norm",
            "the norm's output is used for the branch and for the residual",
        )
        fix = "keep x itself for the addition: x = x + branch(norm(x))"
        place = add.where
    else:
        return  # gates, layer scales, hyper-connections: nothing that this probe understands
    yield Found(
        probe="",
        severity="warning",
        message=f"{first}: with branches that give nothing the block returns {what}",
        where=place,
        source=source_lines(place),
        cause=cause,
        fix=fix,
        expected="its input, unchanged",
        observed=f"a largest difference of {float((after - before).abs().max()):.3g}",
        evidence={"blocks that do so": f"{len(changed)} of {len(blocks)}"},
        case=case,
    )


def _lost_branch(subject: Subject, path: str, case: Case) -> Iterator[Finding]:
    """A branch that is added to the stream, and whose sum only the next branch reads: the block does not hand it on."""
    names = [name for name, _ in branches_of(subject.model.get_submodule(path))]
    for branch in names if len(names) > 1 else ():
        twin = subject.fresh_twin()
        silence_branches(twin.model.get_submodule(path), but=branch)
        recording = _recorded(twin, case)
        lost = sum_that_is_lost(recording, path, branch, roundings_limit(recording.dtypes()))
        if lost is None:
            continue
        yield Found(
            probe="",
            severity="warning",
            message=f"{path}: what {branch} adds to the residual stream never leaves the block: the next branch reads it, and is added to "
            "what came before it",
            where=lost.where,
            source=source_lines(lost.where),
            cause="the last addition takes the block's input, not the sum that is made here",
            fix="keep this sum, and add the next branch to it",
            expected=f"an output that holds what {branch} gives",
            observed=f"the block's input, unchanged, where no branch but {branch} gives anything",
            case=case,
        )
        return


def _owns_more(first: nn.Module, other: nn.Module) -> bool:
    """Whether a block has parameters that another of its kind does not have."""
    return bool({name for name, _ in first.named_parameters()} - {name for name, _ in other.named_parameters()})


def _calls_more(recording: Recording, first: str, other: str) -> bool:
    """Whether a block runs modules that another of its kind has and does not run."""
    left, right = ({call.module[len(path) :] for call in recording.calls if call.module.startswith(f"{path}.")} for path in (first, other))
    return bool(left - right)


@probe()
def large_inputs_in_float16(subject: Subject) -> Iterator[Finding]:
    """No norm squares in float16: activations of 600 must not overflow inside it.

    Why: 600 squared is above float16's largest number, 65504; the norm then returns zeros, and nothing says so.
    Catches: x * rsqrt(x.pow(2).mean(-1) + eps) without .float() before the square.
    """
    twin = subject.fresh_twin(dtype=torch.float16)
    if twin.dtype != torch.float16:
        not_applicable("it does not run in float16")
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq))
    table = embedding_table(twin.model, _recorded(twin, case))
    if table is None:
        not_applicable("no embedding table to make the activations large with")
    with torch.no_grad():
        largest = float(table.abs().max())
        if largest == 0:
            not_applicable("its embedding table is all zeros, which nothing makes large")
        table.copy_((table.double() * (BIG_ACTIVATION / largest)).clamp(-BIG_ACTIVATION, BIG_ACTIVATION))
    recording = _recorded(twin, case)
    seen: set[tuple[str | None, int | None]] = set()
    for event, largest in overflowing_squares(recording):
        key = (event.where.file, event.where.line)
        if key in seen:
            continue
        seen.add(key)
        yield Found(
            probe="",
            severity="warning",
            message=f"in float16 a norm's square overflows: an input of {largest:.0f} squared is above 65504, so the norm returns zeros or NaN",
            where=event.where,
            source=source_lines(event.where),
            cause=f"{event.op} squares in float16",
            fix="upcast first: x.float() before the square, and cast back after the rsqrt",
            expected="finite squares",
            observed="inf in the mean square",
            evidence={"condition": "the model in float16, activations of some hundreds", "largest input": largest},
            case=case,
        )


def _recorded(twin: Subject, case: Case) -> Recording:
    run(twin, case)  # an exception of the model is a finding of its own
    with torch.no_grad(), quiet():
        return record(twin.model, lambda: twin.call(case), keep=True)


def _hidden_width(subject: Subject) -> int:
    table = first_embedding(subject.model)
    declared = subject.setting(*WIDTH_NAMES)
    return declared if isinstance(declared, int) else (table.embedding_dim if table is not None else 0)


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b))


def _eps_left_out(twin: Subject, calls: list[NormCall], case: Case) -> Iterator[Found]:
    """Norms that hold an eps, which they do not add."""
    seen: set[tuple[str | None, int | None]] = set()
    for call in calls:
        held = [v for n, v in vars(twin.model.get_submodule(call.where.module)).items() if "eps" in n and isinstance(v, float) and v > 0]
        if call.eps == 0.0 and len(held) == 1 and (call.where.file, call.where.line) not in seen:
            seen.add((call.where.file, call.where.line))
            same = [other for other in calls if other.where.line == call.where.line and other.eps == 0.0]
            yield replace(_wrong_eps(call, set(held), len(calls), same, case), severity="warning")


def _wrong_eps(call: NormCall, declared: set[float], total: int, same: list[NormCall], case: Case) -> Found:
    wanted = ", ".join(f"{eps:g}" for eps in sorted(declared))
    # BioGPT's weights, for one, were trained with torch's default and its config says another number that nobody reads.
    default = call.where.op in FUSED and call.eps == torch.nn.LayerNorm(1).eps
    cause = "the norm is made with torch's default eps" if default else f"eps {call.eps:g} is added here, whatever the config says"
    if not call.eps:
        cause = "the root is taken of the mean square alone: a row of zeros becomes NaN, and a small one is blown up"
    return Found(
        probe="",
        severity="warning" if default else "error",
        message=f"this {call.kind} {f'uses eps {call.eps:g}' if call.eps else 'adds no eps'}, and {wanted} is declared",
        where=call.where,
        source=source_lines(call.where),
        cause=cause,
        fix="pass the config's eps on to the norm" if call.eps else "add it under the root: torch.rsqrt(mean_square + eps)",
        expected=f"eps {wanted}",
        observed=f"eps {call.eps:g}",
        evidence={"norms with this eps": f"{len(same)} of {total}", "width": call.width},
        case=case,
    )


def _scaled_last(twin: Subject, case: Case, block: nn.Module, scale: float) -> Tensor | None:
    """The logits when what the last block returns is scaled; None where it returns something else."""
    found = []

    def hook(module: nn.Module, args: object, output: object) -> object:
        hidden = hidden_of(output)
        found.append(hidden is not None)
        if isinstance(output, Tensor):
            return output * scale
        return (hidden * scale, *output[1:]) if hidden is not None and isinstance(output, tuple) else output

    handle = block.register_forward_hook(hook)
    try:
        logits = run(twin, case)
    finally:
        handle.remove()
    return logits if found and all(found) else None
