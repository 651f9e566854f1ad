"""A training run in the terminal: a live line while it goes, then its curve, its perplexities, its sample."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Group
from rich.live import Live as RichLive
from rich.text import Text

from ..units import bytes_text, count_text, number_text, plural, seconds_text
from .layout import LABEL, Line, console, line, row

PLOT_WIDTH, PLOT_HEIGHT = 60, 8
PLAIN_LINES = 10  # over a whole run, where no terminal shows it live
BLOCKS = " ▁▂▃▄▅▆▇█"


class Live:
    """What the run shows while it goes: a live line on a terminal, otherwise a plain line now and then."""

    def __init__(self, recipe: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self.recipe, self.say = recipe, say
        self.drawn = RichLive(console=console(sys.stderr), refresh_per_second=4, transient=True) if sys.stderr.isatty() else None
        self.subject, self.told, self.step, self.lines = "", 0, "", 0
        self.started = time.monotonic()

    def __enter__(self) -> Self:
        if self.drawn:
            self.drawn.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.drawn:
            self.drawn.stop()

    def __call__(self, told: Any) -> None:
        if told.spec != self.subject:
            self.subject, self.told, self.lines = told.spec, 0, 0
            self.say(f"training {told.spec}: {self.recipe['steps']} steps of {self.recipe['batch_size']} x {self.recipe['seq_len']} tokens")
        for text in told.said[self.told :]:
            self.say(text)
        self.told = len(told.said)
        text = progress_text(told.step, told.steps, self.recipe["steps"])
        if self.drawn:
            losses = [step["loss"] for step in told.steps]
            self.drawn.update(Group(Text(text), *(Text(part) for part in plot(losses)) if len(losses) > 1 else ()))
        elif told.steps and len(told.steps) * PLAIN_LINES // self.recipe["steps"] > self.lines:
            self.lines = len(told.steps) * PLAIN_LINES // self.recipe["steps"]
            self.say(text)


def progress_text(doing: str, steps: Sequence[Mapping[str, Any]], total: int) -> str:
    """`step 40 of 100, loss 6.51, rate 0.0123, gradient 0.91, 2,100 tokens/s, 1 min 20 s left`."""
    if not steps:
        return doing
    last = steps[-1]
    recent = steps[-5:]
    seconds = sum(step["seconds"] for step in recent)
    speed = sum(step["tokens"] for step in recent) / seconds if seconds else 0.0
    left = (total - last["step"]) * seconds / len(recent)
    parts = [
        f"step {last['step']} of {total}",
        f"loss {number_text(last['loss'])}" if last["loss"] is not None else "loss not finite",
        f"rate {number_text(last['rate'])}",
        f"gradient {number_text(last['grad_norm'])}" if last["grad_norm"] is not None else "gradient overflows",
        f"{speed:,.0f} tokens/s",
    ]
    if left >= 1:
        parts.append(f"{seconds_text(left)} left")
    return ", ".join(parts) if doing == "train.runs" else f"{doing}; {', '.join(parts[:2])}"


def training_view(section: Mapping[str, Any]) -> Group:
    """The section `training` of a report."""
    return Group(*_section(section))


def plot(losses: Sequence[float | None], *, width: int = PLOT_WIDTH, height: int = PLOT_HEIGHT) -> list[str]:
    """A curve as lines of blocks, its largest and smallest value at the left; steps without a loss leave a gap."""
    known = [loss for loss in losses if loss is not None]
    if not known:
        return []
    low, high = min(known), max(known)
    columns: list[float | None] = []
    for i in range(min(width, len(losses))):
        part = losses[i * len(losses) // min(width, len(losses)) : max(1, (i + 1) * len(losses) // min(width, len(losses)))]
        values = [loss for loss in part if loss is not None]
        columns.append(sum(values) / len(values) if values else None)
    scale = (high - low) or 1.0
    lines = []
    for level in range(height - 1, -1, -1):
        cells = []
        for value in columns:
            # one eighth of the lowest line is left for the smallest value, so that it is seen
            filled = 0.0 if value is None else (value - low) / scale * (height - 0.125) + 0.125 - level
            cells.append(BLOCKS[max(0, min(8, round(filled * 8)))])
        label = f"{high:7.3f} " if level == height - 1 else f"{low:7.3f} " if level == 0 else " " * 8
        lines.append((label + "".join(cells)).rstrip())
    return lines


def _section(section: Mapping[str, Any]) -> Iterator[Line]:
    recipe, data = section["recipe"], section["data"]
    yield row(
        "recipe", f"{recipe['name']}: {recipe['steps']} steps of {recipe['batch_size']} x {recipe['seq_len']} tokens, {recipe['optimizer']}"
    )
    if data is not None:
        documents = f"{plural(data['train_documents'], 'document')} to train, {data['validation_documents']} to validate, {data['test_documents']} to test"
        yield row("data", f"{data['source']}: {documents}")
        own = " (trained on the data)" if data["tokenizer_trained"] else ""
        yield row("tokenizer", f"{data['tokenizer']}, {data['vocab_size']} ids{own}")
        if data["unigram_perplexity"] is not None:
            yield row(
                "unigrams", f"perplexity {number_text(data['unigram_perplexity'])} on the validation documents from frequencies alone"
            )
    if len(section["runs"]) > 1:
        yield from _table(section["runs"])
    for run in section["runs"]:
        yield line()
        yield from _run(run)


def _run(run: Mapping[str, Any]) -> Iterator[Line]:
    yield line((run["subject"], "bold"), f"  {count_text(run['parameters'])} parameters")
    for text in run["said"]:
        yield row("", text)
    if run["stopped"]:
        yield row("stopped", f"{run['stopped']} after {len(run['steps'])} steps")
    for text in plot([step["loss"] for step in run["steps"]]):
        yield line(text, head="  ", indent=2)
    for name, found in run["evaluated"].items():
        if found is not None and found["perplexity"] is not None:
            bits = f", {found['bits_per_byte']:.3f} bits per byte" if found["bits_per_byte"] is not None else ""
            part, _, when = name.partition("_")
            yield row(
                part[:10],
                f"perplexity {found['perplexity']:,.1f} {when} training{bits}, {found['tokens']:,} tokens of {plural(found['documents'], 'document')}",
            )
    speed = [f"{run['tokens_per_second']:,.0f} tokens/s" if run["tokens_per_second"] else ""]
    speed += [f"{run['flop_utilisation']:.1%} of the arithmetic that a matrix product reaches here" if run["flop_utilisation"] else ""]
    speed += [f"peak memory {bytes_text(run['peak_bytes'])}" if run["peak_bytes"] else "", seconds_text(run["seconds"])]
    yield row("speed", ", ".join(filter(None, speed)))
    for name in ("before", "after"):
        sample = run["samples"][name]
        if sample is not None:
            yield line(
                (" ".join(sample["prompt"].split()), "dim"),
                " ... ",
                " ".join(sample["text"].split()),
                head=(f"  {name}", "dim"),
                indent=LABEL,
            )
    if run["checkpoint"]:
        yield row("checkpoint", "loads with AutoModelForCausalLM.from_pretrained")


COLUMNS = ("parameters", "train loss", "val ppl", "test ppl", "bits/byte", "memory", "tokens/s", "time")


def _table(runs: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    yield line()
    width = max(len(run["subject"].rpartition(":")[2]) for run in runs) + 2
    yield line((" " * width + "".join(f"{name:>12s}" for name in COLUMNS), "bold"))
    for run in runs:
        yield line(f"{run['subject'].rpartition(':')[2]:{width}s}" + "".join(f"{cell:>12s}" for cell in table_cells(run)))


def table_cells(run: Mapping[str, Any]) -> list[str]:
    """A run's row of the comparison; a dash where it has no such number."""
    after, test = run["evaluated"]["validation_after"], run["evaluated"]["test_after"]
    losses = [step["loss"] for step in run["steps"][-10:] if step["loss"] is not None]

    def perplexity(found: Mapping[str, Any] | None) -> str:
        return f"{found['perplexity']:,.1f}" if found and found["perplexity"] is not None else "-"

    return [
        f"{run['parameters']:,}",
        f"{sum(losses) / len(losses):.3f}" if losses else "-",
        perplexity(after),
        perplexity(test),
        f"{after['bits_per_byte']:.3f}" if after and after["bits_per_byte"] is not None else "-",
        bytes_text(run["peak_bytes"]) if run["peak_bytes"] else "-",
        f"{run['tokens_per_second']:,.0f}" if run["tokens_per_second"] else "-",
        seconds_text(run["seconds"]),
    ]
