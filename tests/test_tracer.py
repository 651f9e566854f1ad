"""The tracer: it changes no bit, leaves nothing behind, and says truly what ran where."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from olmodebug.model import Olmo
from olmodebug.presets import preset
from olmodebug.records import Event
from olmodebug.tracer import record

HERE = Path(__file__)


def line_of(tag: str) -> int:
    """The line of this file that ends in `# <- tag`."""
    lines = HERE.read_text(encoding="utf-8").splitlines()
    return next(number for number, text in enumerate(lines, start=1) if text.endswith(f"# <- {tag}"))


def helper(hidden: Tensor) -> Tensor:
    return hidden.tanh()  # <- helper


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, hidden: Tensor, fail: bool = False) -> Tensor:
        hidden = self.proj(hidden)  # <- proj
        hidden = helper(hidden)
        if fail:
            hidden = hidden @ hidden.new_zeros(7, 2)  # <- failing
        return F.softmax(hidden, dim=-1)  # <- softmax


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, ids: Tensor, fail: bool = False) -> Tensor:
        hidden = self.embed(ids)  # <- embed
        flat = hidden.view(-1, 6)  # <- view
        flat.mul_(2.0)  # <- in-place
        for block in self.blocks:
            hidden = hidden + block(hidden, fail)  # <- residual
        return hidden


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


IDS = torch.tensor([[1, 2, 3], [4, 5, 8]])


def hooks_of(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def event(events: list[Event], op: str, line: int | None = None, phase: str = "forward") -> Event:
    return next(e for e in events if e.op == op and e.phase == phase and line in (None, e.where.line))


# No bit changes


def reference() -> nn.Module:
    return Olmo(preset("olmo3-tiny"), generator=torch.Generator().manual_seed(0))


def llama() -> nn.Module:
    from olmodebug.tiny import build_tiny

    return build_tiny("LlamaForCausalLM")[0]


def gpt2() -> nn.Module:
    from olmodebug.tiny import build_tiny

    return build_tiny("GPT2LMHeadModel")[0]


@pytest.mark.parametrize("build", [reference, llama, gpt2])
@pytest.mark.parametrize("keep", [False, True])
def test_traced_equals_untraced_bit_for_bit_forward_and_backward(build: Callable[[], nn.Module], keep: bool) -> None:
    ids = torch.randint(10, 40, (3, 11), generator=torch.Generator().manual_seed(1))
    runs = []
    for traced in (False, True):
        model = build().train()

        def run(model: nn.Module = model) -> Any:
            torch.manual_seed(5)  # dropout
            out = model(ids, labels=ids)
            out.loss.backward()
            return out

        out = record(model, run, keep=keep, statistics=keep).result if traced else run()
        runs.append((out.logits, out.loss, {name: p.grad for name, p in model.named_parameters()}))
    (logits, loss, grads), (traced_logits, traced_loss, traced_grads) = runs
    assert torch.equal(logits, traced_logits)
    assert torch.equal(loss, traced_loss)
    assert grads.keys() == traced_grads.keys()
    assert sum(grad is not None for grad in grads.values()) > 10
    for name, grad in grads.items():
        other = traced_grads[name]
        assert (grad is None and other is None) or torch.equal(grad, other), name


# Nothing is left behind


def test_no_hook_and_no_mode_is_left_after_a_run(toy: Toy) -> None:
    recording = record(toy, lambda: toy(IDS).sum().backward(), keep=True)
    count = len(recording)
    assert (hooks_of(toy), _get_current_dispatch_mode_stack()) == (0, [])
    toy(IDS)
    assert len(recording) == count, "the recording grows after its run"


@pytest.mark.parametrize("catch", [False, True])
def test_no_hook_and_no_mode_is_left_after_an_exception_in_the_middle_of_forward(toy: Toy, catch: bool) -> None:
    if catch:
        recording = record(toy, lambda: toy(IDS, fail=True), catch=True)
        assert isinstance(recording.error, RuntimeError)
    else:
        with pytest.raises(RuntimeError):
            record(toy, lambda: toy(IDS, fail=True))
    assert (hooks_of(toy), _get_current_dispatch_mode_stack()) == (0, [])
    assert torch.is_grad_enabled()


def test_not_even_an_interruption_leaves_a_hook(toy: Toy) -> None:
    def interrupt() -> None:
        toy(IDS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(toy, interrupt, catch=True)
    assert (hooks_of(toy), _get_current_dispatch_mode_stack()) == (0, [])


def test_the_users_own_hooks_stay_and_run_once(toy: Toy) -> None:
    calls: list[str] = []
    handle = toy.blocks[0].register_forward_hook(lambda *_: calls.append("called"))
    record(toy, lambda: toy(IDS))
    assert (hooks_of(toy), calls) == (1, ["called"])
    handle.remove()


# What ran where


def test_an_op_names_its_module_function_file_and_line(toy: Toy) -> None:
    events = record(toy, lambda: toy(IDS)).events
    softmax = event(events, "_softmax")
    assert (softmax.where.module, softmax.where.function, softmax.where.line) == ("blocks.0", "Block.forward", line_of("softmax"))
    assert softmax.where.file is not None
    assert Path(softmax.where.file).resolve() == HERE.resolve()
    embedding = event(events, "embedding")
    assert (embedding.where.module, embedding.where.function, embedding.where.line) == ("embed", "Toy.forward", line_of("embed"))
    residual = event(events, "add", line_of("residual"))
    assert (residual.where.module, residual.where.function) == ("", "Toy.forward")


def test_an_op_in_a_plain_helper_is_placed_in_the_helper(toy: Toy) -> None:
    tanh = event(record(toy, lambda: toy(IDS)).events, "tanh")
    assert (tanh.where.module, tanh.where.function, tanh.where.line) == ("blocks.0", "helper", line_of("helper"))


def test_torchs_internals_are_never_the_place(toy: Toy) -> None:
    recording = record(toy, lambda: toy(IDS).sum().backward())
    inside = str(Path(nn.__file__).parents[1])
    assert all(e.where.file is None or not str(Path(e.where.file).resolve()).startswith(inside) for e in recording)
    addmm = event(recording.events, "addmm")
    assert (addmm.where.module, addmm.where.line) == ("blocks.0.proj", line_of("proj")), "the caller's line, not F.linear's"
    assert addmm.parameters == ("blocks.0.proj.bias", "blocks.0.proj.weight") or "blocks.0.proj.bias" in addmm.parameters


def test_a_transformers_model_is_placed_in_its_own_file() -> None:
    model = llama()
    ids = torch.randint(10, 40, (2, 5))
    with torch.no_grad():
        events = record(model, lambda: model(ids, use_cache=False)).events
    placed = [e for e in events if e.where.module.startswith("model.layers.0.self_attn")]
    assert placed
    assert {Path(str(e.where.file)).name for e in placed} == {"modeling_llama.py"}
    source = inspect.getsource(type(model.model.layers[0].self_attn).forward)  # type: ignore[union-attr,index]
    first = inspect.getsourcelines(type(model.model.layers[0].self_attn).forward)[1]  # type: ignore[union-attr,index]
    ours = [e for e in placed if e.where.function == "LlamaAttention.forward"]
    assert ours
    assert all(first <= int(e.where.line or 0) < first + source.count("\n") for e in ours)


def test_backward_ops_carry_module_and_line_of_their_forward_op(toy: Toy) -> None:
    recording = record(toy, lambda: toy(IDS).square().sum().backward())
    softmax = event(recording.events, "_softmax_backward_data", phase="backward")
    assert (softmax.where.module, softmax.where.function, softmax.where.line) == ("blocks.1", "Block.forward", line_of("softmax"))
    tanh = event(recording.events, "tanh_backward", phase="backward")
    assert (tanh.where.module, tanh.where.line) == ("blocks.1", line_of("helper"))
    products = [e for e in recording if e.op == "mm" and e.phase == "backward"]
    assert [e.where.module for e in products] == ["blocks.1.proj"] * 2 + ["blocks.0.proj"] * 2
    assert {e.where.line for e in products} == {line_of("proj")}
    embedding = event(recording.events, "embedding_dense_backward", phase="backward")
    assert (embedding.where.module, embedding.where.line) == ("embed", line_of("embed"))


def test_in_place_ops_are_snapshotted_before_they_write(toy: Toy) -> None:
    with torch.no_grad():
        recording = record(toy, lambda: toy(IDS), keep=True)
        plain = toy.embed(IDS).view(-1, 6)
    index = event(recording.events, "mul_").index
    assert torch.equal(recording.kept[index].inputs[0], plain)
    assert torch.equal(recording.kept[index].arguments["self"], plain)
    assert torch.equal(recording.kept[index].outputs[0], plain * 2)
    view = event(recording.events, "view", line_of("view")).index
    assert torch.equal(recording.kept[view].outputs[0], plain), "what an earlier op gave is not changed by a later write"


def test_views_share_their_storage_and_copies_do_not() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            turned = x.view(3, 2).transpose(0, 1)
            return turned.clone()

    x = torch.arange(6.0)
    model = Views()
    events = record(model, lambda: model(x)).events
    view, transpose, clone = (event(events, name) for name in ("view", "transpose", "clone"))
    assert view.inputs[0].storage == view.outputs[0].storage == transpose.outputs[0].storage != 0
    assert (transpose.outputs[0].shape, transpose.outputs[0].strides) == ((2, 3), (1, 2))
    assert clone.outputs[0].storage not in (0, view.outputs[0].storage)


def test_the_op_that_raises_is_kept_with_its_place_and_arguments(toy: Toy) -> None:
    for keep in (False, True):
        recording = record(toy, lambda: toy(IDS, fail=True), keep=keep, catch=True)
        failed = recording.failed
        assert failed is not None
        assert (failed.where.module, failed.where.function, failed.where.line) == ("blocks.0", "Block.forward", line_of("failing"))
        assert [info.shape for info in failed.inputs] == [(6, 6), (7, 2)]
        assert recording.failed_arguments is not None
        assert [t.shape for t in recording.failed_arguments.values()] == [(6, 6), (7, 2)]
        assert recording.result is None


def test_after_a_good_run_no_op_has_failed(toy: Toy) -> None:
    recording = record(toy, lambda: toy(IDS), keep=True)
    assert (recording.failed, recording.failed_arguments, recording.error) == (None, None, None)
    assert len(recording.events) == len(recording.spots) == len(recording.kept) == len(recording)
    assert [e.index for e in recording] == list(range(len(recording)))


def test_module_calls_are_nested_and_in_order_of_their_end(toy: Toy) -> None:
    recording = record(toy, lambda: toy(IDS), keep=True)
    names = [call.module for call in recording.calls]
    assert names == ["embed", "blocks.0.proj", "blocks.0", "blocks.1.proj", "blocks.1", ""]
    calls = {call.module: call for call in recording.calls}
    assert [calls[name].depth for name in ("", "blocks.0", "blocks.0.proj")] == [0, 1, 2]
    outer, inner = calls["blocks.0"], calls["blocks.0.proj"]
    assert outer.first_event <= inner.first_event <= inner.last_event < outer.last_event
    assert {recording.events[i].where.module for i in range(inner.first_event, inner.last_event + 1)} == {"blocks.0.proj"}
    assert (inner.kind, inner.inputs[0].shape, inner.outputs[0].shape) == ("Linear", (2, 3, 6), (2, 3, 6))


def test_statistics_tell_finiteness_and_magnitude() -> None:
    class Overflows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2.0).log()

    model = Overflows()
    events = record(model, lambda: model(torch.tensor([0.0, -3.0])), statistics=True).events
    mul, log = event(events, "mul").outputs[0], event(events, "log").outputs[0]
    assert (mul.finite, mul.absmax) == (True, 6.0)
    assert log.finite is False


def test_dtypes_lists_every_floating_dtype_that_an_op_wrote() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.float() * 2).to(x.dtype).argmax() + x.sum().bfloat16()

    model = Casts()
    recording = record(model, lambda: model(torch.ones(3, dtype=torch.float64)))
    assert recording.dtypes() == {"float64", "float32", "bfloat16"}


@pytest.fixture
def grad_off() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_replaced_outputs_reach_what_comes_after(toy: Toy, grad_off: None) -> None:
    wanted = event(record(toy, lambda: toy(IDS)).events, "embedding").index

    def silence(index: int, outputs: list[Tensor]) -> None:
        if index == wanted:
            outputs[0].zero_()

    replaced = record(toy, lambda: toy(IDS), replace=silence).result
    toy.embed.weight.zero_()
    assert torch.equal(replaced, toy(IDS))


def test_a_module_called_again_in_a_recursion_keeps_its_path() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor, depth: int = 1) -> Tensor:
            x = self.inner(x)
            return self(x, depth - 1) if depth else x

    model = Twice()
    recording = record(model, lambda: model(torch.ones(1, 2)))
    assert [(c.module, c.depth) for c in recording.calls] == [("inner", 1), ("inner", 2), ("", 1), ("", 0)]
