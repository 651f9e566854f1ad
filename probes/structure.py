"""What the model owns is registered, tied as its configuration says, and each part used as often as it should be."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from olmodebug.convention import first_embedding
from olmodebug.explain import place_of, source_lines
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Where
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.sources import Spot, code_of
from olmodebug.subject import Subject

TIE_NAMES = ("tie_word_embeddings", "tie_weights", "weight_tying", "tie_embeddings", "tied_embeddings", "tie_word_embedding")


@probe()
def registered(subject: Subject) -> Iterator[Finding]:
    """Every module and every trainable tensor that the model holds is registered, so that it is trained, moved and saved.

    Why: what sits in a plain list is missing from parameters(), state_dict() and .to(device).
    Catches: self.layers = [Block() for _ in range(n)] instead of nn.ModuleList.
    """
    known_modules = {id(module) for module in subject.model.modules()}
    known_tensors = {id(p) for p in [*subject.model.parameters(), *subject.model.buffers()]}
    seen: set[tuple[type, str]] = set()  # a class that is used in every block forgets the same in each
    for path, module in subject.model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules") or key.startswith(("_forward", "_backward")):
                continue
            lost_modules = [m for m in _inside(value, nn.Module) if id(m) not in known_modules and list(m.parameters())]
            lost_tensors = [t for t in _inside(value, Tensor) if id(t) not in known_tensors and (t.requires_grad and t.is_leaf)]
            if (not lost_modules and not lost_tensors) or (type(module), key) in seen:
                continue
            seen.add((type(module), key))
            count = sum(p.numel() for m in lost_modules for p in m.parameters()) + sum(t.numel() for t in lost_tensors)
            what = f"{len(lost_modules)} modules" if lost_modules else f"{len(lost_tensors)} trainable tensors"
            kind = type(value).__name__
            where = _class_place(module, path)
            right = {"list": "nn.ModuleList", "tuple": "nn.ModuleList", "dict": "nn.ModuleDict"}.get(kind, "a registered attribute")
            yield Found(
                probe="",
                severity="error",
                message=f"{path + '.' if path else ''}{key} is a plain {kind} with {what}: {count:,} parameters are not registered",
                where=where,
                source=source_lines(where),
                cause=f"torch registers modules and parameters that are attributes, not those inside a plain {kind}",
                fix=f"use {right if lost_modules else 'nn.ParameterList or nn.ParameterDict'}",
                evidence={"parameters that are lost": count},
            )


@probe()
def tied_as_configured(subject: Subject) -> Iterator[Finding]:
    """With tie_word_embeddings the head is the embedding's own parameter; without it the two are apart.

    Why: two copies that start alike drift apart in training, and the model is larger than it says.
    Catches: weights copied instead of shared; a tie that to_empty or a rebuild has cut; a transformers class without _tied_weights_keys.
    """
    model: Any = subject.model
    yield from _shared_memory(model)
    tied = subject.setting(*TIE_NAMES)
    if not isinstance(tied, bool):
        not_applicable("its config does not say whether embeddings are tied")
    named = next(name for name in TIE_NAMES if subject.setting(name) is not None)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else first_embedding(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else _head(model)
    undeclared = hasattr(model, "_tied_weights_keys") and not model._tied_weights_keys
    if undeclared and not _speaks_of(subject.config, named):
        not_applicable("its transformers class declares no weights that could be tied")
    if embedding is None or head is None or not all(isinstance(getattr(t, "weight", None), Tensor) for t in (embedding, head)):
        not_applicable("no embedding and head of the same shape")
    if tuple(head.weight.shape) != tuple(embedding.weight.shape):
        not_applicable("the head has another shape than the embedding")
    shared = head.weight.data_ptr() == embedding.weight.data_ptr()
    where = _tying(model)
    if tied and not shared:
        equal = bool(torch.equal(head.weight, embedding.weight))
        cause, fix = (
            "the head was never tied to the embedding",
            "self.lm_head.weight = self.embed_tokens.weight, after the weights are made",
        )
        if undeclared:
            cause = f"transformers ties what _tied_weights_keys names, and {type(model).__name__} names nothing there"
            fix = "_tied_weights_keys = {name of the head's weight: name of the embedding's}, in the class"
        elif equal:
            cause = "the weight was copied, not shared: both start with the same values"
        yield Found(
            probe="",
            severity="warning" if undeclared else "error",
            message=f"{named} is set, and the head has its own weight",
            where=where,
            source=source_lines(where),
            cause=cause,
            fix=fix,
            expected="one parameter",
            observed=f"two of shape {tuple(head.weight.shape)}",
        )
    if shared and not tied:
        yield Found(
            probe="",
            severity="warning",
            message=f"the head shares the embedding's weight, and {named} is False",
            expected="two parameters",
            observed="one",
        )


@probe()
def layers_are_distinct(subject: Subject) -> Iterator[Finding]:
    """The entries of a list of layers are modules of their own, unless the configuration says that they are shared.

    Why: a model with one layer's weights used n times trains, and is n times smaller than it says.
    Catches: nn.ModuleList([Block(config)] * n).
    """
    lists = [(p, m) for p, m in subject.model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
    if not lists:
        not_applicable("it has no list of layers")
    words = ("share", "group", "recur", "loop", "universal")
    if any(
        word in str(name).lower() and subject.setting(name) for name in _setting_names(subject.config) for word in words[:1] + words[2:]
    ):
        not_applicable("its configuration speaks of shared layers")
    seen: set[tuple[str | None, int | None]] = set()  # a class that is used in every block makes its list in one line
    for path, layers in lists:
        entries = list(layers)
        # An entry may be None: x-transformers fills its lists so.
        if len({id(m) for m in entries}) > 1 or entries[0] is None or not any(True for _ in entries[0].parameters()):
            continue
        owner = path.rpartition(".")[0]
        while owner and type(subject.model.get_submodule(owner)).__module__.startswith("torch."):
            owner = owner.rpartition(".")[0]  # a ModuleDict between the list and the class that made both
        where = _class_place(subject.model.get_submodule(owner), owner)
        if (where.file, where.line) in seen:
            continue
        seen.add((where.file, where.line))
        count = sum(p.numel() for p in entries[0].parameters())
        yield Found(
            probe="",
            severity="warning",
            message=f"the {len(entries)} entries of {path} are one and the same module: {count:,} parameters used {len(entries)} times",
            where=where,
            source=source_lines(where),
            cause=f"the list holds one object {len(entries)} times, as [layer] * {len(entries)} makes it",
            fix="make one module an entry: nn.ModuleList(Block(config) for _ in range(n)); if the layers are meant to be shared, say so in the config",
            expected=f"{len(entries)} modules",
            observed="1",
        )


def _speaks_of(config: object, name: str) -> bool:
    """Whether a config's own classes have a word on a setting, which transformers' base class would have for every model."""
    own = [kind for kind in type(config).__mro__ if kind.__module__ not in ("transformers.configuration_utils", "builtins")]
    return any(name in vars(kind).get("__annotations__", {}) or name in _arguments(vars(kind).get("__init__")) for kind in own)


def _arguments(function: object) -> tuple[str, ...]:
    code = code_of(function)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code is not None else ()


def _setting_names(config: object) -> list[str]:
    return list(config) if isinstance(config, dict) else list(vars(config)) if hasattr(config, "__dict__") else []


def _shared_memory(model: nn.Module) -> Iterator[Found]:
    """Two parameters on one piece of memory: tied for reading, and not for the optimizer."""
    seen: dict[int, str] = {}
    pairs = []
    for name, parameter in model.named_parameters():
        other = seen.setdefault(parameter.data_ptr(), name) if parameter.numel() else name
        if other != name and parameter.device.type != "meta":
            pairs.append((name, other))
    if not pairs:
        return
    where = _tying(model)
    yield Found(
        probe="",
        severity="warning",
        message="{} and {} are two parameters on one storage".format(*pairs[0])
        + (f", and {len(pairs) - 1} more pairs" if len(pairs) > 1 else ""),
        where=where,
        source=source_lines(where),
        cause="the tie was made through .data: the memory is shared, the parameter is not; each gets a part of the gradient, "
        "an optimizer steps twice, and a cast or to_empty separates them",
        fix="share the parameter itself: head.weight = embedding.weight",
    )


def _inside(value: Any, kind: type) -> list[Any]:
    """Every instance of a kind in nested lists, tuples and dicts."""
    if isinstance(value, kind):
        return [value]
    if isinstance(value, list | tuple | set):
        return [found for item in value for found in _inside(item, kind)]
    if isinstance(value, dict):
        return [found for item in value.values() for found in _inside(item, kind)]
    return []


def _head(model: nn.Module) -> nn.Linear | None:
    embedding = first_embedding(model)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if embedding is None or not linears or linears[-1].weight.shape != embedding.weight.shape:
        return None
    return linears[-1]


def _tying(model: nn.Module) -> Where:
    """The model's own function for tying, under the names that people give it, else its __init__."""
    for cls in type(model).__mro__:
        if cls.__module__.partition(".")[0] in ("torch", "transformers", "builtins"):
            continue
        for name, function in vars(cls).items():
            code = getattr(function, "__code__", None)
            if "tie" in name and code is not None:
                return place_of(Spot(code, 0, code.co_firstlineno))
    return _class_place(model, "")


def _class_place(module: nn.Module, path: str) -> Where:
    code = code_of(type(module).__init__)
    return place_of(Spot(code, 0, code.co_firstlineno) if code else None, module=path)
