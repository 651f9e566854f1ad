"""A pasted log or traceback, decoded: repeated lines folded, the kernel named, usual causes ranked, the command that finds it.

Nothing is run and no torch is loaded. A cause is never stated as the fact: the words of the log only order the candidates.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..units import bytes_text
from .signatures import SIGNATURES, Cause, Signature

THREAD_LINE = re.compile(r"block: \[\d+,\s*\d+,\s*\d+\], thread: \[\d+,\s*\d+,\s*\d+\] Assertion")
FRAME = re.compile(r'^\s*(?:\[rank\d+\]:\s*)?File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
INSTALLED = re.compile(r"site-packages|dist-packages|/lib/python\d|<frozen|<string>|/torch/")
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

FOLDED_FROM = 2  # identical assertion lines from which on the count is worth a word
STRANDED = 1.0  # reserved but unallocated, in units of the request: at that size the memory was there, in pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A candidate cause and the words of the log that speak for it."""

    cause: Cause
    because: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What one text in a log means. `place` is the innermost line of the user's own in the last traceback."""

    name: str
    text: str
    meaning: str
    facts: Mapping[str, str] = field(default_factory=dict)
    folded: int = 0
    place: str | None = None
    asynchronous: bool = False
    verdict: str | None = None
    causes: tuple[Ranked, ...] = ()
    command: str = ""


def decode(log: str) -> tuple[Decoded, ...]:
    """Every known text in a log, roots first; symptoms that a root explains are left out."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log)
    found = [(signature, match) for signature in SIGNATURES if (match := _match(signature, text)) is not None]
    if any(signature.root for signature, _ in found):
        found = [(signature, match) for signature, match in found if signature.root]
    spans: list[tuple[int, int]] = []
    decoded = []
    for signature, match in found:
        if any(start <= match.start() < end for start, end in spans):
            continue  # two signatures of one line: the first listed is the better one
        spans.append(match.span())
        decoded.append(_decoded(signature, match, text))
    return tuple(decoded)


def _match(signature: Signature, text: str) -> "re.Match[str] | None":
    return re.search(signature.pattern, text)


def _decoded(signature: Signature, match: "re.Match[str]", text: str) -> Decoded:
    facts = {name: value for name, value in match.groupdict().items() if value is not None}
    folded = len(THREAD_LINE.findall(text)) if ".cu" in match[0] else 0
    on_device = ".cu" in match[0] or "CUDA error" in match[0] or "CUDA_ERROR" in match[0]
    run = f"olmodebug run --guard {signature.guard} -- YOUR COMMAND"
    return Decoded(
        name=signature.name,
        text=_one_line(match[0], text, match.start()),
        meaning=signature.meaning,
        facts=facts,
        folded=folded if folded >= FOLDED_FROM else 0,
        place=_place(text),
        asynchronous=on_device and "device-side" in text or signature.name == "illegal-access",
        verdict=_memory_verdict(facts) if signature.name == "cuda-memory" else None,
        causes=_ranked(signature.causes, text),
        command=signature.command or run,
    )


def _ranked(causes: Iterable[Cause], text: str) -> tuple[Ranked, ...]:
    """In the order of how many hints occur in the lines of the user's tracebacks, then in the usual order."""
    lines = "\n".join(line for line in text.splitlines() if not THREAD_LINE.search(line))
    ranked = [Ranked(cause=cause, because=tuple(hint for hint in cause.hints if hint in lines)) for cause in causes]
    return tuple(sorted(ranked, key=lambda item: -len(item.because)))


def _place(text: str) -> str | None:
    """`train.py:88 in step`, the innermost frame of the last traceback that is not installed code."""
    last = text[text.rfind("Traceback (most recent call last)") :] if "Traceback (most recent call last)" in text else text
    own = [match for line in last.splitlines() if (match := FRAME.match(line)) and not INSTALLED.search(match["file"])]
    if not own:
        return None
    return f"{own[-1]['file']}:{own[-1]['line']} in {own[-1]['function']}"


def _one_line(found: str, text: str, start: int) -> str:
    line = found.partition("\n")[0].strip()
    begin = text.rfind("\n", 0, start) + 1
    end = text.find("\n", start)
    whole = text[begin : end if end >= 0 else len(text)].strip()
    return whole if len(whole) <= 240 else line[:240]


def _memory_verdict(facts: Mapping[str, str]) -> str | None:
    """Need or fragmentation, from the numbers of CUDA's own message."""
    asked, stranded, free = (_bytes(facts.get(name)) for name in ("asked", "stranded", "free"))
    if asked is None or stranded is None:
        return None
    if stranded >= STRANDED * asked:
        return (
            f"fragmentation: {bytes_text(stranded)} are reserved and not in use, more than the {bytes_text(asked)} asked for, but in pieces; "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True lets them join"
        )
    short = asked - (free or 0)
    return f"need: {bytes_text(stranded)} are reserved and not in use, less than the {bytes_text(asked)} asked for; {bytes_text(max(short, 0))} are missing"


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    number, unit = text.split()
    return int(float(number) * UNITS[unit])
