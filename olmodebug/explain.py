"""An exception of the subject's own code, turned into a finding: the place, the operands by name, the cause, the repair.

The failing run is traced again, so that the op, its arguments and where they came from are known. A cause is only
stated when the captured arguments establish it; torch's own words are kept beside it.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .convention import NoLogits
from .load import SubjectCodeError
from .own_code import quiet
from .records import Case, Where
from .relations.edits import additive_mask
from .relations.repair import Edit, Expressions, Found, expressions
from .report import Scalar, Severity, SourceLine
from .sources import Sources, Spot, code_of, excerpt, short_path, traceback_frames
from .subject import Subject
from .tracing.dims import dimension_names, named_shape
from .tracing.tracer import Recording, record

LOSS_OPS = ("nll_loss_forward", "nll_loss2d_forward")
INDEX_OPS = ("index", "embedding", "index_select", "gather", "take", "index_put_", "_index_put_impl_", *LOSS_OPS)


@dataclass(slots=True, kw_only=True)
class Explanation:
    """What an exception means; `cause` is None where its arguments do not establish one."""

    message: str
    where: Where
    spot: Spot | None = None
    cause: str | None = None
    fix: str | None = None
    edits: tuple[Edit, ...] = ()
    raised: str = ""
    expected: str | None = None
    observed: str | None = None
    evidence: dict[str, Scalar] = field(default_factory=dict)

    def finding(self, *, severity: Severity = "error", case: Case | None = None, message: str | None = None) -> Found:
        return Found(
            probe="",
            severity=severity,
            message=message or self.message,
            where=self.where,
            source=source_lines(self.where),
            cause=self.cause,
            fix=self.fix,
            expected=self.expected,
            observed=self.observed,
            evidence=self.evidence,
            raised=self.raised,
            case=case,
            edits=self.edits,
        )


def source_lines(where: Where, *, around: int = 1) -> tuple[SourceLine, ...]:
    """The subject's source around a place."""
    return tuple(SourceLine(number=n, text=text, marked=n == where.line) for n, text in excerpt(where.file, where.line, around=around))


def place_of(spot: Spot | None, *, module: str = "", op: str | None = None) -> Where:
    """A spot as the report gives it."""
    if spot is None:
        return Where(module=module, op=op)
    return Where(module=module, function=spot.function, file=short_path(spot.file), line=spot.line, op=op)


def forward_place(model: nn.Module, module: str = "") -> Where:
    """The first line of the forward of a model, or of one of its modules."""
    code = code_of(type(model.get_submodule(module)).forward)
    return place_of(Spot(code, 0, code.co_firstlineno) if code is not None else None, module=module)


def explain(error: SubjectCodeError) -> Explanation:
    """What an exception of the subject's own code means: traced again where there is a model to trace."""
    if error.subject is None or error.case is None:
        return explain_build(error)
    subject, case = error.subject, error.case
    return explain_run(subject, lambda: subject.call(case), error, case=case)


def explain_build(error: SubjectCodeError) -> Explanation:
    """An exception raised while the subject was imported or built, when there is no model to trace yet."""
    original = error.__cause__ or error
    spot = _innermost_own(original)
    stage = {"import": "importing the subject", "build": "building the model", "first run": "the first forward"}.get(
        error.stage, error.stage
    )
    explanation = Explanation(
        message=f"{stage} raises {_told(original)}",
        where=place_of(spot),
        spot=spot,
        raised=f"{type(original).__name__}: {original}",
    )
    if isinstance(original, SyntaxError) and original.filename:
        explanation.where = Where(file=short_path(original.filename), line=original.lineno)
    for rule in (_already_exists, _missing_import, _before_super):
        if rule(original, explanation):
            break
    return explanation


def explain_run(subject: Subject, run: Callable[[], Any], error: BaseException, *, case: Case) -> Explanation:
    """An exception raised by a run of the model: the run is repeated under the tracer to learn the op and its arguments."""
    if isinstance(error.__cause__ or error, NoLogits):
        return Explanation(
            message=f"forward gives no logits: it returned {error.__cause__ or error}",
            where=Where(function=f"{type(subject.model).__name__}.forward"),
            cause="a causal language model returns logits for every position: a tensor, an object or dict with logits, or a tuple with them",
            fix="return the logits [batch, seq_len, vocab], or state the call with --adapter",
        )
    original = error.__cause__ if isinstance(error, SubjectCodeError) and error.__cause__ else error
    sources = Sources(subject.model)
    with quiet():
        recording = record(subject.model, run, keep=True, sources=sources, catch=True)
    spot = sources.spot_of(original)
    failed = recording.failed
    module = failed.where.module if failed else ""
    op = failed.op if failed else None
    names = dimension_names(subject, batch=case.batch_size, seq=case.seq_len)
    explanation = Explanation(
        message=f"forward{f' with {subject.attention} attention' if subject.attention else ''} raises {_told(original)}",
        where=place_of(spot, module=module, op=op),
        spot=spot,
        raised=_told(original),
    )
    if failed is not None and recording.failed_arguments is not None:
        for rule in (_index_out_of_range, _sizes_do_not_fit) if isinstance(original, RuntimeError) else (_index_out_of_range,):
            if rule(recording, explanation, names, case):
                return explanation
    if (named := operands(original, spot, names)) and isinstance(original, RuntimeError | AssertionError):
        explanation.message += f" ({named})"
        explanation.observed = named
    _view_out_of_order(original, explanation)
    return explanation


def operands(error: BaseException, spot: Spot | None, names: dict[int, str]) -> str:
    """The tensors that the failing expression names, with their shapes, read from the frame it ran in; nothing where all of
    them are single numbers, whose shapes explain no failure."""
    tree = expressions(spot)
    frame = next((f for f, _, line in reversed(traceback_frames(error.__traceback__)) if spot and f.f_code is spot.code), None)
    if tree is None or spot is None or frame is None:
        return ""
    around = tree.at(spot)
    if not around:
        return ""
    shapes = {}
    for node in ast.walk(around[0]):
        value = frame.f_locals.get(node.id) if isinstance(node, ast.Name) else None
        if isinstance(value, Tensor):
            shapes[node.id] = named_shape(tuple(value.shape), names)  # type: ignore[attr-defined]
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items()) if set(shapes.values()) - {"()"} else ""


def _view_out_of_order(error: BaseException, explanation: Explanation) -> None:
    """`x.view(...)` of what does not lie in memory as its dimensions say."""
    tree = expressions(explanation.spot)
    if tree is None or explanation.spot is None or "view size is not compatible" not in str(error):
        return
    calls = (node.func for node in tree.at(explanation.spot) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    func = next((func for func in calls if func.attr == "view"), None)
    if func is not None:
        explanation.cause = f"`{tree.source(func.value)}` does not lie in memory in the order of its dimensions, as after a transpose or a cut, and view never copies"
        explanation.fix = "reshape in the place of view: it copies where it must"
        explanation.edits = (tree.replace(func, f"{tree.source(func.value)}.reshape"),)


def _already_exists(error: BaseException, explanation: Explanation) -> bool:
    """`self.x = tensor` before `register_buffer("x", ...)`: the name is taken."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else ""
    if not (text.startswith("attribute '") and text.endswith("' already exists")):
        return False
    name = text.split("'")[1]
    tree = expressions(explanation.spot)
    call, taken = _registration(tree, explanation.spot, name) if tree and explanation.spot else (None, None)
    register = call.func.attr if call is not None and isinstance(call.func, ast.Attribute) else "register_buffer"
    explanation.message = f"{register}({name!r}) fails: the module already has an attribute {name}"
    explanation.expected, explanation.observed = f"no attribute {name} before {register}", f"self.{name} is set already"
    if tree is not None and call is not None and taken is not None:
        explanation.cause = f"line {taken.lineno} sets self.{name} as a plain attribute, and line {call.lineno} registers the same name"
        explanation.fix = f"compute it in a local variable (line {taken.lineno}: {name} = ...), and let {register} alone set self.{name}"
        explanation.edits = _local_instead(tree, call, taken, name)
    else:
        explanation.cause = f"self.{name} exists when {register}({name!r}) runs: an earlier assignment or a base class set it"
        explanation.fix = f"remove the earlier self.{name}, or register under another name"
    return True


def _registration(tree: Expressions, spot: Spot, name: str) -> tuple[ast.Call | None, ast.Assign | None]:
    call = next((n for n in tree.at(spot) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)), None)
    taken = None
    for node in ast.walk(tree.tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and call is not None and node.lineno < call.lineno:
            target = node.targets[0]
            inside = spot.code.co_firstlineno <= node.lineno
            if inside and isinstance(target, ast.Attribute) and target.attr == name and tree.source(target.value) == "self":
                taken = node
    return call, taken


def _local_instead(tree: Expressions, call: ast.Call, taken: ast.Assign, name: str) -> tuple[Edit, ...]:
    target = taken.targets[0]
    edits = [tree.replace(target, name)]
    for node in ast.walk(tree.tree):
        used = isinstance(node, ast.Attribute) and node.attr == name and tree.source(node.value) == "self" and node is not target
        if used and isinstance(node, ast.expr) and taken.lineno <= node.lineno <= (call.end_lineno or call.lineno):
            edits.append(tree.replace(node, name))
    return tuple(edits)


def _missing_import(error: BaseException, explanation: Explanation) -> bool:
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return False
    package = error.name.partition(".")[0]
    explanation.message = f"the subject imports {error.name}, which is not installed here"
    explanation.cause = f"no module named {error.name}"
    explanation.fix = f"install the package that provides {package}, or put its folder on PYTHONPATH"
    return True


def _before_super(error: BaseException, explanation: Explanation) -> bool:
    if not (isinstance(error, AttributeError) and "before Module.__init__() call" in str(error)):
        return False
    explanation.cause = "a parameter, buffer or module is assigned before super().__init__() has run"
    explanation.fix = "make super().__init__() the first line of __init__"
    return True


def _index_out_of_range(recording: Recording, explanation: Explanation, names: dict[int, str], case: Case) -> bool:
    """An index beyond its table: the bad value, its place, the bound, and which table it is."""
    failed, arguments = recording.failed, recording.failed_arguments
    if failed is None or arguments is None or failed.op not in INDEX_OPS:
        return False
    found = _bad_index(failed.op, arguments)
    if found is None:
        return False
    table, index, dim, bound, low = found
    flat = index.reshape(-1)
    wrong = (flat >= bound) | (flat < low)
    value = int(flat[wrong][0])
    first = tuple(int(i) for i in torch.unravel_index(wrong.nonzero()[0, 0], index.shape))
    name = failed.parameters[0] if failed.parameters else _table_name(recording, table)
    what = f"`{name}`" if name else "the table"
    explanation.message = f"index {value} is out of range: {what} has {bound} rows"
    explanation.expected = f"indices {low} .. {bound - 1} (dimension {dim} of {what}, shape {tuple(table.shape)})"
    explanation.observed = f"{value} at {first}; {int(wrong.sum())} of {flat.numel()} values out of range"
    explanation.evidence = {"smallest index": int(flat.min()), "largest index": int(flat.max()), "rows": bound}
    ids = [token for row in case.input_ids for token in row]
    if failed.op in LOSS_OPS:
        explanation.cause = f"a label is {value}, and there are {bound} classes"
        explanation.fix = "labels lie in 0 .. vocab - 1; give -100 where nothing is asked"
    elif failed.op == "embedding" and sorted(set(flat.tolist())) == sorted(set(ids)):
        explanation.cause = f"token id {value} has no row in the embedding table of {bound} rows"
        explanation.fix = f"make the embedding at least {int(flat.max()) + 1} rows, or use the tokenizer that the model was made for"
    elif case.position_ids is not None and set(flat.tolist()) <= {p for row in case.position_ids for p in row}:
        explanation.cause = f"position {int(flat.max())} is asked of a table of {bound} rows"
        explanation.fix = f"build the table for at least {int(flat.max()) + 1} positions; on CUDA this is `device-side assert triggered`"
    elif int(flat.max()) < case.seq_len and flat.numel() in (case.seq_len, case.seq_len * case.batch_size):
        explanation.cause = f"a sequence of {case.seq_len} tokens is longer than the position table of {bound} rows"
        explanation.fix = f"build the table for at least {case.seq_len} positions; on CUDA this is the `device-side assert triggered`"
        explanation.evidence["longest sequence that works"] = bound
    return True


def _bad_index(op: str, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, int, int, int] | None:
    """(table, index, dimension, bound, lowest legal value) of the first index that is out of range."""
    if op in ("index", "index_put_", "_index_put_impl_"):
        table = arguments["self"]
        for dim, index in enumerate(arguments["indices"]):
            if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and index.numel():
                bound = table.shape[dim]
                if int(index.max()) >= bound or int(index.min()) < -bound:
                    return table, index, dim, bound, -bound
        return None
    if op == "embedding":
        table, index, dim = arguments["weight"], arguments["indices"], 0
    elif op in LOSS_OPS:
        table, index, dim = arguments["self"], arguments["target"], 1
        index = index[index != arguments.get("ignore_index", -100)]
    elif op in ("index_select", "gather"):
        table, index, dim = arguments["self"], arguments["index"], int(arguments["dim"])
    else:
        return None
    if index.numel() and (int(index.max()) >= table.shape[dim] or int(index.min()) < 0):
        return table, index, dim, table.shape[dim], 0
    return None


def _table_name(recording: Recording, table: Tensor) -> str | None:
    """The buffer or parameter that a table came from, when an op read one of its size before."""
    for event in reversed(recording.events):
        for info in event.inputs:
            if event.parameters and info.shape == tuple(table.shape):
                return event.parameters[0]
    return None


def _sizes_do_not_fit(recording: Recording, explanation: Explanation, names: dict[int, str], case: Case) -> bool:
    """Two operands whose dimensions do not line up, with every size that has a name named."""
    failed, arguments = recording.failed, recording.failed_arguments
    if failed is None or arguments is None:
        return False
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    if len(tensors) < 2:
        return False
    left, right = tensors[0], tensors[1]
    clash = _clash(left, right) if failed.op not in ("mm", "bmm", "addmm", "matmul") else None
    if clash is None:
        if failed.op in ("mm", "bmm", "addmm"):
            first, second = tensors[-2:]
            if first.shape[-1] == second.shape[-2] and first.dtype != second.dtype:
                kinds = [str(t.dtype).removeprefix("torch.") for t in (first, second)]
                explanation.message = f"{failed.op} gets {kinds[0]} and {kinds[1]}, and multiplies one dtype only"
                explanation.observed = " and ".join(kinds)
                return True
            shapes = ", ".join(named_shape(tuple(t.shape), names) for t in tensors)
            explanation.message = f"{failed.op} cannot multiply {shapes}"
            explanation.observed = shapes
            return True
        return False
    dim, a, b = clash
    shapes = f"{named_shape(tuple(left.shape), names)} and {named_shape(tuple(right.shape), names)}"
    explanation.message = f"{failed.op} of {shapes}: {_called(a, names)} lines up with {_called(b, names)}"
    explanation.expected = f"equal sizes, or 1, at dimension {dim} from the right"
    explanation.observed = f"{_called(a, names)} and {_called(b, names)}"
    batch, seq = case.batch_size, case.seq_len
    mask = _mask_operand(left, right, batch, seq)
    if mask is not None:
        scores = right if mask is left else left
        explanation.cause = (
            f"a mask [batch, seq_len] = {tuple(mask.shape)} meets scores {tuple(scores.shape)}: torch lines dimensions up from the "
            "right, so its rows fall on the queries; where batch equals seq_len this passes without an error"
        )
        explanation.fix = "use mask[:, None, None, :], turned into 0 where real and finfo.min where padded"
        if explanation.spot is not None and (tree := expressions(explanation.spot)) is not None:
            explanation.edits = additive_mask(tree, explanation.spot, 0 if mask is left else 1, flat=mask.ndim == 2)
    elif (table := _short_table(recording, left, right, seq)) is not None:
        name, rows = table
        explanation.cause = f"`{name}` has {rows} rows: a slice to {seq} positions comes back with {rows}, without an error of its own"
        explanation.fix = f"build the table for at least {seq} positions, and check the length before slicing"
        explanation.evidence["longest sequence that works"] = rows
    elif (new := _mask_of_new_tokens(left, right, seq)) is not None:
        explanation.cause = f"the mask is made for the {new[0]} new tokens alone, and the scores go over {new[1]} keys: the cache holds {new[1] - new[0]} more"
        explanation.fix = "make it [new tokens, past + new tokens]: earlier keys are seen by every new token"
    elif _batch_first_table(left, right, batch):
        explanation.cause = (
            "a table indexed with position_ids [batch, seq_len] gives [batch, seq_len, head_dim]; its batch falls on the heads"
        )
        explanation.fix = "unsqueeze(1) the table after indexing it with position_ids"
        explanation.edits = _unsqueeze_index(recording, batch, seq)
    return True


def _clash(left: Tensor, right: Tensor) -> tuple[int, int, int] | None:
    """The first dimension from the right at which two shapes do not broadcast: (dimension, left size, right size)."""
    for k, (a, b) in enumerate(zip(reversed(left.shape), reversed(right.shape), strict=False), start=1):
        if a != b and 1 not in (a, b):
            return k, a, b
    return None


def _mask_operand(left: Tensor, right: Tensor, batch: int, seq: int) -> Tensor | None:
    for mask, scores in ((left, right), (right, left)):
        if tuple(mask.shape) == (batch, seq) and scores.ndim == 4 and scores.shape[-1] == seq and scores.shape[0] == batch:
            return mask
    return None


def _short_table(recording: Recording, left: Tensor, right: Tensor, seq: int) -> tuple[str, int] | None:
    """A named buffer that was sliced to `seq` rows and came back shorter."""
    for event, kept in zip(reversed(recording.events), reversed(recording.kept), strict=True):
        if event.op == "slice" and event.parameters and event.inputs[0].shape and kept.arguments.get("dim", 0) == 0:
            rows = event.inputs[0].shape[0]
            asked = (kept.arguments.get("end") or 0) - (kept.arguments.get("start") or 0)
            if 1 < rows < min(seq, asked) and any(rows in t.shape for t in (left, right)):
                return event.parameters[0], rows
    return None


def _mask_of_new_tokens(left: Tensor, right: Tensor, seq: int) -> tuple[int, int] | None:
    """(new tokens, keys) where a square mask of the new tokens meets scores that go over the keys of a cache too."""
    for mask, scores in ((left, right), (right, left)):
        sizes = [size for size in mask.shape if size > 1]
        if len(sizes) == 2 and sizes[0] == sizes[1] and scores.ndim >= 3 and sizes[0] < scores.shape[-1] <= seq:
            if sizes[0] in scores.shape[1:-1]:
                return sizes[0], scores.shape[-1]
    return None


def _batch_first_table(left: Tensor, right: Tensor, batch: int) -> bool:
    small, wide = (left, right) if left.ndim < right.ndim else (right, left)
    return small.ndim == 3 and wide.ndim == 4 and small.shape[0] == batch and small.shape[1] == wide.shape[2]


def _unsqueeze_index(recording: Recording, batch: int, seq: int) -> tuple[Edit, ...]:
    """`table[position_ids]` -> `table[position_ids].unsqueeze(1)` wherever that gave [batch, seq_len, dim]."""
    edits: dict[tuple[int, int], Edit] = {}
    for event, spot in zip(recording.events, recording.spots, strict=True):
        if event.op != "index" or len(event.outputs[0].shape) != 3 or event.outputs[0].shape[:2] != (batch, seq):
            continue
        tree = expressions(spot)
        node = next((n for n in tree.at(spot) if isinstance(n, ast.Subscript)), None) if tree and spot else None
        if tree is not None and node is not None:
            edit = tree.replace(node, f"{tree.source(node)}.unsqueeze(1)")
            edits[(edit.start, edit.end)] = edit
    return tuple(edits.values())


def _called(size: int, names: dict[int, str]) -> str:
    return f"{names[size]}={size}" if size in names else str(size)


def _told(error: BaseException) -> str:
    """The kind of an error and its first line; an assert without words is its kind alone."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    line = text.strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _innermost_own(error: BaseException) -> Spot | None:
    """The innermost frame of the traceback that is neither torch's, nor ours, nor Python's or an installed package's."""
    plain = Sources(torch.nn.Module())
    best = None
    for frame, instruction, line in traceback_frames(error.__traceback__):
        if plain.rank(frame.f_code.co_filename) == 2:
            best = Spot(frame.f_code, instruction, line)
    return best
