"""Everything that a forward makes is made on the device of its inputs."""

import ast
from collections.abc import Iterator

import torch

from olmodebug.devices import Stray, first_stray, plain_tensors
from olmodebug.explain import place_of, source_lines
from olmodebug.own_code import quiet
from olmodebug.probe import probe, skip
from olmodebug.records import Case, Where
from olmodebug.relations.repair import Found, expressions
from olmodebug.report import Finding, Severity
from olmodebug.settle import settled
from olmodebug.sources import Spot
from olmodebug.subject import Subject


@probe()
def made_where_the_inputs_are(subject: Subject) -> Iterator[Finding]:
    """No op of a forward mixes the model's device with another: positions, masks and tables are made where the inputs are.

    Why: on the CPU everything is on the CPU; on a GPU the same code raises, often only in the branch with a mask or labels.
    Catches: torch.arange(seq_len) without device=; device="cpu"; a table kept as a plain attribute that .to(device) does not move.
    """
    batch, seq = subject.sizes()
    ids = subject.token_ids(batch, seq)
    ran, refused = 0, ""
    for case in _cases(subject, ids):
        twin = subject.fresh_twin(dtype=subject.dtype)
        try:
            with settled(seed=twin.seed), quiet():
                stray = first_stray(twin.model, lambda t=twin, c=case: t.call(c))  # type: ignore[misc]
        except Exception as error:  # what asks a tensor for its memory or its device's kernels has no answer on meta
            refused = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
            continue
        ran += 1
        if stray is not None:
            finding = _finding(subject, stray, case)
            if finding is not None:
                yield finding
            return
    if not ran:
        skip(f"forward does not run on the meta device ({refused})")


def _cases(twin: Subject, ids: tuple[tuple[int, ...], ...]) -> Iterator[Case]:
    yield Case(name="a batch", input_ids=ids)
    if twin.convention.attention_mask:
        yield Case(name="a padded batch", input_ids=ids, attention_mask=tuple((1,) * len(row) for row in ids))
    if twin.convention.position_ids:
        yield Case(name="a batch with positions", input_ids=ids, position_ids=tuple(tuple(range(len(row))) for row in ids))
    if twin.convention.labels:
        yield Case(name="a batch with labels", input_ids=ids, labels=ids)


def _finding(subject: Subject, stray: Stray, case: Case) -> Found | None:
    """The finding on a stray tensor that was made in the run, or is an attribute; None where it came from is not known."""
    if stray.made is not None:
        return _made_elsewhere(subject, stray, stray.made, case)
    if stray.attribute is None:
        return None
    fresh = _in_fresh_build(subject, stray.attribute)
    why = (
        "it is a plain attribute, which .to(device) does not move"
        if fresh
        else "it was kept from an earlier call, and is not made anew when the model moves"
    )
    return _mixed(
        stray,
        case,
        place_of(stray.used, module=stray.module, op=stray.op),
        "error" if fresh else "warning",
        f"{stray.attribute} ({_shape(stray)}) stays on the {stray.device} when the model moves",
        cause=why if fresh is not None else None,
        fix="register it: self.register_buffer(name, tensor, persistent=False)" if fresh else "compare its device before it is used again",
    )


def _made_elsewhere(subject: Subject, stray: Stray, made: Spot, case: Case) -> Found:
    where = place_of(made, module=stray.module, op=stray.maker)
    kept, chosen = _kept_device(subject), _chosen_device(made)
    if stray.maker == "_to_copy" and kept is not None:
        return _mixed(
            stray,
            case,
            where,
            "warning",
            f"{_shape(stray)} is moved to the {stray.device} that {kept} holds from an earlier call",
            cause=f"{kept} is a torch.device that was noted once, and does not change when the model moves",
            fix="read the device from a parameter or from the input in every call",
            condition="a model that has run, and moves afterwards",
        )
    if chosen is not None:
        return _mixed(
            stray,
            case,
            where,
            "warning",
            f"{_shape(stray)} is put on {chosen}, the {stray.device} here, and not where the inputs are",
            cause=f"{chosen} was chosen apart from the model, and does not change when the model moves",
            fix="read the device from the input in every call: device=input_ids.device",
            condition=f"a model on another device than {chosen}",
        )
    return _mixed(
        stray,
        case,
        where,
        "error",
        f"{stray.maker} makes {_shape(stray)} on the {stray.device}, whatever the device of the model",
        cause=f"{stray.maker} is called without the inputs' device"
        if stray.device == "cpu"
        else f"the device {stray.device} is written down",
        fix="make it with device=input_ids.device (or that of the hidden states)",
        used_at=str(place_of(stray.used, op=stray.op)),
    )


def _mixed(
    stray: Stray,
    case: Case,
    where: Where,
    severity: Severity,
    what: str,
    *,
    cause: str | None,
    fix: str,
    condition: str = "",
    used_at: str = "",
) -> Found:
    known = {"condition": condition, "used at": used_at, "found by": "a run on the meta device"}
    return Found(
        probe="",
        severity=severity,
        message=f"{what}; {stray.op} then mixes two devices",
        where=where,
        source=source_lines(where),
        cause=cause,
        fix=fix,
        expected="every tensor on the device of the inputs",
        observed=f"{_shape(stray)} on {stray.device}",
        evidence={name: text for name, text in known.items() if text},
        case=case,
    )


def _shape(stray: Stray) -> str:
    return f"{stray.dtype}{list(stray.shape)}"


def _chosen_device(spot: Spot) -> str | None:
    """The variable or attribute whose device the line that makes a tensor asks for; None where it asks for none, or for one
    that is written down there."""
    tree = expressions(spot)
    call = next((node for node in tree.at(spot) if isinstance(node, ast.Call)), None) if tree else None
    if tree is None or call is None:
        return None
    asked = [keyword.value for keyword in call.keywords if keyword.arg == "device"]
    if isinstance(call.func, ast.Attribute) and call.func.attr == "to":
        asked += call.args[:1]
    return next((tree.source(value) for value in asked if isinstance(value, ast.Name | ast.Attribute)), None)


def _kept_device(subject: Subject) -> str | None:
    """A plain attribute of a module that holds a device, as `path.name`."""
    for path, module in subject.model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.device):
                return f"{path}.{name}" if path else name
    return None


def _in_fresh_build(subject: Subject, attribute: str) -> bool | None:
    """Whether a model that never ran holds this tensor already; None where no fresh one can be built."""
    if subject.remake is None:
        return None
    with quiet():
        return attribute in plain_tensors(subject.remake(subject.seed)).values()
