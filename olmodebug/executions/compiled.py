"""A compiled run held against the same run uncompiled: logits, loss and every gradient, each as a whole.

Compiled code runs no op that could be seen, so its ops are not judged one by one. What it gives must be what other legal
roundings of the uncompiled run give: every op of that run is moved at random by as much as its derived bound allows, a few
times over, and the spread of the results is the standard deviation that a result of the compiled run is held against.
A small model is compiled once more in float64, where no rounding is left to explain anything: what capturing the code and
making it functional change shows there however small it is, by the mildest backend that still shows it, and module by module
on the inputs of the uncompiled run. The code generator itself is asked in float64 only where a result lies outside.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..compare import difference, roundings_limit
from ..explain import place_of
from ..own_code import quiet
from ..records import Case, Event, Where
from ..settle import settled
from ..sources import Spot, code_of
from ..subject import Subject
from ..tracing.tracer import record
from .bound import LAMBDA, ROUNDOFF, SMALLEST, deviation
from .judge import Judgement, agree
from .lift import Calls, calls_of, gradients
from .replay import Expected, expect, op_name

SAMPLES = 4  # of the uncompiled run with its roundings moved; a row of a result is pooled, so few are enough
CHOICES = ("topk", "sort", "argmax", "argmin", "multinomial", "bucketize", "searchsorted")  # a rounding may turn them
BACKENDS = {
    "eager": "as soon as its Python code is captured (backend eager): compiling takes another branch, or a value that Python keeps is frozen",
    "aot_eager": "when the captured graph is made functional (backend aot_eager): an op does not do what it declares, about mutation, aliasing or its fake result",
    "inductor": "only in the code that inductor generates; the graph that it generates it from is right",
}

Run = Callable[[], dict[str, Tensor]]


@dataclass(slots=True, kw_only=True)
class Uncompiled:
    """What the uncompiled run gave, by how much its legal roundings move that, and which of its ops have no bound."""

    results: dict[str, Tensor]
    variances: dict[str, Tensor]
    unbounded: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    unstable: bool = False  # it gives other bits when it is repeated

    def allowed(self, name: str, dtype: torch.dtype) -> Tensor:
        """The largest legal distance of each element of a result from that of another legal run."""
        variance = self.variances[name]
        if variance.ndim:
            variance = torch.maximum(variance, variance.mean(-1, keepdim=True))  # a row's elements have like roundings
        size = self.results[name].to("cpu", torch.float64).abs()
        return LAMBDA * math.sqrt(2) * variance.sqrt() + ROUNDOFF[dtype] * size + SMALLEST[dtype]


def uncompiled(model: nn.Module, run: Run) -> Uncompiled:
    """Run a compiled model without its compilation, once as it is and SAMPLES times with the roundings of every op moved."""
    with torch.compiler.set_stance("force_eager"):
        results = {name: t.detach().clone() for name, t in run().items()}
        found = Uncompiled(results=results, variances={n: torch.zeros(t.shape, dtype=torch.float64) for n, t in results.items()})
        found.unstable = any(not torch.equal(t, results[name]) for name, t in run().items())
        for seed in range(SAMPLES):
            for name, moved in _moved(model, run, seed, found).items():
                away = (moved.detach() - results[name]).to("cpu", torch.float64)
                found.variances[name] += away.square().nan_to_num(0.0, 0.0, 0.0) / SAMPLES
    return found


def _moved(model: nn.Module, run: Run, seed: int, found: Uncompiled) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    current: list[Expected] = []

    def before(event: Event, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        current[:] = [expect(func, args, kwargs)]
        name = op_name(func)
        if seed == 0 and current[0].unverified and name not in found.unbounded:
            found.unbounded.append(name)
        if seed == 0 and name in CHOICES and name not in found.choices:
            found.choices.append(name)

    def shake(_: int, outputs: list[Tensor]) -> None:
        expected = current[0]
        if expected.unverified:  # at least its results were written once
            sizes: list[Tensor | None] = [t.double().abs() * ROUNDOFF[t.dtype] if t.dtype in ROUNDOFF else None for t in outputs]
        else:
            sizes = [
                deviation(exact, output.dtype, expected.compute) if exact is not None and output.dtype in ROUNDOFF else None
                for exact, output in zip(expected.outputs, outputs, strict=False)
            ]
        for size, output in zip(sizes, outputs, strict=False):
            if size is None or tuple(size.shape) != tuple(output.shape) or not output.dtype.is_floating_point:
                continue
            noise = torch.randn(output.shape, generator=generator, dtype=torch.float64) * size.to("cpu").nan_to_num(0.0, 0.0, 0.0)
            output.add_(noise.to(output.device, output.dtype) if output.dtype != torch.float64 else noise.to(output.device))

    moved: dict[str, Tensor] = record(model, run, before=before, replace=shake, log=False).result
    return moved


def judged(reference: Uncompiled, results: Mapping[str, Tensor]) -> Iterator[tuple[str, Judgement]]:
    """The judgement on every result of a compiled run; one that is there on one side only has diverged."""
    for name in sorted(reference.results.keys() | results.keys(), key=list({**results, **reference.results}).index):
        ours, theirs = reference.results.get(name), results.get(name)
        if ours is None or theirs is None:
            yield (
                name,
                Judgement(verdict="diverged", margin=math.inf, reason="there " + ("compiled" if ours is None else "uncompiled") + " only"),
            )
            continue
        if torch.equal(ours, theirs):
            yield name, Judgement(verdict="exact", total=ours.numel())
            continue
        yield name, agree(ours, theirs, reference.allowed(name, theirs.dtype) if ours.shape == theirs.shape else 0.0)


def backend_of(name: str, graphs: list[int]) -> Callable[..., Any]:
    """A backend that also counts: the number of operations of every graph that it compiles."""
    from torch._dynamo import lookup_backend  # how torch's guide to custom backends wraps one that it has

    inner = lookup_backend(name)

    def backend(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(sum(node.op.startswith("call_") for node in graph.graph.nodes))
        return inner(graph, inputs, **options)

    return backend


# Where a compiled run departs, in float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Departed:
    """What compiling in float64 says: by which backend the difference is there first (None: it is gone), and where."""

    backend: str | None
    module: str = ""
    where: Where = field(default_factory=Where)
    what: str = ""


def departed(subject: Subject, case: Case, backend: str) -> Departed | None:
    """Compile a float64 copy of a subject with ever more of the compiler, and name the first backend and the innermost
    module whose compiled results differ on the inputs of the uncompiled run; None where it does not run in float64."""
    twin = subject.fresh_twin()
    model = twin.model
    if twin.dtype != torch.float64:
        return None
    names = list(BACKENDS)
    with settled(model, seed=subject.seed), quiet():
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            calls = calls_of(twin, case)
            limit = roundings_limit(record(model, lambda: twin.call(case)).dtypes())
        for name in names[: names.index(backend) + 1]:
            what = _differs(model, calls[("", 0)].arguments, name, limit)
            if what is not None:
                module = _innermost(model, calls, name, limit)
                what = _differs(model.get_submodule(module), calls[(module, 0)].arguments, name, limit) or what
                return Departed(backend=name, module=module, where=_where(model.get_submodule(module), module), what=what)
    return Departed(backend=None)


def _innermost(model: nn.Module, calls: Calls, backend: str, limit: float) -> str:
    """Down from the model, always into the first child that differs when it is compiled alone."""
    current = ""
    while True:
        inside = [name for name, number in calls if number == 0 and name.startswith(f"{current}." if current else "") and name != current]
        children = [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]
        wrong = next((name for name in children if _differs(model.get_submodule(name), calls[(name, 0)].arguments, backend, limit)), None)
        if wrong is None:
            return current
        current = wrong


def _differs(module: nn.Module, arguments: Any, backend: str, limit: float) -> str | None:
    """Which result of a module differs when it is compiled, called twice; None where all agree or it does not run alone."""
    with torch.compiler.set_stance("force_eager"):
        plain, again = _results(module, arguments), _results(module, arguments)
    if plain is None or again is None or any(not torch.equal(t, again[name]) for name, t in plain.items()):
        return None
    torch.compiler.reset()  # another backend must not find the code of the last one
    before = module._compiled_call_impl  # Module.compile has no public way back
    try:
        module.compile(backend=backend)
        for turn in ("", " when it is called again"):
            compiled = _results(module, arguments)
            if compiled is None:  # in the execution's own dtype it runs: float64 is our question, not the user's
                return None
            for name, tensor in plain.items():
                gap = difference(tensor, compiled[name], relative_limit=limit) if name in compiled else None
                if gap is not None or name not in compiled:
                    return f"{name} is off by {gap.max_abs:.3g} of {gap.scale:.3g}{turn}" if gap else f"{name} is missing{turn}"
    finally:
        module._compiled_call_impl = before
    return None


def _results(module: nn.Module, arguments: Any) -> dict[str, Tensor] | None:
    """Outputs and gradients of a module on copies of its arguments; None where it does not run alone."""
    from torch.utils._pytree import tree_map

    args, kwargs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, arguments)
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    try:
        with torch.no_grad():
            outputs = [t for t in _tensors(module(*args, **kwargs)) if t.is_floating_point()]
    except Exception:  # a module that runs in its place only proves nothing alone
        return None
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
    found = {f"output {i}" if len(outputs) > 1 else "its output": t.clone() for i, t in enumerate(outputs)}
    return found | {f"the gradient of {name}": g for name, g in (gradients(module, arguments) or {}).items()}


def _tensors(output: Any) -> list[Tensor]:
    leaves = tree_leaves(output)
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    for leaf in leaves:  # an output object that torch does not know as a tree
        if not isinstance(leaf, Tensor | nn.Module | type) and hasattr(leaf, "__dict__"):
            found += [value for value in vars(leaf).values() if isinstance(value, Tensor)]
    return found


def _where(module: nn.Module, name: str) -> Where:
    code = code_of(type(module).forward)
    return Where(module=name) if code is None else place_of(Spot(code, 0, code.co_firstlineno), module=name)


def compiler_of(environment: Mapping[str, str]) -> str | None:
    """The C++ compiler that inductor would call on the CPU: `CXX`, else g++ or clang++; None where there is none."""
    from shutil import which

    names = [environment["CXX"]] if environment.get("CXX") else ["g++", "clang++"]
    return next((found for name in names if (found := which(name)) and Path(found).is_file()), None)
