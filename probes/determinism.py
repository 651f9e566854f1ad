"""The same call gives the same result."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from olmodebug.compare import difference
from olmodebug.explain import place_of, source_lines
from olmodebug.invariance import run
from olmodebug.load import SubjectCodeError
from olmodebug.probe import probe
from olmodebug.records import Case, Where
from olmodebug.repair import Found
from olmodebug.report import Finding
from olmodebug.settle import settled
from olmodebug.subject import Subject, attention_choices, own_code, quiet
from olmodebug.trace import record

DROPOUT_WORDS = ("dropout", "drop", "pdrop")
RANDOM_OPS = ("bernoulli", "bernoulli_", "native_dropout", "rand_like", "randn_like", "rand", "randn", "uniform_", "normal_", "multinomial")


@probe()
def eval_repeats(subject: Subject) -> Iterator[Finding]:
    """In eval mode two calls give the same bits, with every dropout rate set to 0.3.

    Why: evaluation that is random cannot be compared, and dropout in eval makes every result a little worse.
    Catches: scaled_dot_product_attention(dropout_p=self.p) without a look at self.training; F.dropout(x, p).
    """
    for name in [None, *attention_choices(subject)]:
        twin = subject.fresh_twin(attention=name)
        forced = force_dropout(twin.model)
        batch, seq = twin.sizes()
        case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=16))
        first, second = _seeded(twin, case, 1), _seeded(twin, case, 2)
        apart = difference(first, second)
        if apart is None:
            continue
        where = _random_op(twin, case)
        dropout = bool(forced) and difference(run(subject.twin(attention=name), case), run(subject.twin(attention=name), case)) is None
        yield Found(
            probe="",
            severity="error",
            message=f"two calls in eval mode differ by {apart.max_abs:.3g}" + (" once dropout is configured" if dropout else ""),
            where=where,
            source=source_lines(where),
            cause=f"{where.op} draws random numbers in eval mode: dropout is not switched off by model.eval()" if where.op else None,
            fix="dropout_p=self.p if self.training else 0.0, or F.dropout(x, p, training=self.training)" if where.op else None,
            expected="equal bits",
            observed=f"{apart.mismatched} of {apart.total} logits differ",
            evidence={"dropout rates set to 0.3": ", ".join(sorted(forced)[:6])} if forced else {},
            case=case,
        )
        return


@probe()
def calls_do_not_interfere(subject: Subject) -> Iterator[Finding]:
    """A call gives the same bits after other calls: of other lengths, batches, masks and positions.

    Why: a mask or table cached under too small a key is right in the first test and wrong ever after.
    Catches: a mask cached by sequence length alone; a rotary table that keeps what an earlier call put into it.
    """
    twin = subject.fresh_twin()
    batch, seq = twin.sizes()
    case = Case(name="the first call", input_ids=twin.token_ids(batch, seq, seed=17))
    before = run(twin, case)
    for other in _others(twin, batch, seq):
        try:
            run(twin, other)
        except SubjectCodeError:
            continue  # what does not run at all is told by the probes of masks, positions and batches
        apart = difference(before, run(twin, case))
        if apart is not None:
            yield Found(
                probe="",
                severity="error",
                message=f"a call differs by {apart.max_abs:.3g} from the same call before, after {other.name}",
                cause="the model keeps something from one call that changes the next",
                fix="key what is cached by everything it depends on: sizes, offset, window, dtype, device, mask",
                expected="equal bits",
                observed=f"{apart.mismatched} of {apart.total} logits differ",
                evidence={"the call between": f"batch {other.batch_size}, seq_len {other.seq_len}"},
                case=case,
            )
            return


@probe()
def leaves_things_alone(subject: Subject) -> Iterator[Finding]:
    """A forward in eval mode changes neither its arguments nor the model's parameters and buffers.

    Why: ids that are overwritten in place poison the labels made from them.
    Catches: labels[mask] = -100 on a view of input_ids; running statistics updated in eval.
    """
    twin = subject.fresh_twin()
    batch, seq = twin.sizes()
    ids = torch.tensor(twin.token_ids(batch, seq, seed=18))
    kept = ids.clone()
    state = {name: t.clone() for name, t in twin.model.state_dict().items()}
    arguments: dict[str, Tensor | bool] = {twin.convention.ids: ids}
    if twin.convention.labels:
        arguments[twin.convention.labels] = ids
    if twin.convention.use_cache:
        arguments[twin.convention.use_cache] = False
    if twin.adapter is None:
        first = arguments.pop(twin.convention.ids)
        case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=18))
        with torch.no_grad(), quiet(), settled(seed=twin.seed):
            try:
                twin.model(first, **arguments)
            except Exception:  # labels of another shape, or none without images: the loss probes speak of those
                arguments.pop(twin.convention.labels or "", None)
                with own_code(twin, case):
                    twin.model(first, **arguments)
    if not torch.equal(ids, kept):
        yield Found(
            probe="",
            severity="error",
            message=f"forward writes into its {twin.convention.ids}: {int((ids != kept).sum())} of {ids.numel()} values changed",
            cause="an in-place write reaches the caller's tensor through a view",
            fix="clone before writing",
        )
    changed = [name for name, t in twin.model.state_dict().items() if name in state and not _same(t, state[name])]
    if changed:
        yield Found(
            probe="",
            severity="error",
            message=f"a forward in eval mode changes {changed[0]}" + (f" and {len(changed) - 1} more" if len(changed) > 1 else ""),
            where=Where(module=changed[0].rpartition(".")[0]),
            fix="update buffers in train mode only",
        )


def force_dropout(model: nn.Module) -> list[str]:
    """Set every dropout rate of the model to 0.3, in modules and in plain attributes; the names of what was set."""
    forced = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.AlphaDropout):
            module.p = 0.3
            forced.append(name)
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and 0.0 <= value < 1.0 and any(word in key.lower() for word in DROPOUT_WORDS):
                setattr(module, key, 0.3)
                forced.append(f"{name}.{key}" if name else key)
    return forced


def _seeded(twin: Subject, case: Case, seed: int) -> Tensor:
    with torch.random.fork_rng(devices=[]), quiet(), own_code(twin, case):
        torch.manual_seed(seed)
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


def _others(twin: Subject, batch: int, seq: int) -> Iterator[Case]:
    longest = twin.max_positions or 4 * seq
    for length in (max(1, seq - 3), min(seq + 5, longest)):
        yield Case(name=f"a call with {length} tokens", input_ids=twin.token_ids(batch + 1, length, seed=19))
    if twin.convention.position_ids and longest > seq + 4:
        moved = (tuple(range(4, 4 + seq)),) * batch
        yield Case(name="a call with other positions", input_ids=twin.token_ids(batch, seq, seed=19), position_ids=moved)
    if twin.convention.attention_mask:
        mask = ((0,) * (seq // 2) + (1,) * (seq - seq // 2),) * batch
        yield Case(name="a call with a padding mask", input_ids=twin.token_ids(batch, seq, seed=19), attention_mask=mask)


def _same(left: Tensor, right: Tensor) -> bool:
    return difference(left, right) is None
