"""A run that died: the op that was about to run, replayed on the CPU, where the error has words.

On a device an index out of range ends the process with a wall of assertions and no number. The journal has the op, its
arguments' shapes and the numbers of its indices, so the op runs here on tensors of zeros that take no memory.
"""

import signal
from typing import Any

import torch
from torch import Tensor

from ..explain import source_lines
from ..process import Death
from ..records import Where
from ..report import Finding, Scalar

# For each op that reads an index: the argument with the indices, the one that is indexed, and along which dimension.
INDEXED = {
    "embedding": ("indices", "weight", 0),
    "index_select": ("index", "self", None),
    "gather": ("index", "self", None),
    "nll_loss_forward": ("target", "self", 1),
    "scatter": ("index", "self", None),
    "take": ("index", "self", None),
}
KINDS = {"memory": "ran out of memory", "device": "was ended by the device"}


def death_finding(
    last: dict[str, Any] | None, *, how: str, kind: str, words: str, death: Death | None, printed: str | None, where: Where
) -> Finding:
    """A run that ended in the middle, as a finding of the subject: module, function, line, op, arguments, and the exact bad value.

    `last` is the op that the journal names last; `where` the frame that faulthandler saw, where the death was not in an op.
    """
    place = where
    evidence: dict[str, Scalar] = {}
    cause = fix = expected = observed = None
    if last is not None:
        op_place = Where(module=last["module"], function=last["function"], file=last["file"], line=last["line"], op=last["op"])
        outside = where.line is not None and (where.file, where.line) != (op_place.file, op_place.line)
        place = Where(module=last["module"], function=where.function, file=where.file, line=where.line, op=None) if outside else op_place
        evidence |= {"case": last["case"], "phase": last["phase"], "arguments": arguments_text(last["arguments"])}
        if outside:
            evidence["last op"] = f"{last['op']} at {last['file']}:{last['line']}"
        bad = bad_index(last["arguments"])
        if bad is not None:
            cause, expected, observed = bad["cause"], bad["expected"], bad["observed"]
            fix = "mend the index, or the table that it points into"
            evidence["on the CPU"] = bad["raised"]
    if printed:
        evidence["last line of its output"] = printed[:200]
    if kind == "memory" and fix is None:
        fix = "a smaller batch or sequence, activation checkpointing, or a narrower dtype"
    elif death is not None and death.hung:
        fix = "look for an endless loop, a lock or a wait for input; --timeout allows more time"
    doing = f" in {place.op}" if place.op else ""
    if death is not None and death.signal == signal.SIGKILL and place.op:  # no frame was seen, and the kernel does not say why
        doing = f"; the last op that began is {place.op}"
    return Finding(
        probe="parity.runs",
        severity="error",
        message=f"the execution {words} {how}{doing}",
        cause=cause,
        fix=fix,
        where=place,
        source=source_lines(place),
        expected=expected,
        observed=observed,
        evidence=evidence,
    )


def bad_index(arguments: list[dict[str, Any]]) -> dict[str, str] | None:
    """The first index that is out of range, its bound, and what the CPU says when it runs the op; None where all fit."""
    op = next((a["op"] for a in arguments if "op" in a), "")
    named = {a["name"]: a for a in arguments}
    checks: list[tuple[str, list[int], int, int]] = []
    if op == "index" or op.startswith("index_put"):
        items = named.get("indices", {}).get("items", [])
        shape = named.get("self", {}).get("shape", [])
        for i, item in enumerate(items):
            if "values" in item and i < len(shape):
                checks.append((f"indices[{i}]", item["values"], -shape[i], shape[i]))
    elif op in INDEXED:
        name, table, dim = INDEXED[op]
        known = named.get(name, {})
        axis = dim if dim is not None else int(named.get("dim", {}).get("value", 0) or 0)
        if "values" in known:
            size = named[table]["shape"][axis]
            ignored = named.get("ignore_index", {}).get("value")
            values = [0 if v == ignored else v for v in known["values"]]
            checks.append((name, values, 0, size))
    for name, values, low, high in checks:
        wrong = next((i for i, v in enumerate(values) if not low <= v < high), None)
        if wrong is None:
            continue
        count = sum(not low <= v < high for v in values)
        return {
            "cause": f"{name} holds {values[wrong]} (element {wrong} of {len(values)}; {count} out of range), and {op} takes {low} to {high - 1}",
            "expected": f"{low} to {high - 1}",
            "observed": str(values[wrong]),
            "raised": replayed(arguments) or "the CPU accepts it",
        }
    return None


def replayed(arguments: list[dict[str, Any]]) -> str | None:
    """What torch raises on the CPU for an op with these arguments; None when it runs."""
    name = next(a["overload"] for a in arguments if "overload" in a)
    space, op, overload = name.split(".")
    func = getattr(getattr(getattr(torch.ops, space), op), overload)
    schema = {spec.name: spec for spec in func._schema.arguments}
    given = {a["name"]: _built(a) for a in arguments if a["name"] in schema}
    try:
        func(**given)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def _built(known: dict[str, Any]) -> Any:
    if "items" in known:
        return [_built(item) for item in known["items"]]
    if "shape" not in known:
        return known.get("value")
    dtype: torch.dtype = getattr(torch, known["dtype"])
    if "values" in known:
        return torch.tensor(known["values"], dtype=dtype).reshape(known["shape"])
    zero: Tensor = torch.zeros((), dtype=dtype)
    return zero.expand(known["shape"])  # any size, no memory


def arguments_text(arguments: list[dict[str, Any]]) -> str:
    """`weight float32[71, 80], indices int64[5, 11] (3..97)`."""
    return ", ".join(_shown(a) for a in arguments if a["name"])


def _shown(known: dict[str, Any]) -> str:
    if "items" in known:
        return f"{known['name']} [{', '.join(_shown({'name': '', **item}) for item in known['items'])}]"
    if "shape" not in known:
        return f"{known['name']} {known.get('value')}"
    values = known.get("values")
    span = f" ({min(values)}..{max(values)})" if values else ""
    return f"{known['name']} {known['dtype']}{known['shape']}{span}".strip()
