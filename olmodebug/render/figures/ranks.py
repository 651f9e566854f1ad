"""One training step on several ranks beside the other run: errors against their bounds by layer, and whether replicas agree."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ...units import number_text, plural
from .layers import by_layer
from .parts import listed, paragraph, table

Section = Mapping[str, Any]

STAGES = {
    "start": "Weights before the step",
    "forward": "Module outputs",
    "gradient": "Gradients",
    "step": "Changes of the weights",
    "state": "Optimizer tensors after the step",
}
WHEN = {"start": "before the step", "step": "after the step"}


def draw(section: Section) -> Markup:
    """The ranks, a chart for each stage of the step, and the replicas."""
    beside = section.get("beside")
    other = f"{plural(beside['world'], 'rank')} ({beside['strategy']})" if beside else "one process with the same weights and batch"
    parts = [paragraph(f"{plural(section['world'], 'rank')} ({section['strategy']}), beside {other}.")]
    if section["compared"] is None:
        parts.append(paragraph("! The step did not come to its end, or the runs cannot be compared.", class_="message"))
    parts += [_stage(body) for body in section.get("layers", ())]
    if section.get("replicas"):
        parts.append(_replicas(section["replicas"]))
    parts.append(_collectives(section["collectives"]))
    return Markup("").join(parts)


def _stage(body: Section) -> Markup:
    layers = body["layers"]
    heading = Markup("<h3>{}</h3>").format(STAGES[body["stage"]])
    if all(layer["error"] == 0 for layer in layers):
        return heading + paragraph("✓ exactly the same.", class_="message")
    beyond = [layer["module"] for layer in layers if layer["error"] is None or layer["error"] > 1]
    words = f"✗ {plural(len(beyond), 'layer')} of {len(layers)} beyond rounding" if beyond else "✓ within rounding"
    first = next((index for index, layer in enumerate(layers) if layer["module"] == body["first"]), None)
    values = [(layer["module"], float("inf") if layer["error"] is None else float(layer["error"])) for layer in layers]
    rows = [
        [layer["module"], layer["tensors"], "shapes differ" if layer["error"] is None else number_text(layer["error"]), layer["worst"]]
        for layer in layers
    ]
    inner = table(["layer", "tensors", "error / bound", "largest in"], rows, numbers=frozenset({1, 2}))
    return Markup("").join(
        [
            heading,
            paragraph(f"{words}.", class_="message"),
            by_layer(
                values,
                bound=1.0,
                bound_text="what rounding may make",
                title=f"{STAGES[body['stage']].lower()}: largest difference in each layer, as a share of what rounding may make",
                first=first,
            ),
            Markup("<details><summary>Layer by layer</summary>{}</details>").format(inner),
        ]
    )


def _replicas(replicas: Sequence[Section]) -> Markup:
    rows = [[WHEN[each["stage"]], each["whole"], each["alike"], each["spread"]] for each in replicas]
    unlike = [f"{name}: not the same bits on all ranks {WHEN[each['stage']]}" for each in replicas for name in each["unlike"]]
    heads = ["weights", "whole on every rank", "of these the same bits", "spread over the ranks"]
    return Markup("<h3>Replicas</h3>{}{}").format(table(heads, rows, numbers=frozenset({1, 2, 3})), listed(unlike))


def _collectives(calls: Sequence[int]) -> Markup:
    if not calls:
        return Markup("")
    text = f"{calls[0]} on every rank" if len(set(calls)) == 1 else f"{', '.join(map(str, calls))}, by rank"
    return paragraph(f"Calls between ranks: {text}.", class_="quiet")
