"""A sequence read in chunks through a cache, and how far its logits are from those of one full forward."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compare import difference
from ..own_code import own_code
from ..records import Case, Difference
from ..report import case_from, plain
from ..settle import settled
from ..subject import Subject
from .chunks import NoCache, pieces, run_chunks
from .invariance import run
from .pair import twin_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a sequence is cut into chunks, and the case that says what is passed with them."""

    case: Case
    sizes: tuple[int, ...]
    given: str
    first: int = 0  # the first position that counts: those before it are padding

    def __str__(self) -> str:
        cut = f"chunks of {', '.join(map(str, self.sizes))} tokens"
        return f"{cut} with the cache{f' ({self.given} given)' if self.given else ''}"


def breach(twin: Subject, way: Way, limit: float, full: dict[Case, Tensor] | None = None) -> Difference | None:
    """How far the chunks' logits are from those of one full forward; None where they agree, or no cache comes back."""
    full = {} if full is None else full
    if way.case not in full:
        full[way.case] = run(twin, way.case)
    logits = chunked(twin, way.case, way.sizes, silent=full[way.case])
    if logits is None:
        return None
    found = difference(full[way.case][:, way.first :], logits[:, way.first :], relative_limit=limit)
    if found is None:
        return None
    floor = difference(full[way.case], run(twin, way.case))
    return None if floor is not None and found.max_abs <= 32 * floor.max_abs else found


def way_record(twin: Subject, way: Way) -> dict[str, Any]:
    """A sequence in chunks and the twin it was run on, as JSON values."""
    return {
        "kind": "chunks",
        "case": plain(way.case),
        "sizes": list(way.sizes),
        "first": way.first,
        "given": way.given,
        **twin_record(twin),
    }


def way_from(record: Mapping[str, Any]) -> Way:
    """The way of a record."""
    return Way(case=case_from(record["case"]), sizes=tuple(record["sizes"]), first=record["first"], given=record["given"])


def chunked(twin: Subject, case: Case, sizes: tuple[int, ...], *, silent: Tensor | None = None) -> Tensor | None:
    """The logits of all chunks in a row; None where the model gives no cache back. `silent` has those of the positions that a
    model leaves out which, with a cache, gives the last position of each chunk only."""
    with settled(), own_code(twin, case):
        try:
            parts = run_chunks(twin, case, pieces(sizes))[0]
        except NoCache:
            return None
    if silent is not None:
        chunks = zip(pieces(sizes), parts, strict=True)
        parts = [torch.cat((silent[:, chunk.start : chunk.stop - part.shape[1]].to(part), part), 1) for chunk, part in chunks]
    return torch.cat(parts, dim=1).cpu()
