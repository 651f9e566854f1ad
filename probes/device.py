"""Everything that a forward makes is made on the device of its inputs."""

import ast
from collections.abc import Iterator

import torch

from olmodebug.devices import Stray, first_stray, plain_tensors
from olmodebug.explain import place_of, source_lines
from olmodebug.own_code import quiet
from olmodebug.probe import probe, skip
from olmodebug.records import Case
from olmodebug.relations.repair import Found, expressions
from olmodebug.report import Finding
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
    shape = f"{stray.dtype}{list(stray.shape)}"
    if stray.made is not None:
        where = place_of(stray.made, module=stray.module, op=stray.maker)
        kept = _kept_device(subject)
        if stray.maker == "_to_copy" and kept is not None:
            return Found(
                probe="",
                severity="warning",
                message=f"{shape} is moved to the {stray.device} that {kept} holds from an earlier call; {stray.op} then mixes two devices",
                where=where,
                source=source_lines(where),
                cause=f"{kept} is a torch.device that was noted once, and does not change when the model moves",
                fix="read the device from a parameter or from the input in every call",
                expected="every tensor on the device of the inputs",
                observed=f"{shape} on {stray.device}",
                evidence={"condition": "a model that has run, and moves afterwards", "found by": "a run on the meta device"},
                case=case,
            )
        if (chosen := _chosen_device(stray.made)) is not None:
            return Found(
                probe="",
                severity="warning",
                message=f"{shape} is put on {chosen}, the {stray.device} here, and not where the inputs are; {stray.op} then mixes two devices",
                where=where,
                source=source_lines(where),
                cause=f"{chosen} was chosen apart from the model, and does not change when the model moves",
                fix="read the device from the input in every call: device=input_ids.device",
                expected="every tensor on the device of the inputs",
                observed=f"{shape} on {stray.device}",
                evidence={"condition": f"a model on another device than {chosen}", "found by": "a run on the meta device"},
                case=case,
            )
        return Found(
            probe="",
            severity="error",
            message=f"{stray.maker} makes {shape} on the {stray.device}, whatever the device of the model; {stray.op} then mixes two devices",
            where=where,
            source=source_lines(where),
            cause=f"{stray.maker} is called without the inputs' device"
            if stray.device == "cpu"
            else f"the device {stray.device} is written down",
            fix="make it with device=input_ids.device (or that of the hidden states)",
            expected="every tensor on the device of the inputs",
            observed=f"{shape} on {stray.device}",
            evidence={"used at": str(place_of(stray.used, op=stray.op)), "found by": "a run on the meta device"},
            case=case,
        )
    if stray.attribute is None:
        return None  # where it came from is not known
    where = place_of(stray.used, module=stray.module, op=stray.op)
    fresh = _in_fresh_build(subject, stray.attribute)
    why = (
        "it is a plain attribute, which .to(device) does not move"
        if fresh
        else "it was kept from an earlier call, and is not made anew when the model moves"
    )
    return Found(
        probe="",
        severity="error" if fresh else "warning",
        message=f"{stray.attribute} ({shape}) stays on the {stray.device} when the model moves; {stray.op} then mixes two devices",
        where=where,
        source=source_lines(where),
        cause=why if fresh is not None else None,
        fix="register it: self.register_buffer(name, tensor, persistent=False)" if fresh else "compare its device before it is used again",
        expected="every tensor on the device of the inputs",
        observed=f"{shape} on {stray.device}",
        evidence={"found by": "a run on the meta device"},
        case=case,
    )


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
