"""Text as token ids: a tokenizer from a file, a folder or the hub, or a byte-level BPE trained on the data itself."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError

END_OF_TEXT = "<|endoftext|>"
# The names under which tokenizers keep the token that ends a document, the commonest first.
END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>", "<|eot_id|>")
BYTES = 256
TRAINED_VOCABULARY = 4096
TRAINED_ON_CHARACTERS = 4_000_000  # a larger sample no longer changes the first 4,096 merges much


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """A tokenizer with its end of document and the number of embedding rows that it needs (its largest id and one)."""

    name: str
    tokenizer: Any
    eos_id: int
    rows: int
    trained: bool = False

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, nothing added and nothing cut."""
        return [item.ids for item in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))


def load_encoder(name: str, *, eos_id: int | None = None) -> Encoder:
    """The tokenizer of a tokenizer.json, of a folder with one, or of a repository on the hub. UsageError where there is none."""
    from tokenizers import Tokenizer

    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.exists() else Tokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises bare Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"--tokenizer {name}: no tokenizer.json, no folder with one, and the hub gives none ({reason})") from None
    return _encoder(tokenizer, name=name, eos_id=eos_id)


def train_encoder(texts: Iterable[str], *, vocab_size: int, cache: Path | None) -> Encoder:
    """A byte-level BPE of `vocab_size` ids trained on the texts, kept in `cache` under a name made of all that it depends on."""
    from tokenizers import Tokenizer

    if vocab_size <= BYTES:
        raise UsageError(f"a vocabulary of {vocab_size} holds no byte-level tokenizer, which needs {BYTES + 1}; give one with --tokenizer")
    sample = _sample(texts)
    digest = hashlib.sha256(f"{vocab_size}\0".encode())
    for text in sample:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    file = cache / f"bpe-{vocab_size}-{digest.hexdigest()[:16]}.json" if cache is not None else None
    if file is not None and file.is_file():
        return _encoder(Tokenizer.from_file(str(file)), name=str(file), eos_id=None, trained=True)
    tokenizer = _trained(sample, vocab_size)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            tokenizer.save(str(partial))
            partial.replace(file)
        except OSError:
            file = None
    return _encoder(tokenizer, name=str(file or "trained here"), eos_id=None, trained=True)


def _trained(texts: Sequence[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer=trainer)
    return tokenizer


def _sample(texts: Iterable[str]) -> list[str]:
    sample, size = [], 0
    for text in texts:
        sample.append(text)
        size += len(text)
        if size >= TRAINED_ON_CHARACTERS:
            break
    return sample


def _encoder(tokenizer: Any, *, name: str, eos_id: int | None, trained: bool = False) -> Encoder:
    # Saved files carry the truncation and padding of whoever saved them; either would cut or fill documents in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise UsageError(f"--tokenizer {name}: it has no token")
    if eos_id is None:
        eos_id = next((vocabulary[end] for end in END_NAMES if end in vocabulary), None)
    if eos_id is None:
        raise UsageError(f"--tokenizer {name}: no token ends a document (looked for {', '.join(END_NAMES)}); give its id with --eos-id")
    # The largest id and not the count: some files keep added tokens above a gap or outside the count.
    return Encoder(name=name, tokenizer=tokenizer, eos_id=eos_id, rows=max(vocabulary.values()) + 1, trained=trained)
