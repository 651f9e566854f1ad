"""What a step takes in memory: the figures against the budget, who holds the peak, the run over its events, what would help."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ...units import bytes_text, fit_text, seconds_text
from ..svg import round_ticks
from .parts import legend, listed, paragraph, shares, table
from .plots import Mark, Series, curves, stacked

Section = Mapping[str, Any]

LEAST_SHARE = 0.01  # of the peak: smaller categories are drawn together as "other"
MOST_PLACES = 40  # of a snapshot or of two
COLOURS = ("c1", "c2", "c3", "c4", "c5", "c7", "c8")
OTHER = "c6"
GIB, MIB = 1024**3, 1024**2


def draw(section: Section) -> Markup:
    """A prediction, a snapshot or a comparison, whichever the section holds, and what a run measured."""
    parts: list[Markup] = []
    if section["plan"] is not None:
        card = f" on {section['gpu']['name']} ({bytes_text(section['gpu']['total_bytes'])})" if section["gpu"] else ""
        parts.append(paragraph(section["plan"]["text"], card, "."))
    views: Sequence[Callable[[Section], Markup]] = (
        _figures,
        _peak,
        _timeline,
        _holders,
        _what_ifs,
        _confirmation,
        _snapshot,
        _comparison,
        _small_print,
    )
    parts += [view(section) for view in views]
    return Markup("").join(parts)


def _figures(section: Section) -> Markup:
    """Low, expected and safe for tensors, allocator and process, and whether that fits."""
    labels = {"tensors": "tensors allocated", "reserved": "reserved by the allocator", "process": "process, with the CUDA context"}
    rows = [
        [label, *(bytes_text(section["figures"][name][column]) for column in ("low", "expected", "safe"))]
        for name, label in labels.items()
        if section["figures"][name]
    ]
    if not rows:
        return Markup("")
    budget = Markup("")
    if section["budget_bytes"] is not None:
        needed = section["figures"]["process"] or section["figures"]["tensors"]
        words = fit_text(needed["expected"], needed["safe"], section["budget_bytes"])
        budget = paragraph(f"It {words} a budget of {bytes_text(section['budget_bytes'])}.", class_="message")
    return budget + table(["memory", "low", "expected", "safe"], rows, numbers=frozenset({1, 2, 3}))


def _colours(section: Section) -> dict[str, str]:
    """A colour for each category that is worth one, the same at the peak and over time."""
    if section["kind"] == "snapshot" and section["timeline"]:
        return dict(zip(section["timeline"]["names"], (OTHER, COLOURS[0]), strict=True))
    total = sum(item["bytes"] for item in section["categories"]) or 1
    large = [item["name"] for item in section["categories"] if item["bytes"] >= LEAST_SHARE * total]
    large.sort(key=lambda name: -next(item["bytes"] for item in section["categories"] if item["name"] == name))
    return dict(zip(large, COLOURS, strict=False))


def _peak(section: Section) -> Markup:
    if not section["peak"] or not section["categories"]:
        return Markup("")
    peak, colours = section["peak"], _colours(section)
    sizes = {item["name"]: item["bytes"] for item in section["categories"]}
    parts = [(colour, name, sizes[name]) for name, colour in colours.items()]
    rest = sum(sizes.values()) - sum(size for _, _, size in parts)
    parts += [(OTHER, "other", rest)] if rest > 0 else []
    place = f", {peak['file']}:{peak['line']}" if peak["file"] else ""
    module = f", {peak['module']}" if peak["module"] else ""
    budget = section["budget_bytes"]
    mark = (budget, f"budget {bytes_text(budget)}") if budget is not None else None
    return Markup("").join(
        [
            Markup("<h3>At the peak</h3>"),
            paragraph(_sentence(peak["owner"])),
            shares(parts, total=sum(sizes.values()), title="bytes at the peak by category", mark=mark),
            legend((colour, f"{name} {bytes_text(size)}") for colour, name, size in parts),
            paragraph(f"The peak is in {peak['op']}{module}{place}: step {peak['step']}, {peak['phase']}.", class_="quiet"),
        ]
    )


def _timeline(section: Section) -> Markup:
    """Bytes of tensors over the events, by category."""
    timeline = section["timeline"]
    if not timeline or not timeline["points"]:
        return Markup("")
    colours = _colours(section)
    rows = [point["categories"] for point in timeline["points"]]
    bands, rest = [], [0.0] * len(rows)
    for column, name in enumerate(timeline["names"]):
        values = [float(row[column]) for row in rows]
        if name in colours:
            bands.append((colours[name], name, values))
        else:
            rest = [low + value for low, value in zip(rest, values, strict=True)]
    words = Markup("")
    if section["kind"] == "snapshot":
        words = legend((colour, name) for name, colour in colours.items())
    else:
        bands.sort(key=lambda band: -list(colours).index(band[1]))
        bands.insert(0, (OTHER, "other", rest))
    highest = max(point["allocated_bytes"] for point in timeline["points"])
    budget = section["budget_bytes"]
    return Markup("").join(
        [
            Markup("<h3>Over the run</h3>"),
            stacked(
                bands,
                title="bytes of tensors over the events of the run, by category",
                ticks=_byte_ticks(max(highest, budget or 0)),
                stretches=[(mark["point"], f"{mark['phase']} {mark['step'] or ''}".strip()) for mark in timeline["marks"]],
                marks=[Mark(index=timeline["peak"], text=f"peak {bytes_text(highest)}", class_="peak")],
                level=(budget, f"budget {bytes_text(budget)}") if budget is not None else None,
            ),
            words,
        ]
    )


def _holders(section: Section) -> Markup:
    if not section["holders"]:
        return Markup("")
    rows = []
    for holder in section["holders"]:
        shape = f"{holder['dtype']}[{', '.join(map(str, holder['shape']))}]" if holder["shape"] else holder["dtype"]
        place = f"{holder['file']}:{holder['line']}" if holder["file"] else holder["module"]
        count = f"{holder['count']} × " if holder["count"] > 1 else ""
        rows.append([bytes_text(holder["bytes"]), f"{count}{holder['op']} {shape}", holder["category"], place, holder["born"]])
    modules = table(["module", "bytes"], [[item["name"], bytes_text(item["bytes"])] for item in section["modules"]], numbers=frozenset({1}))
    return Markup(
        "<details open><summary>The largest at the peak</summary>{}</details><details><summary>By module</summary>{}</details>"
    ).format(table(["bytes", "tensors", "category", "made at", "born"], rows, numbers=frozenset({0})), modules)


def _what_ifs(section: Section) -> Markup:
    if not section["what_ifs"] and not section["largest"]:
        return Markup("")
    rows: list[list[object]] = []
    for change in section["what_ifs"]:
        if change["reason"]:
            rows.append([change["change"], "", "", "", change["reason"]])
            continue
        needed, budget = change["needed"], section["budget_bytes"]
        words = fit_text(needed["expected"], needed["safe"], budget) if budget else ""
        fits = {"fits": "✓ fits", "does not fit": "✗ does not fit"}.get(words, words)
        rows.append([change["change"], bytes_text(needed["expected"]), bytes_text(change["saved_bytes"]), fits, change["owner"]])
    axes = {"batch_size": "batch size", "seq_len": "sequence length"}
    largest = [
        f"Largest {axes[item['axis']]} that fits: {item['value']} (safe figure {bytes_text(item['safe_bytes'])}; bounded by {item['bounded_by']})"
        if item["value"]
        else f"No {axes[item['axis']]} fits, not even the smallest"
        for item in section["largest"]
    ]
    return Markup("").join(
        [
            Markup("<h3>What would help</h3>"),
            table(["change", "expected", "saved", "budget", "then"], rows, numbers=frozenset({1, 2})) if rows else Markup(""),
            listed(largest),
        ]
    )


def _confirmation(section: Section) -> Markup:
    measured = section["confirmation"]
    if not measured:
        return Markup("")
    rows = [
        [
            figure["name"],
            bytes_text(figure["predicted_bytes"]),
            bytes_text(figure["measured_bytes"]),
            "" if figure["error"] is None else f"{100 * figure['error']:+.1f} %",
        ]
        for figure in measured["figures"]
    ]
    parts = [Markup("<h3>Measured</h3>"), paragraph(f"{measured['plan']} on {measured['device']}.")]
    if rows:
        parts.append(table(["figure", "predicted", "measured", "error"], rows, numbers=frozenset({1, 2, 3})))
    if measured["events"]:
        events = measured["events"]
        same = "every one agrees" if events["identical"] else f"first difference: {events['first_difference']}"
        parts.append(paragraph(f"Events predicted {events['predicted']}, measured {events['measured']}: {same}."))
    if measured["training"]:
        training = measured["training"]
        losses = [float(loss) for loss in training["losses"]]
        marks = [Mark(index=step, text="", class_="bad") for step in training["overflow_at"]]
        parts.append(curves([Series(name="loss", values=losses)], title="loss of the short training", marks=marks))
        parts.append(
            paragraph(
                f"{training['steps']} steps: loss {float(training['first_loss']):.3f} to {float(training['last_loss']):.3f}. {training['overflow_text']}"
            )
        )
    if measured["out_of_memory"]:
        parts.append(paragraph(measured["out_of_memory"]["text"]))
    if measured["skipped"]:
        parts.append(paragraph(measured["skipped"]))
    return Markup("").join(parts)


def _snapshot(section: Section) -> Markup:
    snapshot = section["snapshot"]
    if not snapshot:
        return Markup("")
    facts = {
        "allocated": snapshot["allocated_bytes"],
        "reserved": snapshot["reserved_bytes"],
        "largest free block": snapshot["largest_free_bytes"],
        "free in pieces": snapshot["stranded_bytes"],
    }
    return Markup("").join(
        [
            paragraph(f"{snapshot['file']}: ", ", ".join(f"{name} {bytes_text(size)}" for name, size in facts.items()), "."),
            paragraph(_sentence(section["peak"]["owner"])) if section["peak"] else Markup(""),
            _places("held at the recorded peak", snapshot.get("peak_owners", ())),
            _places("held at the end", snapshot["owners"]),
            listed(
                f"a request of {bytes_text(one['requested_bytes'])} failed with {bytes_text(one['free_bytes'])} free"
                for one in snapshot["out_of_memory"]
            ),
        ]
    )


def _places(title: str, owners: Sequence[Mapping[str, Any]]) -> Markup:
    rows = [[owner["place"], owner["count"] or "", bytes_text(owner["bytes"])] for owner in owners[:MOST_PLACES]]
    return table([title, "blocks", "bytes"], rows, numbers=frozenset({1, 2})) if rows else Markup("")


def _comparison(section: Section) -> Markup:
    comparison = section["comparison"]
    if not comparison:
        return Markup("")
    parts = []
    for title, items in (("", comparison["figures"]), (comparison.get("by") or "category", comparison["categories"][:MOST_PLACES])):
        sizes = [(item["name"], item["left_bytes"], item["right_bytes"]) for item in items]
        rows = [[name, bytes_text(left), bytes_text(right), _signed(right - left)] for name, left, right in sizes]
        if rows:
            parts.append(table([title, comparison["left"], comparison["right"], "change"], rows, numbers=frozenset({1, 2, 3})))
    return Markup("").join(parts)


def _small_print(section: Section) -> Markup:
    texts = list(section["notes"])
    if section["predict_seconds"] is not None:
        texts.append(f"predicted in {seconds_text(section['predict_seconds'])}, nothing was allocated")
    if section["not_modelled"]:
        texts.append(f"left out: {'; '.join(section['not_modelled'])}")
    if section["opaque"]:
        texts.append(f"operators that nobody can look into: {', '.join(section['opaque'])}")
    return listed(texts)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _signed(count: int) -> str:
    return f"{'+' if count > 0 else '-' if count else ''}{bytes_text(abs(count))}"


def _byte_ticks(highest: float) -> list[tuple[float, str]]:
    unit = GIB if highest >= GIB else MIB
    return [(tick * unit, bytes_text(round(tick * unit))) for tick in round_ticks(0, highest / unit)]
