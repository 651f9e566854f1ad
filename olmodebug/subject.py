"""The model under test: how it is called, what it is made of, and copies of it to experiment on.

A probe never touches the subject itself: it works on a *twin*, a deep copy in the dtype, mode and attention
implementation that it asks for.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily  # no public name; without it no ids under a fake mode

from .casts import cast
from .convention import (
    ALIGNED_LABELS,
    HANDED_NAMES,
    LOSS_ATTRIBUTES,
    LOSS_METHODS,
    MAKER_NAMES,
    RESET_NAMES,
    SETUP_NAMES,
    SHIFTED_LABELS,
    STATE_MAKERS,
    Convention,
    NoLogits,
    Output,
    find_logits,
    find_loss,
    first_embedding,
    ids_tensor,
    is_scalar_loss,
    read_signature,
)
from .deep_copies import deep_copy
from .draws import Draws
from .errors import SubjectError
from .load import SubjectCodeError
from .records import Case, Rows
from .report import SubjectInfo
from .settle import settled
from .sources import Sources, code_of, is_ours, short_path, traceback_frames

VOCAB_NAMES = ("vocab_size", "n_vocab", "padded_vocab_size", "num_tokens", "vocabulary_size", "vocab", "num_vocab")
CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "block_size",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "context_length",
    "n_ctx",
    "seq_length",
)
BATCH_NAMES = ("max_batch_size", "max_gen_batch_size", "max_bsz", "max_batch")  # rows of a cache made in advance
HEAD_NAMES = ("num_attention_heads", "n_head", "n_heads", "num_heads")
LAYER_NAMES = ("n_layers", "n_layer", "num_layers", "num_hidden_layers", "layers", "depth")
CONFIG_NAMES = ("config", "cfg", "args", "params", "hparams")

# Sizes that a method which makes a cache asks for, and the length where the config declares none.
BATCH_NAME = r"b(atch|sz|s$|$)"
SIZE_NAMES = BATCH_NAME + r"|.*(len|size|positions|tokens)"
ROOM = 256
LOGITS_FLAG = re.compile(r"(get|return|output|with|compute|need)_?\w*logits")  # a switch without which forward keeps them
WHOLE_MASKS = ("seen", "hidden", "added")  # what True says of a place; a mask that is added to the scores
BATCH_SIZES = (3, 5, 7, 2)
# What is tried where no context length is declared: the last position where positions can be given, else a sequence.
LENGTHS_TRIED = (4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8)
LONGEST_TRIED = 512
MULTIPLES_TRIED = (2, 4, 8, 16, 32, 64, 128)  # chunk sizes
SEQ_LENS = (11, 13, 17, 19, 23, 7, 5)

# A module, its attributes, and its tables of parameters, buffers and modules.
_Held = tuple[nn.Module, dict[str, Any], dict[str, dict[str, Any]]]
TABLES = ("_parameters", "_buffers", "_modules")


@dataclass(slots=True, kw_only=True)
class Subject:
    """A live model, how to call it, and what is known about it. Only the subject holds a live model.

    `rebuild` makes a fresh one from the same spec, with the same weights from the same seed, and `remake` the bare model
    from another seed or on another device, without a first run; both None for a model that was handed over alive.
    `assumptions` are what had to be guessed; the report prints them. `measured` is what probes measured beyond their
    findings, by topic of `Report.sections`, and `draws` the values that they drew; a subject and its twins share both.
    `attention` is the implementation that a twin was asked for; with `keep_dtype` twins asked for in float64 stay in the model's own.
    `lost` is the probe under which the device stopped: nothing more can run there in this process.
    """

    spec: str
    model: nn.Module
    convention: Convention
    config: object = None
    tokenizer: str | None = None
    adapter: Callable[..., Any] | None = None
    rebuild: Callable[[], "Subject"] | None = None
    remake: Callable[[int], nn.Module] | None = None
    declared_vocab: int | None = None
    assumptions: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None
    keep_dtype: bool = False
    lost: str | None = None
    draws: Draws = field(default_factory=Draws)
    seed: int = 0
    limit: float | None = None
    _last: list[tuple[Case, Tensor]] = field(default_factory=list)
    _twins: dict[tuple[object, ...], "Subject"] = field(default_factory=dict)
    _bare: list[_Held] = field(default_factory=list)  # what the modules held before a cache was made
    _usable: list[int | None] = field(default_factory=list)  # one for all twins

    @property
    def vocab_size(self) -> int:
        """How many ids may be fed: the config's number, else the rows of the first embedding."""
        if self.declared_vocab:
            return self.declared_vocab
        rows = self.embedding_rows
        declared = self.setting(*VOCAB_NAMES)
        sizes = [size for size in (rows, declared) if isinstance(size, int) and size > 0]
        if not sizes:
            raise SubjectError(f"{self.spec}: no vocabulary size in its config and no embedding table; state it with --vocab-size")
        return min(sizes)

    @property
    def embedding_rows(self) -> int | None:
        """Rows of the first embedding table; None when the model has none."""
        table = first_embedding(self.model)
        return None if table is None else table.num_embeddings

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the config declares."""
        value = self.setting(*CONTEXT_NAMES)
        return value if isinstance(value, int) and value > 0 else None

    @property
    def usable_positions(self) -> int | None:
        """The longest sequence that may be asked of the model: the declared one; where none is declared, the longest of a
        few lengths that it runs. None where even the longest of these runs."""
        if self.max_positions is not None or self.device.type == "meta":
            return self.max_positions
        if not self._usable:
            self._usable.append(self._longest_that_runs())
        return self._usable[0]

    def _longest_that_runs(self) -> int | None:
        far = self.convention.position_ids is not None
        lengths = LENGTHS_TRIED if far else [n for n in LENGTHS_TRIED if n <= LONGEST_TRIED]
        for length in lengths:
            size = min(length, 4) if far else length
            spots = (*range(size - 1), length - 1)
            case = Case(name="how far", input_ids=self._random_ids(1, size), position_ids=(spots,) if far else None)
            with settled(self.model, seed=self.seed), quiet(), suppress(Exception):
                self.at_once.logits(case)
                return None if length == lengths[0] else length
        return None

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.dtype.is_floating_point), torch.float32)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def sources(self) -> Sources:
        return Sources(self.model)

    def setting(self, *names: str) -> Any:
        """The first of these names that the config has, with a nested `text_config` searched too, and the dataclasses that a
        dataclass is made of; None without one."""
        for holder in (self.config, getattr(self.config, "text_config", None), *_parts(self.config)):
            for name in names:
                value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
                if value is not None:
                    return value
        return None

    def info(self) -> SubjectInfo:
        """What the report says about the subject."""
        parameters = {id(p): p for p in self.model.parameters()}.values()
        kind = type(self.model)
        file = getattr(__import__("sys").modules.get(kind.__module__), "__file__", None)
        return SubjectInfo(
            spec=self.spec,
            kind=f"{kind.__module__}.{kind.__qualname__}" if not kind.__module__.startswith("_olmodebug_file") else kind.__qualname__,
            file=short_path(file) if file else None,
            parameters=sum(p.numel() for p in parameters),
            parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
            dtype=str(self.dtype).removeprefix("torch."),
            convention=str(self.convention),
            assumptions=tuple(self.assumptions),
        )

    def sizes(self) -> tuple[int, int]:
        """(batch, seq_len): primes that divide no dimension of the model, so that each is known by its size."""
        return self.draws.sizes(self._sizes, self.usable_positions)

    def _sizes(self) -> tuple[int, int]:
        dimensions = self._dimensions()
        longest = min(self.usable_positions or 10**6, 10**6)

        def clash(number: int) -> int:
            return sum(size % number == 0 for size in dimensions)

        most = self.setting(*BATCH_NAMES)
        sizes = [n for n in BATCH_SIZES if n <= most] if isinstance(most, int) and most > 1 else BATCH_SIZES
        batch = min(sizes, key=clash)
        usual = SEQ_LENS[-2:] if self.convention.last_only else SEQ_LENS  # every prefix is a run
        lengths = [n for n in usual if n <= longest and n != batch] or [max(longest, 1)]
        return batch, min(lengths, key=lambda n: (clash(n), SEQ_LENS.index(n) if n in SEQ_LENS else 0))

    def _dimensions(self) -> set[int]:
        """Every size of a parameter or buffer, and the number of heads."""
        heads = self.setting(*HEAD_NAMES)
        sizes = {size for t in [*self.model.parameters(), *self.model.buffers()] for size in t.shape if size > 1}
        return sizes | ({heads} if isinstance(heads, int) else set())

    def token_ids(self, *shape: int, seed: int = 0) -> Rows:
        """Random ids `[batch, seq_len]` inside the vocabulary that are no special token of the config."""
        return self.draws.ids(shape, seed, self.vocab_size, lambda: self._random_ids(*shape, seed=seed))

    def _random_ids(self, rows: int, columns: int, *, seed: int = 0) -> Rows:
        special: set[object] = set()
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "mask_token_id"):
            value = self.setting(name)
            special |= set(value) if isinstance(value, list | tuple) else {value}
        allowed = [i for i in range(self.vocab_size) if i not in special and (i >= 10 or self.vocab_size < 20)][:4096]
        generator = torch.Generator().manual_seed(seed)
        with unset_fake_temporarily():  # ids are drawn for real where the model itself is made of fake tensors
            picks = torch.randint(len(allowed), (rows, columns), generator=generator).tolist()
        return tuple(tuple(allowed[i] for i in row) for row in picks)

    @property
    def at_once(self) -> "Subject":
        """The same subject, whose every call is one run: of a model that gives the last position only, no other logits then."""
        if not self.convention.last_only:
            return self
        return replace(self, convention=replace(self.convention, last_only=False), _last=[], _twins={})

    def call(
        self,
        case: Case,
        *,
        cache: Any = None,
        use_cache: bool = False,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        start: int | None = None,
    ) -> Output:
        """Run the model once on a case; NoLogits when it returns none, and whatever the model raises.

        `start` is the place of the first token in a cache that the model keeps itself. Where the model gives the logits of
        the last position only, every prefix is run, and the whole last.
        """
        outputs = []
        for missing in range(case.seq_len - 1 if self.convention.last_only else 0, -1, -1):
            outputs.append(
                self._call(
                    _without_last(case, missing),
                    cache,
                    use_cache,
                    position_ids if not missing or position_ids is None else position_ids[:, :-missing],
                    attention_mask if not missing or attention_mask is None else attention_mask[:, :-missing],
                    start,
                )
            )
        if len(outputs) > 1:
            outputs[-1].logits = torch.cat([output.logits for output in outputs], 1)
        return outputs[-1]

    def _call(
        self,
        case: Case,
        cache: Any,
        use_cache: bool,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        start: int | None,
    ) -> Output:
        form, device = self.convention, self.device
        ids = ids_tensor(case.input_ids, device)
        assert ids is not None
        arguments: dict[str, Any] = {form.ids: ids}
        mask = attention_mask if attention_mask is not None else ids_tensor(case.attention_mask, device)
        if form.attention_mask and mask is not None:
            arguments[form.attention_mask] = mask == 0 if form.mask_hides else mask
        positions = position_ids if position_ids is not None else ids_tensor(case.position_ids, device)
        if form.position_ids and positions is not None:
            arguments[form.position_ids] = positions
        if form.hands_cache and use_cache and cache is None:
            cache = self._handed_cache(case.batch_size)
        if form.cache and cache is not None:
            arguments[form.cache] = cache
        if form.use_cache:
            arguments[form.use_cache] = use_cache
        if form.start and start is not None:
            arguments[form.start] = start
        elif form.places and start is not None:
            arguments[form.places] = torch.arange(start, start + case.seq_len, device=device)
        if form.labels and case.labels is not None and not form.loss_method:
            arguments[form.labels] = ids_tensor(case.labels, device)
        elif form.labels and form.logits_need_labels and not form.loss_method:
            arguments[form.labels] = ids.clone()
        result = self.forward(arguments)
        try:
            output = self._read(result, case)
        except NoLogits:
            loss = find_loss(result)
            if case.labels is None or form.logits_need_labels or (loss is None and not _is_loss_per_token(result, case)):
                raise
            # With labels it gives the loss alone, or the logits that the loss was taken from: all of them come without.
            output = self._call(replace(case, labels=None), None, False, position_ids, attention_mask, None)
            output.loss = loss
        if form.hands_cache and use_cache and output.cache is None:
            given = result if isinstance(result, tuple) else ()
            output.cache = next((item for item in given if type(item) is type(cache)), cache)  # handed back, or filled in place
        if form.loss_method and case.labels is not None:
            output.loss = getattr(self.model, form.loss_method)(ids, ids_tensor(case.labels, device))
        if case.seq_len % form.multiple:
            output.loss = None  # of a batch with padding in it
        elif output.loss is None and case.labels is not None:
            output.loss = next((value for name in LOSS_ATTRIBUTES if is_scalar_loss(value := getattr(self.model, name, None))), None)
        return output

    def forward(self, arguments: Mapping[str, Any]) -> Any:
        """The raw result of one call with arguments by their names, the ids among them."""
        form = self.convention
        if form.sets_up and form.places not in arguments:
            self.new_cache(*arguments[form.ids].shape)
            try:
                return self._forward(arguments)
            finally:
                _hold(self._bare)
        return self._forward(arguments)

    def _forward(self, arguments: Mapping[str, Any]) -> Any:
        form = self.convention
        arguments = self._formed(arguments)
        if self.adapter is not None:
            return self.adapter(self.model, **arguments)
        if form.in_dict:
            return self.model(arguments)
        if form.by_name:
            return self.model(**arguments)
        return self.model(arguments[form.ids], **{k: v for k, v in arguments.items() if k != form.ids})

    def _formed(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with what has no default, in whole multiples of the length that the model takes, and in its order."""
        form, ids, formed = self.convention, arguments[self.convention.ids], dict(arguments)
        if form.whole_mask and form.whole_mask[0] in form.required:
            formed.setdefault(form.whole_mask[0], whole_mask(form.whole_mask[1], ids.shape[1], device=ids.device))
        neutral = {
            form.position_ids: lambda: torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous(),
            form.attention_mask: lambda: torch.zeros_like(ids, dtype=torch.bool) if form.mask_hides else torch.ones_like(ids),
            form.labels: ids.clone,
            form.start: lambda: 0,
            form.places: lambda: torch.arange(ids.shape[1], device=ids.device),
            form.state: lambda: self._method(STATE_MAKERS)(len(ids)),  # type: ignore[misc]
        }
        needed = (*form.required, form.start, form.state, form.places if form.sets_up else None)
        formed |= {name: neutral[name]() for name in needed if name and name not in formed} | dict.fromkeys(form.flags, True)
        missing = -ids.shape[1] % form.multiple
        for name, value in formed.items():
            if not (isinstance(value, Tensor) and value.shape == ids.shape):
                continue
            if missing:
                last = torch.full_like(value[:, -1:], -100) if name == form.labels else value[:, -1:]
                counted = torch.arange(1, missing + 1, device=value.device) if name == form.position_ids else 0
                value = torch.cat((value, last.expand(-1, missing) + counted), 1)
            formed[name] = value.t().contiguous() if form.sequence_first else value
        return formed

    def _read(self, result: object, case: Case) -> Output:
        """What a result holds, its logits as `[batch, seq_len, vocab]`."""
        form = self.convention
        rows, columns = case.batch_size, case.seq_len + -case.seq_len % form.multiple
        if form.sequence_first:
            output = find_logits(result, batch_size=columns, seq_len=rows)
            output.logits = output.logits.transpose(0, 1)
        else:
            output = find_logits(result, batch_size=rows, seq_len=columns)
        if columns != case.seq_len:
            output.logits = output.logits[:, : case.seq_len]
        return output

    @property
    def keeps_its_cache(self) -> bool:
        """Whether the model keeps keys and values itself, and is told where new tokens stand or when a new sequence starts."""
        form = self.convention
        counts = form.use_cache is not None and form.cache is None and self._method(RESET_NAMES) is not None
        return form.start is not None or (form.places is not None and self.makes_new_caches) or counts

    @property
    def makes_new_caches(self) -> bool:
        """Whether it has a method that makes its cache anew, or empties it."""
        return self._method((*SETUP_NAMES, *RESET_NAMES)) is not None

    def new_cache(self, batch_size: int, length: int) -> None:
        """Have a model that keeps its cache itself make a fresh one, or forget the last one, where it has a method for that."""
        setup, reset = self._method(SETUP_NAMES), self._method(RESET_NAMES)
        if reset is not None:
            try:
                self._with_sizes(reset, batch_size, length)
            except (RuntimeError, AttributeError):  # nothing is there yet that it could empty
                if setup is None and self.convention.places is None:
                    raise
        if self.convention.sets_up:  # some make none where the last one is large enough, whatever is in it
            if not self._bare:
                self._bare.extend(_held(self.model))
            _hold(self._bare)
        if setup is not None:
            usual = torch.get_default_dtype()
            try:  # what it makes without naming a dtype is made in that of the weights, as in the model's own dtype
                if self.dtype in (torch.float32, torch.float64):
                    torch.set_default_dtype(self.dtype)
                asked = [p.name for p in inspect.signature(setup).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][:2]
                with torch.device(self.device):
                    setup(*(self.dtype if "dtype" in name else size for name, size in zip(asked, (batch_size, length), strict=False)))
            finally:
                torch.set_default_dtype(usual)

    def _handed_cache(self, batch_size: int) -> Any:
        """A fresh cache that the caller has to make: by the model's own method, or of the cache class beside the model; else an
        empty dict."""
        reset = self._method(RESET_NAMES)
        maker, room = self._method(MAKER_NAMES), self.max_positions or ROOM
        if reset is not None:
            self._with_sizes(reset, batch_size, room)
        if maker is not None:
            return self._with_sizes(maker, batch_size, room)
        forward = inspect.unwrap(type(self.model).forward)
        for name, kind in getattr(forward, "__globals__", {}).items():
            if isinstance(kind, type) and "cache" in name.lower():
                with suppress(Exception):  # a cache of another kind, as one of a single layer
                    return kind(**self._sizes_for(kind, batch_size, room))
        return {}

    def _with_sizes(self, method: Callable[..., Any], batch_size: int, room: int) -> Any:
        """Call a method of the model that makes or forgets a cache, with the sizes that it asks for."""
        sizes = [p for p in inspect.signature(method).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        return method(*(batch_size if re.match(BATCH_NAME, p.name) else room for p in sizes[:2] if re.match(SIZE_NAMES, p.name)))

    def _sizes_for(self, kind: type, batch_size: int, room: int) -> dict[str, Any]:
        """What a cache class must be given, as far as its names say it; KeyError where they do not."""
        layers = self.setting(*LAYER_NAMES)
        known = dict.fromkeys(LAYER_NAMES, layers) | dict.fromkeys(CONFIG_NAMES, self.config) | {"model": self.model}
        given = {}
        for p in inspect.signature(kind).parameters.values():
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                sizes = batch_size if re.match(BATCH_NAME, p.name) else room
                given[p.name] = sizes if re.match(SIZE_NAMES, p.name) else known[p.name]
        return given

    def _method(self, names: Sequence[str]) -> Callable[..., Any] | None:
        return next((method for name in names if callable(method := getattr(self.model, name, None))), None)

    def reached_by_own_loss(self, case: Case, names: Sequence[str], *, training: bool = False) -> set[str]:
        """Those of some parameters that get a gradient from the loss that the model computes itself, where it computes one:
        heads for further tokens serve no other."""
        if self.convention.labels is None or not names:
            return set()
        twin = self.fresh_twin(dtype=self.dtype, training=training)
        try:
            with settled(seed=self.seed), quiet(), torch.enable_grad():
                loss = twin.call(replace(case, labels=case.input_ids)).loss
                if loss is None or not loss.requires_grad:
                    return set()
                loss.backward()
        except Exception:  # the probes of the loss say what is wrong with it
            return set()
        parameters = dict(twin.model.named_parameters())
        return {name for name in names if (grad := parameters[name].grad) is not None and bool(grad.any())}

    def logits(self, case: Case) -> Tensor:
        """Logits `[batch, seq_len, vocab]` of one run without gradients."""
        with torch.no_grad():
            return self.call(case).logits

    def remembered(self, case: Case, run: Callable[[], Tensor]) -> Tensor:
        """What `run()` gave for this case the last few times, so that a relation with one left side runs it once."""
        for known, value in self._last:
            if known == case:
                return value
        value = run()
        self._last = [*self._last[-2:], (case, value)]
        return value

    def twin(self, *, dtype: torch.dtype = torch.float64, training: bool = False, attention: str | None = None) -> "Subject":
        """A deep copy in this dtype, mode and attention implementation; the same one each time it is asked for.

        It falls back to the subject's own dtype where the model does not run in the one asked for.
        """
        key = (dtype, training, attention)
        if key not in self._twins:
            self._twins[key] = self._make_twin(dtype, training, attention)
        return self._twins[key]

    def fresh_twin(self, *, dtype: torch.dtype = torch.float64, training: bool = False, attention: str | None = None) -> "Subject":
        """A deep copy that nobody else uses."""
        return self._make_twin(dtype, training, attention)

    def in_own_dtype(self) -> "Subject":
        """The same subject, whose twins stay in the model's own dtype: what fails there too is no fault of a twin in float64."""
        return replace(self, keep_dtype=True, _twins={}, _last=[], assumptions=list(self.assumptions))

    def _make_twin(self, dtype: torch.dtype, training: bool, attention: str | None) -> "Subject":
        if self.keep_dtype and dtype == torch.float64:
            dtype = self.dtype
        twin = replace(self, model=self._copy(), _bare=[], _twins={}, assumptions=[], limit=None, _last=[], attention=attention)
        if attention is not None:
            set_attention(twin.model, attention)
        # In the model's own dtype it stays as it is: weights in 16 bits beside tables in float32 are one of them.
        if dtype != self.dtype and any(p.dtype.is_floating_point for p in twin.model.parameters()):
            cast(twin.model, dtype)
        if dtype == torch.float64 and hasattr(twin.model, "set_experts_implementation"):
            with suppress(Exception):  # transformers' grouped kernel takes no float64 on the CPU; not every class has another
                twin.model.set_experts_implementation("eager")  # type: ignore[operator]
        twin.config = config_of(twin.model) or self.config
        twin.model.train(training)
        if dtype != self.dtype and twin.health() < self.health():
            note = f"runs in {str(self.dtype).removeprefix('torch.')} only, so it was checked in that, with a wider limit"
            if dtype == torch.float64 and note not in self.assumptions:
                self.assumptions.append(note)
            return self._make_twin(self.dtype, training, attention)
        return twin

    def first_case(self) -> Case:
        """A short batch, for the first run of a model that may know few positions; its sizes are unlike the model's own."""
        dimensions = self._dimensions()
        lengths = [n for n in (5, 4, 6, 7) if n <= (self.max_positions or n)] or [self.max_positions or 4]
        batch = min((2, 3), key=lambda n: n in dimensions)
        length = min(lengths, key=lambda n: n in dimensions or n == batch)
        return Case(name="first run", input_ids=self._random_ids(batch, length))

    def runs(self) -> bool:
        """Whether a short forward goes through and gives finite logits."""
        return self.health() == 2

    def health(self) -> int:
        """2 where a short forward goes through and gives finite logits, 1 where they are not finite, 0 where it raises."""
        case = self.first_case()
        with settled(self.model, seed=self.seed), quiet():
            try:
                return 1 + bool(torch.isfinite(self.logits(case)).all())
            except Exception:
                return 0

    def _copy(self) -> nn.Module:
        try:
            return deep_copy(self.model)
        except Exception as error:
            if self.rebuild is None:
                raise SubjectCodeError("copying the model (copy.deepcopy)") from error
            model = self.rebuild().model
            model.load_state_dict(self.model.state_dict())
            return model


def _without_last(case: Case, missing: int) -> Case:
    """A case without the last tokens."""
    if not missing:
        return case
    ids, mask, positions, labels = (
        None if rows is None else tuple(row[:-missing] for row in rows)
        for rows in (case.input_ids, case.attention_mask, case.position_ids, case.labels)
    )
    return replace(case, input_ids=ids or (), attention_mask=mask, position_ids=positions, labels=labels)


def _held(model: nn.Module) -> list[_Held]:
    return [(m, dict(vars(m)), {name: dict(vars(m)[name]) for name in TABLES}) for m in model.modules()]


def _hold(held: Sequence[_Held]) -> None:
    """Give modules back the attributes that they held, but for their mode."""
    for module, attributes, tables in held:
        mode, known = module.training, vars(module)
        for name in set(known) - set(attributes):
            del known[name]
        known.update(attributes)
        for name, table in tables.items():
            known[name].clear()
            known[name].update(table)
        module.training = mode


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
    with settled(subject.model, seed=subject.seed), quiet(), suppress(Exception):
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
        return _with_handed_cache(subject, _with_loss_method(subject))


def _with_own_cache(subject: Subject, case: Case) -> Convention:
    """The convention without the places of new tokens, where the model declines to fill the cache that it made for them: it
    wants to be told more, as the whole mask, and what that is cannot be guessed."""
    form, bare = subject.convention, _held(subject.model)
    if subject.adapter is not None or form.places is None or not subject.keeps_its_cache:
        return form
    trial = replace(subject, _last=[], _twins={}, _bare=bare)
    try:
        with own_code(trial, case):
            trial.new_cache(case.batch_size, case.seq_len)
            trial.forward(
                {form.ids: ids_tensor(case.input_ids, subject.device), form.places: torch.arange(case.seq_len, device=subject.device)}
            )
    except SubjectCodeError as error:
        if (words := own_refusal(error)) is not None:
            subject.assumptions.append(f"its cache is left alone: the model declines to fill one with {form.places} alone ({words})")
            return replace(form, places=None)
    finally:
        _hold(bare)
    return form


def _other_form(subject: Subject, case: Case, error: SubjectCodeError) -> Convention:
    """Another form of the call, under which the first run does go through; else the error, or a SubjectError where the
    model speaks of how it wants to be called."""
    form, original = subject.convention, error.__cause__
    call = f"forward({form.ids} [{case.batch_size}, {case.seq_len}])"
    if isinstance(original, NoLogits):
        flags = [n for n, p in inspect.signature(subject.model.forward).parameters.items() if p.default is False and LOGITS_FLAG.search(n)]
        for name in flags:
            asked = replace(subject, convention=replace(form, flags=(name,)), _last=[], _twins={})
            with suppress(Exception):
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
            told = replace(subject, convention=trial, _last=[], _twins={}).call(replace(case, labels=case.input_ids))
            return trial if told.loss is not None else replace(trial, labels=None)
    if form.state:  # the rows that its state is for say which dimension holds them
        trial = replace(form, sequence_first=True)
        with suppress(Exception):
            replace(subject, convention=trial, _last=[], _twins={}).call(case)
            subject.assumptions.append(f"ids are [seq_len, batch]: {form.state} is made for the rows of the second dimension")
            return trial
    if form.attention_mask in form.required and (whole := _with_whole_mask(subject, case)) is not None:
        return whole
    if form.places and subject.keeps_its_cache:
        bare: list[_Held] = []
        with suppress(Exception):
            trial = replace(form, sets_up=True)
            replace(subject, convention=trial, _bare=bare, _last=[], _twins={}).call(case)
            _hold(bare)
            return trial
        _hold(bare)
    words = own_refusal(error)
    if words is None:
        raise error
    for multiple in MULTIPLES_TRIED:
        trial = replace(form, multiple=multiple)
        with suppress(Exception):
            asked = replace(subject, convention=trial, _last=[], _twins={})
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
    Where it is never causal, one that may be left out is left out."""
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
                trial = replace(subject, convention=told, _last=[], _twins={})
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


def whole_mask(kind: str, seq: int, *, hide: bool = True, device: torch.device | str = "cpu") -> Tensor:
    """A mask `[1, 1, seq_len, seq_len]` of one of WHOLE_MASKS: causal, or with nothing hidden."""
    later = torch.ones(1, 1, seq, seq, dtype=torch.bool, device=device).triu(1) & hide
    if kind == "added":
        return torch.zeros(later.shape, device=device).masked_fill(later, float("-inf"))
    return later if kind == "hidden" else ~later


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


def _with_handed_cache(subject: Subject, form: Convention) -> Convention:
    """The convention with the cache that the caller makes, where two chunks run with one."""
    names = inspect.signature(subject.model.forward).parameters
    name = next((each for each in HANDED_NAMES if each in names), None)
    if name is None or form.use_cache or form.places or subject.adapter is not None:
        return form
    # With a start beside it the cache is the caller's all the same: the model keeps none.
    without = replace(form, start=None) if form.start and names[form.start].default is not inspect.Parameter.empty else form
    case = Case(name="a cache", input_ids=subject.token_ids(2, 3))
    trial = replace(subject, convention=replace(form, cache=name, hands_cache=True), _last=[], _twins={})
    with suppress(Exception):  # another kind of cache: what it wants is not known, so nothing is asked of it
        output = trial.call(case, use_cache=True)
        try:
            output = trial.call(case, use_cache=True, cache=output.cache)
        except RuntimeError:  # a cache of its own class that sizes do not fit in is one all the same, and cache.* says what is wrong
            return without if type(output.cache) in (dict, list, tuple) or _reads_the_whole_again(trial) else trial.convention
        return trial.convention if output.logits.shape[1] == case.seq_len else without
    return without


def _reads_the_whole_again(trial: Subject) -> bool:
    """Whether a cache goes with the whole sequence once more, of which the model drops what it has seen, as in XLM."""
    short, whole = (Case(name="a cache", input_ids=trial.token_ids(2, length)) for length in (3, 5))
    try:
        trial.call(whole, use_cache=True, cache=trial.call(short, use_cache=True).cache)
    except NoLogits:  # it ran, and gives the logits of what was new
        return True
    except Exception:
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


def _is_loss_per_token(result: object, case: Case) -> bool:
    """Whether a result can be a loss for each token, as `reduction="none"` leaves it."""
    sizes = {(case.batch_size, n) for n in (case.seq_len, case.seq_len - 1)} | {
        (case.batch_size * n,) for n in (case.seq_len, case.seq_len - 1)
    }
    return isinstance(result, Tensor) and result.is_floating_point() and tuple(result.shape) in sizes


def _has_loss_for_each_label(subject: Subject) -> bool:
    """Whether every label of a row has a loss of its own, the first too, which a shift inside would leave out."""
    case, form = subject.first_case(), subject.convention
    if form.labels is None or form.loss_method or form.multiple > 1 or subject.adapter is not None:
        return False
    with settled(subject.model, seed=subject.seed), torch.no_grad(), quiet(), suppress(Exception):
        subject.model.eval()
        ids = ids_tensor(case.input_ids, subject.device)
        assert ids is not None
        result = subject.forward({form.ids: ids, form.labels: ids.clone()})
        return _is_loss_per_token(result, case) and isinstance(result, Tensor) and result.numel() == ids.numel()
    return False


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside of wrappers that pass all arguments on, forward(*args, **kwargs), to the one module they hold."""
    while len(children := list(model.children())) == 1:
        kinds = {p.kind for p in inspect.signature(model.forward).parameters.values()}
        if kinds != {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            break
        model = children[0]
    return model


def own_refusal(error: BaseException) -> str | None:
    """The model's own words when it declines a call openly, by raising ValueError, AssertionError or NotImplementedError
    itself; None for what torch raised in its place."""
    original = error.__cause__
    if not isinstance(error, SubjectCodeError) or not isinstance(original, ValueError | AssertionError | NotImplementedError):
        return None
    frames = traceback_frames(original.__traceback__)
    if not frames or Sources(nn.Module()).is_torch(frames[-1][0].f_code.co_filename):
        return None
    return f"{type(original).__name__}: {str(original).strip().partition(chr(10))[0]}".removesuffix(": ")


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


def rows_before_the_first_position(subject: Subject, longest: int) -> int:
    """RoBERTa's family keeps the rows up to padding_idx of its position table for padding, inside the declared number."""
    for module in subject.model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == longest and module.padding_idx is not None:
            ahead = subject.setting("ngram")  # ProphetNet looks up the positions it predicts, too
            return module.padding_idx + 1 + (ahead if isinstance(ahead, int) else 0)
    return 0


def _parts(config: object) -> list[object]:
    """The dataclasses in the fields of a config that is a dataclass itself and nobody's published class."""
    if not is_dataclass(config) or hasattr(config, "to_dict"):
        return []
    return [value for field in fields(config) if is_dataclass(value := getattr(config, field.name)) and not isinstance(value, type)]


def config_of(model: nn.Module) -> object:
    """The model's own config object, under the names people use; None without one."""
    for name in CONFIG_NAMES:
        value = getattr(model, name, None)
        if value is not None and not callable(value) and not isinstance(value, Tensor):
            return value  # type: ignore[no-any-return]
    return None


def attention_choices(subject: Subject) -> list[str]:
    """The attention implementations that the subject offers by name; empty when it has no such switch."""
    config = subject.config
    if hasattr(subject.model, "set_attn_implementation"):  # transformers
        choices = ["eager"]
        if getattr(subject.model, "_supports_sdpa", False):
            choices.append("sdpa")
        return choices
    if getattr(config, "attn_implementation", None) in ("eager", "sdpa"):
        return ["eager", "sdpa"]
    return []


def set_attention(model: nn.Module, name: str) -> None:
    """Switch every part of the model to one attention implementation."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(name)  # type: ignore[operator]
        return
    seen = set()
    for module in model.modules():
        for holder in (module, config_of(module)):
            if holder is None or id(holder) in seen or getattr(holder, "attn_implementation", None) not in ("eager", "sdpa"):
                continue
            seen.add(id(holder))
            object.__setattr__(holder, "attn_implementation", name)


@contextmanager
def own_code(subject: Subject, case: Case, *, stage: str = "run") -> Iterator[None]:
    """Whatever is raised inside comes from running the subject on this case: a SubjectCodeError, and so a finding. A fault
    of an instrument that watches stays what it is."""
    try:
        yield
    except Exception as error:
        if is_ours(error):
            raise
        raise SubjectCodeError(stage, subject=subject, case=case) from error


@contextmanager
def quiet() -> Iterator[None]:
    """The subject's warnings are its own business while a probe runs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _without_model(adapter: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(adapter)
    parameters = list(signature.parameters.values())
    if len(parameters) < 2:
        raise SubjectError("an adapter takes the model and the token ids: adapter(model, input_ids, ...)")

    def call(*args: Any, **kwargs: Any) -> Any:
        return adapter(*args, **kwargs)

    call.__signature__ = signature.replace(parameters=parameters[1:])  # type: ignore[attr-defined]
    return call
