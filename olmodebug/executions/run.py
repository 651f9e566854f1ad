"""One execution of a subject, op by op under judgement, written to a bundle.

Every op is replayed in float64 on the inputs that it really had, before it runs, and judged when it has run; only what is
needed later is kept: outputs of the blocks, logits, loss and gradients, and the inputs of ops that failed. So the peak is the
model, its gradients and one op.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils._pytree import tree_leaves

from ..casts import cast
from ..errors import SubjectError
from ..own_code import quiet
from ..records import Event, ModuleCall
from ..report import plain
from ..settings import set_attention
from ..settle import settled
from ..subject import Subject
from ..tracing.copies import digest
from ..tracing.recording import Moment
from ..tracing.tracer import record
from .bound import ROUNDOFF
from .bundle import Writer, dtype_named
from .cases import ParityCase, learning_rule
from .compare import drift
from .compiled import BACKENDS, backend_of, departed, judged, uncompiled
from .execution import Execution, applied
from .judge import Judgement, judge
from .replay import ATTENTION, UNWRITTEN, Expected, expect, is_arithmetic, op_name
from .state import another_input, remembers, same_start

Tell = Callable[..., None]
REPRO_BYTES = 64 << 20  # of inputs of one failed op
MOST_REPROS = 8
JOURNALLED_INTEGERS = 4096  # indices that go to the parent before the op runs, so that it can replay a device assert
NOISE_RUNS = 3
MOST_DERIVED = 40_000_000  # parameters of a model whose float64 copy is made beside it
PROJECTED = 128  # numbers of a tensor that is too large to keep


@dataclass(slots=True, kw_only=True)
class Options:
    """How thoroughly a run is looked at. `judged` is off for the float64 side, whose own roundings nobody asks about."""

    judged: bool = True
    journal: bool = True
    repeat: bool = True
    replace: Callable[[int, list[Tensor]], None] | None = None  # what a device with a fault would do to an op's outputs


@dataclass(slots=True)
class _Watch:
    """What looks at every op: told before and after it runs."""

    writer: Writer
    tell: Tell
    options: Options
    declared: frozenset[str]
    case: str = ""
    count: int = 0
    offset: int = 0
    repros: int = 0
    expected: Expected | None = None
    func: Any = None
    inputs: dict[str, Any] = field(default_factory=dict)
    digests: list[int] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)  # operations of every graph that was compiled
    astray: ParityCase | None = None  # the first case whose compiled results are not those of the uncompiled run

    def before(self, event: Event, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        self.func = func
        if func.namespace == "profiler":  # marks that optimizers leave for the profiler
            return
        if self.options.journal:
            self.tell("op", case=self.case, **place(event), arguments=described(func, args, kwargs))
        self.expected = expect(func, args, kwargs) if self.options.judged else None

    def after(self, moment: Moment) -> None:
        event = moment.event
        if self.func.namespace == "profiler":
            return
        line = {"i": self.count, "case": self.case, **place(event)}
        line |= {"in": [str(t) for t in event.inputs], "out": [str(t) for t in event.outputs], "parameters": list(event.parameters)}
        line["scalars"] = scalars(moment.arguments)
        line["digest"] = [digest(t) for t in moment.outputs]
        self.digests.append(bits(moment))
        if self.expected is not None:
            found = judge(self.expected, moment.outputs, declared=self.declared)
            line["judged"] = judgement_fields(found)
            line["does"] = self.expected.kind
            if found.verdict in ("diverged", "range", "explained") and self.repros < MOST_REPROS:
                line["repro"] = self._keep(moment, found)
        self.writer.event("op", **line)
        self.count += 1

    def left(self, call: ModuleCall, outputs: list[Tensor]) -> None:
        floats = [t for t in outputs if t.is_floating_point()]
        line: dict[str, Any] = {"case": self.case, "module": call.module, "class": call.kind, "depth": call.depth}
        line |= {"first": self.offset + call.first_event, "last": self.offset + call.last_event, "out": [str(t) for t in call.outputs]}
        if floats:
            key = f"{self.case}/{call.module}/{call.first_event}"
            line["sample"] = sample(floats[0])
            line["norm"] = finite_number(floats[0].detach().double().norm())
            line["key"] = key if call.depth <= 1 and self.writer.tensor(key, floats[0]) else None
        self.writer.event("call", **line)

    def _keep(self, moment: Moment, found: Judgement) -> dict[str, Any] | None:
        """The inputs of an op that failed, for a script that shows it alone."""
        tensors = {name: value for name, value in moment.arguments.items() if isinstance(value, Tensor)}
        size = sum(t.numel() * t.element_size() for t in [*tensors.values(), *moment.outputs])
        if size > REPRO_BYTES or not tensors:
            return None
        prefix = f"repro/{self.count}"
        named = [*tensors.items(), *((f"out{i}", t) for i, t in enumerate(moment.outputs))]
        if not all(self.writer.tensor(f"{prefix}/{name}", t) for name, t in named):
            return None
        self.repros += 1
        rest = {name: plain_argument(v) for name, v in moment.arguments.items() if name not in tensors}
        return {"prefix": prefix, "op": str(self.func), "tensors": sorted(tensors), "arguments": rest, "output": found.output}


def run_parity(
    subject: Subject,
    execution: Execution,
    cases: list[ParityCase],
    writer: Writer,
    *,
    tell: Tell,
    options: Options,
    weights: str | None = None,
) -> None:
    """Run a subject on the cases and write the bundle's events; raises what the subject raises.

    `weights` is the dtype that parameters are rounded to first, so that two executions start from the same numbers.
    """
    watch = _Watch(writer, tell, options, execution.declared)
    prepare(subject, execution, weights, graphs=watch.graphs)
    writer.event("weights", digests={name: digest(_as(p, weights)) for name, p in subject.model.named_parameters()})
    with applied(execution), settled(subject.model, seed=subject.seed), quiet():
        subject.model.eval()  # dropout is random, and nothing to compare
        for case in cases:
            watch.case = case.name
            writer.event("case", name=case.name, mode=case.mode, batch=case.case.batch_size, seq=case.case.seq_len)
            tell("start", step=case.name)
            _one(subject, execution, case, watch, weights)
    if execution.compile and watch.graphs and sum(p.numel() for p in subject.model.parameters()) <= MOST_DERIVED:
        tell("start", step="compiling again in float64, module by module")
        backend = execution.compile if watch.astray is not None else min(execution.compile, "aot_eager", key=list(BACKENDS).index)
        found = departed(subject, (watch.astray or cases[0]).case, backend)
        if found is not None:
            writer.event("departed", asked=backend, **{**asdict(found), "where": plain(found.where)})


def _one(subject: Subject, execution: Execution, case: ParityCase, watch: _Watch, weights: str | None) -> None:
    watch.offset = watch.count
    writer = watch.writer
    once = (lambda: _gradients(subject, case)) if case.mode == "step" else (lambda: _forward(subject, case))
    run = (lambda: _step(subject, execution, case, weights)) if case.mode == "step" else once
    if watch.options.judged:
        with torch.compiler.set_stance("force_eager") if execution.compile else contextlib.nullcontext():
            _drifts(subject, case, once, writer)
    if execution.compile:
        result = _compiled(subject, execution, case, watch, once)
        if case.mode == "step":
            result |= _stepped(subject, execution, weights)
    else:
        result = _seen(subject, case, watch, once, run)
    if watch.options.judged and case.mode == "forward" and not execution.compile:
        writer.event("noise", case=case.name, sigma=noise(subject, execution, case, result["logits"]))
    for name, tensor in result.items():
        key = f"{case.name}/{name}"
        line: dict[str, Any] = {"case": case.name, "name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype)[6:]}
        line |= {"digest": digest(tensor), "norm": finite_number(tensor.detach().double().norm()), "sample": sample(tensor)}
        writer.event("result", **line, key=key if writer.tensor(key, tensor) else None)


def _seen(subject: Subject, case: ParityCase, watch: _Watch, once: Callable[[], Any], run: Callable[[], Any]) -> dict[str, Tensor]:
    """The results of a run whose every op is looked at; whether its bits come again, from the same state and from where it ends."""
    first, writer = len(watch.digests), watch.writer
    changed: list[str] = []
    before = _digests(subject, once, changed) if watch.options.repeat else []
    with same_start(subject):
        seen = record(
            subject.model, run, before=watch.before, on_event=watch.after, on_call=watch.left, log=False, replace=watch.options.replace
        )
        result: dict[str, Tensor] = seen.result
    unequal = next((i for i, (a, b) in enumerate(zip(before, watch.digests[first:], strict=False)) if a != b), None)
    if unequal is not None:
        read = another_input(subject, once, unequal) if watch.options.replace is None else None
        writer.event("nondeterministic", case=case.name, i=first + unequal, read=read)
    elif changed and remembers(subject, once):
        writer.event("stateful", case=case.name, changed=changed)
    return result


def prepare(subject: Subject, execution: Execution, weights: str | None, *, graphs: list[int] | None = None) -> None:
    """Bring a subject, built in float32 on the CPU, into the execution's dtype, device, attention and compilation; `graphs`
    takes the sizes of what is compiled."""
    model = subject.model
    if weights is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dtype.is_floating_point:
                    parameter.copy_(parameter.to(dtype_named(weights)).to(parameter.dtype))
    if execution.attention is not None:
        set_attention(model, execution.attention)
    if execution.dtype == "float64":
        with contextlib.suppress(Exception):  # the grouped kernel of transformers' experts takes no float64; not every class has another
            model.set_experts_implementation("eager")  # type: ignore[operator]
    cast(model, dtype_named(execution.dtype), device=torch.device(execution.device))
    if execution.compile:
        model.compile(backend=backend_of(execution.compile, [] if graphs is None else graphs))


def _forward(subject: Subject, case: ParityCase) -> dict[str, Tensor]:
    with torch.no_grad():
        if case.mode == "decode":
            return {"logits": _decoded(subject, case)}
        return {"logits": _attended(case, subject.call(case.case).logits)}


def _attended(case: ParityCase, logits: Tensor) -> Tensor:
    """The logits of the positions that the attention mask shows, as one row: at hidden ones nothing is defined."""
    mask = case.case.attention_mask
    if mask is None:
        return logits
    shown = [i for i, seen in enumerate(seen for row in mask for seen in row) if seen]
    return logits.flatten(0, 1)[None, shown]


def _decoded(subject: Subject, case: ParityCase) -> Tensor:
    """Logits of all but the last two tokens at once, then of the last two one by one with the cache."""
    from dataclasses import replace

    rows = case.case.input_ids
    length = case.case.seq_len
    cut = max(1, length - 2)
    parts, cache = [], None
    for start, stop in [(0, cut), *((i, i + 1) for i in range(cut, length))]:
        piece = replace(case.case, input_ids=tuple(row[start:stop] for row in rows), labels=None)
        output = subject.call(piece, cache=cache, use_cache=True)
        cache = output.cache
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


def _gradients(subject: Subject, case: ParityCase) -> dict[str, Tensor]:
    """Loss and backward: loss, logits and every gradient."""
    model = subject.model
    for parameter in model.parameters():
        parameter.grad = None
    output = subject.call(case.case)
    loss = output.loss
    if loss is None:
        labels = torch.tensor(case.case.labels, device=output.logits.device)
        logits, targets = output.logits[:, :-1], labels[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten())
    try:
        loss.backward()
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise SubjectError(
            f"{subject.spec} keeps tensors of an earlier call's graph in eval mode, in which executions are compared; "
            "leave the training step out: --case padded --case long"
        ) from error
    results = {"loss": loss.detach(), "logits": output.logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[f"gradient/{name}"] = parameter.grad
    return results


def _step(subject: Subject, execution: Execution, case: ParityCase, weights: str | None) -> dict[str, Tensor]:
    """Loss, backward and one optimizer step."""
    return _gradients(subject, case) | _stepped(subject, execution, weights)


def _stepped(subject: Subject, execution: Execution, weights: str | None) -> dict[str, Tensor]:
    learning_rule(subject.model, weights or execution.dtype).step()
    return {f"stepped/{name}": parameter.detach() for name, parameter in subject.model.named_parameters()}


def _compiled(subject: Subject, execution: Execution, case: ParityCase, watch: _Watch, once: Callable[[], Any]) -> dict[str, Tensor]:
    """The results of a compiled run, each judged against the uncompiled run; compiled code runs no op that could be seen."""
    writer = watch.writer
    reference = uncompiled(subject.model, once)
    known = len(watch.graphs)
    first: dict[str, Tensor] = {name: t.detach().clone() for name, t in once().items()}
    writer.event(
        "graphs",
        case=case.name,
        operations=watch.graphs[known:],
        unbounded=reference.unbounded,
        choices=reference.choices,
        unstable=reference.unstable,
    )
    for turn, results in enumerate((first, once())):
        for name, found in judged(reference, results):
            kind, _, parameter = name.partition("/")
            line = {"case": case.name, "what": kind, "name": parameter, "turn": turn} | judgement_fields(found)
            writer.event("whole", **line)
            if found.verdict == "diverged" and watch.astray is None:
                watch.astray = case
    if case.mode == "forward":
        sigma = reference.variances["logits"].mean(-1).sqrt().flatten().tolist()
        writer.event("noise", case=case.name, sigma=[finite_number(v) for v in sigma])
    return first


def noise(subject: Subject, execution: Execution, case: ParityCase, logits: Tensor) -> list[float | str]:
    """How much one more rounding at every op moves the logits, as a root mean square for each position, over NOISE_RUNS runs.

    Every result of arithmetic is moved by up to one unit roundoff, at random.
    """
    unit = ROUNDOFF[dtype_named(execution.dtype)]
    total = torch.zeros(logits.shape[:2], dtype=torch.float64)
    for seed in range(NOISE_RUNS):
        generator = torch.Generator().manual_seed(seed)
        fresh: list[bool] = []

        def before(event: Event, func: Any, args: Any, kwargs: Any, fresh: list[bool] = fresh) -> None:
            fresh.append(is_arithmetic(func))

        def shake(index: int, outputs: list[Tensor], fresh: list[bool] = fresh, generator: torch.Generator = generator) -> None:
            if not fresh[-1]:
                return
            for output in outputs:
                if output.is_floating_point():
                    move = (2 * torch.rand(output.shape, generator=generator) - 1) * unit
                    output.mul_(1 + move.to(output.device))

        with same_start(subject):
            moved = record(subject.model, lambda: _forward(subject, case), before=before, replace=shake, log=False).result["logits"]
        total += (moved.double() - logits.double()).square().mean(-1).cpu()
    return [finite_number(v) for v in (total / NOISE_RUNS).sqrt().flatten().tolist()]


def _drifts(subject: Subject, case: ParityCase, run: Callable[[], Any], writer: Writer) -> None:
    """How far the results drift when what the embedding gives is rounded once more, over NOISE_RUNS runs: what is ordinary."""
    with same_start(subject):
        samples = {name: sample(tensor) for name, tensor in run().items()}
    known: dict[str, list[float | str | None]] = {name: [] for name in samples}
    for seed in range(NOISE_RUNS):
        generator = torch.Generator().manual_seed(100 + seed)
        fresh: list[bool] = []

        def before(event: Event, func: Any, args: Any, kwargs: Any, fresh: list[bool] = fresh) -> None:
            fresh.append(op_name(func) == "embedding")

        def shake(index: int, outputs: list[Tensor], fresh: list[bool] = fresh, generator: torch.Generator = generator) -> None:
            if fresh[-1] and sum(fresh) == 1:
                fresh.append(True)
                move = (2 * torch.rand(outputs[0].shape, generator=generator) - 1) * ROUNDOFF[outputs[0].dtype]
                outputs[0].mul_(1 + move.to(outputs[0].device))

        with same_start(subject):
            moved = record(subject.model, run, before=before, replace=shake, log=False).result
        for name, tensor in moved.items():
            known[name].append(drift(samples[name], sample(tensor)))
    for name, values in known.items():
        writer.event("drift", case=case.name, name=name, values=values)


def _digests(subject: Subject, run: Callable[[], Any], changed: list[str]) -> list[int]:
    """Checksums of every op's outputs, of a run that nobody judges; `changed` takes the names of what it changes in the model."""
    seen: list[int] = []

    def note(moment: Moment) -> None:
        if not moment.event.op.startswith("_record_function"):
            seen.append(bits(moment))

    with same_start(subject, changed):
        record(subject.model, run, on_event=note, log=False)
    return seen


def bits(moment: Moment) -> int:
    """A checksum of what an op's outputs hold that is defined.

    Memory that was only asked for holds what was there before; so do fused attention's padded row sums, the seed that nothing
    drew from, and rows that see no key.
    """
    outputs = [] if moment.event.op.rstrip("_") in UNWRITTEN else moment.outputs
    if moment.event.op in ATTENTION and outputs:
        bias = moment.arguments.get("attn_bias", moment.arguments.get("attn_mask"))
        outputs = outputs[:1]
        if isinstance(bias, Tensor) and bias.is_floating_point():
            blind = torch.isneginf(bias).all(-1, keepdim=True)
            outputs = [outputs[0].masked_fill(blind, 0.0)]
    return hash(tuple(digest(t) for t in outputs))


# What an event says of its op


def place(event: Event) -> dict[str, Any]:
    where = event.where
    return {
        "op": event.op,
        "module": where.module,
        "function": where.function,
        "file": where.file,
        "line": where.line,
        "phase": event.phase,
    }


def described(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of an op as JSON: shapes of tensors, the numbers of small integer tensors, everything else as it is."""
    schema = func._schema
    named = [(spec.name, value) for spec, value in zip(schema.arguments, args, strict=False)] + list(kwargs.items())
    return [{"name": name, **_described(value)} for name, value in named] + [{"name": "", "op": op_name(func), "overload": str(func)}]


def _described(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        known: dict[str, Any] = {"shape": list(value.shape), "dtype": str(value.dtype)[6:]}
        integers = value.dtype in (torch.int64, torch.int32) and value.device.type != "meta"
        if integers and 0 < value.numel() <= JOURNALLED_INTEGERS:
            known["values"] = value.detach().flatten().tolist()
        return known
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        return {"items": [_described(item) for item in value]}
    return {"value": plain_argument(value)}


def plain_argument(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain_argument(item) for item in value]
    return str(value)


def scalars(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are no tensors: eps, scale, dtype, is_causal."""
    return {name: plain_argument(v) for name, v in arguments.items() if not any(isinstance(t, Tensor) for t in tree_leaves(v))}


def judgement_fields(found: Judgement) -> dict[str, Any]:
    """A judgement as JSON; what is right says little."""
    values: dict[str, Any] = {"verdict": found.verdict, "margin": finite_number(found.margin)}
    if found.roundoff is not None:
        values["roundoff"] = finite_number(found.roundoff)
    if not found.derived:
        values["derived"] = False
    if found.reason and found.verdict in ("unverified", "range", "diverged"):
        values["reason"] = found.reason
    if found.policy:
        values["policy"] = found.policy
    if found.verdict in ("diverged", "range", "explained"):
        values |= {name: finite_number(getattr(found, name)) for name in ("observed", "exact", "limit")}
        values |= {"index": list(found.index), "mismatched": found.mismatched, "total": found.total, "output": found.output}
    return values


def finite_number(value: Any) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)


def sample(tensor: Tensor) -> list[float | str]:
    """A few elements at fixed places, to measure drift where the whole tensor was not kept."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() > PROJECTED:
        generator = torch.Generator().manual_seed(flat.numel())
        flat = flat[torch.randint(flat.numel(), (PROJECTED,), generator=generator).to(flat.device)]
    return [finite_number(v) for v in flat.double().tolist()]


def _as(parameter: Tensor, weights: str | None) -> Tensor:
    return parameter.detach() if weights is None else parameter.detach().to(dtype_named(weights))


__all__ = ["Options", "described", "prepare", "run_parity", "scalars"]
