"""What two bundles say about each other: verdict per op, first place, drift by layer, products, decisions, arguments.

The right side carries the judgement of its own ops, each on its own inputs; the left side is what the free run is held
against. Drift of the free run is reported, and never used to find a place.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..report import NON_FINITE
from .bound import factor
from .bundle import Bundle

VERDICTS = ("exact", "within", "explained", "diverged", "nondeterministic", "range", "unverified")
# Root mean square of the error of a product over that of its terms' spread, in powers of two: measured for 1024 terms
# IEEE float32 2^-21.9, TF32 2^-11.7, factors rounded to bfloat16 2^-8.7. The limits lie half way.
BEHAVIOURS = ((-30.0, "float64"), (-16.8, "float32"), (-10.2, "TF32"), (-6.0, "bfloat16"), (0.0, "worse than bfloat16"))
MOST_ROWS = 64
# The numbers by which a dtype is known: its spacing at 1, and its smallest.
OF_DTYPES = {
    number
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for number in (torch.finfo(dtype).eps, torch.finfo(dtype).tiny)
}

Op = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Comparison:
    """Everything found about two bundles; `section` is what the report's `parity` section holds for the pair."""

    section: dict[str, Any]
    bad: list[Op] = field(default_factory=list)
    policies: list[Op] = field(default_factory=list)
    overflows: list[Op] = field(default_factory=list)
    nondeterministic: list[Op] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)
    stateful: list[str] = field(
        default_factory=list
    )  # what a run of the right side changes in its model, and reads when it is called again
    outside: list[dict[str, Any]] = field(default_factory=list)  # results of compiled runs
    departed: dict[str, Any] = field(default_factory=dict)  # what compiling again in float64 said of them


def compare(left: Bundle, right: Bundle) -> Comparison:
    """Hold the right bundle against the left one."""
    ops = list(right.of("op"))
    for event in right.of("nondeterministic"):
        found = next((op for op in ops if op["i"] == event["i"]), None)
        if found is not None and found.get("judged", {}).get("verdict") not in ("diverged",):
            found["judged"] = {
                "verdict": "nondeterministic",
                "margin": found.get("judged", {}).get("margin", 0.0),
                "read": event.get("read"),
            }
    judged = [op for op in ops if "judged" in op]
    of = {verdict: [op for op in judged if op["judged"]["verdict"] == verdict] for verdict in VERDICTS}
    bad = sorted([*of["diverged"], *of["nondeterministic"]], key=lambda op: op["i"])
    declared = set(_declared(right))
    policies = [op for op in of["explained"] if op["judged"].get("policy") not in declared]
    decisions = _decisions(left, right)
    compiled = [found for side in (left, right) if (found := _compiled(side)) is not None]
    comparison = Comparison(
        section={},
        stateful=list(dict.fromkeys(name for event in right.of("stateful") for name in event["changed"])),
        bad=bad,
        policies=policies,
        overflows=of["range"],
        nondeterministic=of["nondeterministic"],
        arguments=_arguments(left, right),
        weights=_weights(left, right),
        nonfinite=_nonfinite(left, right),
        outside=[line for side in (left, right) for line in side.of("whole") if line["verdict"] == "diverged"],
        departed=next((event for side in (left, right) for event in side.of("departed")), {}),
    )
    changed = decisions is not None and decisions["changed"] > 0
    parts = bool(bad or policies or comparison.arguments or comparison.weights or changed or any(c["verdict"] == "parts" for c in compiled))
    seen = bool(judged or compiled) and all(c["verdict"] == "agrees" for c in compiled)
    counted = Counter(op["judged"]["verdict"] for op in judged)
    worth = [op for op in judged if op.get("does") != "none" or op["judged"]["verdict"] == "unverified"]
    covered = sum(op["judged"]["verdict"] != "unverified" for op in worth) / len(worth) if worth else 0.0
    comparison.section = {
        "left": _side(left),
        "right": _side(right),
        "verdict": "parts" if parts else "agrees" if seen or (decisions and not compiled) else "undecided",
        "ops": {verdict: counted.get(verdict, 0) for verdict in VERDICTS},
        "coverage": round(covered, 4),
        "first": first_place(bad[0] if bad else policies[0]) if bad or policies else _first_compiled(comparison, compiled),
        "layers": _layers(left, right, judged),
        "products": _products(judged),
        "policies": [
            {"policy": policy, "count": count, "declared": policy in declared}
            for policy, count in Counter(op["judged"]["policy"] for op in of["explained"]).most_common()
        ],
        "unverified": [
            {"reason": reason, "count": count}
            for reason, count in Counter(op["judged"].get("reason", "no reason given") for op in of["unverified"]).most_common(12)
        ],
        "decisions": decisions,
        "compiled": compiled,
        "results": _results(left, right),
        "died": None,
        "left_out": left.left_out + right.left_out,
    }
    return comparison


def first_place(op: Op) -> dict[str, Any]:
    """One op's place and numbers as the section gives them."""
    judged = op["judged"]
    names = ("module", "function", "file", "line", "op", "phase", "case")
    return {name: op[name] for name in names} | {
        "verdict": judged["verdict"],
        "margin": judged["margin"],
        "policy": judged.get("policy"),
        "reason": judged.get("reason"),
    }


def _first_compiled(comparison: Comparison, compiled: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The module whose compiled results differ, as a first place; None where none does."""
    known = next((c for c in compiled if c["verdict"] == "parts"), None)
    if known is None:
        return None
    where = comparison.departed.get("where") or dict.fromkeys(("function", "file", "line")) | {"module": ""}
    worst = max(comparison.outside, key=lambda line: number(line["margin"]), default=None)
    rest = {"phase": "forward", "policy": None, "verdict": "diverged", "op": f"compiled with {known['backend']}"}
    rest |= {"case": worst["case"] if worst else "float64", "margin": worst["margin"] if worst else "inf"}
    reason = known["float64"]["what"] if known["float64"] else None
    return {name: where[name] for name in ("module", "function", "file", "line")} | rest | {"reason": reason or None}


def number(value: Any) -> float:
    """A number of a bundle, where non-finite ones are words."""
    return NON_FINITE[value] if isinstance(value, str) else float(value)


def _compiled(bundle: Bundle) -> dict[str, Any] | None:
    """What a compiled run gave, held against the same run uncompiled, and what nobody saw of it; None where nothing was to
    be compiled."""
    graphs = list(bundle.of("graphs"))
    if not graphs:
        return None
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in bundle.of("whole"):
        row = rows.setdefault(
            (line["case"], line["what"]), {"case": line["case"], "what": line["what"], "count": 0, "outside": 0, "margin": 0.0}
        )
        row["count"] += line["turn"] == 0
        row["outside"] += line["verdict"] == "diverged"
        row["margin"] = max(row["margin"], line["margin"], key=number)
    outside = any(row["outside"] for row in rows.values())
    departed = next(bundle.of("departed"), None)
    unbounded, choices = (sorted({name for event in graphs for name in event[kind]}) for kind in ("unbounded", "choices"))
    operations = [size for event in graphs for size in event["operations"]]
    unstable = any(event["unstable"] for event in graphs)
    persists = departed is not None and departed["backend"] is not None
    parts = persists or (outside and not unstable and not unbounded and not choices)
    return {
        "backend": bundle.head["execution"]["compile"],
        "verdict": "parts" if parts else "undecided" if outside or unstable or not operations else "agrees",
        "graphs": len(operations),
        "operations": sum(operations),
        "results": list(rows.values()),
        "unbounded": unbounded,
        "choices": choices,
        "unstable": unstable,
        "float64": {name: departed[name] for name in ("asked", "backend", "module", "what")} if departed else None,
    }


def _declared(bundle: Bundle) -> frozenset[str]:
    from .execution import Execution

    values = bundle.head["execution"]
    return Execution(**{**values, "flags": tuple(values["flags"])}).declared


def _side(bundle: Bundle) -> dict[str, Any]:
    head = bundle.head
    environment = head["environment"]
    return {
        "execution": head["words"],
        "subject": head["job"]["spec"],
        "device": head["execution"]["device"],
        "dtype": head["execution"]["dtype"],
        "gpu": environment["gpu"],
        "torch": environment["torch"],
    }


def _layers(left: Bundle, right: Bundle, judged: list[Op]) -> list[dict[str, Any]]:
    """Blocks and what stands beside them, in order: how far the free run has drifted, and the worst op inside."""
    case = next((e["name"] for e in right.of("case") if e["mode"] == "step"), next((e["name"] for e in right.of("case")), None))
    theirs = {call["module"]: call for call in left.of("call") if call["case"] == case}
    margins = [(op["i"], number(op["judged"]["margin"])) for op in judged]
    rows = []
    seen = set()
    for call in right.of("call"):
        path = call["module"]
        if call["case"] != case or path in seen or not path or not _is_row(path):
            continue
        seen.add(path)
        inside = [margin for i, margin in margins if call["first"] <= i <= call["last"]]
        other = theirs.get(path)
        away = drift(other["sample"], call["sample"]) if other and "sample" in other and "sample" in call else None
        rows.append({"module": path, "kind": call["class"], "drift": away, "margin": _json(max(inside, default=0.0)), "ops": len(inside)})
    return rows[:MOST_ROWS]


def _is_row(path: str) -> bool:
    """Whether a module is a block (the last part of its path is a number) or stands beside the blocks."""
    parts = path.split(".")
    return parts[-1].isdigit() or (not any(part.isdigit() for part in parts) and len(parts) <= 2)


def drift(left: list[Any], right: list[Any]) -> float | str | None:
    """How far two samples of a tensor are apart, as a share of the left one's norm; None where they are of unlike tensors."""
    if len(left) != len(right):
        return None
    a = torch.tensor([number(v) for v in left], dtype=torch.float64)
    b = torch.tensor([number(v) for v in right], dtype=torch.float64)
    both = torch.isfinite(a) & torch.isfinite(b)
    if not bool(both.all()):
        return "nan"
    size = float(a.norm())
    return float((a - b).norm()) / size if size else float((a - b).norm())


def _products(judged: list[Op]) -> list[dict[str, Any]]:
    """Which precision the products of matrices behaved like, by the mean square of their errors."""
    groups: dict[str, list[float]] = {}
    for op in judged:
        roundoff = op["judged"].get("roundoff")
        if roundoff is None or op["judged"]["verdict"] not in ("exact", "within", "explained", "diverged"):
            continue
        value = number(roundoff)
        groups.setdefault(_behaviour(value, op["out"][0]), []).append(value)
    return [
        {"behaves_like": name, "count": len(values), "roundoff": _json(sorted(values)[len(values) // 2])}
        for name, values in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]


def _behaviour(roundoff: float, output: str) -> str:
    for text, own in (("bf16", 2.0**-8), ("f16", 2.0**-11)):
        if output.startswith(text):
            # Rounding the result once leaves about 0.4 of a unit; twice that is another source of error.
            return f"float32 sums, one rounding to {text}" if roundoff < 0.8 * own else f"more than one rounding to {text}"
    exponent = math.log2(roundoff) if roundoff > 0 else -60.0
    return next(name for limit, name in BEHAVIOURS if exponent <= limit or limit == 0.0)


def _decisions(left: Bundle, right: Bundle) -> dict[str, Any] | None:
    """Where the most likely token is the same: compared only where its lead is more than roundings could take away."""
    total = same = ties = changed = 0
    smallest = math.inf
    worst: dict[str, Any] | None = None
    for event in right.of("case"):
        case = event["name"]
        a, b = left.tensor(f"{case}/logits"), right.tensor(f"{case}/logits")
        noise = next((e["sigma"] for e in right.of("noise") if e["case"] == case), None)
        if a is None or b is None or a.shape != b.shape or noise is None:
            continue
        top = a.double().topk(2, dim=-1)
        lead = (top.values[..., 0] - top.values[..., 1]).flatten()
        # The difference of two logits has the noise of both.
        limit = factor() * math.sqrt(2) * torch.tensor([number(v) for v in noise], dtype=torch.float64).flatten()
        equal = (top.indices[..., 0] == b.double().argmax(-1)).flatten()
        sure = lead > limit
        total += lead.numel()
        same += int(equal.sum())
        ties += int((~sure & ~equal).sum())
        wrong = sure & ~equal
        changed += int(wrong.sum())
        smallest = min(smallest, float((lead / limit.clamp_min(1e-300)).min()))
        if bool(wrong.any()) and worst is None:
            place = int(wrong.nonzero()[0])
            worst = {"case": case, "position": place, "lead": float(lead[place]), "limit": float(limit[place])}
    if not total:
        return None
    return {"positions": total, "same": same, "ties": ties, "changed": changed, "smallest_lead": _json(smallest), "worst": worst}


def _results(left: Bundle, right: Bundle) -> list[dict[str, Any]]:
    """Loss, logits, gradients and stepped weights of each case: relative drift, the largest of a kind, and the drifts of the
    same result where the right side's own embeddings are rounded once more."""
    ordinary = {(e["case"], e["name"]): e["values"] for e in right.of("drift")}
    ours = {(e["case"], e["name"]): e for e in left.of("result")}
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    for event in right.of("result"):
        other = ours.get((event["case"], event["name"]))
        if other is None or other["shape"] != event["shape"]:
            continue
        away = drift(other["sample"], event["sample"])
        kind, _, name = event["name"].partition("/")
        known = kinds.get((event["case"], kind))
        size = math.inf if isinstance(away, str) else away or 0.0
        if known is None or size > known["_size"]:
            count = known["count"] + 1 if known else 1
            kinds[event["case"], kind] = {"case": event["case"], "what": kind, "name": name, "drift": away, "count": count, "_size": size}
            kinds[event["case"], kind]["ordinary"] = ordinary.get((event["case"], event["name"]))
        else:
            known["count"] += 1
    return [{k: v for k, v in row.items() if k != "_size"} for row in kinds.values()]


def _weights(left: Bundle, right: Bundle) -> list[str]:
    """Parameters that did not start from the same numbers, where both sides rounded them alike."""
    if left.head["weights"] != right.head["weights"]:
        return []
    a: dict[str, int] = next((e["digests"] for e in left.of("weights")), {})
    b: dict[str, int] = next((e["digests"] for e in right.of("weights")), {})
    return [name for name in b if name in a and a[name] != b[name]]


def _nonfinite(left: Bundle, right: Bundle) -> list[str]:
    """Results that are finite on the left only."""
    ours = {(e["case"], e["name"]): e for e in left.of("result")}
    return [
        f"{e['name']} ({e['case']})"
        for e in right.of("result")
        if isinstance(e["norm"], str) and (other := ours.get((e["case"], e["name"]))) is not None and not isinstance(other["norm"], str)
    ]


# Arguments come before any number


def _arguments(left: Bundle, right: Bundle) -> list[dict[str, Any]]:
    """Scalar arguments that differ between ops that correspond: eps, scale, theta, is_causal; and dtypes, where both
    executions have the same."""
    a_way, b_way = left.head["execution"], right.head["execution"]
    same_dtype = a_way["dtype"] == b_way["dtype"]
    same_way = a_way["attention"] == b_way["attention"]
    found: list[dict[str, Any]] = []
    known: set[tuple[Any, ...]] = set()
    for case in (e["name"] for e in right.of("case")):
        for a, b in corresponding_ops(_of_case(left, case), _of_case(right, case), whole_modules=not same_way):
            for difference in argument_differences(a, b, same_dtype):
                key = (b["op"], b["file"], b["line"], difference["argument"], difference["left"], difference["right"])
                if key not in known:
                    known.add(key)
                    found.append({"left_op": a, "op": b, **difference})
    return found


def _of_case(bundle: Bundle, case: str) -> list[Op]:
    return [op for op in bundle.of("op") if op["case"] == case]


def corresponding_ops(left: Sequence[Op], right: Sequence[Op], *, whole_modules: bool = False) -> list[tuple[Op, Op]]:
    """Ops whose arguments can be compared: one module runs an op of that name equally often on both sides.

    With `whole_modules` it must run the same ops in the same order: another attention is another way, with scales and masks
    of its own.
    """
    sides: list[dict[tuple[str, str], list[Op]]] = [{}, {}]
    for groups, ops in zip(sides, (left, right), strict=True):
        for op in ops:
            groups.setdefault((op["module"], op["phase"]), []).append(op)
    found = []
    for key, theirs in sides[0].items():
        mine = sides[1].get(key, [])
        if [op["op"] for op in theirs] == [op["op"] for op in mine]:
            found += list(zip(theirs, mine, strict=True))
            continue
        if whole_modules:
            continue
        for name in dict.fromkeys(op["op"] for op in theirs):
            a, b = ([op for op in side if op["op"] == name] for side in (theirs, mine))
            if len(a) == len(b):
                found += list(zip(a, b, strict=True))
    order = {id(op): i for i, op in enumerate(right)}
    return sorted(found, key=lambda pair: order[id(pair[1])])


def argument_differences(a: Op, b: Op, same_dtype: bool) -> Iterator[dict[str, Any]]:
    left, right = a.get("scalars", {}), b.get("scalars", {})
    for name in sorted(set(left) | set(right)):
        x, y = left.get(name), right.get(name)
        if x == y or name in ("device", "layout", "pin_memory", "non_blocking", "memory_format") or _is_extreme(x) and _is_extreme(y):
            continue
        if not same_dtype and _follow_from_dtypes(x, y):
            continue
        if isinstance(x, str | None) and isinstance(y, str | None) and not same_dtype:
            continue
        if name in ("size", "shape", "dim", "start", "end", "index", "split_size") or isinstance(x, list) or isinstance(y, list):
            continue  # another layout is another way, not another value
        yield {"argument": name, "left": x, "right": y}
    if same_dtype and [t.partition("[")[0] for t in a["in"]] != [t.partition("[")[0] for t in b["in"]]:
        yield {"argument": "dtype", "left": ", ".join(a["in"]), "right": ", ".join(b["in"])}


def _follow_from_dtypes(x: Any, y: Any) -> bool:
    """Numbers that two precisions give to one intention: a constant rounded to float32, or the eps of each dtype, which is
    what torch's rms_norm takes where none is given."""
    if isinstance(x, bool) or isinstance(y, bool) or not isinstance(x, int | float) or not isinstance(y, int | float):
        return False
    return abs(x - y) <= torch.finfo(torch.float32).eps * max(abs(x), abs(y)) or (x in OF_DTYPES and y in OF_DTYPES)


def _is_extreme(value: Any) -> bool:
    """The smallest number of a dtype, as masks use it, or an infinity: it follows from the dtype."""
    if isinstance(value, str):
        return value in NON_FINITE
    return isinstance(value, int | float) and abs(value) > 6e4


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
