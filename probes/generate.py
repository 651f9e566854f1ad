"""The model's own way to write text does with forward what forward is for."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from olmodebug.explain import place_of, source_lines
from olmodebug.own_code import quiet
from olmodebug.probe import NotApplicable, not_applicable, probe
from olmodebug.records import Case
from olmodebug.relations.invariance import run
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.settle import settled
from olmodebug.sources import OWN, Spot, code_of
from olmodebug.subject import Subject

COUNTS = ("max_new_tokens", "n", "num_tokens", "n_tokens", "num_new_tokens", "new_tokens", "n_new", "steps", "max_tokens")
# Arguments that make something else of the logits than their order; where they are on by default nothing is asked.
SHIFTS = ("penalty", "repeat", "bias", "suppress", "ban", "beam", "guidance", "cfg", "scale")
NEUTRAL = (None, 0, 1, 0.0, 1.0, False)
NEW, PROMPT = 8, 7
SHARPER = 4.0  # with attention near uniform half of the slips change no token
# A token that is this far below the most likely one, as a share of the range of the logits, was not taken for rounding.
MARGIN = 1e-2


@probe(after=("causality.no-future", "cache.matches-full-forward", "determinism.eval-repeats"))
def writes_what_forward_says(subject: Subject) -> Iterator[Finding]:
    """The model's own generate, where it takes the most likely token, writes the tokens that forward finds most likely.

    Why: training and evaluation never call generate, and a slip there looks like a model that has learnt little.
    Catches: a start_pos that is one too late; the logits of another position; a prompt that is cut at the wrong end.
    """
    code = code_of(getattr(type(subject.model), "generate", None))
    if code is None or subject.sources.rank(code.co_filename) != OWN:
        not_applicable("the model has no generate of its own")
    count = _count(subject)
    twin = _sharpened(subject)
    if (twin.usable_positions or NEW + PROMPT) < NEW + PROMPT:
        not_applicable("its context is too short")
    prompt = twin.token_ids(1, PROMPT, seed=44)
    seen: list[Tensor] = []
    written = [_written(subject, prompt, count, seed, seen) for seed in (1, 2)]
    if written[0] != written[1]:
        not_applicable("its generate draws in a way of its own")
    special = {value for name in ("eos_token_id", "pad_token_id", "bos_token_id") if isinstance(value := subject.setting(name), int)}
    row = prompt[0]
    for step, token in enumerate(written[0]):
        case = Case(name=f"the prompt and {step} tokens", input_ids=(row,))
        logits = run(twin, case)[0, -1].double()
        top, spread = int(logits.argmax()), float(logits.max() - logits.min())
        if top in special or not 0 <= token < len(logits):
            return
        if float(logits[top] - logits[token]) > MARGIN * spread:
            if any(_chose_otherwise(rows, logits, token) for rows in seen):
                not_applicable(
                    f"its generate does more with the logits than to choose: it had those after {case.name}, and writes another token"
                )
            where = place_of(Spot(code, 0, code.co_firstlineno))
            rank = int((logits > logits[token]).sum())
            yield Found(
                probe="",
                severity="warning",
                message=f"generate writes token {token} as number {step + 1} after the prompt, where forward finds {top} most likely and {rank} others more likely",
                where=where,
                source=source_lines(where),
                fix="compare the positions, the cache and the row of the logits that generate uses at this step with a forward of the whole text",
                expected=f"token {top}",
                observed=f"token {token}",
                evidence={"drawing": "the most likely token instead of torch.multinomial's choice"},
                case=case,
            )
            return
        row = (*row, token)


def _count(subject: Subject) -> str:
    """The argument of generate that says how many tokens; leaves the probe where generate needs more than that and the ids, or
    does more with the logits than to choose."""
    try:
        arguments = list(inspect.signature(subject.model.generate).parameters.values())  # type: ignore[arg-type]
    except (TypeError, ValueError):
        not_applicable("its generate has no readable signature")
    named = [a for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    count = next((name for name in COUNTS if name in [a.name for a in named[1:]]), None)  # steps may be of depth beside a count
    needed = [a.name for a in named[1:] if a.default is a.empty and a.name != count]
    if count is None or needed or named[0].kind is named[0].KEYWORD_ONLY:
        not_applicable("its generate is not called with ids and a number of new tokens alone")
    if shift := next((a.name for a in named if any(word in a.name for word in SHIFTS) and a.default not in NEUTRAL), None):
        not_applicable(f"its generate changes the logits by default ({shift})")
    return count


def _sharpened(subject: Subject) -> Subject:
    """A twin whose matrices are larger: at fresh weights attention is near uniform, and the most likely token hangs on the last
    one alone, wherever it stands."""
    twin = subject.fresh_twin(dtype=subject.dtype)
    with torch.no_grad():
        for parameter in {id(p): p for p in twin.model.parameters() if p.ndim > 1 and p.is_floating_point()}.values():
            parameter.mul_(SHARPER)
    return twin


def _chose_otherwise(rows: Tensor, logits: Tensor, token: int) -> bool:
    """Whether generate had the right logits in its last row and took a token that is most likely in no other row either: it bans,
    punishes or pads, and has not mistaken the row."""
    spread = float(logits.max() - logits.min())
    if rows.shape[-1] != len(logits) or float((rows[-1] - logits).abs().max()) > MARGIN * spread:
        return False
    return token not in rows[:-1].argmax(-1).tolist()


def _written(subject: Subject, prompt: tuple[tuple[int, ...], ...], count: str, seed: int, seen: list[Tensor]) -> list[int]:
    """The tokens that generate writes after the prompt, and the logits that it sees; leaves the probe where that cannot be read."""
    twin = _sharpened(subject)

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        ids = next((t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor) and not t.is_floating_point() and t.ndim == 2), None)
        if ids is not None and not seen and ids.shape[1] > PROMPT:
            not_applicable("its generate puts tokens of its own before the prompt")
        logits = next((t for t in tree_iter(output) if isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 1), None)
        if logits is not None:
            seen.append(logits.detach().double().reshape(-1, logits.shape[-1]))

    handle = twin.model.register_forward_hook(note, with_kwargs=True)
    try:
        with settled(twin.model, seed=seed), quiet(), torch.no_grad(), _MostLikely():
            given: Any = twin.model.generate(torch.tensor(prompt, device=twin.device), **{count: NEW})  # type: ignore[operator]
    except NotApplicable:
        raise
    except Exception as error:  # what it wants more is not known
        not_applicable(f"its generate raises {type(error).__name__} on ids and {count}={NEW}")
    finally:
        handle.remove()
    if not isinstance(given, Tensor) or given.is_floating_point() or given.ndim != 2 or len(given) != 1:
        not_applicable("its generate gives back no ids [batch, tokens]")
    tokens: list[int] = given[0].tolist()
    if tokens[:PROMPT] == list(prompt[0]):
        return tokens[PROMPT:]
    return tokens if len(tokens) <= NEW else not_applicable("its generate does not give back the prompt as it was")


class _MostLikely(TorchFunctionMode):
    """Inside it torch.multinomial takes the most likely of its choices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.multinomial, Tensor.multinomial):
            weights = args[0] if args else kwargs["input"]
            if (args[1] if len(args) > 1 else kwargs.get("num_samples", 1)) == 1:
                return weights.argmax(-1, keepdim=True)
        return func(*args, **kwargs)
