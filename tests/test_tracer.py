"""The tracer: it changes no bit, leaves nothing behind, and says truly what ran where."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from olmodebug.model import Olmo
from olmodebug.presets import preset
from olmodebug.records import Event
from olmodebug.tracing.tracer import Moment, record

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


# Streams: nothing is kept, everything is seen


def test_a_consumer_sees_every_op_with_its_live_tensors_and_nothing_is_kept(toy: Toy, grad_off: None) -> None:
    seen: list[tuple[int, str, list[Tensor]]] = []
    ends: list[str] = []
    wanted = record(toy, lambda: toy(IDS), keep=True)

    def look(moment: Moment) -> None:
        assert moment.event.outputs[0].shape == moment.outputs[0].shape
        seen.append((moment.event.index, moment.event.op, [t.clone() for t in moment.outputs]))

    recording = record(toy, lambda: toy(IDS), on_event=look, on_call=lambda call, outputs: ends.append(call.module), log=False)
    assert (recording.events, recording.calls, recording.kept, recording.spots) == ([], [], [], [])
    assert [(index, op) for index, op, _ in seen] == [(e.index, e.op) for e in wanted]
    assert all(
        torch.equal(a, b) for (_, _, outs), kept in zip(seen, wanted.kept, strict=True) for a, b in zip(outs, kept.outputs, strict=True)
    )
    assert ends == [call.module for call in wanted.calls]


def test_a_consumer_gets_what_stood_there_before_an_op_wrote_into_it(toy: Toy, grad_off: None) -> None:
    before: list[tuple[Tensor, Tensor]] = []

    def look(moment: Moment) -> None:
        if moment.event.op == "mul_":
            before.append((moment.arguments["self"].clone(), moment.outputs[0].clone()))

    record(toy, lambda: toy(IDS), on_event=look)
    ((was, is_now),) = before
    assert torch.equal(was, toy.embed(IDS).view(-1, 6))
    assert torch.equal(is_now, was * 2)


def test_ops_of_the_consumer_are_not_recorded(toy: Toy) -> None:
    plain = [e.op for e in record(toy, lambda: toy(IDS))]
    looked = record(
        toy, lambda: toy(IDS), on_event=lambda m: m.outputs[0].float().abs().max().item(), on_call=lambda c, outputs: outputs[0].sum()
    )
    assert [e.op for e in looked] == plain


def test_tensors_are_kept_only_where_a_predicate_asks(toy: Toy, grad_off: None) -> None:
    recording = record(toy, lambda: toy(IDS), keep=lambda e: e.op == "_softmax")
    assert len(recording.kept) == len(recording.events)
    full = record(toy, lambda: toy(IDS), keep=True)
    for e, kept, other in zip(recording.events, recording.kept, full.kept, strict=True):
        if e.op == "_softmax":
            assert torch.equal(kept.inputs[0], other.inputs[0])
            assert torch.equal(kept.outputs[0], other.outputs[0])
            assert kept.arguments.keys() == other.arguments.keys()
        else:
            assert (kept.arguments, kept.inputs, kept.outputs) == ({}, [], [])
    assert recording.kept_calls == []


def test_digests_tell_two_runs_apart_bit_for_bit_without_a_tensor(toy: Toy, grad_off: None) -> None:
    def run(change: bool) -> list[int | None]:
        if change:
            toy.blocks[1].proj.weight[0, 0] += 1e-6  # type: ignore[union-attr,operator,index]
        return [info.digest for e in record(toy, lambda: toy(IDS), digests=True) for info in e.outputs]

    first, again, changed = run(False), run(False), run(True)
    assert first == again
    assert None not in first
    differs = next(i for i, (a, b) in enumerate(zip(first, changed, strict=True)) if a != b)
    events = record(toy, lambda: toy(IDS)).events
    assert (events[differs].op, events[differs].where.module) == ("t", "blocks.1.proj"), "the view of the changed weight is the first"


# Ways of running that are easy to get wrong


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = Block()
        self.reentrant = reentrant

    def forward(self, hidden: Tensor) -> Tensor:
        return checkpoint(self.block, hidden, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_activation_checkpointing_runs_again_is_told_from_backward(reentrant: bool) -> None:
    torch.manual_seed(0)
    model, hidden = Recomputed(reentrant), torch.randn(2, 6, requires_grad=True)
    recording = record(model, lambda: model(hidden).square().sum().backward())
    again = [(e.op, e.where.module, e.where.line) for e in recording if e.phase == "recompute" and e.op != "detach"]
    first = [(e.op, e.where.module, e.where.line) for e in recording if e.phase == "forward" and e.where.module.startswith("block")]
    assert (
        again[:3]
        == first[:3]
        == [("t", "block.proj", line_of("proj")), ("addmm", "block.proj", line_of("proj")), ("tanh", "block", line_of("helper"))]
    )
    product = [e for e in recording if e.op == "mm" and e.phase == "backward"]
    assert {(e.where.module, e.where.line) for e in product} == {("block.proj", line_of("proj"))}


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x  # <- square

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * x.exp()  # <- own-backward


def test_a_backward_written_by_hand_stands_at_its_own_line() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Square.apply(x)  # type: ignore[no-any-return,no-untyped-call]

    model, x = Model(), torch.ones(3, requires_grad=True)
    exp = event(record(model, lambda: model(x).sum().backward()).events, "exp", phase="backward")
    assert (exp.where.function, exp.where.line) == ("Square.backward", line_of("own-backward"))


def test_the_parameters_that_an_op_reads_are_named_also_through_views(toy: Toy) -> None:
    events = record(toy, lambda: toy(IDS)).events
    assert event(events, "embedding").parameters == ("embed.weight",)
    assert set(event(events, "addmm").parameters) == {"blocks.0.proj.bias", "blocks.0.proj.weight"}


def test_an_accumulated_gradient_belongs_to_the_module_of_its_parameter(toy: Toy) -> None:
    def twice() -> None:
        for _ in range(2):
            toy(IDS).sum().backward()

    added = [e.where.module for e in record(toy, twice) if e.op == "add_" and e.phase == "backward"]
    assert sorted(added) == ["blocks.0.proj"] * 2 + ["blocks.1.proj"] * 2 + ["embed"]


def test_a_module_used_in_two_places_is_called_twice_under_its_first_name() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    recording = record(model, lambda: model(torch.ones(1, 3)))
    assert [call.module for call in recording.calls] == ["0", "1", "0", ""]


class Ones(TorchDispatchMode):
    """A mode of the subject's own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.ones(3) if func is torch.ops.aten.zeros.default else func(*args, **(kwargs or {}))


def test_dispatch_modes_of_the_subject_work_inside_and_around_a_trace() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with Ones():
                return x + torch.zeros(3)

    model = Model()
    inner = record(model, lambda: model(torch.ones(3)))
    assert inner.result.tolist() == [2.0, 2.0, 2.0]
    assert [e.op for e in inner if e.op in ("ones", "zeros", "add")] == ["ones", "ones", "add"]
    with FakeTensorMode():
        plain = nn.Linear(3, 3)
        fake = record(plain, lambda: plain(torch.empty(2, 3)))
    view, product = event(fake.events, "t"), event(fake.events, "addmm")
    assert product.outputs[0].shape == (2, 3)
    assert view.inputs[0].storage == view.outputs[0].storage != product.outputs[0].storage


def test_views_are_known_on_the_meta_device_too() -> None:
    model = nn.Linear(3, 4, device="meta")
    events = record(model, lambda: model(torch.empty(2, 3, device="meta")), statistics=True, digests=True).events
    turned, product = event(events, "t"), event(events, "addmm")
    assert turned.inputs[0].storage == turned.outputs[0].storage == product.inputs[2].storage != product.outputs[0].storage
    assert (product.outputs[0].finite, product.outputs[0].digest) == (None, None)


def test_a_compiled_model_is_traced_as_it_runs_uncompiled() -> None:
    torch.manual_seed(0)
    model = Block()
    compiled = torch.compile(model, backend="eager")
    hidden = torch.randn(2, 6)
    recording = record(compiled, lambda: compiled(hidden))
    assert torch.equal(recording.result, model(hidden))
    assert event(recording.events, "tanh").where.function == "helper"


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def states(self, hidden: Tensor) -> Iterator[Tensor]:
        for block in self.blocks:
            hidden = block(hidden)
            yield hidden * 2  # <- yielded

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.stack(list(self.states(hidden)))


def test_an_op_in_a_generator_stands_in_the_generator() -> None:
    model = Steps()
    doubled = [e for e in record(model, lambda: model(torch.ones(2, 6))) if e.op == "mul"]
    assert [(e.where.function, e.where.line, e.where.module) for e in doubled] == [("Steps.states", line_of("yielded"), "")] * 2


def test_a_hook_of_the_subject_that_raises_leaves_the_stack_of_modules_in_order(toy: Toy) -> None:
    def refuse(module: nn.Module, args: Any) -> None:
        raise ValueError("no")

    handle = toy.blocks[0].register_forward_pre_hook(refuse)
    recording = record(toy, lambda: toy(IDS), catch=True)
    handle.remove()
    assert isinstance(recording.error, ValueError)
    assert [call.module for call in recording.calls] == ["embed", ""]


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
