"""Two executions held against each other: verdict, first place, error and drift by layer, products, decisions, what to do."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group

from ..report import NON_FINITE
from ..units import number_text, plural
from .layout import LABEL, Line, line, row

BARS = 24  # columns of a full bar: the derived bound
LAYERS_SHOWN = 12  # rows; of more the worst and the ends are shown
WORDS = {
    "agrees": ("agrees", "bold green"),
    "parts": ("parts", "bold red"),
    "died": ("died", "bold red"),
    "undecided": ("undecided", "bold yellow"),
}
NEXT = {
    "agrees": "nothing: every error is one that arithmetic of this precision makes",
    "parts": "start at the first place; later ones may be causes of their own, since every op is judged on its own inputs",
    "died": "mend the place where it died, then run this again",
    "undecided": "look at what could not be judged, above: the difference may be one of rounding, or not",
}


def parity_view(section: Mapping[str, Any]) -> Group:
    """The section `parity` of a report, one block a pair."""
    blocks: list[Line] = []
    for i, run in enumerate(section["runs"]):
        blocks += ([line()] if i else []) + list(_run(run))
    return Group(*blocks)


def _run(run: Mapping[str, Any]) -> Iterator[Line]:
    left, right = run["left"], run["right"]
    other = f" of {left['subject']}" if left["subject"] != right["subject"] else ""
    gpu = f" ({right['gpu']})" if right["gpu"] else ""
    yield line(
        WORDS[run["verdict"]], f"  {right['execution']}{gpu} against {left['execution']}{other}", head=("parity", "bold"), indent=LABEL
    )
    if run["first"]:
        yield row("first", _place(run["first"]))
    counts = [f"{count} {name}" for name, count in run["ops"].items() if count]
    if counts:
        yield row("ops", f"{', '.join(counts)}; {run['coverage']:.1%} judged")
    for reason in run["unverified"][:3]:
        yield row("unverified", f"{reason['reason']} ({plural(reason['count'], 'op')})")
    for found in run.get("compiled", []):
        yield row("compiled", compiled_text(found))
        yield row("not seen", unseen_text(found))
    yield from _chart(run["layers"])
    for policy in run["policies"]:
        asked = "as the execution asks" if policy["declared"] else "which the execution did not ask for"
        yield row("policy", f"{plural(policy['count'], 'op')} as with {policy['policy']}, {asked}")
    if run["products"]:
        texts = [f"{item['count']} like {item['behaves_like']} (roundoff 2^{_exponent(item['roundoff'])})" for item in run["products"]]
        yield row("products", "\n".join(texts))
    if run["decisions"]:
        yield row("decisions", _decisions(run["decisions"]))
    drifts = [_drift(item) for item in run["results"] if item["drift"] is not None]
    if drifts:
        yield row("drift", "\n".join(drifts))
    if run["left_out"]:
        yield row("left out", f"{plural(run['left_out'], 'tensor')} that the budget did not take")
    yield row("do", NEXT[run["verdict"]])


def compiled_text(found: Mapping[str, Any]) -> str:
    """What was compared of a compiled run, in what, and the worst of it."""
    if not found["graphs"]:
        return "nothing was compiled: every call ran as it does without torch.compile"
    graphs = f"{plural(found['graphs'], 'graph')} of {plural(found['operations'], 'operation')}"
    results = found["results"]
    worst = max((_value(item["margin"]) for item in results), default=0.0)
    kinds = ", ".join(dict.fromkeys(item["what"] for item in results))
    lines = [
        f"{graphs}, called twice; {plural(sum(item['count'] for item in results), 'result')} ({kinds}) against the same run uncompiled:"
    ]
    outside = [f"{item['outside']} of {item['what']} ({item['case']})" for item in results if item["outside"]]
    lines[0] += f" {', '.join(outside)} outside" if outside else " all within what legal roundings of its ops make"
    lines[0] += f"; worst {_number(worst)} x its bound"
    if found["unstable"]:
        lines.append("the uncompiled run gives other results when it is repeated, so there is nothing to hold the compiled one against")
    again = found["float64"]
    if again is not None:
        gone = "equal" if again["backend"] is None else f"{again['module'] or 'the model'}: {again['what']}, with {again['backend']}"
        lines.append(f"in float64, compiled with {again['asked']}: {gone}")
    return "\n".join(lines)


def unseen_text(found: Mapping[str, Any]) -> str:
    """What of a compiled run nobody could compare, and why."""
    parts = ["the ops inside a graph, one by one", "the optimizer's step, which is not compiled"]
    if found["graphs"] and found["float64"] is None:
        parts.append("float64, in which the model does not run or is too large to be copied")
    if found["unbounded"]:
        parts.append(f"the roundings of {', '.join(found['unbounded'])}, which have no bound")
    if found["choices"]:
        parts.append(f"the choices of {', '.join(found['choices'])}, which a rounding may turn")
    return "; ".join(parts)


def _drift(item: Mapping[str, Any]) -> str:
    """How far a result of the free run is away, beside what one rounding of the embeddings makes of it: no verdict."""
    text = f"{item['what']} {_number(item['drift'])} ({item['case']})"
    values = [_value(v) for v in item.get("ordinary") or [] if v is not None]
    if not values:
        return text
    low, high = min(values), max(values)
    size = _number(low) if low == high else f"{_number(low)} to {_number(high)}"
    return f"{text}; one more rounding of the embeddings alone makes {size}"


def _place(first: Mapping[str, Any]) -> str:
    if first["verdict"] == "died":
        return str(first["reason"])
    where = f"{first['function'] or ''} {first['file']}:{first['line']}" if first["file"] else first["module"]
    size = "" if first["verdict"] == "nondeterministic" else f", {_number(first['margin'])} x its bound"
    policy = f", as with {first['policy']}" if first["policy"] else ""
    return f"{first['op']} ({first['phase']}), {where.strip()}, module {first['module'] or '(none)'}, case {first['case']}{size}{policy}"


def _chart(layers: list[Mapping[str, Any]]) -> Iterator[Line]:
    """The worst op of each layer as a bar whose full length is the bound, and the drift of the free run."""
    if not layers:
        return
    shown = layers
    if len(layers) > LAYERS_SHOWN:
        worst = sorted(range(len(layers)), key=lambda i: -_value(layers[i]["margin"]))[: LAYERS_SHOWN - 4]
        keep = sorted({0, 1, len(layers) - 2, len(layers) - 1, *worst})
        shown = [layers[i] for i in keep]
    width = max(len(item["module"]) for item in shown)
    yield row("by layer", f"{'':{width}s}  worst op as a share of its bound{'':{BARS - 30 if BARS > 30 else 1}s}drift")
    for item in shown:
        margin = _value(item["margin"])
        bar = "█" * min(BARS, math.ceil(margin * BARS)) if margin > 0 else ""
        over = " over" if margin > 1 else ""
        drift = "" if item["drift"] is None else f"  {_number(item['drift'])}"
        text = f"{item['module']:{width}s}  {bar:·<{BARS}s} {_number(item['margin']):>8s}{over}{drift}"
        yield line((text, "red" if margin > 1 else ""), head="", indent=LABEL)
    if len(shown) < len(layers):
        yield line((f"{plural(len(layers) - len(shown), 'layer')} more in the report", "dim"), indent=LABEL)


def _decisions(known: Mapping[str, Any]) -> str:
    text = f"{known['same']} of {known['positions']} positions choose the same token"
    if known["ties"]:
        text += f", {known['ties']} differ where the lead is less than roundings take away"
    if known["changed"]:
        text += f", {known['changed']} differ where it is more"
    return f"{text}; smallest lead {_number(known['smallest_lead'])} x what roundings take away"


def _exponent(value: Any) -> str:
    number = _value(value)
    return f"{math.log2(number):.1f}" if number > 0 and math.isfinite(number) else "-inf"


def _value(value: Any) -> float:
    return NON_FINITE[value] if isinstance(value, str) else float(value)


def _number(value: Any) -> str:
    return value if isinstance(value, str) else number_text(float(value))
