"""The model under test: how it is called, what it is made of, and copies of it to experiment on.

A probe never touches the subject itself: it works on a *twin*, a deep copy in the dtype, mode and attention
implementation that it asks for.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily  # no public name; without it no ids under a fake mode

from .caches import Held, handed_cache, hold, method_of, new_cache
from .casts import cast
from .convention import (
    LOSS_ATTRIBUTES,
    STATE_MAKERS,
    Convention,
    NoLogits,
    Output,
    find_logits,
    find_loss,
    first_embedding,
    ids_tensor,
    is_loss_per_token,
    is_scalar_loss,
    returned_cache,
    whole_mask,
)
from .deep_copies import deep_copy
from .draws import Draws
from .errors import SubjectError
from .load import SubjectCodeError
from .own_code import quiet
from .records import Case, Rows
from .report import SubjectInfo
from .settings import BATCH_NAMES, CONTEXT_NAMES, HEAD_NAMES, VOCAB_NAMES, config_of, set_attention, setting
from .settle import settled
from .sources import Sources, short_path

BATCH_SIZES = (3, 5, 7, 2)
# What is tried where no context length is declared: the last position where positions can be given, else a sequence.
LENGTHS_TRIED = (4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8)
LONGEST_TRIED = 512
SEQ_LENS = (11, 13, 17, 19, 23, 7, 5)


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
    bare: list[Held] = field(default_factory=list)  # what the modules held before a cache was made
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
            with settled(self.model, seed=self.seed), quiet(), suppress(Exception):  # too long, then: a shorter one is tried
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
        """The first of these names that the config has, as settings.setting reads it."""
        return setting(self.config, *names)

    def info(self) -> SubjectInfo:
        """What the report says about the subject."""
        parameters = {id(p): p for p in self.model.parameters()}.values()
        kind = type(self.model)
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
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
        return self.called_as(replace(self.convention, last_only=False))

    def called_as(self, convention: Convention) -> "Subject":
        """The same live model, called in another way; nothing is remembered of what it gave before."""
        return replace(self, convention=convention, _last=[], _twins={})

    def around(self, model: nn.Module) -> "Subject":
        """The same for another live model, of which nothing is remembered yet."""
        return replace(self, model=model, _last=[], _twins={})

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
                    case.without_last(missing),
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
            cache = handed_cache(self, case.batch_size)
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
            if case.labels is None or form.logits_need_labels or (loss is None and not is_loss_per_token(result, case)):
                raise
            # With labels it gives the loss alone, or the logits that the loss was taken from: all of them come without.
            output = self._call(replace(case, labels=None), None, False, position_ids, attention_mask, None)
            output.loss = loss
        if form.cache and not form.hands_cache and output.cache is None and (use_cache or not form.use_cache):
            output.cache = returned_cache(result)
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
        if form.sets_up and (form.places or form.start) not in arguments:
            new_cache(self, *arguments[form.ids].shape)
            try:
                return self._forward(arguments)
            finally:
                hold(self.bare)
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
            form.state: lambda: method_of(self.model, STATE_MAKERS)(len(ids)),  # type: ignore[misc]
        }
        needed = (*form.required, form.state, form.places if form.sets_up else None)
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
        twin = replace(self, model=self._copy(), bare=[], _twins={}, assumptions=[], limit=None, _last=[], attention=attention)
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
            own = self._make_twin(self.dtype, training, attention)
            if own.health() <= twin.health():
                return twin  # it is this attention that does not run, in whatever dtype
            note = f"runs in {str(self.dtype).removeprefix('torch.')} only, so it was checked in that, with a wider limit"
            if dtype == torch.float64 and note not in self.assumptions:
                self.assumptions.append(note)
            return own
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
            except Exception:  # of whatever kind: what it is the probe tells that runs into it
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


def rows_before_the_first_position(subject: Subject, longest: int) -> int:
    """RoBERTa's family keeps the rows up to padding_idx of its position table for padding, inside the declared number."""
    for module in subject.model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == longest and module.padding_idx is not None:
            ahead = subject.setting("ngram")  # ProphetNet looks up the positions it predicts, too
            return module.padding_idx + 1 + (ahead if isinstance(ahead, int) else 0)
    return 0
