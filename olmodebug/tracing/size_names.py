"""Names for the sizes of a model: what its configuration calls them, and which of two meanings a number has."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..convention import first_embedding
from ..records import Event, TensorInfo
from ..settings import HEAD_NAMES, VOCAB_NAMES
from ..subject import Subject
from .dims import KV_HEAD_NAMES, MLP_NAMES, WIDTH_NAMES
from .tracer import Recording

EXPERT_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_CHOSEN_NAMES = ("num_experts_per_tok", "moe_top_k", "top_k", "moe_k")
EXPERT_MLP_NAMES = ("moe_intermediate_size", "expert_ffn_hidden_size")
ROTARY_NAMES = ("partial_rotary_factor", "rotary_pct", "rope_pct")

ATTENTION, EXPERTS = re.compile(r"attn|attention"), re.compile(r"expert|router|gate|moe|mlp|ffn|feed_forward")
RESHAPES = ("view", "_unsafe_view", "reshape", "_reshape_alias")

Merges = Mapping[tuple[int, int], str]  # (storage, size) -> `heads*head_dim`


@dataclass(frozen=True, slots=True)
class Meaning:
    """One meaning of a size. `last`: whether it can be a tensor's last dimension, or only that (None: any place);
    `near` is a pattern of the module paths where it is preferred."""

    name: str
    last: bool | None = None
    near: re.Pattern[str] | None = None


def sizes_of(subject: Subject) -> dict[int, list[Meaning]]:
    """Size -> its meanings, from the configuration; without one, the width and rows of the first embedding."""

    def number(*names: str) -> int | None:
        value = subject.setting(*names)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    table = first_embedding(subject.model)
    (heads, kv), width = head_counts(subject), number(*WIDTH_NAMES)
    width = width or (table.embedding_dim if table is not None else None)
    head_dim = number("head_dim") or (width // heads if width and heads else None)
    mlp, chosen = number(*MLP_NAMES), number(*EXPERTS_CHOSEN_NAMES)
    rope = subject.setting("rope_parameters", "rope_scaling")
    share = subject.setting(*ROTARY_NAMES) or (rope.get("partial_rotary_factor") if isinstance(rope, dict) else None)
    found: dict[int, list[Meaning]] = {}

    def mean(size: int | None, meaning: Meaning) -> None:
        if size and size > 1 and meaning not in found.setdefault(size, []):
            found[size].append(meaning)

    mean(number(*VOCAB_NAMES), Meaning("vocab"))
    if table is not None and table.num_embeddings not in found:
        mean(table.num_embeddings, Meaning("vocab rows" if number(*VOCAB_NAMES) else "vocab"))
    mean(width, Meaning("hidden"))
    mean(mlp, Meaning("intermediate"))
    if mlp is not None:
        mean(2 * mlp, Meaning("2*intermediate", near=EXPERTS))
    elif width:
        mean(4 * width, Meaning("4*hidden", near=EXPERTS))  # what GPT-2 and its relatives mean by leaving it out
    mean(heads, Meaning("heads", last=False, near=ATTENTION))
    mean(kv if kv != heads else None, Meaning("kv_heads", last=False, near=ATTENTION))
    mean(head_dim, Meaning("head_dim", last=True))
    mean(head_dim // 2 if head_dim and head_dim % 2 == 0 else None, Meaning("head_dim/2", last=True))
    if isinstance(share, float) and 0 < share < 1 and head_dim:
        mean(int(head_dim * share), Meaning("rotary_dim", last=True))
    if heads and head_dim:
        mean(3 * heads * head_dim, Meaning("3*heads*head_dim", near=ATTENTION))
        if kv and kv != heads:
            mean(kv * head_dim, Meaning("kv_heads*head_dim", near=ATTENTION))
            mean((heads + 2 * kv) * head_dim, Meaning("(heads+2*kv_heads)*head_dim", near=ATTENTION))
        if heads * head_dim != width:
            mean(heads * head_dim, Meaning("heads*head_dim", near=ATTENTION))
    mean(number(*EXPERT_NAMES), Meaning("experts", near=EXPERTS))
    mean(chosen, Meaning("experts_per_token", near=EXPERTS))
    mean(number(*EXPERT_MLP_NAMES), Meaning("expert_intermediate", near=EXPERTS))
    return found


def head_counts(subject: Subject) -> tuple[int | None, int | None]:
    """(heads, heads of keys and values) from the configuration, else from an attribute that all attention modules share."""
    found = []
    for names in ((*HEAD_NAMES, "heads", "nhead"), KV_HEAD_NAMES):
        value = subject.setting(*names)
        if value is None:
            held = {getattr(m, name) for m in subject.model.modules() for name in names if type(getattr(m, name, None)) is int}
            value = next(iter(held)) if len(held) == 1 else None
        found.append(value if isinstance(value, int) and value > 0 else None)
    return found[0], found[1]


class Namer:
    """Names the dimensions of two runs: B and T by how a size changes, the rest by what it means where it stands."""

    def __init__(self, meanings: dict[int, list[Meaning]], *, batches: tuple[int, int], seqs: tuple[int, int], merges: Merges) -> None:
        self.meanings, self.batches, self.seqs, self.merges = meanings, batches, seqs, merges
        self.used: dict[str, int] = {}

    def shape(self, first: TensorInfo, second: TensorInfo, path: str) -> str:
        """`(B, T, hidden)` from one tensor in the two runs; `path` is the module at whose border it stands."""
        if len(first.shape) != len(second.shape):
            return str(first.shape)
        names = []
        for i, (a, b) in enumerate(zip(first.shape, second.shape, strict=True)):
            merged = self.merges.get((first.storage, a)) if a == b else None
            names.append(self._note(merged, a) if merged else self._dimension(a, b, path, last=i == len(first.shape) - 1))
        return f"({names[0]},)" if len(names) == 1 else f"({', '.join(names)})"

    def _dimension(self, first: int, second: int, path: str, *, last: bool) -> str:
        """The name of one dimension: a product with B or T, a sum with T, or a size of the model."""
        if first == second:
            return self._fixed(first, path, last=last)
        (b1, b2), (t1, t2) = self.batches, self.seqs
        for name, x, y in (("B*T", b1 * t1, b2 * t2), ("B", b1, b2), ("T", t1, t2)):
            if x != y and first % x == 0 and second % y == 0 and first // x == second // y:
                return name if first == x else f"{name}*{self._fixed(first // x, path, last=False)}"
        if t1 != t2 and first - t1 == second - t2:
            return f"T{first - t1:+d}"
        return str(first)

    def _fixed(self, size: int, path: str, *, last: bool) -> str:
        """The one meaning that a size can have here; the number where there is none, or more than one."""
        possible = [m for m in self.meanings.get(size, ()) if m.last is None or m.last == last]
        if len(possible) > 1:
            near = [m for m in possible if m.near is not None and m.near.search(path)]
            possible = near or [m for m in possible if m.near is None]
        return self._note(possible[0].name, size) if len(possible) == 1 else str(size)

    def _note(self, name: str, size: int) -> str:
        self.used[name] = size
        return name


def head_merges(recording: Recording, subject: Subject, meanings: dict[int, list[Meaning]]) -> Merges:
    """The dimensions that are made of heads: split by a view, put together by one, or given by a norm or the like, which
    multiplies no matrix, what is split after it."""
    heads, kv = head_counts(subject)
    names = {kv: "kv_heads"} if kv and kv != heads else {}
    names |= {heads: "heads"} if heads else {}
    widths = {size: m.name for size, found in meanings.items() for m in found if m.name == "head_dim"}
    merges: dict[tuple[int, int], str] = {}
    for event in recording.events:
        if event.op in RESHAPES and event.inputs and event.outputs:
            for whole, name in _split(event, names, widths):
                for info in (event.inputs[0], event.outputs[0]):
                    if whole in info.shape and info.storage:
                        merges[info.storage, whole] = name
    modules = dict(subject.model.named_modules())
    for call in reversed(recording.calls):
        plain = all(p.ndim < 2 for p in modules[call.module].parameters())
        if plain and call.inputs and call.outputs and call.inputs[0].shape == call.outputs[0].shape:
            last = call.outputs[0].shape[-1] if call.outputs[0].shape else 0
            if (passed := merges.get((call.outputs[0].storage, last))) is not None:
                merges.setdefault((call.inputs[0].storage, last), passed)
    return merges


def _split(event: Event, heads: Mapping[int, str], widths: Mapping[int, str]) -> Iterator[tuple[int, str]]:
    """(merged size, its name) for a view that splits one dimension into heads and head_dim, or merges them."""
    for parts, whole in ((event.outputs[0].shape, event.inputs[0].shape), (event.inputs[0].shape, event.outputs[0].shape)):
        if len(parts) != len(whole) + 1:
            continue
        for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)):
            if parts[:i] == whole[:i] and parts[i + 2 :] == whole[i + 1 :] and a * b == whole[i] and a in heads:
                factor = b // next(iter(widths), b) if widths else 1
                if b in widths:
                    yield a * b, f"{heads[a]}*{widths[b]}"
                elif widths and factor > 1 and b == factor * next(iter(widths)):
                    yield a * b, f"{heads[a]}*{factor}*head_dim"
