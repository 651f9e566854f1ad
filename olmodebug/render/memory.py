"""The memory section as text: the answer first, then who holds the peak, the timeline, what would help, what was measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group

from ..units import bytes_text, fit_text, plural, seconds_text
from .layout import Line, line, row

Section = Mapping[str, Any]
PHASES = ("forward", "backward", "optimizer", "prefill", "decode")  # each has a letter of its own under the timeline

WIDTH = 80
BARS = " ▁▂▃▄▅▆▇█"
HEIGHT = 6  # rows of the timeline
NAME = 34  # columns of a table's first field
STYLES = {"fits": "green", "may not fit": "yellow", "does not fit": "red"}
SHORT = {"fits": "yes", "may not fit": "maybe", "does not fit": "no"}
FEWEST_BYTES_SHOWN = 0.001  # of the peak: smaller categories are left to the JSON
MOST_MODULES = 8
MOST_HOLDERS = 6
MOST_PLACES = 12  # of a snapshot or of two


def memory_view(section: Section) -> Group:
    """Everything that a section says, for 80 columns."""
    views = {"prediction": _prediction, "snapshot": _snapshot, "comparison": _comparison}
    return Group(*views[section["kind"]](section))


def _prediction(section: Section) -> Iterator[Line]:
    plan, gpu = section["plan"], section["gpu"]
    card = f" on {gpu['name']} ({bytes_text(gpu['total_bytes'])})" if gpu else " on the CPU"
    if plan is not None:
        yield line((plan["text"], "bold"), card)
    if section["budget_bytes"] is not None:
        needed = section["figures"]["process"] or section["figures"]["tensors"]
        words = fit_text(needed["expected"], needed["safe"], section["budget_bytes"])
        yield line((words, f"bold {STYLES[words]}"), f"  a budget of {bytes_text(section['budget_bytes'])}")
    yield line("")
    yield line((f"{'':{NAME}}{'low':>12}{'expected':>12}{'safe':>12}", "dim"))
    labels = {"tensors": "tensors allocated", "reserved": "reserved by the allocator", "process": "process (with CUDA context)"}
    for name, label in labels.items():
        figure = section["figures"][name]
        if figure:
            yield line(
                f"{label:{NAME}}{bytes_text(figure['low']):>12}",
                (f"{bytes_text(figure['expected']):>12}", "bold"),
                f"{bytes_text(figure['safe']):>12}",
            )
    yield line("")
    peak = section["peak"]
    place = f"{peak['file']}:{peak['line']}" if peak["file"] else ""
    yield line((peak["owner"], "bold"))
    yield line(
        (f"the peak is in {peak['op']}" + (f", {peak['module']}" if peak["module"] else "") + (f", {place}" if place else ""), "dim")
    )
    yield from _shares("at the peak, by category", section["categories"], len(section["categories"]))
    yield from _shares("at the peak, by module", section["modules"], MOST_MODULES)
    yield from _holders(section["holders"])
    yield from _timeline(section)
    yield from _what_ifs(section)
    yield from _confirmation(section["confirmation"])
    yield line("")
    if section["predict_seconds"] is not None:
        yield row("predicted", f"in {seconds_text(section['predict_seconds'])}, nothing was allocated")
    for note in section["notes"]:
        yield row("note", note)
    if section["not_modelled"]:
        yield row("left out", "; ".join(section["not_modelled"]))


def _shares(title: str, shares: Sequence[Mapping[str, Any]], most: int) -> Iterator[Line]:
    total = sum(share["bytes"] for share in shares)
    if not total:
        return
    yield line("")
    yield line((title, "dim"))
    for share in shares[:most]:
        if share["bytes"] >= FEWEST_BYTES_SHOWN * total:
            yield line(_bar_row(share["name"], share["bytes"], total))


def _bar_row(name: str, size: int, total: int) -> str:
    part = size / total
    return f"  {name[: NAME - 3]:{NAME - 2}}{bytes_text(size):>10}{100 * part:>7.1f} %  {'█' * round(22 * part)}"


def _holders(holders: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    if not holders:
        return
    yield line("")
    yield line(("the largest at the peak", "dim"))
    for holder in holders[:MOST_HOLDERS]:
        shape = f" {holder['dtype']}[{','.join(map(str, holder['shape']))}]" if holder["shape"] else ""
        count = f"{holder['count']} x " if holder["count"] > 1 else ""
        place = f", {holder['file']}:{holder['line']}" if holder["file"] else ""
        module = f" in {holder['module']}" if holder["module"] and holder["module"] != "(model)" else ""
        text = f"{count}{holder['op']}{shape}{module}, {holder['born']}{place}"
        yield line(text, head=f"  {bytes_text(holder['bytes']):>10}  ", indent=14)


def _timeline(section: Section) -> Iterator[Line]:
    timeline = section["timeline"]
    if not timeline or not timeline["points"]:
        return
    points = timeline["points"]
    columns = WIDTH - 12
    columns = min(columns, len(points))
    most = points[timeline["peak"]]["allocated_bytes"] or 1
    heights, peak_column = [], 0
    for column in range(columns):
        first, last = column * len(points) // columns, max(column * len(points) // columns + 1, (column + 1) * len(points) // columns)
        heights.append(max(point["allocated_bytes"] for point in points[first:last]))
        if first <= timeline["peak"] < last:
            peak_column = column
    yield line("")
    yield line(("allocated, over the events; ^ marks the peak", "dim"))
    for level in range(HEIGHT, 0, -1):
        label = bytes_text(round(most * level / HEIGHT))
        cells = "".join(BARS[max(0, min(8, round((height / most * HEIGHT - (level - 1)) * 8)))] for height in heights)
        yield line(f"{label:>10} {cells}".rstrip())
    yield line(f"{'':>11}{' ' * peak_column}^")
    marks = [" "] * columns
    for mark in timeline["marks"]:
        column = min(columns - 1, mark["point"] * columns // len(points))
        marks[column] = mark["phase"][0] if mark["phase"] in PHASES else " "
    if legend := [f"{phase[0]} {phase}" for phase in PHASES if phase[0] in marks]:
        yield line((f"{'':>11}{''.join(marks)}".rstrip(), "dim"))
        yield line((f"{'':>11}{', '.join(legend)}", "dim"))


def _what_ifs(section: Section) -> Iterator[Line]:
    if section["what_ifs"]:
        yield line("")
        budget = section["budget_bytes"]
        yield line((f"what if (each traced){'':{NAME - 9}}{'expected':>10}{'saves':>12}{'fits' if budget else '':>10}", "dim"))
        for item in section["what_ifs"]:
            if item["needed"] is None:
                yield line(item["reason"], head=f"  {item['change']}  ", indent=NAME + 12)
                continue
            needed = item["needed"]
            fits = SHORT[fit_text(needed["expected"], needed["safe"], budget)] if budget else ""
            yield line(
                f"  {item['change'][: NAME + 8]:{NAME + 8}}{bytes_text(item['needed']['expected']):>12}{bytes_text(item['saved_bytes']):>12}{fits:>10}"
            )
    for size in section["largest"]:
        name = {"batch_size": "batch", "seq_len": "sequence"}[size["axis"]]
        value = f"up to {size['value']}" if size["value"] else "not even the smallest fits"
        yield row(
            name,
            f"{value}: safe figure {bytes_text(size['safe_bytes'])}, stopped by {size['bounded_by']}, {plural(size['traces'], 'trace')}",
        )


def _confirmation(confirmation: Mapping[str, Any] | None) -> Iterator[Line]:
    if confirmation is None:
        return
    yield line("")
    if confirmation["skipped"]:
        yield row("measured", confirmation["skipped"])
    if confirmation["figures"]:
        yield line((f"measured on {confirmation['device']}: {confirmation['plan']}", "bold"))
        yield line((f"{'':{NAME}}{'predicted':>12}{'measured':>12}{'error':>10}", "dim"))
        for item in confirmation["figures"]:
            error = "" if item["error"] is None else f"{100 * item['error']:+.2f} %"
            yield line(f"{item['name']:{NAME}}{bytes_text(item['predicted_bytes']):>12}{bytes_text(item['measured_bytes']):>12}{error:>10}")
    if events := confirmation["events"]:
        same = "identical, one by one" if events["identical"] else f"differ: {events['first_difference']}"
        yield row("events", f"{events['predicted']} predicted, {events['measured']} measured: {same}")
        for item in events["unpredicted"][:5]:
            yield row(
                "",
                f"not predicted: {item['count']} x {bytes_text(item['bytes'])} {item['place'] if item['place'].startswith('after ') else 'at ' + item['place']}",
            )
        for item in events.get("missing", [])[:5]:
            yield row("", f"not made: {item['count']} x {bytes_text(item['bytes'])}, {item['place']}")
    if training := confirmation["training"]:
        word = "fell" if training["fell"] else "did not fall"
        yield row(
            "training",
            f"{plural(training['steps'], 'step')}: the loss {word}, {float(training['first_loss']):.3f} to {float(training['last_loss']):.3f}, {seconds_text(training['seconds'])}",
        )
        yield row("overflow", training["overflow_text"])
        yield row("sample", training["sample"])
    if lost := confirmation["out_of_memory"]:
        yield row("no memory", f"in {lost['step']}: {lost['text']}")
        if lost["live"]:
            yield line((f"  {'':{NAME - 2}}{'at the peak':>14}{'when it failed':>16}", "dim"))
        for item in lost["live"]:
            yield line(f"  {item['name']:{NAME - 2}}{bytes_text(item['predicted_bytes']):>14}{bytes_text(item['live_bytes']):>16}")


def _snapshot(section: Section) -> Iterator[Line]:
    snapshot = section["snapshot"]
    yield line(f"{plural(snapshot['events'], 'event')}, device {', '.join(map(str, snapshot['devices']))}")
    yield line("")
    for label, name in (
        ("allocated at the end", "allocated_bytes"),
        ("reserved at the end", "reserved_bytes"),
        ("free in segments", "stranded_bytes"),
        ("largest free block", "largest_free_bytes"),
    ):
        yield line(f"{label:{NAME}}{bytes_text(snapshot[name]):>12}")
    yield line(f"{'segments':{NAME}}{snapshot['segments']:>12}")
    if section["peak"]:
        yield line("")
        yield line((section["peak"]["owner"], "bold"))
    for lost in snapshot["out_of_memory"]:
        yield row(
            "no memory", f"a request of {bytes_text(lost['requested_bytes'])} with {bytes_text(lost['free_bytes'])} free on the device"
        )
    yield from _places("at the recorded peak, by place", snapshot.get("peak_owners", ()))
    yield from _places("allocated at the end, by place", snapshot["owners"])
    yield from _timeline(section)
    yield from _notes(section)


def _places(title: str, owners: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    if not owners:
        return
    yield line("")
    yield line((title, "dim"))
    for owner in owners[:MOST_PLACES]:
        count = f"{owner['count']} x  " if owner["count"] else ""
        yield line(f"{count}{owner['place']}", head=f"  {bytes_text(owner['bytes']):>10}  ", indent=14)
    if rest := owners[MOST_PLACES:]:
        yield line((f"  {bytes_text(sum(owner['bytes'] for owner in rest)):>10}  in {plural(len(rest), 'more place')}", "dim"))


def _comparison(section: Section) -> Iterator[Line]:
    both = section["comparison"]
    yield row("first", both["left"])
    yield row("second", both["right"])
    yield line("")
    columns = f"{'first':>12}{'second':>12}{'change':>14}"
    yield line((f"{'':{NAME}}{columns}", "dim"))
    for item in both["figures"]:
        yield line(f"{item['name']:{NAME}}{_changed(item)}")
    by, items = both.get("by"), both["categories"]
    if items and by:
        yield line("")
        yield line((f"by {by}", "dim"))
    if not by or by.startswith("category"):
        for item in items:
            yield line(f"{item['name']:{NAME}}{_changed(item)}")
    else:  # a place is as long as its file and function
        for item in items[:MOST_PLACES]:
            yield line(item["name"], head=_changed(item) + "  ", indent=len(columns) + 2)
        if len(items) > MOST_PLACES:
            yield line((f"{plural(len(items) - MOST_PLACES, 'more place')}, each with a smaller change", "dim"))
    yield from _notes(section)


def _changed(item: Mapping[str, Any]) -> str:
    change = item["right_bytes"] - item["left_bytes"]
    sign = "+" if change > 0 else ""
    return f"{bytes_text(item['left_bytes']):>12}{bytes_text(item['right_bytes']):>12}{sign + bytes_text(change):>14}"


def _notes(section: Section) -> Iterator[Line]:
    if section["notes"]:
        yield line("")
    for note in section["notes"]:
        yield row("note", note)
