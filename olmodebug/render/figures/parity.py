"""Two runs held against each other: every op against its bound, layer by layer, and a subject against a reference implementation."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ...report import NON_FINITE
from ...units import number_text
from ..parity import compiled_text, unseen_text
from .layers import by_layer
from .parts import listed, paragraph, table

Section = Mapping[str, Any]

WORDS = {
    "agrees": "✓ They agree: nothing parts beyond what arithmetic could do.",
    "parts": "✗ They part.",
    "died": "! An execution did not come to its end.",
    "undecided": "! Not all of it could be judged.",
}
OPS = {
    "exact": "exact",
    "within": "within their bound",
    "explained": "explained by a policy",
    "diverged": "diverged",
    "nondeterministic": "not the same twice",
    "range": "out of the dtype's range",
    "unverified": "could not be judged",
}


def draw(section: Section) -> Markup:
    """Every pair of executions, then the reference implementation."""
    parts = [_run(run) for run in section.get("runs", ())]
    if section.get("implementations"):
        parts.append(implementations(section["implementations"]))
    return Markup("").join(parts)


def _run(run: Section) -> Markup:
    left, right = run["left"], run["right"]
    first = run["first"]
    parts = [
        Markup("<h3>{}</h3>").format(f"{right['execution']}, held against {left['execution']}"),
        paragraph(WORDS[run["verdict"]], class_="message"),
        *([paragraph(_ops(run))] if any(run["ops"].values()) else []),
    ]
    for found in run.get("compiled", ()):
        parts += [paragraph("Compiled: ", compiled_text(found), "."), paragraph("Not seen: ", unseen_text(found), ".", class_="quiet")]
    if run["died"]:
        parts.append(paragraph(run["died"]))
    if first:
        place = f"{first['file']}:{first['line']}" if first["file"] else first["module"]
        inside = ", ".join(
            filter(None, [first["op"], f"module {first['module']}" if first["file"] else "", first["phase"], f"case {first['case']}"])
        )
        parts.append(
            paragraph("First: ", Markup("<code>{}</code>").format(place), f" ({inside}), {_text(first['margin'])} times its bound.")
        )
    layers = run["layers"]
    if layers:
        parts.append(
            by_layer(
                [(layer["module"], _number(layer["margin"])) for layer in layers],
                bound=1.0,
                bound_text="what the declared precision could do",
                title="largest error of an op in each layer, as a share of its bound",
                first=_layer_of(first, layers),
            )
        )
        parts.append(paragraph("Each op on identical inputs: its error as a share of its bound, by layer.", class_="quiet"))
        rows = [[layer["module"], layer["kind"], layer["ops"], _text(layer["margin"]), _text(layer["drift"])] for layer in layers]
        heads = ["module", "class", "ops", "error / bound", "drift, running free"]
        parts.append(_folded("Layer by layer", table(heads, rows, numbers=frozenset({2, 3, 4}))))
    parts += [_decisions(run["decisions"]), _results(run["results"]), _reasons(run)]
    return Markup("").join(parts)


def _ops(run: Section) -> str:
    counts = [f"{count:,} {OPS.get(name, name)}" for name, count in run["ops"].items() if count]
    return f"Ops: {', '.join(counts) or 'none'}; {100 * run['coverage']:.1f} % of those with a value could be judged."


def _layer_of(first: Section | None, layers: Sequence[Section]) -> int | None:
    """The layer that holds the first offender: the one with the longest matching path."""
    if not first:
        return None
    inside = [
        (len(layer["module"]), index)
        for index, layer in enumerate(layers)
        if first["module"] == layer["module"] or first["module"].startswith(f"{layer['module']}.")
    ]
    return max(inside)[1] if inside else None


def _decisions(decisions: Section | None) -> Markup:
    if not decisions:
        return Markup("")
    text = (
        f"The most likely token is the same at {decisions['same']} of {decisions['positions']} positions; "
        f"{decisions['ties']} ties within rounding, {decisions['changed']} decided otherwise."
    )
    return paragraph(text)


def _results(results: Sequence[Section]) -> Markup:
    if not results:
        return Markup("")
    rows = [[item["case"], item["what"], item["name"], _text(item["drift"]), _ordinary(item), item["count"]] for item in results]
    heads = ["case", "what", "of", "drift", "of one more rounding of the embeddings", "tensors"]
    return _folded("Loss, logits, gradients and stepped weights of the free runs", table(heads, rows, numbers=frozenset({3, 4, 5})))


def _ordinary(item: Section) -> str:
    values = [number for value in item.get("ordinary") or [] if (number := _number(value)) is not None]
    return _text(max(values)) if values else ""


def _reasons(run: Section) -> Markup:
    texts = [f"{item['count']:,} products behaved like {item['behaves_like']}" for item in run["products"]]
    texts += [
        f"{item['count']:,} ops explained by {item['policy']}" + ("" if item["declared"] else ", which nobody asked for")
        for item in run["policies"]
    ]
    texts += [f"{item['count']:,} ops could not be judged: {item['reason']}" for item in run["unverified"]]
    texts += [f"{run['left_out']:,} tensors were left out for their size"] if run["left_out"] else []
    return listed(texts)


def implementations(body: Section) -> Markup:
    """A subject against a reference implementation, on the same weights and tokens."""
    logits, gradients = body["logits"], body["gradients"]
    agree = "✓ The logits agree" if logits["agree"] else "✗ The logits differ"
    parts = [
        Markup("<h3>{}</h3>").format(f"Against {body['reference']}"),
        paragraph(
            f"{agree}: largest difference {_text(logits['largest_difference'])} of magnitude {_text(logits['largest_magnitude'])}; "
            f"{body['case']}, float64, the same weights.",
            class_="message",
        ),
    ]
    if gradients:
        parts.append(
            paragraph(
                f"Gradients: {gradients['compared'] - gradients['differing']} of {gradients['compared']} agree; "
                f"loss {_text(gradients['loss'])} against {_text(gradients['reference_loss'])}."
            )
        )
    layers = [(layer["module"], _number(layer["difference"])) for layer in body["layers"]]
    if layers:
        worse = [index for index, (_, value) in enumerate(layers) if value is not None and not value <= body["limit"]]
        parts.append(
            by_layer(
                layers,
                bound=body["limit"],
                bound_text="what rounding may make",
                title="largest difference by use of a weight, as a share of its largest magnitude",
                first=worse[0] if worse else None,
            )
        )
    if body["tried"]:
        rows = [[item["cause"], "✓ the difference vanishes" if item["vanishes"] else "no"] for item in body["tried"]]
        parts.append(table(["cause that was tried", "undone on one side"], rows))
    tensors = body["tensors"]
    parts.append(
        paragraph(
            f"Tensors found on the other side by value: {tensors['subject_found']} of {tensors['subject']} of the subject, "
            f"{tensors['reference_found']} of {tensors['reference']} of the reference."
        )
    )
    if body["mapping"]:
        rows = [[item["slot"], item["subject"], item["reference"]] for item in body["mapping"]]
        parts.append(_folded("Which weights are which", table(["slot", "subject", "reference"], rows)))
    parts.append(listed(f"settled by value: {text}" for text in body["settled_by_value"]))
    return Markup("").join(parts)


def _folded(words: str, inside: Markup) -> Markup:
    return Markup("<details><summary>{}</summary>{}</details>").format(words, inside)


def _number(value: Any) -> float | None:
    """A number of the section; `nan`, `inf` and `-inf` are words there."""
    if value is None:
        return None
    return float(NON_FINITE.get(value, value)) if isinstance(value, str) else float(value)


def _text(value: Any) -> str:
    number = _number(value)
    return "" if number is None else number_text(number)
