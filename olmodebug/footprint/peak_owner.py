"""Who holds the peak, in one sentence."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from ..units import bytes_text, plural
from .allocator import rounded
from .storage_trace import ACTIVATIONS, LOGITS, LOSS, TEMPORARIES, Allocation

COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
MOST_OF_A_CATEGORY = 0.75  # from this share on, alike storages stand for their whole category


def owner(live: Sequence[Allocation], step: int, phase: str) -> str:
    """`94 % of the peak is three float32 copies of the logits, in the loss (backward of step 2)`."""
    total = sum(rounded(a.bytes) for a in live)
    if not total:
        return "nothing is allocated"
    sums = Counter[str]()
    for a in live:
        sums[a.category] += rounded(a.bytes)
    category, size = sums.most_common(1)[0]
    when = f"{phase} of step {step}"
    members = [a for a in live if a.category == category]
    alike: dict[tuple[tuple[int, ...], str], list[Allocation]] = defaultdict(list)
    for a in members:
        alike[(_flat(a.shape), a.dtype)].append(a)
    (_, dtype), same = max(alike.items(), key=lambda item: sum(a.bytes for a in item[1]))
    part = sum(rounded(a.bytes) for a in same)
    if category == LOGITS and part >= MOST_OF_A_CATEGORY * size:
        number = COUNTS.get(len(same), str(len(same)))
        noun = "copy" if len(same) == 1 else "copies"
        each = " each" if len(same) > 1 else ""
        modules = sorted({a.module for a in same})
        where = "in the loss" if LOSS in modules else f"in {modules[0] or 'the model'}"
        return f"{_percent(part, total)} of the peak is {number} {dtype} {noun} of the logits of {bytes_text(same[0].bytes)}{each}, {where} ({when})"
    if category == ACTIVATIONS:
        layers = len({_layer(a.module) for a in members if _layer(a.module)})
        where = f" of {plural(layers, 'layer')}" if layers else ""
        return f"{_percent(size, total)} of the peak is saved activations{where}, {bytes_text(size)} ({when})"
    if category == TEMPORARIES and len(same) > 1 and len({a.op for a in members}) == 1:
        return f"{_percent(size, total)} of the peak is temporary copies made by {members[0].op}, {bytes_text(size)} ({when})"
    names = dict(sums.most_common(3))
    if size < 0.5 * total and len(names) > 1:
        listed = ", ".join(f"{name} {_percent(amount, total)}" for name, amount in names.items())
        return f"no single category holds the peak: {listed} ({when})"
    return f"{_percent(size, total)} of the peak is {category}, {bytes_text(size)} ({when})"


def _percent(part: int, total: int) -> str:
    return f"{100 * part / total:.0f} %"


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Batch and sequence in one: `[8, 2048, V]` and `[16384, V]` are copies of each other."""
    count = 1
    for size in shape[:-1]:
        count *= size
    return (count, shape[-1]) if shape else ()


def _layer(module: str) -> str:
    parts = module.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if numbered is None else ".".join(parts[: numbered + 1])
