"""Ways of computing the same thing give the same result."""

import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from olmodebug.compare import difference
from olmodebug.explain import place_of, source_lines
from olmodebug.footprint.blocks import blocks_of
from olmodebug.load import SubjectCodeError
from olmodebug.own_code import own_code, quiet
from olmodebug.probe import not_applicable, probe, skip
from olmodebug.records import Case, Difference, Where
from olmodebug.relations.invariance import limit_of, run
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.settle import settled
from olmodebug.subject import Subject
from olmodebug.switches import TRAINED_SCORE, attention_twins, checkpointing_twin, score_growth, with_grown_scores
from olmodebug.tracing.attends import Attends, attentions
from olmodebug.tracing.tracer import record

# Where the two kernels order their sums differently, float32 parts inside included.
GRADIENT_LIMIT = 1e-4


@probe()
def implementations_agree(subject: Subject) -> Iterator[Finding]:
    """Every attention implementation that the model offers gives the same logits, with padding too.

    Why: a model is trained with one and served with another.
    Catches: a scale, a softcap, a window or a mask that one branch forgets.
    """
    twins = attention_twins(subject)
    if len(twins) < 2:
        not_applicable("the model offers one attention implementation")
    batch, seq = subject.sizes()
    ids = subject.token_ids(batch, seq, seed=26)
    plain = Case(name="a batch", input_ids=ids)
    cases = [plain]
    if subject.convention.attention_mask and seq > 3:
        mask = tuple((0,) * (i % 3) + (1,) * (seq - i % 3) for i in range(batch))
        cases.append(replace(plain, name="a batch padded on the left", attention_mask=mask))
    (first, left), *others = twins
    for second, right in others:
        for case in cases:
            apart = _apart(left, right, case)
            if apart is not None:
                yield _disagreement(left, right, first, second, case, apart)
                break
        else:
            factor = score_growth(left, plain)
            if factor is None:
                continue
            grown = [with_grown_scores(twin, factor) for twin in (left, right)]
            apart = _apart(grown[0], grown[1], plain)
            if apart is not None:
                large = replace(plain, name=f"attention scores of {TRAINED_SCORE:.0f}")
                yield _disagreement(grown[0], grown[1], first, second, large, apart)


@probe()
def checkpointing_agrees(subject: Subject) -> Iterator[Finding]:
    """With gradient checkpointing the loss and every gradient are those without it, also with frozen embeddings.

    Why: checkpointing may cost time and nothing else.
    Catches: use_reentrant=True, which gives no gradient at all when no input of the block requires one; a cache kept on.
    """
    plain, checkpointed = checkpointing_twin(subject, False), checkpointing_twin(subject, True)
    if plain is None or checkpointed is None:
        not_applicable("the model offers no gradient checkpointing")
    expected, observed = _gradients(plain), _gradients(checkpointed)
    if observed is None:
        skip("with checkpointing the training step does not run here")
    assert expected is not None
    # What a gradient that is zero, as a bias of keys has it, may be instead: roundings of the gradients it is a difference of.
    rounding = limit_of(plain) * max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
    for name, gradient in expected.items():
        other = observed.get(name)
        if other is None or _beyond(gradient, other, rounding):
            where = _checkpoint_place(checkpointed)
            yield Found(
                probe="",
                severity="error",
                message=f"with gradient checkpointing {name} gets " + ("no gradient" if other is None else "another gradient"),
                where=where,
                source=source_lines(where),
                expected="the gradient without checkpointing",
                observed="none" if other is None else f"off by {float((gradient - other).abs().max()):.3g}",
            )
            return
    for twin in (plain, checkpointed):
        for module in twin.model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.requires_grad_(False)
    expected, observed = _gradients(plain), _gradients(checkpointed)
    if observed is None:
        skip("with checkpointing and frozen embeddings the training step does not run here")
    lost = [name for name in expected or {} if name not in observed]
    if lost:
        where = _checkpoint_place(checkpointed)
        count = len(expected or {})
        yield Found(
            probe="",
            severity="warning",
            message=f"with gradient checkpointing and frozen embeddings {len(lost)} of {count} parameters get no gradient: the checkpoint is reentrant",
            where=where,
            source=source_lines(where),
            cause="checkpoint(use_reentrant=True) records no gradient unless an input of the block requires one",
            fix="checkpoint(..., use_reentrant=False), or enable_input_require_grads()",
            expected="the gradients without checkpointing",
            observed=f"none for {lost[0]} and {len(lost) - 1} more",
            evidence={"condition": "frozen embeddings, as with adapters"},
        )


@probe(cost="slow")
def compile_agrees(subject: Subject) -> Iterator[Finding]:
    """torch.compile gives the logits of the model that is not compiled, for two sequence lengths.

    Why: what tracing freezes (a length, a flag, a table) is wrong for the next input.
    Catches: a Python number taken from the first input; state that changes while it is traced.
    """
    twin = subject.fresh_twin()
    batch, seq = twin.sizes()
    cases = [Case(name=f"{length} tokens", input_ids=twin.token_ids(batch, length, seed=27)) for length in (seq, max(1, seq - 4))]
    expected = [run(twin, case) for case in cases]
    compiled = subject.fresh_twin()
    try:
        torch.compiler.reset()
        with quiet():
            compiled.model.compile(backend="eager")  # the graph as traced: what inductor makes of it is torch's business
            observed = [run(compiled, case) for case in cases]
    except Exception as error:
        cause = error.__cause__ or error
        skip(f"torch.compile does not take it: {type(cause).__name__}: {str(cause).partition(chr(10))[0][:120]}")
    finally:
        torch.compiler.reset()
    for case, left, right in zip(cases, expected, observed, strict=True):
        apart = difference(left, right, relative_limit=limit_of(twin))
        if apart is not None:
            yield Found(
                probe="",
                severity="warning",
                message=f"compiled, the logits of {case.name} differ by {apart.max_abs:.3g}",
                expected="no difference beyond rounding",
                observed=f"{apart.mismatched} of {apart.total} logits differ",
                evidence={"condition": "torch.compile(backend='eager')"},
                case=case,
            )
            return


@probe()
def embeddings_as_input_agree(subject: Subject) -> Iterator[Finding]:
    """inputs_embeds made with the model's own embedding gives the logits of the input_ids.

    Why: prompt tuning and multimodal models come in this way.
    Catches: an embedding scale or norm in one branch only.
    """
    import inspect

    if "inputs_embeds" not in inspect.signature(subject.model.forward).parameters or not hasattr(subject.model, "get_input_embeddings"):
        not_applicable("forward takes no inputs_embeds")
    if subject.setting("hidden_size_per_layer_input"):
        not_applicable("its layers read embeddings of their own, which need the ids (Gemma 3n)")
    twin = subject.twin()
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=28))
    expected = run(twin, case)
    try:
        with torch.no_grad(), quiet(), settled(seed=twin.seed):
            embeds = twin.model.get_input_embeddings()(torch.tensor(case.input_ids, device=twin.device))  # type: ignore[operator]
            observed = twin.model(inputs_embeds=embeds).logits.cpu()
    except Exception as error:
        skip(f"inputs_embeds alone is refused: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}")
    apart = difference(expected, observed, relative_limit=limit_of(twin))
    if apart is not None:
        where = _on_one_way_in(twin, case, embeds)
        yield Found(
            probe="",
            severity="warning",
            where=where,
            source=source_lines(where),
            cause=f"this {where.op} runs when input_ids are given, and not when inputs_embeds are" if where.op else None,
            message=f"inputs_embeds of the same tokens gives logits that differ by {apart.max_abs:.3g} from input_ids",
            fix="scale and norm the embeddings behind the place where the two ways in join",
            expected="equal logits",
            observed=f"{apart.mismatched} of {apart.total} logits differ",
            evidence={"condition": "called with inputs_embeds"},
            case=case,
        )


def _on_one_way_in(twin: Subject, case: Case, embeds: Tensor) -> Where:
    """The first op behind the embedding that runs for ids and not for embeddings; nowhere when there is none."""
    with torch.no_grad(), quiet(), settled(seed=twin.seed):
        ids = record(twin.model, lambda: twin.call(case))
        given = record(twin.model, lambda: twin.model(inputs_embeds=embeds))
    seen = {(e.op, e.where.function, e.where.line) for e in given}
    table = next((i for i, e in enumerate(ids) if e.op == "embedding"), 0)
    for event, spot in zip(ids.events[table + 1 :], ids.spots[table + 1 :], strict=True):
        if event.op != "embedding" and (event.op, event.where.function, event.where.line) not in seen:
            return place_of(spot, module=event.where.module, op=event.op)
    return Where()


def _apart(left: Subject, right: Subject, case: Case) -> Difference | None:
    limit = max(limit_of(left), limit_of(right))
    try:
        first, second = run(left, case), run(right, case)
    except SubjectCodeError:
        return None  # the probes of masks say it
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        # Code that casts scores to float32 turns float64's finfo.min into -inf, and a row of these into NaN.
        if left.dtype != torch.float64:
            return None  # the probes of masks and of precision say it
        return _apart(left.fresh_twin(dtype=torch.float32), right.fresh_twin(dtype=torch.float32), case)
    if case.attention_mask is not None and first.shape[1] == case.seq_len:
        real = torch.tensor(case.attention_mask, dtype=torch.bool)
        first, second = first[real][None], second[real][None]
    return difference(first, second, relative_limit=limit)


def _disagreement(left: Subject, right: Subject, first: str, second: str, case: Case, apart: Difference) -> Found:
    where, cause, fix = _why(left, right, first, second, case)
    return Found(
        probe="",
        severity="error",
        message=f"{first} and {second} give logits that differ by {apart.max_abs:.3g} ({case.name})",
        where=where,
        source=source_lines(where),
        cause=cause,
        fix=fix,
        expected="no difference beyond rounding",
        observed=f"{apart.mismatched} of {apart.total} logits differ",
        evidence={"logits of magnitude": apart.scale},
        case=case,
    )


def _why(left: Subject, right: Subject, first: str, second: str, case: Case) -> tuple[Where, str | None, str | None]:
    """The first attention in which the two differ, and in what: the scale, a cap, or who sees whom."""
    calls = []
    for twin in (left, right):
        with torch.no_grad(), quiet():
            calls.append(attentions(record(twin.model, lambda t=twin: t.call(case), keep=True), case.seq_len))  # type: ignore[misc]
    for a, b in zip(*calls, strict=False):
        if a.capped != b.capped:
            lacking, name, other = (b, second, first) if a.capped else (a, first, second)
            return (
                lacking.weighed.where,
                f"{other} caps its scores with tanh (softcap) and {name} does not",
                "use the branch that caps wherever a softcap is configured",
            )
        if a.visible is not None and b.visible is not None and not torch.equal(a.visible, b.visible):
            return _mask_differs(left, a, b, first, second)
        if a.scale is not None and b.scale is not None and abs(a.scale / b.scale - 1) > 1e-6:
            return _scale_differs(a, b, first, second)
    return Where(), None, None


def _scale_differs(a: Attends, b: Attends, first: str, second: str) -> tuple[Where, str | None, str | None]:
    assert a.scale is not None and b.scale is not None
    width = a.scored.inputs[0].shape[-1]
    usual = width**-0.5
    odd, name, other, right = (a, first, b, second) if abs(a.scale - usual) > abs(b.scale - usual) else (b, second, a, first)
    assert odd.scale is not None and other.scale is not None
    cause = f"{name} multiplies q.k by {odd.scale:.4g} and {right} by {other.scale:.4g} (1/sqrt(head_dim) is {usual:.4g})"
    if odd.scale == 1.0:
        cause += ": the scale is missing here"
    return odd.scored.where, cause, "pass the same scale to every implementation"


def _mask_differs(left: Subject, a: Attends, b: Attends, first: str, second: str) -> tuple[Where, str | None, str | None]:
    assert a.visible is not None and b.visible is not None
    apart = (a.visible != b.visible).nonzero()
    query, key = (int(i) for i in next((pair for pair in apart if pair[1] > pair[0]), apart[0]))
    more, sees, blind = (a, first, second) if bool(a.visible[query, key]) else (b, second, first)
    cause = f"with {sees} query {query} sees key {key}, with {blind} it does not"
    window = left.setting("sliding_window", "attention_window", "window_size")
    if isinstance(window, int) and all(int(q) - int(k) >= window for q, k in apart):
        cause += f": the sliding window of {window} never reaches {sees}"
    elif key > query:
        cause += ": later tokens are not masked there, so the future leaks"
    return more.weighed.where, cause, "build one mask and give it to every implementation"


def _beyond(expected: Tensor, observed: Tensor, rounding: float) -> bool:
    """Whether a gradient is another one, by more than an order of sums makes of it and than rounding leaves of a zero."""
    apart = difference(expected, observed, relative_limit=GRADIENT_LIMIT)
    return apart is not None and not apart.max_abs <= rounding


def _gradients(twin: Subject) -> dict[str, Tensor] | None:
    """The gradient of every parameter that gets one, none where the logits carry none; None where the step raises."""
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=29))
    twin.model.zero_grad(set_to_none=True)
    with settled(seed=twin.seed), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with own_code(twin, case):
                logits = twin.call(case).logits
            if not logits.requires_grad:
                return {}
            weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=logits.device).reshape(logits.shape)
            (logits * weights).mean().backward()
        except (SubjectCodeError, RuntimeError):
            return None
        return {name: p.grad.clone() for name, p in twin.model.named_parameters() if p.grad is not None}


def _checkpoint_place(twin: Subject) -> Where:
    """Where the blocks are called."""
    batch, seq = twin.sizes()
    case = Case(name="a batch", input_ids=twin.token_ids(batch, seq, seed=29))
    blocks = blocks_of(twin.model)
    with warnings.catch_warnings(), settled(seed=twin.seed), torch.enable_grad():
        warnings.simplefilter("ignore")
        recording = record(twin.model, lambda: twin.call(case), keep=True, catch=True)
    call = next((c for c in recording.kept_calls if blocks and c.module == blocks[0][0]), None)
    return place_of(call.spot, module=call.module.rpartition(".")[0].rpartition(".")[0]) if call else Where()
