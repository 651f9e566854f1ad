"""The same call gives the same result."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from olmodebug.compare import difference
from olmodebug.explain import place_of, source_lines
from olmodebug.members import unregistered
from olmodebug.own_code import own_code, quiet
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case, Where
from olmodebug.relations.invariance import run
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.settings import attention_choices
from olmodebug.settle import random_state_kept, set_seed
from olmodebug.subject import Subject
from olmodebug.switches import attention_twins, set_dropout
from olmodebug.tracing.tracer import record

RANDOM_OPS = ("bernoulli", "bernoulli_", "native_dropout", "rand_like", "randn_like", "rand", "randn", "uniform_", "normal_", "multinomial")


@probe()
def eval_repeats(subject: Subject) -> Iterator[Finding]:
    """In eval mode two calls give the same bits, with every dropout rate set to 0.3.

    Why: evaluation that is random cannot be compared, and dropout in eval makes every result a little worse.
    Catches: scaled_dot_product_attention(dropout_p=self.p) without a look at self.training; F.dropout(x, p).
    """
    for name in [None, *attention_choices(subject.model)]:
        twin = subject.fresh_twin(attention=name)
        forced = set_dropout(twin.model, 0.3)
        batch, seq = twin.sizes()
        case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=16))
        first, second = _seeded(twin, case, 1), _seeded(twin, case, 2)
        apart = difference(first, second)
        if apart is None:
            continue
        where = _random_op(twin, case)
        hidden = next((name for name in unregistered(twin.model) if name.rpartition(".")[0] == where.module), None) if where.op else None
        dropout = bool(forced) and difference(run(subject.twin(attention=name), case), run(subject.twin(attention=name), case)) is None
        yield Found(
            probe="",
            severity="error",
            message=f"two calls in eval mode differ by {apart.max_abs:.3g}" + (" once dropout is configured" if dropout else ""),
            where=where,
            source=source_lines(where),
            cause=f"the modules in {hidden} are not registered, so model.eval() does not reach them: their dropout goes on"
            if hidden
            else f"{where.op} draws random numbers in eval mode: dropout is not switched off by model.eval()"
            if where.op
            else None,
            fix="keep modules in nn.ModuleList or nn.ModuleDict"
            if hidden
            else "dropout_p=self.p if self.training else 0.0, or F.dropout(x, p, training=self.training)"
            if where.op
            else None,
            expected="equal bits",
            observed=f"{apart.mismatched} of {apart.total} logits differ",
            evidence={"dropout rates set to 0.3": ", ".join(sorted(forced)[:6])} if forced else {},
            case=case,
        )
        return


@probe()
def zero_rate_draws_nothing(subject: Subject) -> Iterator[Finding]:
    """In train mode with every dropout rate at zero, each attention implementation repeats itself where another one does.

    Why: a rate of zero switches dropout off, and an implementation that goes on dropping trains another model.
    Catches: F.dropout(weights, training=self.training), which drops half of them where the rate was forgotten.
    """
    repeating, drawing = [], []
    for choice, twin in attention_twins(subject):
        name = choice if "attention" in choice else f"{choice} attention"
        train = twin.fresh_twin(training=True, attention=twin.attention)
        set_dropout(train.model, 0.0)
        batch, seq = train.sizes()
        case = Case(name="a batch in train mode without dropout", input_ids=train.token_ids(batch, seq, seed=16))
        apart = difference(_seeded(train, case, 1), _seeded(train, case, 2))
        if apart is None:
            repeating.append(name)
        else:
            drawing.append((name, train, case, apart))
    if len(repeating) + len(drawing) < 2:
        not_applicable("the model offers one attention implementation")
    if not repeating:
        return  # noise of the model's own, which no rate governs
    for name, train, case, apart in drawing:
        with _Rates() as rates:
            _seeded(train, case, 1)
        if rates.seen != {0.5}:
            continue  # a rate under a name that says nothing of dropout: it is the model's own, and it was not at zero
        where = _random_op(train, case)
        yield Found(
            probe="",
            severity="error",
            message=f"with every dropout rate at zero two calls in train mode differ by {apart.max_abs:.3g} with {name}, and not with {repeating[0]}",
            where=where,
            source=source_lines(where),
            cause=f"{where.op} draws at a rate of its own: none of the model's rates reaches it" if where.op else None,
            fix="F.dropout(x, p=rate, training=self.training): without p the rate is 0.5" if where.op else None,
            expected=f"equal bits, as with {repeating[0]}",
            observed=f"{apart.mismatched} of {apart.total} logits differ",
            case=case,
        )


class _Rates(TorchFunctionMode):
    """Notes the rates above zero with which F.dropout drops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[float] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout and kwargs.get("training", True) and kwargs.get("p", 0.5) > 0:
            self.seen.add(float(kwargs.get("p", 0.5)))
        return func(*args, **kwargs)


def _seeded(twin: Subject, case: Case, seed: int) -> Tensor:
    with random_state_kept(), quiet(), own_code(twin, case):
        set_seed(seed)
        return twin.logits(case)


def _random_op(twin: Subject, case: Case) -> Where:
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case))
    for event, spot in zip(recording.events, recording.spots, strict=True):
        if event.op in RANDOM_OPS:
            return place_of(spot, module=event.where.module, op=event.op)
        if event.op.startswith("_scaled_dot_product") and spot is not None:
            dropout = place_of(spot, module=event.where.module, op=event.op)
    return locals().get("dropout", Where())
