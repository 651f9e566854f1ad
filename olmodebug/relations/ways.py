"""A sequence read in chunks through a cache, and how far its logits are from those of one full forward."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..caches import keeps_its_cache, new_cache
from ..compare import difference
from ..own_code import own_code
from ..records import Case, Difference
from ..report import case_from, plain
from ..settle import settled
from ..subject import Subject
from .chunks import Chunk, NoCache, call_chunk, pieces, run_chunks
from .invariance import run
from .pair import twin_record

# Causal-LM classes of transformers whose cache is not used as the others are.
OWN_CACHES = ("cpmant", "prophetnet")


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


def no_cache(subject: Subject) -> str | None:
    """Why a subject cannot be asked to read a sequence in chunks through a cache; None where it can."""
    if subject.setting("model_type") in OWN_CACHES:
        return "its cache wants more than the new tokens: the whole input, or positions counted its own way"
    if subject.convention.cache is None and not keeps_its_cache(subject):
        return "forward takes no cache"
    twin = subject.fresh_twin()  # what a call with a cache leaves behind is nobody else's business
    if keeps_its_cache(subject) and _keeps_nothing(twin):
        return "as it is configured, it keeps no keys and values from one call to the next"
    if chunked(twin, Case(name="a first chunk", input_ids=twin.token_ids(1, 2)), (2,)) is None:
        return "use_cache=True gives no cache back"
    return None


def _keeps_nothing(twin: Subject) -> bool:
    """Whether a call with a place in the cache leaves the model as it was, and nothing that it holds is called a cache."""

    def held() -> dict[str, Tensor]:
        return {**dict(twin.model.named_buffers()), **dict(_plain(twin.model))}

    new_cache(twin, 1, 4)
    before = {name: (tensor, tensor.clone()) for name, tensor in held().items()}
    if any(re.search(r"cache|past|(^|[._])[kv](ey|alue)?s?($|_)", name) for name in before):
        return False
    call_chunk(twin, Case(name="a first chunk", input_ids=twin.token_ids(1, 2)), Chunk(start=0, stop=2, seq=2), None)
    after = held()
    return before.keys() == after.keys() and all(t is before[n][0] and torch.equal(t, before[n][1]) for n, t in after.items())


def _plain(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that modules hold as plain attributes, also one level deep in a list or a dict."""
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Tensor):
                    yield f"{path}.{key}", item
