"""Weights of a fresh build are what the initialisation says they are."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmodebug.explain import place_of, source_lines
from olmodebug.own_code import own_code, quiet
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case, Where
from olmodebug.relations.invariance import run
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.settle import settled
from olmodebug.sources import Spot
from olmodebug.subject import Subject
from olmodebug.tracing.births import Build, watch_build
from olmodebug.weights import RESIDUAL, Weight, shared_std, weights_of

# The least relative gap that is called another std: truncation at 2 or 3 sigma moves a std by 12 % and 1.4 %.
LEAST_GAP = 0.15
# Uniform logits have a loss of ln V; logits with a std of 2 already cost 2 nats more.
LOSS_MARGIN = 2.0
# Multipliers after muP (MiniCPM, Granite, Cohere, Falcon H1): the loss at the start depends on the full width.
WIDTH_SCALES = ("scale_emb", "dim_model_base", "logits_scaling", "logit_scale", "embedding_multiplier", "lm_head_multiplier")
MLP_INPUT = ("w1", "w3", "gate_proj", "up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "ff_proj")
MLP_OUTPUT = ("w2", "down_proj", "fc2", "fc_out", "dense_4h_to_h", "ff_out", "w_out")
INIT_METHODS = ("init_weights", "_init_weights", "initialize_weights", "_initialize_weights", "reset_parameters")


@probe()
def finite_weights(subject: Subject) -> Iterator[Finding]:
    """No parameter and no floating buffer holds NaN, and no parameter an infinity.

    Why: one NaN in a weight makes every logit NaN after the first step that touches it.
    Catches: an overflowing initialisation; a checkpoint that was damaged or saved after a diverged step.
    """
    tensors: list[tuple[str, torch.Tensor, str]] = [(name, p, "parameter") for name, p in subject.model.named_parameters()]
    tensors += [(name, b, "buffer") for name, b in subject.model.named_buffers()]
    for name, tensor, kind in tensors:
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        bad = torch.isnan(tensor) if kind == "buffer" else ~torch.isfinite(tensor)  # masks are kept as -inf
        if bool(bad.any()):
            yield Found(
                probe="",
                severity="error",
                message=f"{kind} {name} holds {int(bad.sum())} of {tensor.numel()} numbers that are not finite",
                where=Where(module=name.rpartition(".")[0]),
                expected="finite numbers",
                observed=f"first at {tuple(int(i) for i in bad.nonzero()[0])}",
            )


@probe()
def every_weight_initialised(subject: Subject) -> Iterator[Finding]:
    """Two builds from one seed have equal weights, and none is memory that nothing wrote into.

    Why: torch.empty gives what the memory held before: often zeros on a fresh machine, garbage in a long run.
    Catches: nn.Parameter(torch.empty(...)) without an init; weights drawn from an unseeded numpy generator.
    """
    if subject.remake is None:
        not_applicable("a model that was handed over alive cannot be built again")
    with quiet(), settled(seed=subject.seed):
        first = dict(subject.remake(subject.seed).named_parameters())
        # torch fills fresh memory with NaN where deterministic algorithms are asked for.
        torch.use_deterministic_algorithms(True, warn_only=True)
        second = dict(subject.remake(subject.seed).named_parameters())
    for name, parameter in second.items():
        if name in first and first[name].shape == parameter.shape and _same(first[name], parameter):
            continue
        empty = parameter.is_floating_point() and bool(torch.isnan(parameter).any())
        where = _init_place(subject, name)
        yield Found(
            probe="",
            severity="warning",
            message=f"{name} is never initialised: it holds what the memory held"
            if empty
            else f"{name} differs between two builds from one seed",
            where=where,
            source=source_lines(where),
            cause="torch.empty was called and nothing wrote into it: it is NaN where fresh memory is filled with NaN" if empty else None,
            fix="initialise it in __init__ or reset_parameters" if empty else "draw it from torch's seeded generator",
            expected="equal weights",
        )
        return


@probe()
def as_configured(subject: Subject) -> Iterator[Finding]:
    """Matrices have the std that the configuration or the init code sets; residual projections may be scaled by depth, once.

    Why: too large and the first steps diverge, too small and the depth does not train; both look like a bad learning rate.
    Catches: an init function that is never called; `name == "c_proj.weight"` against full names; 1/sqrt(2L) twice or on w3.
    """
    build = _fresh_build(subject)
    weights = weights_of(build.model)
    for never in build.never_true():
        where = place_of(never.spot)
        yield Found(
            probe="",
            severity="warning",
            message=f"`if {never.condition}` holds for no parameter, so the init below it (of residual projections, by depth, as a rule) never runs",
            where=where,
            source=source_lines(where),
            cause="named_parameters() gives full names, such as "
            + next((w.name for w in weights if w.role in RESIDUAL), weights[0].name if weights else ""),
            fix="compare with name.endswith(...)",
        )
        return
    found = _default_init(subject, build, weights) or _depth(subject, build, weights)
    if found is not None:
        yield found


@probe()
def rows_and_branches_alive(subject: Subject) -> Iterator[Finding]:
    """No embedding row but padding's is zero, and no two factors of one product are zero together.

    Why: where both factors are zero each one's gradient is a product with the other: neither ever moves.
    Catches: v_proj and o_proj both zeroed; embedding rows of added tokens left at zero.
    """
    _fresh_only(subject)
    table = next(((n, m) for n, m in subject.model.named_modules() if isinstance(m, nn.Embedding)), None)
    if table is not None:
        name, module = table
        padding = {module.padding_idx, subject.setting("pad_token_id")}
        dead = [i for i in (module.weight == 0).all(dim=1).nonzero().flatten().tolist() if i not in padding]
        if dead and len(dead) < module.num_embeddings:
            where = _init_place(subject, f"{name}.weight")
            yield Found(
                probe="",
                severity="warning",
                message=f"{len(dead)} embedding rows are zero, from id {dead[0]} to {dead[-1]}: these tokens all look alike",
                where=where,
                source=source_lines(where),
                fix="draw them like the others",
                evidence={"rows": module.num_embeddings},
            )
    zero = [name for name, p in subject.model.named_parameters() if p.ndim >= 2 and p.requires_grad and not bool(p.any())]
    if len(zero) < 2:
        return
    stuck = _stuck(subject, zero)
    if len(stuck) >= 2:
        where = _init_place(subject, stuck[0])
        yield Found(
            probe="",
            severity="error",
            message=f"{stuck[0]} and {stuck[1]} are both zero and get a zero gradient: they can never train",
            where=where,
            source=source_lines(where),
            cause="each one's gradient is a product with the other, and both are zero",
            fix="draw one of the two at random; zero the output projection alone if the branch shall start silent",
            evidence={"parameters": ", ".join(stuck[:6])},
        )


@probe(after=("logits.finite",))
def loss_near_log_vocab(subject: Subject) -> Iterator[Finding]:
    """Before training the loss on random tokens is about ln V: the model knows nothing and does not pretend to.

    Why: logits that are large at the start waste the first thousands of steps, or diverge in 16 bits.
    Catches: an embedding at torch's default std of 1 that is tied to the head; an initialisation that is never called.
    """
    _fresh_only(subject)
    scaled = next((name for name in WIDTH_SCALES if subject.setting(name) not in (None, 1, 1.0)), None)
    if scaled is not None:
        not_applicable(f"its config scales by width ({scaled}), which a small copy does not reproduce")
    twin = subject.twin()
    batch, seq = twin.sizes()
    ids, target = twin.token_ids(batch, seq, seed=21), torch.tensor(twin.token_ids(batch, seq, seed=22))
    case = Case(name="random tokens", input_ids=ids)
    logits = run(twin, case).double()
    if logits.shape[1] != seq:
        not_applicable("it gives the last position only")
    loss = float(F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1)))
    expected = math.log(logits.shape[-1])
    if loss <= expected + LOSS_MARGIN:
        return
    head = _head_name(subject.model)
    where = _init_place(subject, head) if head else Where()
    yield Found(
        probe="",
        severity="warning",
        message=f"the loss of the fresh model on random tokens is {loss:.2f}, and ln V is {expected:.2f}: the init makes logits of std {float(logits.std()):.2g}",
        where=where,
        source=source_lines(where),
        fix="draw the head (or the tied embedding) with a std near 0.02, or scale the logits",
        expected=f"about {expected:.2f}",
        observed=f"{loss:.2f}",
        case=case,
    )


def _fresh_only(subject: Subject) -> None:
    if subject.remake is None or subject.spec.startswith("hf:") or "/" in subject.spec and ":" not in subject.spec:
        not_applicable("only a fresh build says how weights start")
    for name, parameter in subject.model.named_parameters():
        if parameter.ndim == 1 and "norm" in name.lower() and parameter.numel() > 1 and float(parameter.detach().std()) > 0:
            not_applicable("its weights look trained")


def _fresh_build(subject: Subject) -> Build:
    _fresh_only(subject)
    assert subject.remake is not None
    with quiet(), settled(seed=subject.seed):
        return watch_build(lambda: subject.remake(subject.seed), subject.sources)  # type: ignore[misc]


def _default_init(subject: Subject, build: Build, weights: list[Weight]) -> Found | None:
    """Linear layers at torch's own default although the config declares a std, or an init method exists and never ran."""
    linears = {name: m for name, m in build.model.named_modules() if isinstance(m, nn.Linear)}
    default = []
    for weight in weights:
        linear = linears.get(weight.name.removesuffix(".weight"))
        bound = 1 / math.sqrt(weight.tensor.shape[1])
        birth = build.births.get(weight.name)
        drawn_by_torch = birth is None or birth.spot is None or birth.spot.code.co_name == "__init__"  # where the layer is made
        if linear is not None and drawn_by_torch and weight.near(bound / math.sqrt(3)) and float(weight.tensor.abs().max()) <= bound:
            default.append(weight)
    if len(default) < 2 or 3 * len(default) < len(linears):
        return None
    declared = subject.setting("initializer_range", "init_std", "initializer_std")
    told = isinstance(declared, float) and not any(w.near(declared) for w in default) and abs(default[0].std / declared - 1) > LEAST_GAP
    forgotten = _forgotten(build)
    if not told and forgotten is None:
        return None
    first = default[0]
    where = place_of(forgotten[1]) if forgotten else _birth_place(build, first.name)
    cause = f"{forgotten[0]} is defined, and building never calls it" if forgotten else "nothing overwrites what nn.Linear draws"
    expected = f"std {declared:g} (initializer_range)" if told else f"the init of {forgotten[0] if forgotten else 'the model'}"
    return Found(
        probe="",
        severity="warning",
        message=f"{len(default)} of {len(linears)} linear layers have torch's default init: {first.name} has std {first.std:.3g}, expected {expected}",
        where=where,
        source=source_lines(where),
        cause=cause,
        fix="call the init function at the end of __init__ (self.apply(self._init_weights))",
        expected=expected,
        observed=f"uniform within 1/sqrt(fan_in), std {first.std:.3g}",
    )


def _depth(subject: Subject, build: Build, weights: list[Weight]) -> Found | None:
    """Residual projections whose std is 1/(2L) of the others', or a depth scale on the way into the MLP and not out of it."""
    layers = subject.setting("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if not isinstance(layers, int) or layers < 2:
        return None
    base = shared_std(subject, weights)
    if base is None:
        return None
    once, twice = base / math.sqrt(2 * layers), base / (2 * layers)
    residual = [w for w in weights if w.role in RESIDUAL]
    attention = [w for w in residual if w.role not in MLP_OUTPUT]
    inward = [w for w in weights if w.role in MLP_INPUT]
    outward = [w for w in weights if w.role in MLP_OUTPUT]
    doubled = next((own for role in RESIDUAL if (own := [w for w in residual if w.role == role]) and all(w.near(twice) for w in own)), None)
    if doubled:
        first, text = (
            doubled[0],
            f"std {doubled[0].std:.3g} is {base:.3g}/(2L): the depth scale 1/sqrt(2L) seems applied twice to the residual projections",
        )
        fix = "scale the residual projections once, by 1/sqrt(2 * num_hidden_layers)"
    elif (
        outward
        and all(w.near(base) for w in outward)
        and (scaled := [r for r in MLP_INPUT if (own := [w for w in inward if w.role == r]) and all(w.near(once) for w in own)])
    ):
        first = next(w for w in inward if w.role == scaled[0])
        text = f"std {first.std:.3g} is {base:.3g}/sqrt(2L): the depth scale is on {scaled[0]}, which feeds the MLP, and not on {outward[0].role}, which writes to the residual stream"
        fix = f"scale {outward[0].role}, not {scaled[0]}"
    elif (halves := _half_scaled(attention, outward, once, base)) is not None:
        (first, other), fix = halves, f"scale {halves[0].role} by 1/sqrt(2 * num_hidden_layers) too"
        text = f"std {first.std:.3g}, and {other.role} has {other.std:.3g}, which is {base:.3g}/sqrt(2L): both write to the residual stream, and the depth scale is on one of them"
    else:
        return None
    where = _birth_place(build, first.name)
    return Found(
        probe="",
        severity="warning",
        message=f"{first.name}: {text}",
        where=where,
        source=source_lines(where),
        fix=fix,
        expected=f"std {once:.3g} (or {base:.3g}) on residual projections",
        observed=f"std {first.std:.3g}",
        evidence={"layers": layers, "std of the other matrices": base},
    )


def _half_scaled(attention: list[Weight], outward: list[Weight], once: float, base: float) -> tuple[Weight, Weight] | None:
    """A projection to the residual stream that the depth scale has left out, and one that has it; every layer must say so."""
    for without, scaled in ((attention, outward), (outward, attention)):
        if without and scaled and all(w.near(base) for w in without) and all(w.near(once) for w in scaled):
            return without[0], scaled[0]
    return None


def _forgotten(build: Build) -> tuple[str, Spot] | None:
    """An init method of the model's own classes that draws weights and did not run."""
    for kind in dict.fromkeys(type(m) for m in build.model.modules()):
        for name in INIT_METHODS:
            code = getattr(kind.__dict__.get(name), "__code__", None)
            if code is None or code in build.lines or build.sources.rank(code.co_filename) != 2:
                continue
            if {"normal_", "trunc_normal_", "uniform_", "xavier_uniform_", "kaiming_normal_", "xavier_normal_"} & set(code.co_names):
                return f"{kind.__name__}.{name}", Spot(code, 0, code.co_firstlineno)
    return None


def _birth_place(build: Build, name: str) -> Where:
    birth = build.births.get(name)
    module = name.rpartition(".")[0]
    return place_of(birth.spot, module=module, op=birth.op) if birth else Where(module=module)


def _init_place(subject: Subject, name: str) -> Where:
    if subject.remake is None:
        return Where(module=name.rpartition(".")[0])
    with quiet(), settled(seed=subject.seed):
        return _birth_place(watch_build(lambda: subject.remake(subject.seed), subject.sources), name)  # type: ignore[misc]


def _stuck(subject: Subject, zero: list[str]) -> list[str]:
    """Of these all-zero parameters, those of one layer whose gradient is zero too, and stays so when the others move."""
    twin = subject.fresh_twin(training=True)
    parameters = dict(twin.model.named_parameters())
    batch, seq = twin.sizes()
    with settled(seed=twin.seed), quiet(), torch.enable_grad():
        case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=23))
        with own_code(twin, case):
            logits = twin.call(case).logits
        logits.pow(2).mean().backward() if logits.requires_grad else None
    dead = [name for name in zero if (grad := parameters[name].grad) is not None and not bool(grad.any())]
    for first in dead:
        owner = first.rsplit(".", 2)[0]
        together = [name for name in dead if name.rsplit(".", 2)[0] == owner]
        if len(together) >= 2 and not _come_alive(twin, together, case):
            return together
    return []


def _come_alive(twin: Subject, names: list[str], case: Case) -> bool:
    """Whether one of these parameters gets a gradient once the others have moved, as they do in the first steps of training."""
    parameters = dict(twin.model.named_parameters())
    generator = torch.Generator().manual_seed(twin.seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.grad = None
            if name not in names and parameter.dtype == torch.float64:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device), alpha=0.02)
    with settled(seed=twin.seed), quiet(), torch.enable_grad(), own_code(twin, case):
        twin.call(case).logits.pow(2).mean().backward()
    return any((grad := parameters[name].grad) is not None and bool(grad.any()) for name in names)


def _head_name(model: nn.Module) -> str | None:
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        return None
    names = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    return names.get(id(model.get_submodule(linears[-1]).weight))


def _same(left: Tensor, right: Tensor) -> bool:
    return bool(torch.equal(left.detach(), right.detach()))
