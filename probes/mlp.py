"""The feed-forward block computes what its configuration says."""

from collections.abc import Iterator

import torch

from olmodebug.explain import place_of, source_lines
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case, Event
from olmodebug.repair import Found
from olmodebug.report import Finding
from olmodebug.subject import Subject, quiet
from olmodebug.tracer import Recording, record

SETTINGS = ("hidden_act", "activation_function", "hidden_activation", "activation", "act_fn", "mlp_hidden_act")
# What each name in a configuration means as an op: (aten op, its `approximate` argument).
MEANING: dict[str, tuple[str, str | None]] = {
    "silu": ("silu", None),
    "swish": ("silu", None),
    "gelu": ("gelu", "none"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", None),
}


@probe()
def activation_as_configured(subject: Subject) -> Iterator[Finding]:
    """The activation that forward applies is the one that the configuration names.

    Why: a checkpoint trained with one activation is slightly wrong with another, and nothing fails.
    Catches: F.gelu where the config says silu; exact GELU where it says gelu_pytorch_tanh.
    """
    named = subject.setting(*SETTINGS)
    if not isinstance(named, str) or named not in MEANING:
        not_applicable("its config names no activation that torch has as one op")
    twin = subject.twin()
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=33))
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case), keep=True)
    seen = [(event, i) for i, event in enumerate(recording.events) if event.op.rstrip("_") in ("silu", "gelu", "relu")]
    if not seen:
        not_applicable("forward applies no activation that is one op")
    op, approximate = MEANING[named]
    if any(_is(recording, event, i, op, approximate) for event, i in seen):
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


def _is(recording: Recording, event: Event, index: int, op: str, approximate: str | None) -> bool:
    given = recording.kept[index].arguments.get("approximate", "none")
    return event.op.rstrip("_") == op and (approximate is None or given == approximate)


def _named(recording: Recording, event: Event, index: int) -> str:
    tanh = recording.kept[index].arguments.get("approximate", "none") == "tanh"
    return "gelu (tanh approximation)" if tanh else f"exact {event.op}" if event.op == "gelu" else event.op.rstrip("_")
