"""The subject around a live model: how it wants to be called, learnt from its signature and a few short runs."""

import inspect
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .caches import Held, held, hold, keeps_its_cache, makes_its_kind, makes_new_caches, new_cache
from .convention import (
    ALIGNED_LABELS,
    HANDED_NAMES,
    LOSS_METHODS,
    RETURNED_NAMES,
    SHIFTED_LABELS,
    WHOLE_MASKS,
    Convention,
    NoLogits,
    find_logits,
    ids_tensor,
    is_loss_per_token,
    read_signature,
    whole_mask,
)
from .errors import SubjectError
from .load import SubjectCodeError
from .own_code import own_code, own_refusal, quiet
from .records import Case
from .settings import VOCAB_NAMES, config_of
from .settle import settled
from .sources import code_of, traceback_frames
from .subject import Subject

LOGITS_FLAG = re.compile(r"(get|return|output|with|compute|need)_?\w*logits")  # a switch without which forward keeps them
MULTIPLES_TRIED = (2, 4, 8, 16, 32, 64, 128)  # chunk sizes


def from_model(
    model: nn.Module,
    *,
    spec: str | None = None,
    config: object = None,
    adapter: Callable[..., Any] | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    rebuild: Callable[[], Subject] | None = None,
) -> Subject:
    """The subject around a live model; its calling convention comes from the signature and from one short run.

    SubjectError when the call cannot be guessed, SubjectCodeError when the model raises on its first run.
    """
    forward = adapter or inner_model(model).forward
    convention = read_signature(_without_model(forward) if adapter else forward)
    subject = Subject(
        spec=spec or type(model).__name__,
        model=model,
        convention=convention,
        config=config if config is not None else config_of(model),
        tokenizer=tokenizer,
        adapter=adapter,
        rebuild=rebuild,
        declared_vocab=vocab_size,
        seed=seed,
    )
    _measure_vocabulary(subject)
    subject.convention = settle_convention(subject)
    _narrow_vocabulary(subject)
    if subject.convention.labels and (
        _decodes_for_an_encoder(subject.config) or _says_not_shifted(forward) or _has_loss_for_each_label(subject)
    ):
        subject.convention = replace(subject.convention, labels_aligned=True)
    return subject


def _measure_vocabulary(subject: Subject) -> None:
    """Take the width of the logits for the vocabulary where neither the config nor an embedding module says how many ids
    there are (parameters in a dict, looked up by a function), and the last of that many ids can be fed."""
    if subject.declared_vocab or subject.embedding_rows or isinstance(subject.setting(*VOCAB_NAMES), int):
        return
    with settled(subject.model, seed=subject.seed), quiet(), suppress(Exception):  # who cannot be run is told so elsewhere
        subject.model.eval()
        width = subject.logits(Case(name="vocabulary", input_ids=((0, 1, 0, 1, 1), (1, 0, 0, 1, 0)))).shape[-1]
        subject.logits(Case(name="last id", input_ids=((0, width - 1, 1, 0, 1), (0, 1, 1, 0, 1))))
        subject.declared_vocab = width
        subject.assumptions.append(f"a vocabulary of {width} ids, the width of the logits: no config or embedding module says how many")


def _narrow_vocabulary(subject: Subject) -> None:
    """Where no config says how many ids there are and the logits are narrower than the embedding, which then has rows for
    more than tokens (a blank, a padding row), as many ids as logits."""
    if subject.declared_vocab or subject.setting(*VOCAB_NAMES) is not None or subject.embedding_rows is None:
        return
    with settled(subject.model, seed=subject.seed), quiet(), suppress(Exception):  # as above
        subject.model.eval()
        width = subject.logits(subject.first_case()).shape[-1]
        if 1 < width < subject.embedding_rows:
            subject.assumptions.append(
                f"a vocabulary of {width} ids, the width of the logits; the embedding has {subject.embedding_rows} rows"
            )
            subject.declared_vocab = width


def settle_convention(subject: Subject) -> Convention:
    """The convention after one run: the form of the call that runs, whether all positions come back without labels, and
    in which order the dimensions of ids and logits stand. SubjectError where the model declines the call itself."""
    case = subject.first_case()
    with settled(subject.model, seed=subject.seed), torch.no_grad(), quiet():
        subject.model.eval()
        try:
            with own_code(subject, case, stage="first run"):
                output = subject.call(case)
        except SubjectCodeError as error:
            if subject.adapter is not None:
                raise
            subject.convention = _other_form(subject, case, error)
            output = subject.call(case)
        subject.convention = _with_whole_mask(subject, case) or subject.convention
        if output.logits.shape[1] == 1 and case.seq_len > 1 and subject.convention.labels:
            return replace(subject.convention, logits_need_labels=True)
        if output.logits.shape[1] == 1 and case.seq_len > 1 and subject.adapter is None:
            subject.assumptions.append(
                "it gives the logits of the last position only, so those of every position are taken from its prefix"
            )
            return replace(subject.convention, last_only=True, cache=None)
        if not subject.convention.sequence_first and (reason := _sequence_first(subject, case)) is not None:
            subject.convention = replace(subject.convention, sequence_first=True)
            subject.assumptions.append(
                f"ids are [seq_len, batch]: {reason}; where yours are [batch, seq_len], it mixes the rows (batch_first=True)"
            )
        subject.convention = _with_own_cache(subject, case)
        form = _with_loss_method(subject)
        return _with_returned_cache(subject, form) or _with_handed_cache(subject, form)


def _with_own_cache(subject: Subject, case: Case) -> Convention:
    """The convention without the places of new tokens, where the model declines to fill the cache that it made for them: it
    wants to be told more, as the whole mask, and what that is cannot be guessed."""
    form, bare = subject.convention, held(subject.model)
    if subject.adapter is not None or form.places is None or not keeps_its_cache(subject):
        return form
    trial = replace(subject.called_as(form), bare=bare)
    try:
        with own_code(trial, case):
            new_cache(trial, case.batch_size, case.seq_len)
            trial.forward(
                {form.ids: ids_tensor(case.input_ids, subject.device), form.places: torch.arange(case.seq_len, device=subject.device)}
            )
    except SubjectCodeError as error:
        if (words := own_refusal(error)) is not None:
            subject.assumptions.append(f"its cache is left alone: the model declines to fill one with {form.places} alone ({words})")
            return replace(form, places=None)
    finally:
        hold(bare)
    return form


def _other_form(subject: Subject, case: Case, error: SubjectCodeError) -> Convention:
    """Another form of the call, under which the first run does go through; else the error, or a SubjectError where the
    model speaks of how it wants to be called. What a form raises that is not the right one says nothing: the first error counts.
    """
    form, original = subject.convention, error.__cause__
    call = f"forward({form.ids} [{case.batch_size}, {case.seq_len}])"
    if isinstance(original, NoLogits):
        flags = [n for n, p in inspect.signature(subject.model.forward).parameters.items() if p.default is False and LOGITS_FLAG.search(n)]
        for name in flags:
            asked = subject.called_as(replace(form, flags=(name,)))
            with suppress(Exception):  # a flag for something else
                asked.call(case)
                return asked.convention
        if original.loss:
            raise SubjectError(f"{call} returns a loss and no logits; state a call that gives logits with --adapter") from error
        raise error
    required = [
        p for p in inspect.signature(subject.model.forward).parameters.values() if p.default is p.empty and p.kind < p.VAR_POSITIONAL
    ]
    if len(required) == 1:
        trial = replace(form, ids="input_ids", in_dict=True, labels="labels", labels_aligned=False, attention_mask=None, position_ids=None)
        with suppress(Exception):
            told = subject.called_as(trial).call(replace(case, labels=case.input_ids))
            return trial if told.loss is not None else replace(trial, labels=None)
    if form.state:  # the rows that its state is for say which dimension holds them
        trial = replace(form, sequence_first=True)
        with suppress(Exception):
            subject.called_as(trial).call(case)
            subject.assumptions.append(f"ids are [seq_len, batch]: {form.state} is made for the rows of the second dimension")
            return trial
    if form.attention_mask in form.required and (whole := _with_whole_mask(subject, case)) is not None:
        return whole
    if (form.places or form.start) and makes_new_caches(subject):
        bare: list[Held] = []
        with suppress(Exception):
            trial = replace(form, sets_up=True)
            replace(subject.called_as(trial), bare=bare).call(case)
            hold(bare)
            return trial
        hold(bare)
    words = own_refusal(error)
    if words is None:
        raise error
    for multiple in MULTIPLES_TRIED:
        trial = replace(form, multiple=multiple)
        with suppress(Exception):
            asked = subject.called_as(trial)
            for length in (case.seq_len, multiple + 1):
                asked.call(Case(name="how long", input_ids=subject.token_ids(case.batch_size, length)))
            subject.assumptions.append(
                f"sequences of a multiple of {multiple} tokens; shorter ones are padded on the right, and their logits cut ({words})"
            )
            return trial
    if traceback_frames(original.__traceback__ if original else None)[-1][0].f_code is code_of(type(subject.model).forward):
        raise SubjectError(f"the model declines {call}: {words}; state the call with --adapter") from error
    raise error


def _with_whole_mask(subject: Subject, case: Case) -> Convention | None:
    """The convention without a mask of the padding, where one [batch, seq_len] is not accepted and the argument holds the
    whole attention mask, causality included: then it is causal as the mask says, and sees everything where that hides nothing.
    Where it is never causal, one that may be left out is left out. A mask that is refused, in whatever words, is not accepted.
    """
    form, (batch, seq) = subject.convention, (case.batch_size, case.seq_len)
    if form.attention_mask is None or subject.adapter is not None:
        return None
    with suppress(Exception):
        subject.call(case, attention_mask=torch.ones(batch, seq, dtype=torch.long, device=subject.device))
        return None
    last = replace(case, input_ids=tuple((*row[:-1], row[0]) for row in case.input_ids))
    never: list[bool] = []
    for whole in WHOLE_MASKS:
        told = replace(form, attention_mask=None, whole_mask=(form.attention_mask, whole))
        with suppress(Exception):
            apart = []
            for hide in (True, False):
                trial = subject.called_as(told)
                mask = whole_mask(whole, seq, hide=hide)
                left, right = (trial.forward({form.ids: ids_tensor(c.input_ids), form.attention_mask: mask}) for c in (case, last))
                left, right = (find_logits(r, batch_size=batch, seq_len=seq).logits[:, :-1] for r in (left, right))
                apart.append(not torch.equal(left, right))
            if apart == [False, True]:
                subject.assumptions.append(
                    f"{form.attention_mask} is the whole mask [batch, 1, seq_len, seq_len], causality included; no padding is asked of it"
                )
                return told
            never.append(all(apart))
    return replace(form, attention_mask=None) if never and all(never) and form.attention_mask not in form.required else None


def _sequence_first(subject: Subject, case: Case) -> str | None:
    """Why ids are read as `[seq_len, batch]`: read so, the model breaks fewer rules than as `[batch, seq_len]`. The rules: what
    comes later reaches nothing before it, rows do not reach each other, and it does not matter which row it is."""
    if subject.adapter is not None or subject.convention.multiple > 1 or subject.device.type == "meta":
        return None
    ids = torch.tensor(case.input_ids)
    other = torch.tensor(subject.token_ids(*ids.shape, seed=1))
    other = torch.where(other == ids, other.roll(1, 0), other)

    def logits(changed: Tensor) -> Tensor:
        return subject.logits(replace(case, input_ids=tuple(map(tuple, changed.tolist()))))

    def same(one: Tensor, two: Tensor) -> bool:
        rounding = 64 * torch.finfo(one.dtype).eps * one.abs().max()  # a maximum over all rows that is taken off rounds anew
        return bool((one - two).abs().max() <= rounding)

    def reaches(dim: int) -> tuple[bool, bool]:
        """Whether the first place of a dimension reaches later ones, and the last place earlier ones."""
        size = ids.shape[dim]
        first, last = (logits(torch.where(torch.arange(size).view(-1, *(1,) * (1 - dim)) == at, other, ids)) for at in (0, size - 1))
        kept = [same(plain.narrow(dim, at, size - 1), moved.narrow(dim, at, size - 1)) for at, moved in ((1, first), (0, last))]
        return not kept[0], not kept[1]

    with suppress(Exception):  # what cannot be compared, as fake tensors
        plain = logits(ids)
        later, earlier = reaches(0)
        if not (later or earlier):
            return None
        alike, along = logits(ids[:1, :1].expand_as(ids)), reaches(1)
        places = not same(alike, alike[:1])  # what picks tokens out of all rows reaches across, and knows no places
        as_given = along[1] + (later or earlier) + places
        turned = earlier + any(along)
        if same(alike, alike[:, :1]) and turned < as_given and (places or not turned):
            return "the first dimension is read in order and the second stays apart" if not turned else "read so, it breaks fewer rules"
    return None


def _with_returned_cache(subject: Subject, form: Convention) -> Convention | None:
    """The convention with a cache that every call gives back, and that changes what the next call gives when it is handed on."""
    names = inspect.signature(subject.model.forward).parameters
    name = next((each for each in RETURNED_NAMES if each in names and names[each].default is None), None)
    if name is None or form.use_cache or form.places or subject.adapter is not None:
        return None
    trial = replace(subject, convention=replace(form, cache=name), _last=[], _twins={})
    case, more = (Case(name="a cache", input_ids=subject.token_ids(2, length)) for length in (3, 1))
    with suppress(Exception):  # what it gives back is for something else
        cache, alone = trial.call(case).cache, trial.call(more).logits
        if cache is None:
            return None
        try:
            output = trial.call(more, cache=cache)
        except RuntimeError:  # what it gave itself does not fit: cache.* says what is wrong
            return None if _reads_the_whole_again(trial) else trial.convention
        return trial.convention if output.logits.shape == alone.shape and not torch.equal(output.logits, alone) else None
    return None


def _with_handed_cache(subject: Subject, form: Convention) -> Convention:
    """The convention with the cache that the caller makes, where two chunks run with one."""
    names = inspect.signature(subject.model.forward).parameters
    name = next((each for each in HANDED_NAMES if each in names), None)
    if name is None or form.use_cache or form.places or subject.adapter is not None:
        return form
    # With a start beside it the cache is the caller's all the same: the model keeps none.
    without = replace(form, start=None) if form.start and names[form.start].default is not inspect.Parameter.empty else form
    case = Case(name="a cache", input_ids=subject.token_ids(2, 3))
    trial = subject.called_as(replace(form, cache=name, hands_cache=True))
    if makes_its_kind(subject.model) and _fails(trial, case):
        return trial.convention  # what the model's own method makes is of the right kind: cache.* says what is wrong
    with suppress(Exception):  # another kind of cache: what it wants is not known, so nothing is asked of it
        output = trial.call(case, use_cache=True)
        try:
            output = trial.call(case, use_cache=True, cache=output.cache)
        except RuntimeError:  # a cache of its own class that sizes do not fit in is one all the same, and cache.* says what is wrong
            return without if type(output.cache) in (dict, list, tuple) or _reads_the_whole_again(trial) else trial.convention
        return trial.convention if output.logits.shape[1] == case.seq_len else without
    return without


def _fails(trial: Subject, case: Case) -> bool:
    """Whether sizes do not fit in a call with a fresh cache."""
    try:
        trial.call(case, use_cache=True)
    except Exception as error:  # of another kind: the call wants something else
        return isinstance(error, RuntimeError | IndexError)
    return False


def _reads_the_whole_again(trial: Subject) -> bool:
    """Whether a cache goes with the whole sequence once more, of which the model drops what it has seen, as in XLM."""
    short, whole = (Case(name="a cache", input_ids=trial.token_ids(2, length)) for length in (3, 5))
    try:
        trial.call(whole, use_cache=True, cache=trial.call(short, use_cache=True).cache)
    except NoLogits:  # it ran, and gives the logits of what was new
        return True
    except Exception:  # what it is the probes of the cache tell
        return False
    return True


def _with_loss_method(subject: Subject) -> Convention:
    """The convention with a method that takes ids and labels, where forward takes no labels."""
    form = subject.convention
    for name in LOSS_METHODS if form.labels is None and subject.adapter is None else ():
        method = getattr(subject.model, name, None)
        if not callable(method) or isinstance(method, nn.Module):
            continue
        parameters = [p for p in inspect.signature(method).parameters.values() if p.default is p.empty]
        if len(parameters) == 2 and (labels := parameters[1].name) in (*SHIFTED_LABELS, *ALIGNED_LABELS) and parameters[0].name == form.ids:
            return replace(form, loss_method=name, labels=labels, labels_aligned=labels in ALIGNED_LABELS)
    return form


def _has_loss_for_each_label(subject: Subject) -> bool:
    """Whether every label of a row has a loss of its own, the first too, which a shift inside would leave out."""
    case, form = subject.first_case(), subject.convention
    if form.labels is None or form.loss_method or form.multiple > 1 or subject.adapter is not None:
        return False
    with settled(subject.model, seed=subject.seed), torch.no_grad(), quiet(), suppress(Exception):  # the probes of the loss tell
        subject.model.eval()
        ids = ids_tensor(case.input_ids, subject.device)
        assert ids is not None
        result = subject.forward({form.ids: ids, form.labels: ids.clone()})
        return is_loss_per_token(result, case) and isinstance(result, Tensor) and result.numel() == ids.numel()
    return False


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside of wrappers that pass all arguments on, forward(*args, **kwargs), to the one module they hold."""
    while len(children := list(model.children())) == 1:
        kinds = {p.kind for p in inspect.signature(model.forward).parameters.values()}
        if kinds != {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            break
        model = children[0]
    return model


def _says_not_shifted(forward: Callable[..., Any]) -> bool:
    """Whether the documentation of forward says in so many words that labels are not shifted inside, as TrOCR's does."""
    return re.search(r"labels (are|is) (\*\*)?not shifted", " ".join((forward.__doc__ or "").lower().split())) is not None


def _decodes_for_an_encoder(config: object) -> bool:
    """Whether a config class describes an encoder with a decoder by default: its decoder alone takes labels that the
    caller has aligned, as in BartForCausalLM."""
    default = getattr(type(config), "is_encoder_decoder", False)
    if isinstance(default, bool) and default:
        return True
    with suppress(Exception):  # not every class builds from nothing
        return hasattr(config, "is_encoder_decoder") and bool(type(config)().is_encoder_decoder)  # type: ignore[attr-defined]
    return False


def _without_model(adapter: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(adapter)
    parameters = list(signature.parameters.values())
    if len(parameters) < 2:
        raise SubjectError("an adapter takes the model and the token ids: adapter(model, input_ids, ...)")

    def call(*args: Any, **kwargs: Any) -> Any:
        return adapter(*args, **kwargs)

    call.__signature__ = signature.replace(parameters=parameters[1:])  # type: ignore[attr-defined]
    return call
