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
    "undecided": "no op could be judged: run an execution that is not compiled",
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
    yield from _chart(run["layers"])
    for policy in run["policies"]:
        asked = "as the execution asks" if policy["declared"] else "which the execution did not ask for"
        yield row("policy", f"{plural(policy['count'], 'op')} as with {policy['policy']}, {asked}")
    if run["products"]:
        texts = [f"{item['count']} like {item['behaves_like']} (roundoff 2^{_exponent(item['roundoff'])})" for item in run["products"]]
        yield row("products", "\n".join(texts))
    if run["decisions"]:
        yield row("decisions", _decisions(run["decisions"]))
    drifts = [f"{item['what']} {_number(item['drift'])} ({item['case']})" for item in run["results"] if item["drift"] is not None]
    if drifts:
        yield row("drift", ", ".join(drifts))
    if run["left_out"]:
        yield row("left out", f"{plural(run['left_out'], 'tensor')} that the budget did not take")
    yield row("do", NEXT[run["verdict"]])


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
