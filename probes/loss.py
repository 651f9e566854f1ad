"""The loss that a model computes itself is the next-token cross-entropy, nothing else."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import log, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from olmodebug.compare import difference, roundings_limit
from olmodebug.explain import place_of, source_lines
from olmodebug.load import SubjectCodeError
from olmodebug.own_code import own_code, quiet
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case, Rows, Where
from olmodebug.relations.invariance import run
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.settle import settled
from olmodebug.subject import Subject
from olmodebug.tracing.tracer import Recording, record

IGNORED = -100
EQUAL = 1e-5  # some roundings of a loss in float32
MOST_SMOOTHING = 0.5  # the least weight that label smoothing leaves the label
# Losses are computed in float32 in most models, also where the model itself is in float64.
LOSS_LIMIT = roundings_limit({"float32"})
REDUCTIONS = ("nll_loss_forward", "nll_loss2d_forward", "_log_softmax", "logsumexp", "mean", "sum", "cross_entropy_loss")  # to a loss


@probe(after=("logits.finite",))
def next_token_cross_entropy(subject: Subject) -> Iterator[Finding]:
    """The loss is the mean cross-entropy of every token from the position before it (labels), or of the targets as given.

    Why: a wrong shift trains another task and still gives a plausible curve.
    Catches: labels shifted twice, not at all, or after flattening the batch; a sum divided by the wrong count.
    """
    _needs_labels(subject)
    twin = subject.twin()
    batch, seq = twin.sizes()
    ids = twin.token_ids(batch, seq, seed=10)
    labels = twin.token_ids(batch, seq, seed=11)
    case = Case(name="labels unlike the tokens", input_ids=ids, labels=labels)
    logits, loss = _loss(twin, case)
    target = torch.tensor(labels)
    shift = 0 if twin.convention.labels_aligned else 1
    expected = cross_entropy(logits, target, shift=shift)
    limit = LOSS_LIMIT
    if _close(loss, expected, limit) or _has_other_terms(twin, case, loss, expected):
        if (found := _of_other_logits(twin, case, logits, target, loss, shift)) is not None:
            yield found
        return
    if _takes_aligned(twin, logits, target, loss):
        yield replace(
            _wrong(twin, case, loss, expected, (None, None)),
            severity="note",
            message=f"{twin.convention.labels} are taken as aligned: logit t is compared with label t, so the caller has to shift",
        )
        return
    yield _wrong(twin, case, loss, expected, _cause(logits, target, loss, shift, limit))


@probe(after=("loss.next-token-cross-entropy",))
def ignores_minus_100(subject: Subject) -> Iterator[Finding]:
    """Labels of -100 do not count, neither in the sum nor in the number of tokens it is divided by.

    Why: padding and prompts are masked with -100.
    Catches: a mean over all tokens; ignore_index that is not passed on.
    """
    _needs_labels(subject)
    twin = subject.twin()
    batch, seq = twin.sizes()
    ids = twin.token_ids(batch, seq, seed=12)
    shift = 0 if twin.convention.labels_aligned else 1

    def ignoring(value: int) -> Case:
        labels = tuple(tuple(value if i % (2 + r) == 0 else token for i, token in enumerate(row)) for r, row in enumerate(ids))
        return Case(name=f"some labels {value}", input_ids=ids, labels=labels)

    case = ignoring(IGNORED)
    try:
        logits, loss = _loss(twin, case)
    except SubjectCodeError:
        if not twin.convention.labels_aligned and not _known_aligned(twin, ids):
            raise
        case = ignoring(-1)  # nanoGPT's choice
        try:
            logits, loss = _loss(twin, case)
        except SubjectCodeError as error:
            not_applicable(f"{twin.convention.labels} of -100 and of -1 are refused: {error.__cause__}")
    target = torch.tensor(case.labels)
    target = target.masked_fill(target < 0, IGNORED)
    expected = cross_entropy(logits, target, shift=shift)
    limit = LOSS_LIMIT
    if _close(loss, expected, limit) or _has_other_terms(twin, case, loss, expected) or _takes_aligned(twin, logits, target, loss):
        return
    yield _wrong(twin, case, loss, expected, _cause(logits, target, loss, shift, limit), severity_word="labels of -100 change the loss")


@probe(after=("loss.next-token-cross-entropy", "loss.ignores-minus-100"))
def all_ignored_is_finite(subject: Subject) -> Iterator[Finding]:
    """A batch in which no label counts gives a loss that is finite, where the model divides by the count itself.

    Why: one such micro-batch makes every weight NaN; it comes with long prompts that are masked. (The mean of
    torch's own cross_entropy is NaN there by its documentation, and is not reported.)
    Catches: total / count without a clamp.
    """
    _needs_labels(subject)
    twin = subject.twin()
    batch, seq = twin.sizes()
    ids = twin.token_ids(batch, seq, seed=14)
    case, loss = None, None
    for value in (IGNORED, -1):
        try:
            case = Case(name=f"all labels {value}", input_ids=ids, labels=((value,) * seq,) * batch)
            loss = _loss(twin, case)[1]
            break
        except SubjectCodeError:
            continue
    if case is None or loss is None:
        not_applicable("a batch in which no label counts is refused")
    if bool(torch.isfinite(loss)):
        return
    with torch.no_grad(), quiet(), settled(seed=twin.seed):
        recording = record(twin.model, lambda: twin.call(case), keep=True)
    for event, kept, spot in zip(recording.events, recording.kept, recording.spots, strict=True):
        born = any(t.is_floating_point() and bool(torch.isnan(t).any()) for t in kept.outputs)
        if born and not any(t.is_floating_point() and bool(torch.isnan(t).any()) for t in kept.inputs):
            if event.op not in ("div", "div_", "true_divide"):
                return  # torch's own mean
            where = place_of(spot, module=event.where.module, op=event.op)
            yield Found(
                probe="",
                severity="warning",
                message=f"the loss is {float(loss)} when all labels are {case.labels[0][0] if case.labels else IGNORED}",
                where=where,
                source=source_lines(where),
                cause="the sum over no label, 0, is divided by their number, 0: 0/0 is NaN",
                fix="divide by count.clamp(min=1), or skip such a batch",
                expected="a finite loss",
                observed=str(float(loss)),
                case=case,
            )
            return


@probe(after=("loss.next-token-cross-entropy",))
def same_for_copies(subject: Subject) -> Iterator[Finding]:
    """What is added to the cross-entropy is no larger for a batch in which every row stands twice.

    Why: a sum over tokens grows with the batch, so a weight that was tuned at one size pulls harder at another.
    Catches: a balancing loss multiplied by the number of tokens; a z-loss that is a sum and not a mean.
    """
    _needs_labels(subject)
    for training in (False, True):
        twin = subject.twin(training=training)
        batch, seq = twin.sizes()
        ids = twin.token_ids(max(1, batch // 2), seq, seed=39)  # twice that is no more than the model may take
        case = Case(name="a batch", input_ids=ids, labels=ids)
        once, twice = (_added(twin, each) for each in (case, replace(case, input_ids=ids * 2, labels=ids * 2)))
        if abs(once) <= 8 * EQUAL or abs(twice - 2 * once) > EQUAL * max(1.0, abs(twice)):
            continue  # nothing that is told from rounding, or no sum
        with torch.no_grad(), quiet(), settled(seed=twin.seed):
            recording = record(twin.model, lambda: twin.call(case), keep=True)  # noqa: B023 - called at once
        where = _loss_line(recording, ("add", "add_"))
        yield Found(
            probe="",
            severity="warning",
            message=f"beside the cross-entropy the loss holds {once:.4g} for {len(ids)} rows, and {twice:.4g} when each of them stands twice",
            where=where,
            source=source_lines(where),
            cause="what is added to the cross-entropy is a sum over tokens, so its weight grows with the batch, and the cross-entropy is a mean",
            fix="divide it by the number of tokens",
            expected=f"{once:.4g}",
            observed=f"{twice:.4g}",
            case=case,
        )
        return


def cross_entropy(logits: Tensor, labels: Tensor, *, shift: int = 1) -> Tensor:
    """Mean cross-entropy in float64 of label t + shift from logits t, over the labels that are not -100."""
    scores, target = logits.detach().double(), labels
    if shift:
        scores, target = scores[:, :-shift], target[:, shift:]
    return F.cross_entropy(scores.reshape(-1, scores.shape[-1]), target.reshape(-1), ignore_index=IGNORED)


def _needs_labels(subject: Subject) -> None:
    if subject.convention.labels is None:
        not_applicable("forward takes no labels or targets")
    if any(getattr(subject.config, name, None) is not None for name in ("num_codebooks", "vision_config", "audio_config")):
        not_applicable("its labels belong to images, sound or codebooks too")
    if "target_mapping" in inspect.signature(subject.model.forward).parameters:
        not_applicable("its labels belong to the words that target_mapping picks (permutation language models, XLNet)")
    if getattr(subject.config, "disable_ngram_loss", True) is False:
        not_applicable("its loss predicts several tokens ahead by design (n-gram loss)")


def _loss(twin: Subject, case: Case) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), quiet(), settled(seed=twin.seed), own_code(twin, case):
        output = twin.call(case)
    if output.loss is None:
        not_applicable(f"no scalar loss comes back when {twin.convention.labels} are given")
    return output.logits.cpu(), output.loss.detach().cpu()


def _added(twin: Subject, case: Case) -> float:
    """What the loss holds beside the cross-entropy."""
    logits, loss = _loss(twin, case)
    return float(loss) - float(cross_entropy(logits, torch.tensor(case.labels), shift=0 if twin.convention.labels_aligned else 1))


def _close(loss: Tensor, expected: Tensor, limit: float) -> bool:
    return bool(torch.isfinite(loss)) and abs(float(loss) - float(expected)) <= limit * max(1.0, abs(float(expected)))


def _of_other_logits(twin: Subject, case: Case, logits: Tensor, target: Tensor, loss: Tensor, shift: int) -> Found | None:
    """What is wrong where the loss is that of logits which stand in another order than those without labels."""
    if twin.convention.logits_need_labels:
        return None
    plain = run(twin, replace(case, labels=None)).cpu()
    if plain.shape != logits.shape or difference(plain, logits, relative_limit=LOSS_LIMIT) is None:
        return None
    rows, given = plain.flatten(0, 1), logits.flatten(0, 1)
    if difference(rows.double().sort(0).values, given.double().sort(0).values, relative_limit=LOSS_LIMIT) is not None:
        return None  # other numbers, not the same in another order
    expected = cross_entropy(plain, target, shift=shift)
    cause = f"with {twin.convention.labels} the logits stand in another order than without: rows and positions are mixed before the loss"
    return _wrong(twin, case, loss, expected, (cause, "flatten logits and labels in the same order: logits.view(-1, vocab)"))


def _takes_aligned(twin: Subject, logits: Tensor, labels: Tensor, loss: Tensor) -> bool:
    """Whether `labels` are compared unshifted by a model that does not follow transformers otherwise: OLMo-core shifts in
    its data loader. With a cache in the signature the name promises the shift, as everywhere in transformers."""
    form = twin.convention
    like_transformers = form.use_cache is not None or form.attention_mask is not None
    return not form.labels_aligned and not like_transformers and _close(loss, cross_entropy(logits, labels, shift=0), LOSS_LIMIT)


def _known_aligned(twin: Subject, ids: Rows) -> bool:
    """The same, seen on one batch without ignored labels."""
    logits, loss = _loss(twin, Case(name="a batch", input_ids=ids, labels=ids))
    return _takes_aligned(twin, logits, torch.tensor(ids), loss)


def _has_other_terms(twin: Subject, case: Case, loss: Tensor, expected: Tensor) -> bool:
    """Whether the loss holds the cross-entropy, and terms beside it that are a choice: a balancing loss, a z-loss, label
    smoothing, heads that predict further tokens."""
    return _keeps_its_distance(twin, case, loss, expected) or _is_added_to(twin, case, loss, expected)


def _keeps_its_distance(twin: Subject, case: Case, loss: Tensor, expected: Tensor) -> bool:
    """Whether the loss is a weight times the cross-entropy plus a term that does not depend on the labels. With a weight of 1
    that is any auxiliary loss; with less it is label smoothing, where the term is what the weight leaves of the mean over the
    vocabulary, or more, and where the weight is the same whether or not some labels are ignored."""
    line = _line(twin, case)
    if line is None:
        return False
    weight, rest, near, uniform = line
    if abs(float(loss) - weight * float(expected) - rest) > near or rest <= near:
        return False
    if abs(weight - 1) <= near:
        return True
    if not MOST_SMOOTHING <= weight < 1 or rest < (1 - weight) * uniform - near:
        return False
    if not any(label < 0 for row in case.labels or () for label in row):
        return True
    whole = _line(twin, replace(case, labels=case.input_ids))
    return whole is not None and abs(whole[0] - weight) <= max(near, whole[2])


def _line(twin: Subject, case: Case) -> tuple[float, float, float, float] | None:
    """(weight, rest, what counts as equal, cross-entropy against a uniform target) of the loss as a line over the
    cross-entropy, drawn through the likeliest and the unlikeliest labels; the ignored ones stay where they are."""
    shift = 0 if twin.convention.labels_aligned else 1
    logits, _ = _loss(twin, case)
    points, uniform = [], 0.0
    for chosen in (logits.argmin(-1), logits.argmax(-1)):
        target = torch.tensor(case.labels)
        kept = target < 0
        drawn = torch.where(kept, target, chosen.roll(shift, 1) % twin.vocab_size)
        scores, value = _loss(twin, replace(case, name="other labels", labels=tuple(map(tuple, drawn.tolist()))))
        counted = drawn.masked_fill(kept, IGNORED)
        points.append((float(cross_entropy(scores, counted, shift=shift)), float(value)))
        uniform = _mean_over_vocabulary(scores, counted, shift)
    (x1, y1), (x2, y2) = points
    if abs(x2 - x1) < 1e-3:
        return None
    weight = (y2 - y1) / (x2 - x1)
    return weight, y1 - weight * x1, EQUAL * max(1.0, abs(y1)) / min(1.0, abs(x2 - x1)), uniform


def _mean_over_vocabulary(logits: Tensor, labels: Tensor, shift: int) -> float:
    """The cross-entropy against a uniform target, over the positions whose label counts."""
    scores, target = logits.detach().double(), labels
    if shift:
        scores, target = scores[:, :-shift], target[:, shift:]
    return float(-torch.log_softmax(scores, -1).mean(-1)[target != IGNORED].mean())


def _is_added_to(twin: Subject, case: Case, loss: Tensor, expected: Tensor) -> bool:
    """Whether forward computes the cross-entropy as a number and adds to it, once or more, until it is the loss."""
    with torch.no_grad(), quiet(), settled(seed=twin.seed):
        recording = record(twin.model, lambda: twin.call(case), keep=True)
    reached: list[Tensor] = []
    for event, kept in zip(recording.events, recording.kept, strict=True):
        if not kept.outputs or kept.outputs[0].numel() != 1 or not kept.outputs[0].dtype.is_floating_point:
            continue
        made = kept.outputs[0]
        if event.op in ("add", "add_") and any(t.numel() == 1 and torch.equal(t, known) for t in kept.inputs for known in reached):
            if float(made) == float(loss) and float(made) > float(expected):
                return True
            reached.append(made)
        elif _close(made, expected, LOSS_LIMIT):
            reached.append(made)
    return False


def _cause(logits: Tensor, labels: Tensor, loss: Tensor, shift: int, limit: float) -> tuple[str | None, str | None]:
    """The formula that gives this loss exactly, if one of the known slips does."""
    mean = float(cross_entropy(logits, labels, shift=shift))
    low = float(loss.bfloat16())
    if low == float(loss) and low != mean and abs(low - mean) <= 2**-6 * abs(mean):
        return "the loss is a bfloat16 number: it was computed in bfloat16, with steps of 1/256 of its size", "compute the loss in float32"
    for cause, fix, value in _slips(logits, labels, shift):
        if abs(value - float(loss)) <= max(limit, 1e-9) * max(1.0, abs(value)) and abs(value - mean) > 1e-9:
            return cause, fix
    if int((labels == IGNORED).sum()):
        wrapped = labels.masked_fill(labels == IGNORED, 0)
        if abs(_ce(logits, wrapped, shift) - float(loss)) <= max(limit, 1e-9) * max(1.0, mean):
            return "labels of -100 are counted as token 0", "ignore_index=-100"
    return None, None


def _slips(logits: Tensor, labels: Tensor, shift: int) -> list[tuple[str, str, float]]:
    """Known slips: in words, how to mend each, and the loss that it gives."""
    size = logits.shape[-1]
    counted = labels[:, shift:] if shift else labels
    valid, everything = int((counted != IGNORED).sum()), counted.numel()
    flat, target = logits.double().reshape(-1, size), labels.reshape(-1)
    mean = float(cross_entropy(logits, labels, shift=shift))
    return [
        (
            "the labels are not shifted: logit t is compared with label t, the token it has just read",
            "shift by one",
            _ce(logits, labels, 0),
        ),
        (
            "the labels are shifted twice: logit t is compared with label t + 2",
            "shift once, in the model or outside, not both",
            _ce(logits, labels, 2),
        ),
        ("the labels are shifted once, where the caller has aligned them already", "do not shift inside", _ce(logits, labels, 1)),
        (
            "the shift runs backwards: logit t is compared with label t - 1",
            "logits[:, :-1] against labels[:, 1:]",
            _ce_back(logits, labels),
        ),
        (
            "the batch is flattened before the shift: the last position of a row is compared with the first label of the next row",
            "shift every row before flattening",
            float(F.cross_entropy(flat[:-1], target[1:], ignore_index=IGNORED)),
        ),
        (
            f"the sum over {valid} counted labels is divided by all {everything}",
            "divide by the number of labels that are not -100",
            mean * valid / everything,
        ),
        (
            f"the sum over {valid} counted labels is divided by all {labels.numel()} labels",
            "divide by the labels that count",
            mean * valid / labels.numel(),
        ),
        (
            "both the logits and the labels lose their last position, which is no shift: logit t is compared with label t",
            "logits[:, :-1] against labels[:, 1:]",
            _ce(logits[:, :-1], labels[:, :-1], 0),
        ),
        (
            "both the logits and the labels lose their first position, which is no shift: logit t is compared with label t",
            "logits[:, :-1] against labels[:, 1:]",
            _ce(logits[:, 1:], labels[:, 1:], 0),
        ),
        (
            "logits and labels are flattened in different orders: rows and positions are swapped in one of them",
            "flatten both from [batch, seq_len]",
            _ce(logits, labels.t().reshape(labels.shape), 0),
        ),
        (
            "logits and labels are flattened in different orders: rows and positions of the logits are swapped",
            "flatten both from [batch, seq_len]",
            _ce(logits.transpose(0, 1).reshape(logits.shape), labels, 0),
        ),
        ("the loss is a sum over tokens, not a mean", "reduction='mean'", mean * valid),
        (
            f"the sum is divided by the batch size {labels.shape[0]}",
            "divide by the number of labels that count",
            mean * valid / labels.shape[0],
        ),
        (
            "the rows are averaged first, then the batch: short rows weigh more",
            "one mean over all counted tokens",
            _mean_of_means(logits, labels, shift),
        ),
        ("the loss is in bits (log2)", "use the natural logarithm", mean / log(2)),
    ]


def _ce(logits: Tensor, labels: Tensor, shift: int) -> float:
    return float(cross_entropy(logits, labels, shift=shift)) if logits.shape[1] > shift else float("nan")


def _ce_back(logits: Tensor, labels: Tensor) -> float:
    scores = logits.detach().double()[:, 1:]
    return float(F.cross_entropy(scores.reshape(-1, scores.shape[-1]), labels[:, :-1].reshape(-1), ignore_index=IGNORED))


def _mean_of_means(logits: Tensor, labels: Tensor, shift: int) -> float:
    rows = [cross_entropy(logits[i : i + 1], labels[i : i + 1], shift=shift) for i in range(labels.shape[0])]
    return float(torch.stack(rows).mean())


def _wrong(
    twin: Subject, case: Case, loss: Tensor, expected: Tensor, told: tuple[str | None, str | None], *, severity_word: str | None = None
) -> Found:
    with torch.no_grad(), quiet():
        recording = record(twin.model, lambda: twin.call(case))
    where = _loss_line(recording)
    text = severity_word or "the loss is not the next-token cross-entropy of the model's own logits"
    return Found(
        probe="",
        severity="error",
        message=f"{text}: expected {float(expected):.6g}, observed {float(loss):.6g}",
        where=where,
        source=source_lines(where),
        cause=told[0],
        fix=told[1],
        expected=f"{float(expected):.6g}",
        observed=f"{float(loss):.6g}",
        case=case,
    )


def _loss_line(recording: Recording, ops: Sequence[str] = REDUCTIONS) -> Where:
    """The last of some ops that gives one number."""
    for event, spot in zip(reversed(recording.events), reversed(recording.spots), strict=True):
        if prod(event.outputs[0].shape if event.outputs else (2,)) == 1 and event.op in ops:
            return place_of(spot, module=event.where.module, op=event.op)
    return place_of(None)
