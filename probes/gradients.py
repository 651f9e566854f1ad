"""Every parameter takes part in training."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case, Where
from olmodebug.repair import Found
from olmodebug.report import Finding
from olmodebug.settle import settled
from olmodebug.subject import Subject, own_code, quiet
from olmodebug.trace import record


@probe()
def reach_every_parameter(subject: Subject) -> Iterator[Finding]:
    """Every parameter gets a finite gradient from the next-token loss, and no gradient is zero throughout.

    Why: a parameter that gets none never learns, and nothing says so.
    Catches: a norm defined twice and used once; .detach() or .data on the way; a module that forward does not call.
    """
    twin = subject.fresh_twin(training=True)
    trainable = {name: p for name, p in twin.model.named_parameters() if p.requires_grad}
    if not trainable:
        not_applicable("no parameter requires a gradient")
    batch, seq = twin.sizes()
    with settled(seed=twin.seed), quiet(), torch.enable_grad():
        for seed in (14, 15):
            case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=seed))
            with own_code(twin, case):
                recording = record(twin.model, lambda: twin.call(case).logits)  # noqa: B023 - called at once
            logits = recording.result
            called = {call.module for call in recording.calls}
            if not logits.requires_grad:
                yield Found(
                    probe="",
                    severity="error",
                    message="the logits carry no gradient in train mode, so nothing can be trained",
                    cause="forward runs under no_grad, or detaches its result",
                    fix="remove torch.no_grad(), .detach() or .data from the forward pass",
                    case=case,
                )
                return
            target = torch.tensor(case.input_ids)[:, 1:]
            F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), target.reshape(-1)).backward()
    bad = [name for name, p in trainable.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    if bad:
        yield _finding(twin, bad, "error", "a gradient that is not finite", None, None)
    missing = [name for name, p in trainable.items() if p.grad is None]
    zero = [name for name, p in trainable.items() if p.grad is not None and not bool(p.grad.any())]
    cut = [name for name in missing if name.rpartition(".")[0] in called]
    unused = [name for name in missing if name not in cut]
    if cut:
        share = sum(trainable[name].numel() for name in cut) / sum(p.numel() for p in trainable.values())
        cause = "forward calls its module, and the path from there to the logits carries no gradient (detach, .data, no_grad, or a choice by index)"
        yield _finding(twin, cut, "error" if share > 0.5 else "warning", "no gradient", cause, "let the gradient through, or freeze it openly")
    if unused:
        cause = "forward never calls its module"
        yield _finding(twin, unused, "warning", "no gradient", cause, "use it in forward, or remove it")
    if zero and not any("expert" in name for name in zero):
        yield _finding(twin, zero, "warning", "a gradient of exactly zero", None, None)


def _finding(twin: Subject, names: list[str], severity: str, what: str, cause: str | None, fix: str | None) -> Found:
    module = names[0].rpartition(".")[0]
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return Found(
        probe="",
        severity=severity,  # type: ignore[arg-type]
        message=f"{names[0]} gets {what}" + (f", and {len(names) - 1} other parameters too" if len(names) > 1 else ""),
        where=Where(module=module),
        cause=cause,
        fix=fix,
        evidence={"parameters": listed, "of": sum(1 for p in twin.model.parameters() if p.requires_grad)},
    )
