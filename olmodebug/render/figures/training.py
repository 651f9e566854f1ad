"""Training runs: the loss over the steps against guessing by frequency, what went wrong on the way, and what was learned."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ...units import bytes_text, count_text, plural, seconds_text
from .parts import legend, listed, paragraph, table
from .plots import Mark, Series, curves

Section = Mapping[str, Any]

COLOURS = ("c1", "c2", "c3", "c4", "c5", "c7", "c8", "c6")
MOST_SPIKES = 12  # marked in the curve; more are told as a number


def draw(section: Section) -> Markup:
    """The recipe and the data in a sentence each, the curves, a row for each run, and what the models write."""
    runs, data = section["runs"], section["data"]
    parts = [paragraph(_recipe(section["recipe"]))]
    if data:
        parts.append(paragraph(_data(data)))
    if any(run["steps"] for run in runs):
        parts += [
            _curve(runs, data),
            _folded(runs, "rate", "Learning rate"),
            _folded(runs, "grad_norm", "Norm of the gradient, before it was clipped"),
        ]
    parts.append(_table(runs))
    parts += [_run(run) for run in runs]
    return Markup("").join(parts)


def _recipe(recipe: Section) -> str:
    return (
        f"Recipe {recipe['name']}: {plural(recipe['steps'], 'step')} of {recipe['batch_size']} x {recipe['seq_len']} tokens, "
        f"{recipe['optimizer']}, learning rate {recipe['learning_rate']:g}, {recipe['schedule']} after {plural(recipe['warmup_steps'], 'step')} of warmup, "
        f"gradients clipped to {recipe['clip_norm']:g}."
    )


def _data(data: Section) -> str:
    return (
        f"Data: {data['source']}; {data['train_documents']:,} documents to train on, {data['validation_documents']:,} to validate, "
        f"{data['test_documents']:,} to test ({data['protocol']})."
        + (f" Guessing by frequency has perplexity {data['unigram_perplexity']:,.1f}." if data["unigram_perplexity"] is not None else "")
    )


def _curve(runs: Sequence[Section], data: Section | None) -> Markup:
    series = [
        Series(
            name=run["subject"],
            values=[math.nan if step["loss"] is None else float(step["loss"]) for step in run["steps"]],
            colour=COLOURS[index % len(COLOURS)],
        )
        for index, run in enumerate(runs)
    ]
    marks = [Mark(index=step, text="", class_="skip") for run in runs for step in run["skipped"][:MOST_SPIKES]]
    marks += [Mark(index=step, text=f"spike at {step}") for run in runs for step in run["spikes"][:MOST_SPIKES]]
    entropy = data["unigram_entropy"] if data else None
    picture = curves(
        series,
        title="loss by step",
        start=1,
        marks=marks,
        level=(entropy, "guessing by frequency") if entropy is not None else None,
    )
    words = [(COLOURS[index % len(COLOURS)], run["subject"]) for index, run in enumerate(runs)]
    return Markup("<h3>Loss</h3>") + picture + legend(words)


def _folded(runs: Sequence[Section], key: str, words: str) -> Markup:
    """A number of each step, folded: what to look at when a loss jumps."""
    series = [
        Series(
            name=run["subject"],
            values=[math.nan if step[key] is None else float(step[key]) for step in run["steps"]],
            colour=COLOURS[index % len(COLOURS)],
        )
        for index, run in enumerate(runs)
    ]
    picture = curves(series, title=f"{words.partition(',')[0].lower()} by step", start=1, floor=0.0)
    return Markup("<details><summary>{}</summary>{}</details>").format(words, picture)


def _table(runs: Sequence[Section]) -> Markup:
    rows = []
    for run in runs:
        evaluated = run["evaluated"]
        rows.append(
            [
                run["subject"],
                count_text(run["parameters"]),
                _perplexity(evaluated["validation_before"]),
                _perplexity(evaluated["validation_after"]),
                _perplexity(evaluated["test_after"]),
                seconds_text(run["seconds"]),
                "" if run["tokens_per_second"] is None else count_text(round(run["tokens_per_second"])),
                "" if run["peak_bytes"] is None else bytes_text(run["peak_bytes"]),
                f"stopped: {run['stopped']}" if run["stopped"] else "",
            ]
        )
    heads = ["model", "parameters", "perplexity before", "validation", "test", "time", "tokens/s", "peak", ""]
    return table(heads, rows, numbers=frozenset(range(1, 8)))


def _run(run: Section) -> Markup:
    """What is to be known of one run, and what its model writes, folded."""
    texts = list(run["said"])
    texts += [f"{plural(len(run['skipped']), 'update')} left out because gradients overflowed"] if run["skipped"] else []
    texts += [f"the loss jumped by more than 1 nat at {plural(len(run['spikes']), 'step')}"] if run["spikes"] else []
    texts += [f"never got a gradient: {', '.join(run['untouched'][:8])}"] if run["untouched"] else []
    checkpoint = {
        True: "transformers loads the checkpoint as the same model",
        False: "transformers does not load the checkpoint as the same model",
    }
    texts += [checkpoint[run["checkpoint"]]] if run["checkpoint"] is not None else []
    samples = [(when, sample) for when, sample in run["samples"].items() if sample]
    written = [
        paragraph(Markup("<b>{}</b> ").format(f"{when} training: "), sample["prompt"], Markup("<mark>{}</mark>").format(sample["text"]))
        for when, sample in samples
    ]
    if not texts and not written:
        return Markup("")
    return Markup("<details><summary>{}</summary>{}{}</details>").format(run["subject"], listed(texts), Markup("").join(written))


def _perplexity(value: Section | None) -> str:
    if value is None:
        return ""
    return "not finite" if value["perplexity"] is None else f"{value['perplexity']:,.1f}"
