"""Several documents in one row do not see each other, where the signature offers to keep them apart."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from olmodebug.compare import difference
from olmodebug.explain import forward_place, source_lines
from olmodebug.own_code import quiet
from olmodebug.probe import not_applicable, probe, skip
from olmodebug.records import Case, Where
from olmodebug.relations.diagnose import diagnose
from olmodebug.relations.invariance import limit_of
from olmodebug.relations.patterns import Diagnosis
from olmodebug.relations.relation import Part, localise, model_sizes
from olmodebug.relations.repair import Found
from olmodebug.report import Finding
from olmodebug.settle import random_state_kept, set_seed
from olmodebug.subject import Subject

# What a forward calls the argument that says which document a token belongs to, [batch, seq_len].
DOCUMENT_NAMES = ("document_ids", "doc_ids", "segment_ids", "sequence_ids", "seq_idx", "seq_ids", "packed_ids")


@probe(after=("causality.no-future", "batch.rows-independent"))
def documents_are_isolated(subject: Subject) -> Iterator[Finding]:
    """With document ids given, tokens of one document change nothing in the others, in every row.

    Why: training packs documents into rows; what leaks from one into the next is learned, and no loss shows it.
    Catches: document ids that are accepted and not used; positions that restart under a mask that stays causal;
    the boundaries of row 0 used for every row.
    """
    name = _argument(subject)
    twin = subject.twin()
    batch, seq = twin.sizes()
    if seq < 5:
        skip("the model takes too few tokens for two documents")
    # Boundaries differ from row to row, and lie inside the row.
    cuts = [2 + (2 * row) % (seq - 3) for row in range(batch)]
    documents = torch.tensor([[int(i >= cut) for i in range(seq)] for cut in cuts])
    limit = limit_of(twin)
    for first_id in (0, 1):  # documents counted from 0; and from 1, where 0 is padding (T5X, MaxText)
        for row in range(batch):
            finding = _leak(twin, name, documents + first_id, row, cuts, limit)
            if finding is not None:
                yield finding
                return
    yield from _future(twin, name, documents, limit)


def _argument(subject: Subject) -> str:
    """The argument that takes document ids; leaves the probe where there is none."""
    if subject.adapter is not None:
        not_applicable("it is called through an adapter, which takes no document ids")
    names = set(inspect.signature(subject.model.forward).parameters)
    found = next((name for name in DOCUMENT_NAMES if name in names), None)
    if found is None:
        not_applicable(f"forward takes no document ids ({', '.join(DOCUMENT_NAMES[:3])}, ...); positions that restart promise no isolation")
    return found


def _future(twin: Subject, name: str, documents: Tensor, limit: float) -> Iterator[Finding]:
    """The finding for a last token that changes what comes before it, once documents are told apart."""
    batch, seq = documents.shape
    first, other = twin.token_ids(batch, seq, seed=50), twin.token_ids(batch, seq, seed=51)
    changed = tuple((*a[:-1], b[-1]) for a, b in zip(first, other, strict=True))
    part = Part(batch=batch, seq=seq, columns=slice(0, seq - 1), fixed=model_sizes(twin.model))

    def leaks(a: Tensor, b: Tensor) -> bool:
        return difference(a[:, :-1], b[:, :-1], relative_limit=limit) is not None

    left, right = (_logits(twin, ids, name, documents) for ids in (first, changed))
    apart = difference(left[:, :-1], right[:, :-1], relative_limit=limit)
    if apart is None:
        return
    runs = (lambda ids=ids: _logits(twin, ids, name, documents) for ids in (first, changed))
    culprits = localise(twin.model, *runs, part=part, limit=limit, violated=leaks)
    culprit = culprits[0] if culprits else None
    told = diagnose(culprit, part, hidden="later tokens") if culprit else Diagnosis()
    where = culprit.where if culprit else Where()
    yield Found(
        probe="",
        severity="error",
        message=f"with {name} given, logits at position {apart.index[1]} change by {apart.max_abs:.3g} when only the last token changes",
        where=where,
        source=source_lines(where),
        cause=told.cause,
        fix=told.fix or "hide later keys too: the mask of the documents and the causal mask",
        expected="no change beyond rounding",
        observed=f"a change of {apart.max_abs:.3g}",
        evidence={"limit": limit * apart.scale},
        case=Case(name="two documents in a row", input_ids=changed),
    )


def _logits(twin: Subject, ids: Any, name: str, told: Tensor | None) -> Tensor:
    """The logits of a run with these document ids, or with none."""
    with torch.no_grad(), quiet(), random_state_kept():
        set_seed(twin.seed)
        given = {} if told is None else {name: told.to(twin.device)}
        result = twin.forward({twin.convention.ids: torch.tensor(ids, device=twin.device), **given})
        logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
        logits = result[0] if logits is None else logits
        assert isinstance(logits, Tensor)
        return logits.cpu()


def _leak(twin: Subject, name: str, documents: Tensor, row: int, cuts: list[int], limit: float) -> Found | None:
    """The finding for what the first document of a row changes in the second, or None."""
    batch, seq = documents.shape
    cut = cuts[row]
    first, other = twin.token_ids(batch, seq, seed=50), twin.token_ids(batch, seq, seed=51)
    changed = tuple(tuple(other[i][:cut] + ids[cut:]) if i == row else ids for i, ids in enumerate(first))

    def run(ids: Any, told: Tensor | None = documents) -> Tensor:
        return _logits(twin, ids, name, told)

    part = Part(batch=batch, seq=seq, rows=slice(row, row + 1), columns=slice(cut, None), fixed=model_sizes(twin.model))

    def leaks(a: Tensor, b: Tensor, start: int = cut) -> bool:
        return difference(a[row, start:], b[row, start:], relative_limit=limit) is not None

    left, right = run(first), run(changed)
    apart = difference(left[row, cut:], right[row, cut:], relative_limit=limit)
    if apart is None:
        return None
    ignored = bool(torch.equal(left, run(first, None)))
    alike = documents[:1].expand_as(documents)
    others = tuple(tuple(other[i][: cuts[0]] + ids[cuts[0] :]) if i == row else ids for i, ids in enumerate(first))
    of_row_0 = row > 0 and not ignored and not leaks(run(first, alike), run(others, alike), cuts[0])
    culprits = localise(twin.model, lambda: run(first), lambda: run(changed), part=part, limit=limit, violated=leaks)
    culprit = culprits[0] if culprits else None
    told = diagnose(culprit, part, hidden="another document") if culprit else Diagnosis()
    if ignored:
        told = Diagnosis(
            cause=f"{name} is accepted and has no effect: logits are the same with it and without it, so documents see each other",
            fix=f"hide keys of another document: {name}[:, :, None] == {name}[:, None, :], together with the causal mask",
        )
    elif of_row_0:
        told = Diagnosis(
            cause=f"the documents of row 0 are used for every row: row {row} is isolated only where its boundary lies as row 0's does",
            fix=f"build the mask [batch, 1, seq_len, seq_len] from every row of {name}",
        )
    found = Found(
        probe="",
        severity="error",
        message=f"logits of the second packed document in row {row} change by {apart.max_abs:.3g} when only the first document changes",
        cause=told.cause,
        fix=told.fix,
        expected="no change beyond rounding",
        observed=f"a change of {apart.max_abs:.3g} at position {cut + apart.index[0]}, where the document starts at {cut}",
        evidence={"limit": limit * apart.scale, name: " ".join(map(str, documents[row].tolist()))},
        case=Case(name="two documents in a row", input_ids=changed),
    )
    where = forward_place(twin.model) if ignored else culprit.where if culprit else found.where
    return replace(found, where=where, source=source_lines(where))
