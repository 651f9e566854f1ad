"""The feed-forward block computes what its configuration says."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmodebug.explain import place_of, source_lines
from olmodebug.own_code import quiet
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case, Event
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.sources import Spot, code_of
from olmodebug.subject import Subject
from olmodebug.tracing.activations import EXACT, KNOWN, TANH, Bend, bends
from olmodebug.tracing.norms import is_polynomial
from olmodebug.tracing.tracer import Kept, Recording, record

SETTINGS = ("hidden_act", "activation_function", "hidden_activation", "activation", "act_fn", "mlp_hidden_act")
TOP_NAMES = (
    "num_experts_per_tok",
    "n_experts_per_token",
    "num_experts_per_token",
    "n_expert_per_token",
    "moe_top_k",
    "top_k",
    "n_activated_experts",
    "num_activated_experts",
)
# What each name in a configuration means as an op: (aten op, its `approximate` argument).
MEANING: dict[str, tuple[str, str | None]] = {
    "silu": ("silu", None),
    "swish": ("silu", None),
    "gelu": ("gelu", "none"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_fast": ("gelu", "tanh"),
    "relu": ("relu", None),
}
PUTS = ("index_put", "index_put_", "index_copy", "index_copy_")
# What a written-out activation may be off from the one it is meant to be, as a share of the largest input.
NEAR = 0.1


@probe()
def activation_as_configured(subject: Subject) -> Iterator[Finding]:
    """The activation that forward applies is the one that the configuration names.

    Why: a checkpoint trained with one activation is slightly wrong with another, and nothing fails.
    Catches: F.gelu where the config says silu; one that is built and never called; exact GELU where it says gelu_pytorch_tanh.
    """
    named = subject.setting(*SETTINGS)
    if not isinstance(named, str) or named not in MEANING:
        not_applicable("its config names no activation that torch has as one op")
    twin = subject.twin()
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=33))
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case), keep=True)
    either = named == "gelu" and not hasattr(subject.config, "model_type")  # exact in transformers; elsewhere the word covers both
    seen = [(event, i) for i, event in enumerate(recording.events) if event.op.rstrip("_") in ("silu", "gelu", "relu")]
    op, approximate = MEANING[named]
    if not seen and (bend := next(bends(recording), None)) is not None:
        wanted = op if approximate is None else TANH if approximate == "tanh" else EXACT
        if not bend.is_(wanted) and not (either and bend.is_(TANH)):
            yield _written_out(recording, bend, wanted, named, case)
        return
    if not seen:
        yield _none_applied(twin.model, recording, named, case)
        return
    if any(_is(recording, event, i, op, approximate) for event, i in seen):
        return
    if either and any(event.op.rstrip("_") == op for event, _ in seen):
        return
    event, index = seen[0]
    observed = _named(recording, event, index)
    where = place_of(recording.spots[index], module=event.where.module, op=event.op)
    yield Found(
        probe="",
        severity="error",
        message=f"the activation is {observed}, and the config names {named}",
        where=where,
        source=source_lines(where),
        cause=f"forward applies {observed}; the config's activation {named} is not used",
        fix=f"apply {named}, or change the config",
        expected=named,
        observed=observed,
        case=case,
    )


def _written_out(recording: Recording, bend: Bend, wanted: str, named: str, case: Case) -> Found:
    """The finding for an activation made of several ops that is not the one named; leaves the probe where it is one of its own."""
    observed, far = next((name for name in KNOWN if bend.is_(name)), None), bend.apart(wanted)
    if observed is None and far > NEAR * float(bend.x.abs().max()):
        not_applicable("forward applies an activation of its own")
    where = place_of(recording.spots[bend.index], module=recording.events[bend.index].where.module, op=recording.events[bend.index].op)
    x = float(bend.x[(bend.y - KNOWN[wanted](bend.x)).abs().argmax()])
    return Found(
        probe="",
        severity="error" if observed else "warning",
        message=f"the activation is {observed or f'close to {named} and not it'}, and the config names {named}",
        where=where,
        source=source_lines(where),
        cause=f"forward applies {observed}; the config's activation {named} is not used"
        if observed
        else f"what is written out here is off by up to {far:.2g} from {wanted}, at {x:.3g}: one of its constants or steps is another",
        fix=f"apply {named}, or change the config",
        expected=named,
        observed=observed or "no known activation",
        case=case,
    )


def _none_applied(model: nn.Module, recording: Recording, named: str, case: Case) -> Found:
    """The finding for a forward with an activation that is held and never called, in a module that has no bend in what it
    computes; leaves the probe where there is none, as where an activation is made of several ops or is an op of its own."""
    called = {call.module: call.inputs[0].shape for call in recording.calls if call.inputs and call.inputs[0].shape}
    owners = ((idle, *idle.rpartition(".")[::2]) for idle in _activations(model))
    straight = (each for each in owners if each[1] in called and is_polynomial(model.get_submodule(each[1]), called[each[1]][-1]))
    found = next(straight, None)
    if found is None:
        not_applicable("forward applies no activation that is one op")
    idle, owner, attribute = found
    code = code_of(type(model.get_submodule(owner)).forward)
    where = place_of(Spot(code, 0, code.co_firstlineno) if code else None, module=owner)
    return Found(
        probe="",
        severity="error",
        message=f"forward applies no activation, and the config names {named}",
        where=where,
        source=source_lines(where),
        cause=f"{idle} is never called, and no other op bends what {owner} computes: along a line it is a polynomial",
        fix=f"apply it: self.{attribute}(...)",
        expected=named,
        observed="none",
        case=case,
    )


def _activations(model: nn.Module) -> Iterator[str]:
    """Where modules hold an activation, as a module or as torch's function."""
    for name, module in model.named_modules():
        if isinstance(module, nn.SiLU | nn.GELU | nn.ReLU) or type(module).__module__ == "transformers.activations":
            yield name
        yield from (f"{name}.{key}" for key, value in vars(module).items() if any(value is known for known in (F.silu, F.gelu, F.relu)))


@probe()
def expert_weights_as_configured(subject: Subject) -> Iterator[Finding]:
    """The weights of the chosen experts sum to one exactly where the configuration sets norm_topk_prob.

    Why: a checkpoint trained one way drifts when it is run the other way, and nothing fails.
    Catches: a division by their sum where norm_topk_prob is False; one that is left out where it is True.
    """
    wanted, top = subject.setting("norm_topk_prob"), subject.setting(*TOP_NAMES)
    if not isinstance(wanted, bool) or not isinstance(top, int) or top < 2:
        not_applicable("its config sets no norm_topk_prob with two experts a token or more")
    twin = subject.twin()
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=34))
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case), keep=True)
    chosen = [i for i, e in enumerate(recording.events) if e.op == "topk" and recording.kept[i].outputs[0].shape[-1] == top]
    if not chosen:
        not_applicable("no choice of the top experts was seen")
    start = chosen[0]
    module = recording.events[start].where.module
    scores = recording.kept[start].inputs[0]
    later = range(start + 1, min(start + 30, len(recording)))
    if scores.shape[-1] <= top or not _ones(scores.sum(-1)):
        not_applicable("experts are not chosen by probabilities over all of them: a softmax over the chosen logits is Mixtral's design")
    renormalised = next((i for i in later if recording.events[i].where.module == module and _sums_to_one(recording, i, top)), None)
    if wanted and renormalised is None:
        index, observed = start, f"sum to {float(recording.kept[start].outputs[0].sum(-1).mean()):.3g} on average"
        cause = "the probabilities of the chosen experts are used as they are, out of a softmax over all experts"
        fix = "divide them by their sum"
    elif not wanted and renormalised is not None:
        index, observed = renormalised, "sum to 1 for every token"
        op = recording.events[renormalised].op
        cause = f"the weights are renormalised over the {top} chosen experts here ({op}), whatever norm_topk_prob says"
        fix = "renormalise only where norm_topk_prob is set"
    else:
        return
    where = place_of(recording.spots[index], module=module, op=recording.events[index].op)
    yield Found(
        probe="",
        severity="warning",
        message=f"norm_topk_prob is {wanted}, and the weights of the {top} chosen experts {observed}",
        where=where,
        source=source_lines(where),
        cause=cause,
        fix=fix,
        expected="weights that sum to 1" if wanted else "the router's probabilities, whose sum is below 1",
        observed=observed,
        case=case,
    )


@probe()
def experts_add_up(subject: Subject) -> Iterator[Finding]:
    """What the chosen experts of a token give is added up: none overwrites what another gave.

    Why: with two experts a token one of them is computed, trained a little through the router, and thrown away.
    Catches: out[token] = expert(x[token]) in the loop over experts, where out[token] += is meant.
    """
    twin = subject.twin()
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=36))
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case), keep=lambda event: event.op in (*PUTS, "topk"))
    tops = [event for event in recording.events if event.op == "topk" and event.outputs[0].shape[-1:] > (1,)]
    if not tops:
        not_applicable("no choice of two experts or more for a token was seen")
    found = next(_overwritten(recording), None)
    if found is None:
        return
    index, rows, lost = found
    event = recording.events[index]
    where = place_of(recording.spots[index], module=event.where.module, op=event.op)
    yield Found(
        probe="",
        severity="warning",
        message=f"{lost} of the {rows} rows that {event.op.strip('_')} writes here hold what this line wrote before, and nobody has read it",
        where=where,
        source=source_lines(where),
        cause="each expert overwrites what another gave for the same token: of the experts of a token only the last one counts",
        fix="add: out.index_add_(0, token, expert(x[token]) * weight), or out[token] += ...",
        expected="rows that are written once, or added to",
        observed=f"{lost} rows written again",
        case=case,
    )


def _overwritten(recording: Recording) -> Iterator[tuple[int, int, int]]:
    """(event, rows it writes, rows among them that the same line has written in the same call and that nobody read since) where
    rows of floats are put into a tensor."""
    written: dict[int, tuple[tuple[object, ...], Tensor]] = {}
    gone: dict[int, Tensor] = {}
    for index, (event, kept) in enumerate(zip(recording.events, recording.kept, strict=True)):
        puts = event.op in PUTS and kept.arguments["self"].is_floating_point() and not kept.arguments.get("accumulate")
        known = None
        for position, info in enumerate(event.inputs):
            before = written.pop(info.storage, None)  # read: what was written there has served
            known = before if puts and position == 0 else known
        if not puts:
            continue
        put, before = _put(kept), kept.arguments["self"]
        rows = put != 0
        place = (event.where.file, event.where.line, event.where.module)
        if known is not None and known[0] == place and known[1].shape == rows.shape:
            # One row that is written again and again is where tokens go that no expert is to have: most of them must be.
            lost = known[1] & rows & (put != before) | gone.get(event.inputs[0].storage, torch.zeros_like(rows))
            gone[event.outputs[0].storage] = lost
            rows = rows | known[1]
            if 2 * int(lost.any(-1).sum()) >= int(rows.any(-1).sum()):
                yield index, int(rows.any(-1).sum()), int(lost.any(-1).sum())
        written[event.outputs[0].storage] = (place, rows)


def _put(kept: Kept) -> Tensor:
    """What an op puts into a tensor, and 0 elsewhere."""
    given = kept.arguments
    zeros = torch.zeros_like(given["self"])
    if "dim" in given:
        return zeros.index_copy(given["dim"], given["index"], given["source"])
    zeros[tuple(slice(None) if index is None else index for index in given["indices"])] = given["values"]
    return zeros


def _sums_to_one(recording: Recording, index: int, top: int) -> bool:
    """Whether an op turns the weights of the chosen experts into ones that sum to 1."""
    event, kept = recording.events[index], recording.kept[index]
    if event.op not in ("div", "div_", "_softmax") or not kept.outputs or not kept.inputs:
        return False
    out, given = kept.outputs[0], kept.inputs[0]
    return out.shape[-1:] == (top,) and given.shape == out.shape and _ones(out.sum(-1))


def _ones(sums: Tensor) -> bool:
    return bool((sums - 1).abs().max() < 1e-5)


def _is(recording: Recording, event: Event, index: int, op: str, approximate: str | None) -> bool:
    given = recording.kept[index].arguments.get("approximate", "none")
    return event.op.rstrip("_") == op and (approximate is None or given == approximate)


def _named(recording: Recording, event: Event, index: int) -> str:
    tanh = recording.kept[index].arguments.get("approximate", "none") == "tanh"
    return "gelu (tanh approximation)" if tanh else f"exact {event.op}" if event.op == "gelu" else event.op.rstrip("_")
