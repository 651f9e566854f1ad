"""Every token id has its row, in the embedding and in the logits."""

import ast
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

from torch import nn

from olmodebug.convention import first_embedding
from olmodebug.explain import place_of, source_lines
from olmodebug.load import SubjectCodeError
from olmodebug.members import attribute_place
from olmodebug.probe import not_applicable, probe
from olmodebug.records import Case, Where
from olmodebug.relations.invariance import crash, run
from olmodebug.relations.repair import Found, expressions
from olmodebug.report import Finding
from olmodebug.settings import VOCAB_NAMES
from olmodebug.sources import OWN, Spot, code_of
from olmodebug.subject import Subject
from olmodebug.units import listed

SHOWN = 8
# Settings by which a configuration says that it pads its vocabulary.
PADDED_NAMES = (
    "embedding_size",
    "padded_vocab_size",
    "pad_vocab_size_multiple",
    "pad_vocab_to_multiple_of",
    "make_vocab_size_divisible_by",
)


@probe()
def every_id_has_a_row(subject: Subject) -> Iterator[Finding]:
    """The last id of the declared vocabulary can be embedded and predicted.

    Why: an id beyond the table is an IndexError on the CPU and a device-side assert on CUDA.
    Catches: an embedding or head smaller than config.vocab_size.
    """
    declared = subject.setting(*VOCAB_NAMES)
    if not isinstance(declared, int):
        not_applicable("its config declares no vocabulary size")
    twin = subject.twin()
    case = Case(name=f"the last id {declared - 1}", input_ids=((declared - 1, 0),))
    try:
        logits = run(twin, case)
    except SubjectCodeError as error:
        yield crash(twin, case, error, message=f"token id {declared - 1} fails, and the config declares {declared} ids")
        return
    if logits.shape[-1] < declared:
        yield Found(
            probe="",
            severity="error",
            message=f"the model has {logits.shape[-1]} logits and its config declares {declared} ids",
            expected=f"at least {declared} logits",
            observed=str(logits.shape[-1]),
            cause=f"ids {logits.shape[-1]}..{declared - 1} can be read and never predicted, and fail as labels",
            fix=f"make the head {declared} wide",
            case=case,
        )
    wider = logits.shape[-1] - declared
    if wider > 0 and subject.convention.labels is not None and not any(subject.setting(name) for name in PADDED_NAMES):
        head = last_linear(subject.model, logits.shape[-1])
        where = _class_line(subject, head)
        yield Found(
            probe="",
            severity="warning",
            message=f"the model has {logits.shape[-1]} logits and its config declares {declared} ids: its loss sums over {wider} ids that no label can be",
            where=where,
            source=source_lines(where),
            expected=f"{declared} logits",
            observed=str(logits.shape[-1]),
            cause=f"the head has {logits.shape[-1]} rows, and ids {declared}..{logits.shape[-1] - 1} are in the softmax of the loss",
            fix=f"cut the logits to [..., :{declared}] before the loss, or declare the padded size in the config",
            evidence={"loss at initialisation is higher by": math.log(logits.shape[-1] / declared)},
            case=case,
        )


@probe()
def tokenizer_fits(subject: Subject) -> Iterator[Finding]:
    """Every token of the tokenizer has an embedding row; more rows than tokens (a padded embedding) is fine.

    Why: the tokens beyond the table are often the commonest, such as runs of spaces that were added later.
    Catches: vocab_size=50254 or 50257 against a tokenizer whose largest id is 50276.
    """
    if subject.tokenizer is None:
        not_applicable("no tokenizer was given (--tokenizer FILE)")
    tokens = _tokens(Path(subject.tokenizer))
    rows = subject.embedding_rows or subject.vocab_size
    largest = max(tokens.values(), default=-1)
    missing = sorted((i, token) for token, i in tokens.items() if i >= rows)
    if not missing:
        return
    name, spot = _table(subject)
    where = place_of(spot, module=name)
    yield Found(
        probe="",
        severity="error",
        message=f"{len(missing)} tokens of the tokenizer have no embedding row: its largest id is {largest}, the table has {rows} rows",
        where=where,
        source=source_lines(where),
        cause=f"the tokenizer needs {largest + 1} rows (largest id + 1); {_why(rows)}",
        fix=f"set vocab_size to {largest + 1}, or pad it to {_padded(largest + 1)} (a multiple of 128)",
        expected=f"at least {largest + 1} rows",
        observed=f"{rows} rows",
        evidence={"tokens without a row": listed((f"{i} {_shown(token)}" for i, token in missing), SHOWN), "tokenizer": subject.tokenizer},
    )


@probe()
def special_ids_have_rows(subject: Subject) -> Iterator[Finding]:
    """The special tokens that the configuration names (padding, beginning, end) are ids with a row.

    Why: a pad token added to the tokenizer and not to the model is an index error at the first padded batch.
    Catches: pad_token_id = vocab_size.
    """
    rows = subject.embedding_rows
    named = {name: subject.setting(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "mask_token_id")}
    ids = {name: value for name, value in named.items() if isinstance(value, int)}
    if rows is None or not ids:
        not_applicable("its config names no special token")
    for name, value in ids.items():
        if value >= rows:
            yield Found(
                probe="",
                severity="error",
                message=f"{name} is {value}, and the embedding has {rows} rows",
                where=Where(function=type(subject.config).__qualname__, module=_table(subject)[0]),
                cause=f"id {value} has no row: the largest is {rows - 1}",
                fix=f"make the embedding at least {value + 1} rows, or choose a token inside the vocabulary",
                expected=f"at most {rows - 1}",
                observed=str(value),
            )


@probe()
def rows_are_alive(subject: Subject) -> Iterator[Finding]:
    """No embedding row but the padding row is exactly zero.

    Why: a token whose row is zero says nothing, and NaN when a norm divides by its size.
    Catches: rows of reserved tokens that were never initialised.
    """
    table = first_embedding(subject.model)
    if table is None or table.weight.device.type == "meta":
        not_applicable("it has no embedding table")
    dead = (~table.weight.detach().any(dim=1)).nonzero().flatten().tolist()
    padding = {table.padding_idx, subject.setting("pad_token_id")}
    dead = [row for row in dead if row not in padding]
    if not dead or len(dead) == table.num_embeddings:
        return
    where = place_of(_initialiser(subject), module=_table(subject)[0])
    listed = ", ".join(map(str, dead[:SHOWN])) + (" ..." if len(dead) > SHOWN else "")
    yield Found(
        probe="",
        severity="warning",
        message=f"{len(dead)} embedding rows are exactly zero: ids {listed}",
        where=where,
        source=source_lines(where),
        cause="the rows were set to zero, or never initialised; only the padding row is meant to be zero",
        fix="initialise every row as the others",
        evidence={"rows": table.num_embeddings, "zero rows": len(dead)},
    )


def last_linear(model: nn.Module, rows: int) -> str:
    """The path of the last linear layer with this many outputs; empty without one."""
    return next((name for name, m in reversed(list(model.named_modules())) if isinstance(m, nn.Linear) and m.out_features == rows), "")


def _class_line(subject: Subject, path: str) -> Where:
    """The line of its owner's class that sets a module, else that class's __init__."""
    return attribute_place(subject.model, path) if path else place_of(None)


def _initialiser(subject: Subject) -> Spot | None:
    """The model's own function for initial weights, under the names that people give it."""
    for name in ("_init_weights", "init_weights", "reset_parameters"):
        code = getattr(getattr(type(subject.model), name, None), "__code__", None)
        if code is not None and subject.sources.rank(code.co_filename) == OWN:
            return Spot(code, 0, code.co_firstlineno)
    return None


def _shown(token: str) -> str:
    """A token in quotes, or its length where it is nothing but spaces."""
    return f"({len(token)} spaces)" if token and not token.strip(" ") else json.dumps(token)


def _tokens(path: Path) -> dict[str, int]:
    """Every token with its id, added tokens included, from a tokenizer.json or a folder that has one."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    return dict(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True))


def _why(rows: int) -> str:
    """Where a well-known wrong number comes from."""
    known = {
        50254: "50254 is the GPT-NeoX vocabulary without its 23 added tokens for runs of spaces",
        50257: "50257 is GPT-2's vocabulary",
        50280: "50280 is the OLMo tokenizer's vocabulary",
        32000: "32000 is Llama 1 and 2's vocabulary",
        100257: "100257 is cl100k's vocabulary without its special tokens",
    }
    return known.get(rows, f"the model has {rows}")


def _padded(size: int) -> int:
    return -(-size // 128) * 128


def _table(subject: Subject) -> tuple[str, Spot | None]:
    """The first embedding's module path, and the line that makes it in the __init__ of the subject's class around it."""
    table, sources = first_embedding(subject.model), subject.sources
    path = next((name for name, module in subject.model.named_modules() if module is table), "") if table else ""
    owner = path
    while owner:
        owner = owner.rpartition(".")[0]
        code = code_of(type(subject.model.get_submodule(owner)).__init__)
        if code is not None and sources.rank(code.co_filename):  # not torch's own ModuleDict
            return path, Spot(code, 0, _line_of_embedding(code))
    return path, None


def _line_of_embedding(code: CodeType) -> int:
    """The first line of a function that calls something named Embedding; its own first line where none does."""
    tree = expressions(Spot(code, 0, code.co_firstlineno))
    last = max((line for _, _, line in code.co_lines() if line), default=code.co_firstlineno)
    calls = [node for node in ast.walk(tree.tree) if isinstance(node, ast.Call)] if tree else []
    lines = [node.lineno for node in calls if code.co_firstlineno <= node.lineno <= last and "Embedding" in ast.unparse(node.func)]
    return min(lines, default=code.co_firstlineno)
