"""The storage tracer: what it says of fake tensors is what happens with real ones, and what torch's own instruments count."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from olmodebug.first_run import from_model
from olmodebug.footprint.confirm import real_subject
from olmodebug.footprint.dry_run import Prepared, trace_fake, trace_real, trace_steps
from olmodebug.footprint.estimate import estimate, peak_of
from olmodebug.footprint.fake_model import fake_mode
from olmodebug.footprint.findings import findings_of
from olmodebug.footprint.gpus import GPUS
from olmodebug.footprint.section import section
from olmodebug.footprint.storage_trace import ACTIVATIONS, AUTOCAST, GRADIENTS, KV_CACHE, LOGITS, OPTIMIZER_STATE, PARAMETERS, StorageTracer
from olmodebug.footprint.training_step import StepPlan, make_optimizer, step
from olmodebug.spec import Job

TINY = {"batch_size": 3, "seq_len": 17}

CASES = [
    ("olmo1-tiny", {"precision": "fp32"}),
    ("olmo1-tiny", {"precision": "fp16-amp"}),
    ("olmo3-tiny", {"precision": "bf16-amp", "checkpointing": True, "loss": "chunked"}),
    ("olmo2-tiny", {"precision": "bf16", "accumulation": 2}),
    ("olmo2-tiny", {"precision": "bf16", "inference": True, "new_tokens": 2}),
    ("transformers:LlamaForCausalLM", {"precision": "fp32"}),
    ("transformers:GPT2LMHeadModel", {"precision": "fp16-amp"}),
    ("transformers:Olmo2ForCausalLM", {"precision": "bf16-amp", "optimizer": "sgd-momentum"}),
    ("transformers:GPTNeoXForCausalLM", {"precision": "fp32", "optimizer": "adamw-fused"}),
    ("transformers:MixtralForCausalLM", {"precision": "fp32"}),  # experts, in a grouped product
    ("transformers:DeepseekV2ForCausalLM", {"precision": "fp16-amp", "checkpointing": True}),  # values of another head size
    ("transformers:JambaForCausalLM", {"precision": "bf16", "inference": True, "new_tokens": 2}),
]


@pytest.mark.parametrize(("spec", "options"), CASES, ids=[f"{spec}-{'-'.join(map(str, o.values()))}" for spec, o in CASES])
def test_fake_tensors_allocate_what_real_ones_do_event_for_event(spec: str, options: dict) -> None:
    plan = StepPlan(**TINY, **options)
    fake = trace_fake(Prepared(Job(spec=spec), plan.weight_dtype), plan, None)
    real = trace_real(real_subject(Job(spec=spec), plan), plan)
    assert len(fake.events) > 500
    assert fake.sequence() == real.sequence()
    assert peak_of(fake.allocations, fake.events) == peak_of(real.allocations, real.events)


@pytest.mark.parametrize("name", ["softplus", "elu", "hardswish", "hardsigmoid", "hardtanh", "layer_norm"])
def test_operators_of_which_torch_says_otherwise_are_traced_as_their_kernels_do(name: str) -> None:
    def traced() -> list[Any]:
        x, gradient = torch.ones(3, 4, 5, dtype=torch.bfloat16).transpose(1, 2).requires_grad_(), torch.ones(3, 5, 4, dtype=torch.bfloat16)
        weight = torch.ones(4)
        with StorageTracer(nn.Linear(1, 1)) as tracer:
            y = F.layer_norm(x, [4], weight) if name == "layer_norm" else getattr(F, name)(x)
            (grad,) = torch.autograd.grad(y, x, gradient)
        return [*((a.op, a.shape, a.dtype) for a in tracer.finish().allocations), grad.stride()]

    real = traced()
    with fake_mode():
        assert traced() == real


@torch.library.custom_op("olmodebug_test::_fused", mutates_args=())
def fused(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x])[: len(x)].clone()


def test_an_operator_that_nobody_can_look_into_is_named_also_with_a_private_name() -> None:
    """As torch's own cross-entropy in chunks is, and the kernels of flash_attn."""
    with StorageTracer(nn.Linear(1, 1)) as tracer, torch.profiler.record_function("a part"):
        fused(torch.ones(3))
    assert list(tracer.finish().opaque) == ["olmodebug_test._fused"]
    (finding,) = findings_of(section(opaque=list(tracer.trace.opaque), figures={"process": None, "tensors": None}))
    assert finding.severity == "warning" and "olmodebug_test._fused" in finding.message


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return Prepared(Job(spec="olmo1-tiny"), torch.float32)


def test_the_third_step_is_the_second_again(prepared: Prepared) -> None:
    trace = trace_fake(prepared, StepPlan(**TINY), GPUS["A100"])
    steps = {n: [(a.bytes, a.op, a.module, a.phase) for a in trace.allocations if a.step == n] for n in (1, 2, 3)}
    assert steps[2] == steps[3] and steps[1] != steps[2]


def test_parameters_gradients_and_optimizer_state_have_the_bytes_that_they_must(prepared: Prepared) -> None:
    trace = trace_fake(prepared, StepPlan(**TINY, precision="fp32"), GPUS["A100"])
    parameters = sum(p.numel() * 4 for p in prepared.subject.model.parameters())

    def bytes_of(category: str, step: int) -> int:
        return sum(a.bytes for a in trace.allocations if a.category == category and a.step == step and not a.host)

    assert bytes_of(PARAMETERS, 0) == parameters
    assert bytes_of(GRADIENTS, 2) == parameters
    assert bytes_of(OPTIMIZER_STATE, 1) == 2 * parameters and bytes_of(OPTIMIZER_STATE, 2) == 0
    owners = {a.module for a in trace.allocations if a.category == GRADIENTS}
    assert {"model.embed_tokens", "model.layers.1.mlp.down_proj"} <= owners


def test_autocast_copies_are_the_16_bit_weights_of_the_products(prepared: Prepared) -> None:
    trace = trace_fake(prepared, StepPlan(**TINY, precision="bf16-amp"), GPUS["A100"])
    copied = sum(a.bytes for a in trace.allocations if a.category == AUTOCAST and a.step == 1)
    weights = {id(m.weight): m.weight for m in prepared.subject.model.modules() if isinstance(m, nn.Linear)}
    assert copied == sum(2 * w.numel() for w in weights.values())


def test_the_fused_optimizer_counts_its_steps_on_the_card_and_foreach_on_the_host(prepared: Prepared) -> None:
    for kind, on_host in (("adamw", True), ("adamw-fused", False)):
        trace = trace_fake(prepared, StepPlan(**TINY, optimizer=kind), GPUS["A100"], steps=1)
        counters = [a for a in trace.allocations if a.category == OPTIMIZER_STATE and a.bytes == 4]
        assert counters and all(a.host == on_host for a in counters)


def test_backward_allocations_are_given_to_the_module_and_line_of_the_forward_operator(prepared: Prepared) -> None:
    trace = trace_fake(prepared, StepPlan(**TINY, precision="fp32"), GPUS["A100"])
    softmax = [a for a in trace.allocations if a.op == "_log_softmax_backward_data"]
    assert softmax and all(a.module == "(loss)" and a.phase == "backward" and a.category == LOGITS for a in softmax)
    silu = [a for a in trace.allocations if a.op == "silu_backward"]
    assert {a.module for a in silu} == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert all(a.spot is not None and a.spot.function == "OlmoMLP.forward" for a in silu)


def test_checkpointing_keeps_one_input_a_block(prepared: Prepared) -> None:
    plain = estimate(trace_fake(prepared, StepPlan(**TINY), GPUS["A100"]), None)
    saved = estimate(trace_fake(prepared, StepPlan(**TINY, checkpointing=True), GPUS["A100"]), None)

    def at_the_end_of_forward(found: object) -> int:
        last = [p for p in found.timeline.points if (p.step, p.phase) == (2, "forward")][-1]  # type: ignore[attr-defined]
        names = found.timeline.names  # type: ignore[attr-defined]
        return last.categories[names.index(ACTIVATIONS)] if ACTIVATIONS in names else 0

    assert at_the_end_of_forward(saved) < 0.5 * at_the_end_of_forward(plain)


def test_a_gigantic_batch_allocates_nothing_here(prepared: Prepared) -> None:
    trace = trace_fake(prepared, StepPlan(batch_size=1 << 20, seq_len=64), GPUS["H100"], steps=1)
    assert peak_of(trace.allocations, trace.events) > 1 << 36


def test_the_peak_is_affine_in_the_batch(prepared: Prepared) -> None:
    peaks = {}
    for batch in (64, 128, 256):
        trace = trace_fake(prepared, StepPlan(batch_size=batch, seq_len=64), GPUS["A100"], steps=2, lines=False)
        peaks[batch] = peak_of(trace.allocations, trace.events)
    assert peaks[256] - peaks[128] == pytest.approx(2 * (peaks[128] - peaks[64]), rel=1e-3)


def test_a_kv_cache_holds_keys_and_values_of_every_position() -> None:
    plan = StepPlan(batch_size=2, seq_len=16, precision="bf16", inference=True, new_tokens=3)
    ready = Prepared(Job(spec="transformers:LlamaForCausalLM"), torch.bfloat16)
    trace = trace_fake(ready, plan, GPUS["A100"])
    config = ready.subject.config
    width = config.num_key_value_heads * config.head_dim  # type: ignore[attr-defined]
    made = {a.bytes for a in trace.allocations if a.category == KV_CACHE and a.phase == "decode"}
    assert 2 * (16 + 3) * width * 2 in made  # the last step's keys of one layer: batch x positions x width x 2 bytes


def test_a_model_of_bare_logits_gets_its_loss_from_outside() -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(97, 24)
            self.head = nn.Linear(24, 97)

        def forward(self, idx: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(idx))

    trace = trace_real(from_model(Bigram()), StepPlan(batch_size=2, seq_len=8, precision="fp32"))
    assert any(a.op == "_log_softmax" and a.module == "(loss)" for a in trace.allocations)
    assert {a.category for a in trace.allocations if a.op == "nll_loss_backward"} == {LOGITS}


def test_tracing_leaves_no_hook_and_no_kernel_behind() -> None:
    before = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCPU")
    ready = Prepared(Job(spec="olmo1-tiny"), torch.float32)
    trace_fake(ready, StepPlan(**TINY), GPUS["A100"], steps=1)
    assert sorted(torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCPU")) == sorted(before)
    assert not nn.modules.module._global_forward_pre_hooks and not nn.modules.module._global_forward_hooks
    assert all("forward" not in vars(m) for m in ready.subject.model.modules())


def test_the_profiler_of_torch_counts_the_same_bytes() -> None:
    """Allocator-level peak of one real step against the trace's, to 0.01 %."""
    plan = StepPlan(batch_size=4, seq_len=64, precision="fp32")
    subject = real_subject(Job(spec="datadecide-4M"), plan)
    trace = trace_real(subject, plan, steps=2)
    subject = real_subject(Job(spec="datadecide-4M"), plan)
    optimizer = make_optimizer(subject.model, plan.optimizer)
    batches = [torch.zeros(4, 64, dtype=torch.long)]
    step(subject, plan, optimizer, None, batches, lambda name: None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        step(subject, plan, optimizer, None, batches, lambda name: None)
    now = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    second = [i for i, step_number, _ in trace.marks if step_number == 2][0]
    base = sum(a.bytes if e >= 0 else -a.bytes for e in trace.events[:second] for a in (trace.allocations[e if e >= 0 else ~e],))
    level = highest = base
    for event in trace.events[second:]:
        allocation = trace.allocations[event if event >= 0 else ~event]
        level += allocation.bytes if event >= 0 else -allocation.bytes
        highest = max(highest, level)
    assert most == pytest.approx(highest - base, rel=1e-4)


def test_steps_can_be_traced_without_lines() -> None:
    plan = StepPlan(**TINY, precision="fp32")
    trace = trace_steps(real_subject(Job(spec="olmo1-tiny"), plan), plan, steps=1, scratch=False, lines=False)
    assert all(a.spot is None for a in trace.allocations)


def test_gradients_of_one_tensor_are_added_up_in_place_on_a_card(prepared: Prepared) -> None:
    plan = StepPlan(**TINY, precision="bf16-amp")
    on_card, on_cpu = (trace_fake(prepared, plan, gpu) for gpu in (GPUS["H100"], None))
    added = [[a for a in trace.allocations if a.op == "add" and a.phase == "backward"] for trace in (on_card, on_cpu)]
    assert not added[0] and len(added[1]) > 3
    ended = {~event for event in on_card.events if event < 0}
    lost = [a for i, a in enumerate(on_card.allocations) if a.phase == "backward" and a.step == 2 and i not in ended]
    assert lost == []  # what was handed over is given back all the same


@pytest.mark.parametrize(("checkpointing", "kept"), [(False, 2), (True, 3)])
def test_what_a_card_adds_up_elsewhere_is_views_and_what_runs_again(prepared: Prepared, checkpointing: bool, kept: int) -> None:
    """A gradient that is a view of a product's output shares its memory with that, so the first two of q, k and v, and gate and
    up, are added into new memory; the sums of a checkpoint that runs again are no gradients (reports/gpu: 150M and 4M)."""
    plan = StepPlan(**TINY, precision="fp32", checkpointing=checkpointing)
    trace = trace_fake(prepared, plan, GPUS["H100"])
    hidden = (plan.batch_size, plan.seq_len, prepared.subject.model.config.hidden_size)
    added = [a for a in trace.allocations if a.op == "add" and a.phase == "backward" and a.step == 2 and a.shape == hidden]
    assert len(added) == kept * prepared.subject.model.config.num_hidden_layers


class Keeping(nn.Module):
    """Returns its logits and keeps the loss, which its caller fetches."""

    def __init__(self, returns: bool = False) -> None:
        super().__init__()
        self.returns = returns
        self.embed, self.head = nn.Embedding(2003, 24), nn.Linear(24, 2003, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> object:
        logits, loss = self.head(self.embed(tokens)), None
        if targets is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if self.returns:
            return logits, loss
        self.last_loss = loss
        return logits


def profiled_peak(model: nn.Module, ids: torch.Tensor, run: Callable[[torch.optim.Optimizer], None]) -> int:
    """The most bytes beside the parameters in a second step, as torch's profiler counts them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=True)
    run(optimizer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run(optimizer)
    now = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize(("returns", "holds"), [(True, True), (True, False), (False, True)])
def test_a_step_holds_what_the_callers_loop_holds(returns: bool, holds: bool) -> None:
    """`logits, loss = model(...)` holds the logits through the backward pass, and a loss kept by the model is the only one."""
    model, ids = Keeping(returns), torch.zeros(4, 32, dtype=torch.long)

    def own_loop(optimizer: torch.optim.Optimizer) -> None:
        out = model(ids, ids)
        loss = out[1] if returns else model.last_loss
        if not holds:
            del out
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    plan = StepPlan(batch_size=4, seq_len=32, precision="fp32", optimizer="sgd", keep_outputs=holds)
    trace = trace_fake(Prepared(from_model(Keeping(returns)), plan.weight_dtype), plan, None)
    parameters = sum(p.numel() * 4 for p in model.parameters())
    assert peak_of(trace.allocations, trace.events) - parameters == pytest.approx(profiled_peak(model, ids, own_loop), rel=0.01)
