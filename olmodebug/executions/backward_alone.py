"""A script that shows the backward of one module, without olmodebug: its forward as plain ops, which autograd derives anew."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx  # what torch's own tools trace a function to aten ops with; there is no other way
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..own_code import quiet
from ..settle import settled
from .alone import HEAD, write_script

APART = 1e-3  # of the largest gradient: a cut or wrong derivative is off by its own size
STEP = 2.0**-8  # of a random direction as large as the tensor: the quotient errs by its square, and by what float32 inside leaves over it
MOST_OPS = 120  # more of them show nobody anything: they go into a file of their own
CUTS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
SCRIPT = """inf, nan, device = float("inf"), float("nan"), torch.device

{function}

inputs = {{name: tensors[name].requires_grad_() for name in {keys}}}
gradients = torch.autograd.grad(forward(*inputs.values()), list(inputs.values()), {upstream}, allow_unused=True)
for name, gradient in zip(inputs, gradients):
    wanted = torch.zeros_like(inputs[name]) if gradient is None else gradient
    print(name, "largest difference", float((tensors["gradient/" + name] - wanted).abs().max()), "of", float(wanted.abs().max()))
"""

Function = Callable[..., list[Tensor]]


def script_of_backward(module: nn.Module, name: str, arguments: Any, folder: Path | None) -> str | None:
    """Write the script for one call of a module, `arguments` being (args, kwargs); its path.

    None where the module's gradients are those that autograd gives the same ops, or where they can't be shown to be wrong:
    a difference quotient has to side with autograd.
    """
    if folder is None:
        return None
    forward, inputs = _as_function(module, arguments)
    leaves = [t.requires_grad_() for t in inputs.values()]
    try:
        with settled(module, seed=0), torch.enable_grad(), quiet():
            outputs = forward(*leaves)
            flowing = [i for i, t in enumerate(outputs) if t.requires_grad] or list(range(len(outputs)))
            upstream = [torch.randn(outputs[i].shape, generator=torch.Generator().manual_seed(i)).to(outputs[i]) for i in flowing]
            observed = _gradients(outputs, flowing, leaves, upstream)
            traced = _without_cuts(make_fx(lambda *t: [forward(*t)[i] for i in flowing])(*leaves))
            expected = _gradients(traced(*leaves), range(len(flowing)), leaves, upstream)
            if not _apart(observed, expected) or not _sides_with(expected, observed, forward, leaves, flowing, upstream):
                return None
        return _written(traced, f"{name or 'the model'}, the gradients that it gave", inputs, upstream, observed, folder)
    except Exception:  # a module that runs in its place only, or whose ops can't be told without its numbers
        return None


def _as_function(module: nn.Module, arguments: Any) -> tuple[Function, dict[str, Tensor]]:
    """A module's call as a function of its floating inputs and its parameters, and these, copied, by name."""
    leaves, spec = tree_flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    parameters = dict(module.named_parameters())

    def forward(*tensors: Tensor) -> list[Tensor]:
        moved = list(leaves)
        for i, tensor in zip(places, tensors, strict=False):
            moved[i] = tensor
        args, kwargs = tree_unflatten(moved, spec)
        outputs = functional_call(module, dict(zip(parameters, tensors[len(places) :], strict=True)), args, kwargs)
        return [t for t in tree_flatten(outputs)[0] if isinstance(t, Tensor) and t.is_floating_point()]

    inputs = {f"input {number}": leaves[i] for number, i in enumerate(places)} | parameters
    return forward, {name: t.detach().clone() for name, t in inputs.items()}


def _gradients(outputs: Sequence[Tensor], flowing: Sequence[int], leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """The gradient of every leaf; zeros where none flows."""
    pairs = [(outputs[i], g) for i, g in zip(flowing, upstream, strict=True) if outputs[i].requires_grad]
    given = torch.autograd.grad([t for t, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True) if pairs else [None] * len(leaves)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(given, leaves, strict=True)]


def _without_cuts(traced: fx.GraphModule) -> fx.GraphModule:
    """The same ops where nothing stops a gradient."""
    for node in list(traced.graph.nodes):
        if node.target in CUTS:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _apart(observed: list[Tensor], expected: list[Tensor]) -> bool:
    largest = max((float(t.abs().max()) for t in (*observed, *expected) if t.numel()), default=0.0)
    return any(a.numel() and float((a - b).abs().max()) > APART * largest for a, b in zip(observed, expected, strict=True))


def _sides_with(
    expected: list[Tensor], observed: list[Tensor], forward: Function, leaves: list[Tensor], flowing: list[int], upstream: list[Tensor]
) -> bool:
    """Whether a difference quotient along a random direction is ten times as near to the expected gradients: a forward without
    a derivative, such as a quantizer's, is no witness."""
    generator = torch.Generator().manual_seed(1)
    directions = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64) * (float(t.detach().std(correction=0)) or 1.0) for t in leaves
    ]

    def value(step: float) -> float:
        with torch.no_grad():
            outputs = forward(*(t + step * d for t, d in zip(leaves, directions, strict=True)))
        return sum(float((outputs[i].double() * g).sum()) for i, g in zip(flowing, upstream, strict=True))

    quotient = (value(STEP) - value(-STEP)) / (2 * STEP)
    along = [sum(float((g.double() * d).sum()) for g, d in zip(given, directions, strict=True)) for given in (expected, observed)]
    return 10 * abs(quotient - along[0]) < abs(quotient - along[1])


def _written(
    traced: fx.GraphModule, title: str, inputs: dict[str, Tensor], upstream: list[Tensor], observed: list[Tensor], folder: Path
) -> str | None:
    names = [node.name for node in traced.graph.nodes if node.op == "placeholder"]
    constants = [node.target for node in traced.graph.nodes if node.op == "get_attr"]
    source = traced.graph.python_code("self").src
    body = [re.sub(r";  .* = None$", "", line) for line in source.partition(":\n")[2].splitlines() if line.strip()]
    function = "\n".join([f"def forward({', '.join(names)}):", *(re.sub(r"\bself\.(\w+)", r'tensors["\1"]', line) for line in body)])
    name = f"backward-{title.partition(',')[0].replace(' ', '-')}"
    beside = {}
    if len(body) > MOST_OPS:
        beside = {f"{name}.ops.py": f"{function}\n"}
        function = f'exec(open(__file__.removesuffix("py") + "ops.py").read())  # forward(...), {len(body)} lines'
    text = HEAD.format(title=f"{title}, against autograd of the same ops") + SCRIPT.format(
        function=function,
        keys=list(inputs),
        upstream="[" + ", ".join(f'tensors["upstream/{i}"]' for i in range(len(upstream))) + "]",
    )
    tensors = {name: t.detach().clone().contiguous() for name, t in inputs.items()}
    tensors |= {f"upstream/{i}": t.contiguous() for i, t in enumerate(upstream)}
    tensors |= {f"gradient/{name}": t.contiguous() for name, t in zip(inputs, observed, strict=True)}
    tensors |= {name: getattr(traced, name).detach().clone().contiguous() for name in constants}
    return write_script(folder, name, text, tensors, beside)
