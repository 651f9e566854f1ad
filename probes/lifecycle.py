"""A model survives what is done to models: saving, copying, casting, and being built without memory."""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from olmodebug.compare import difference
from olmodebug.deep_copies import functions_left_behind
from olmodebug.explain import place_of, source_lines
from olmodebug.load import SubjectCodeError
from olmodebug.members import attribute_place, equal, not_saved, parameter, shared, tie_place, why_not_saved
from olmodebug.own_code import quiet
from olmodebug.probe import not_applicable, probe, skip
from olmodebug.rebuilt import CannotBuild, materialised, rebuilt
from olmodebug.records import Case, Difference, Where
from olmodebug.relations.invariance import run
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.settings import config_of
from olmodebug.sources import Spot
from olmodebug.subject import Subject
from olmodebug.switches import set_dropout

FEW_ROUNDINGS = 8
OTHER_SEED = 12345
ALIVE = "a model that was handed over alive cannot be built again"


@probe()
def save_and_load(subject: Subject) -> Iterator[Finding]:
    """The state dict of a model, loaded into a fresh build from another seed, gives the same logits.

    Why: what the state dict misses is random again after a restart, and nothing says so.
    Catches: layers in a plain list; a random buffer with persistent=False; a tensor kept as a plain attribute.
    """
    fresh = _fresh(subject)
    saved = {name: tensor.clone() for name, tensor in subject.model.state_dict().items() if isinstance(tensor, Tensor)}
    try:
        with quiet():
            fresh.load_state_dict(saved, strict=True)
    except RuntimeError as error:
        yield Found(
            probe="",
            severity="error",
            message=f"a fresh build does not take the model's own state dict: {str(error).partition(chr(10))[2].strip()[:200]}",
            where=Where(function=f"{type(fresh).__name__}.load_state_dict"),
            fix="keep the names and shapes of the state dict independent of what ran before",
            expected="all keys matched",
        )
        return
    case, apart = _compare(subject, fresh)
    if apart is None:
        return
    missing = not_saved(subject.model, fresh, saved)
    where = attribute_place(subject.model, missing[0]) if missing else Where()
    yield Found(
        probe="",
        severity="error",
        message=f"after state_dict and load_state_dict the logits {apart.apart}: the state dict does not hold all that matters"
        + (f" ({missing[0]})" if missing else ""),
        where=where,
        source=source_lines(where),
        cause=why_not_saved(subject.model, missing[0]) if missing else None,
        fix="register it as a parameter or a persistent buffer; keep modules in nn.ModuleList" if missing else None,
        expected="equal logits",
        observed=f"{apart.mismatched} of {apart.total} logits differ",
        case=case,
    )


@probe()
def safetensors_round_trip(subject: Subject) -> Iterator[Finding]:
    """A model can be saved with safetensors, which refuses tensors that share memory, and comes back with the same logits.

    Why: the format that everyone exchanges weights in has no word for two names of one tensor.
    Catches: a tie that save_pretrained does not know; a state dict with overlapping views.
    """
    if hasattr(subject.model, "save_pretrained"):
        yield from _pretrained(subject)
        return
    from safetensors.torch import load_file, load_model, save_model

    fresh = _fresh(subject)
    with tempfile.TemporaryDirectory(prefix="olmodebug-") as folder, quiet():
        file = str(Path(folder) / "model.safetensors")
        try:
            save_model(subject.model, file)  # names what is shared, and keeps one of each
            if type(fresh).load_state_dict is nn.Module.load_state_dict:
                load_model(fresh, file)
            else:  # load_model unpacks what load_state_dict returns, and one of the model's own may return nothing
                fresh.load_state_dict(load_file(file), strict=False)
        except (RuntimeError, ValueError) as error:
            yield Found(
                probe="",
                severity="warning",
                message=f"safetensors does not save or load this model: {str(error).partition(chr(10))[0][:200]}",
                fix="share whole parameters only (self.a.weight = self.b.weight), no views of them",
                evidence={"condition": "saved with safetensors.torch.save_model"},
            )
            return
    case, apart = _compare(subject, fresh)
    again = _fresh(subject)
    again.load_state_dict(subject.model.state_dict())
    if apart is not None and _compare(subject, again)[1] is None:  # otherwise save-and-load says it
        yield _differs(apart, case, "a round trip through safetensors", "warning")


@probe()
def deepcopy_equal(subject: Subject) -> Iterator[Finding]:
    """copy.deepcopy gives a model with the same logits that shares no parameter with the first.

    Why: EMA weights, reference models and evaluation copies are deep copies.
    Catches: a closure or a hook that still points into the first model.
    """
    try:
        twin = copy.deepcopy(subject.model)
    except Exception as error:
        yield Found(
            probe="",
            severity="warning",
            message=f"copy.deepcopy fails: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}",
            fix="keep no tensor with a gradient history and no handle or lock as an attribute",
            evidence={"condition": "the model is deep-copied, as for EMA"},
        )
        return
    storages = {p.untyped_storage().data_ptr() for p in subject.model.parameters() if p.numel()}
    kept = [n for n, p in twin.named_parameters() if p.requires_grad and p.numel() and p.untyped_storage().data_ptr() in storages]
    if kept:
        yield Found(
            probe="",
            severity="error",
            message=f"a deep copy shares {kept[0]} with the model it was made from"
            + (f", and {len(kept) - 1} more" if len(kept) > 1 else ""),
            expected="weights of its own",
        )
        return
    for attribute, variable, function in functions_left_behind(subject.model):
        where = place_of(Spot(function.__code__, 0, function.__code__.co_firstlineno), module=attribute.rpartition(".")[0])
        yield Found(
            probe="",
            severity="warning",
            message=f"a deep copy goes on using modules of the model it was made from: {attribute} is a function that holds {variable}",
            where=where,
            source=source_lines(where),
            cause="copy.deepcopy copies no functions, and this one was made with the first model's modules in its variables",
            fix="make it a method that reads them from self",
            expected="a copy that uses its own weights",
            evidence={"condition": "the model is deep-copied, as for EMA"},
        )
        return
    case, apart = _compare(subject, twin.eval())
    if apart is not None:
        yield _differs(apart, case, "copy.deepcopy", "error")


@probe()
def dtype_round_trip(subject: Subject) -> Iterator[Finding]:
    """A cast to bfloat16 and back rounds the weights and nothing else: no table that positions are computed from.

    Why: rotary frequencies in bfloat16 are off by up to 0.2 %, an angle of more than a radian at position 1000.
    Catches: inv_freq or a cos/sin table as a float buffer that .to(bfloat16) casts; integer buffers that change.
    """
    before = {name: b.clone() for name, b in subject.model.named_buffers()}
    if not before:
        not_applicable("the model has no buffers")
    saved = set(subject.model.state_dict())
    with quiet():  # a complex buffer that is made real is told below
        narrow = copy.deepcopy(subject.model).to(torch.bfloat16)
        wide = dict(copy.deepcopy(narrow).to(subject.dtype).named_buffers())
    after = dict(narrow.named_buffers())
    rounded = []
    for name, buffer in before.items():
        if name not in after or buffer.shape != after[name].shape:
            continue
        if buffer.is_complex() and not wide[name].is_complex():
            yield _imaginary_part_lost(subject, name, buffer)
        elif not buffer.is_floating_point():
            if not torch.equal(buffer, wide[name]):
                yield Found(
                    probe="",
                    severity="error",
                    message=f"the {buffer.dtype} buffer {name} is not the same after a cast to bfloat16 and back",
                    where=attribute_place(subject.model, name),
                    expected="equal values",
                )
        elif after[name].dtype == torch.bfloat16 and name not in saved and not torch.equal(buffer, wide[name].to(buffer.dtype)):
            rounded.append(name)
    if not rounded:
        return
    name = rounded[0]
    where = attribute_place(subject.model, name)
    # transformers casts on loading (dtype=...), which leaves these buffers in float32; only an explicit .to() rounds them.
    loads = hasattr(subject.model, "from_pretrained")
    scale = float(before[name].double().abs().max())
    off = float((before[name].double() - after[name].double()).abs().max())
    yield Found(
        probe="",
        severity="note" if loads else "warning",
        message=f"model.to(bfloat16) rounds the buffer {name}, which is computed and not learnt: it is off by {off:.2g}"
        + (f", and {len(rounded) - 1} more" if len(rounded) > 1 else ""),
        where=where,
        source=source_lines(where),
        cause="a registered float buffer is cast with the weights",
        fix="compute it in float32 in forward, or make it anew in _apply after a cast"
        if not loads
        else "load with dtype=torch.bfloat16 instead of casting afterwards",
        expected="float32 values",
        observed=f"bfloat16, off by {off:.2g} of {scale:.2g}",
        evidence={"condition": "model.to(torch.bfloat16)", "buffers": ", ".join(rounded[:4])},
    )


def _imaginary_part_lost(subject: Subject, name: str, buffer: torch.Tensor) -> Found:
    where = attribute_place(subject.model, name)
    return Found(
        probe="",
        severity="note" if hasattr(subject.model, "from_pretrained") else "warning",
        message=f"model.to(bfloat16) makes the complex buffer {name} real: its imaginary part is thrown away",
        where=where,
        source=source_lines(where),
        cause="nn.Module.to casts complex buffers to the real dtype that it is given, with a warning only",
        fix="keep the model in float32 and use autocast or mixed precision, or make the table anew in _apply after a cast",
        expected=f"{str(buffer.dtype).removeprefix('torch.')} values",
        observed="real values",
        evidence={"condition": "model.to(torch.bfloat16)"},
    )


@probe(after=("lifecycle.save-and-load",))
def meta_build(subject: Subject) -> Iterator[Finding]:
    """Built on meta, given memory with to_empty, reset and loaded, the model is the same as one built as usual.

    Why: large models are built so (FSDP, torchtitan); what __init__ computed and nobody computes again is whatever the memory held.
    Catches: inv_freq with persistent=False that no reset_parameters makes anew; a scale kept as a buffer.
    """
    model = _materialised(subject)
    buffers = dict(model.named_buffers())
    lost = [name for name, b in buffers.items() if b.is_floating_point() and bool(torch.isnan(b).any())]
    usual = dict(subject.model.named_buffers())
    other = [n for n, b in buffers.items() if n in usual and n not in lost and b.shape == usual[n].shape and not equal(b, usual[n])]
    # What is zero before the first call may be a cache, written before it is read: then the logits are right all the same.
    lost, other = ([name for name in names if name not in usual or bool(usual[name].any())] for names in (lost, other))
    if lost or other:
        yield _lost(subject, lost, other)
        return
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                skip(f"{type(module).__name__}.{key} is a plain tensor that stays on meta")
    try:
        case, apart = _compare(subject, model)
    except SubjectCodeError as error:
        skip(f"after a build on meta it does not run: {str(error.__cause__).partition(chr(10))[0][:120]}")
    if apart is not None:
        yield _differs(apart, case, "a build on meta, to_empty, reset and load_state_dict", "warning")


@probe()
def tie_survives(subject: Subject) -> Iterator[Finding]:
    """Weights that are one parameter stay one through deepcopy, a cast, load_state_dict and to_empty.

    Why: an embedding and a head that come apart start equal and drift in training; nothing else looks wrong.
    Catches: a tie through .data; no tie_weights() after to_empty on a meta build.
    """
    groups = shared(subject.model)
    if not groups:
        not_applicable("no parameter has two names")
    by_object = [names for names in groups if len({id(parameter(subject.model, name)) for name in names}) == 1]
    for names in groups:
        if names not in by_object:
            where = tie_place(subject.model)
            yield Found(
                probe="",
                severity="warning",
                message=f"{' and '.join(names)} share their storage and are two parameters: the tie is lost by deepcopy, a cast or an optimizer",
                where=where,
                source=source_lines(where),
                cause="the .data was shared, not the parameter",
                fix="self.lm_head.weight = self.embed_tokens.weight",
                expected="one parameter",
                observed="two parameters with one storage",
                evidence={"condition": "model.to(dtype), copy.deepcopy"},
            )
    if not by_object:
        return
    loaded = copy.deepcopy(subject.model)
    loaded.load_state_dict(subject.model.state_dict())
    steps = [
        ("copy.deepcopy", copy.deepcopy(subject.model)),
        (".to(float64)", copy.deepcopy(subject.model).to(torch.float64)),
        ("load_state_dict", loaded),
    ]
    if subject.remake is not None:
        with suppress(Exception):  # meta-build says why it cannot be built so
            steps.append(("a build on meta and to_empty", _materialised(subject)))
    for step, model in steps:
        for names in by_object:
            if len({id(parameter(model, name)) for name in names}) == 1:
                continue
            where = tie_place(subject.model)
            yield Found(
                probe="",
                severity="warning",
                message=f"the tie of {' and '.join(names)} is lost by {step}",
                where=where,
                source=source_lines(where),
                cause="to_empty gives each name its own new parameter, and nothing ties them again" if "to_empty" in step else None,
                fix="call tie_weights() in _apply or reset_parameters, after the parameters are replaced",
                expected="one parameter",
                observed=f"{len(names)} parameters",
                evidence={"condition": step},
            )
            return


@probe(after=("determinism.eval-repeats",))
def train_equals_eval_without_dropout(subject: Subject) -> Iterator[Finding]:
    """With every dropout rate at zero train mode gives the same logits as eval mode.

    Why: anything else that train mode changes is a second, untested model.
    Catches: batch norm; a branch on self.training that is not dropout.
    """
    train, usual = subject.fresh_twin(training=True), subject.twin()
    set_dropout(train.model, 0.0)
    for module in train.model.modules():
        if "jitter" in " ".join(vars(module)) or isinstance(module, nn.modules.batchnorm._BatchNorm):
            not_applicable("train mode has noise or batch statistics by design")
    batch, seq = usual.sizes()
    case = Case(name="a batch", input_ids=usual.token_ids(batch, seq, seed=24))
    first, again = run(train, case), run(replace(train, seed=train.seed + 1), case)
    apart = difference(run(usual, case), first, relative_limit=1e-5)
    if apart is None or difference(first, again) is not None:
        return
    yield Found(
        probe="",
        severity="warning",
        message=f"train mode differs from eval mode by {apart.max_abs:.3g} with every dropout rate at zero",
        expected="no difference beyond rounding",
        observed=f"{apart.mismatched} of {apart.total} logits differ",
        evidence={"condition": "model.train()"},
        case=case,
    )


def _fresh(subject: Subject) -> nn.Module:
    """Another build of the subject, from another seed, in its dtype and on its device."""
    model = rebuilt(subject, OTHER_SEED)
    return model if model is not None else not_applicable(ALIVE)


def _materialised(subject: Subject) -> nn.Module:
    try:
        model = materialised(subject, OTHER_SEED)
    except CannotBuild as error:
        skip(str(error))
    return model if model is not None else not_applicable(ALIVE)


def _compare(subject: Subject, model: nn.Module) -> tuple[Case, Difference | None]:
    """The logits of the subject and of another model on one batch, in eval mode, beyond a few roundings."""
    usual = subject.twin(dtype=subject.dtype)
    batch, seq = usual.sizes()
    case = Case(name="a batch", input_ids=usual.token_ids(batch, seq, seed=20))
    other = replace(usual, model=model.to(usual.device).eval(), config=config_of(model) or usual.config, _twins={})
    # What earlier calls left in the one may be the same function in other bits: a table made for a longer sequence.
    limit = FEW_ROUNDINGS * torch.finfo(usual.dtype).eps if usual.dtype in (torch.float32, torch.float64) else 0.0
    return case, difference(run(usual, case), run(other, case), relative_limit=limit)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _differs(apart: Difference, case: Case, step: str, severity: str) -> Found:
    return Found(
        probe="",
        severity=severity,  # type: ignore[arg-type]
        message=f"after {step} the logits {apart.apart}",
        expected="equal logits",
        observed=f"{apart.mismatched} of {apart.total} logits differ",
        evidence={"condition": step} if severity == "warning" else {},
        case=case,
    )


def _pretrained(subject: Subject) -> Iterator[Finding]:
    from transformers import PreTrainedModel

    model = subject.model
    with tempfile.TemporaryDirectory(prefix="olmodebug-") as folder, quiet():
        copied, step = copy.deepcopy(model), "save_pretrained"
        # A transformers model takes its dtype here; huggingface_hub's mixin would hand it on to the model's __init__.
        wanted = {"dtype": subject.dtype} if isinstance(model, PreTrainedModel) else {}
        try:
            with _without_progress_bar():
                copied.save_pretrained(folder)  # type: ignore[operator]
                step = "from_pretrained"
                loaded = type(model).from_pretrained(folder, **wanted)  # type: ignore[attr-defined]
        except Exception as error:
            first = str(error).partition(chr(10))[0][:200]
            yield Found(
                probe="",
                severity="warning",
                message=f"{step} fails: {first if isinstance(error, RuntimeError) else f'{type(error).__name__}: {first}'}",
                fix="declare what is tied in _tied_weights_keys" if isinstance(error, RuntimeError) and step == "save_pretrained" else None,
                evidence={
                    "condition": f"saved with {'save_pretrained' if step == 'save_pretrained' else 'save_pretrained and loaded again'}"
                },
            )
            return
    case, apart = _compare(subject, loaded)
    if apart is None:
        return
    found = _differs(apart, case, "save_pretrained and from_pretrained", "warning")
    lost = not_saved(model, loaded, model.state_dict())
    if lost:
        where = attribute_place(model, lost[0])
        found = replace(
            found,
            where=where,
            source=source_lines(where),
            cause=f"{lost[0]} is not in the checkpoint, and holds other values after loading: from_pretrained builds on meta, and what __init__ computes is lost",
            fix="compute it in _init_weights as well, where from_pretrained asks for what no checkpoint holds, or in forward",
        )
    yield found


def _lost(subject: Subject, empty: list[str], other: list[str]) -> Found:
    """The finding for buffers that nobody fills after to_empty, and for those that are filled with other values."""
    lost = empty + other
    name = lost[0]
    where = attribute_place(subject.model, name)
    loads = hasattr(subject.model, "from_pretrained")
    return Found(
        probe="",
        severity="note" if loads else "warning",
        message=(
            f"the buffer {name} is lost in a meta build: after to_empty it holds what the memory held"
            if empty
            else f"the buffer {name} has other values after a meta build"
        )
        + (f", and {len(lost) - 1} more" if len(lost) > 1 else ""),
        where=where,
        source=source_lines(where),
        cause="it is computed in __init__, is not in the state dict, and no reset_parameters computes it again" if empty else None,
        fix="compute it in reset_parameters as well, or in _apply, or in forward",
        expected="the values of a usual build",
        observed="NaN, where fresh memory is filled with NaN" if empty else "other values",
        evidence={"condition": "meta build + to_empty + load_state_dict", "buffers": ", ".join(lost[:6])},
    )
