"""The data of one run: where it comes from, how it is split, and what its token frequencies alone would predict."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from ..errors import UsageError
from .corpus import SAID, shipped_documents
from .data import Document, Problems, Split, find_files, read_documents
from .tokenization import TRAINED_VOCABULARY, Encoder, load_encoder, train_encoder

# Documents that validate and test, at most, and how far into the data they are looked for: data may be endless.
MOST_EVALUATED = 50
LOOKED_THROUGH = 1000
COUNTED_TOKENS = 2_000_000  # for the frequencies


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """Which documents count and how much of each: `tokens` first tokens of a document are evaluated."""

    name: str
    split: Split
    tokens: int
    most_documents: int | None = None  # of the data, where a protocol names that many


PROTOCOLS = {
    "default": Protocol(name="default", split=Split(), tokens=2048),
    # Train on documents 0-79 of 100, validate on 80-89, test on 90-99, 512 first tokens of each.
    "first-512": Protocol(
        name="first-512",
        split=Split(period=100, validation=tuple(range(80, 90)), test=tuple(range(90, 100))),
        tokens=512,
        most_documents=100,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A document to evaluate: its first ids, and the bytes of the text behind the first of them."""

    ids: tuple[int, ...]
    text_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Training texts, to be read anew for each epoch, and the documents held out."""

    source: str
    train_texts: Callable[[], Iterator[str]]
    encoder: Encoder
    protocol: Protocol
    validation: tuple[Evaluated, ...]
    test: tuple[Evaluated, ...]
    train_documents: int
    counted_tokens: int
    unigram_entropy: float
    unigram_perplexity: float
    duplicates: int
    problems: Problems


def open_dataset(
    patterns: Sequence[str],
    *,
    text_field: str = "text",
    tokenizer: str | None = None,
    eos_id: int | None = None,
    vocab_size: int = TRAINED_VOCABULARY,
    protocol: Protocol = PROTOCOLS["default"],
    cache: Path | None = None,
) -> Dataset:
    """The dataset of files, or of what ships with Python where none are named. UsageError where nothing can be trained on."""
    problems = Problems()
    if patterns:
        files = find_files(patterns)
        source = files[0].name if len(files) == 1 else f"{len(files)} files, {files[0].name} to {files[-1].name}"

        def documents() -> Iterator[Document]:
            return read_documents(files, problems, text_field=text_field)
    else:
        source, documents = SAID, shipped_documents

    def part(name: str) -> Iterator[str]:
        for index, document in enumerate(islice(documents(), protocol.most_documents)):
            if split.part(index) == name:
                yield document.text

    def train_texts() -> Iterator[str]:
        return part("train")

    held_out = list(islice(documents(), protocol.most_documents or LOOKED_THROUGH))
    if not held_out:
        first = f": {problems.first[0]}" if problems.first else ""
        raise UsageError(f"the data has no document{first}")
    split = protocol.split.fitted(len(held_out)) if protocol.most_documents is None else protocol.split
    encoder = load_encoder(tokenizer, eos_id=eos_id) if tokenizer else train_encoder(train_texts(), vocab_size=vocab_size, cache=cache)
    known = {document.text for index, document in enumerate(held_out) if split.part(index) == "train"}
    duplicates = 0
    parts: dict[str, list[Evaluated]] = {"validation": [], "test": []}
    for index, document in enumerate(held_out):
        name = split.part(index)
        if name == "train" or len(parts[name]) == MOST_EVALUATED:
            continue
        if document.text in known:  # trained on: it would flatter the perplexity
            duplicates += 1
            continue
        parts[name].append(_evaluated(document.text, encoder, protocol.tokens))
    frequencies, train_documents = _frequencies(train_texts(), encoder)
    validation = tuple(item for item in parts["validation"] if len(item.ids) > 1)
    return Dataset(
        source=source,
        train_texts=train_texts,
        encoder=encoder,
        protocol=protocol,
        validation=validation,
        test=tuple(item for item in parts["test"] if len(item.ids) > 1),
        train_documents=train_documents,
        counted_tokens=int(frequencies.sum()),
        unigram_entropy=_entropy(frequencies),
        unigram_perplexity=_unigram_perplexity(frequencies, validation),
        duplicates=duplicates,
        problems=problems,
    )


def _evaluated(text: str, encoder: Encoder, tokens: int) -> Evaluated:
    encoding = encoder.tokenizer.encode(text, add_special_tokens=False)
    ids = encoding.ids[:tokens]
    if len(ids) < 2:
        return Evaluated(ids=tuple(ids), text_bytes=0)
    behind = text[encoding.offsets[0][1] : encoding.offsets[len(ids) - 1][1]]
    return Evaluated(ids=tuple(ids), text_bytes=len(behind.encode("utf-8", "surrogatepass")))


def _frequencies(texts: Iterator[str], encoder: Encoder) -> tuple[torch.Tensor, int]:
    """How often each id occurs in the first training tokens, and how many documents there are."""
    counts = torch.zeros(encoder.rows, dtype=torch.float64)
    documents, counted = 0, 0
    for text in texts:
        documents += 1
        if counted < COUNTED_TOKENS:
            ids = torch.tensor([*encoder.encode([text])[0], encoder.eos_id])
            counts += torch.bincount(ids, minlength=encoder.rows)
            counted += len(ids)
    return counts, documents


def _entropy(counts: torch.Tensor) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def _unigram_perplexity(counts: torch.Tensor, documents: Sequence[Evaluated]) -> float:
    """What the frequencies alone, one added to each, predict of the documents."""
    shares = ((counts + 1) / (counts.sum() + len(counts))).log()
    ids = [i for document in documents for i in document.ids[1:]]
    return math.exp(-float(shares[torch.tensor(ids)].mean())) if ids else math.nan
