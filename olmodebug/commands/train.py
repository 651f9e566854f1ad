"""`olmodebug train`: a short run that proves a model end to end: loss, perplexity, a sample, a checkpoint that loads."""

import argparse
import contextlib
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .shared import Commands, add_command, add_output, add_subject, check_output, deliver, positive, say, seconds

if TYPE_CHECKING:
    from ..training.recipe import Recipe
    from ..training.trainer import RankOf, TrainOrder

DTYPES = ("float32", "bfloat16", "float16")
STRATEGIES = ("ddp", "fsdp")


def declare(commands: Commands) -> None:
    """The arguments of `train`."""
    one = add_command(commands, train)
    add_subject(one)
    one.add_argument(
        "--data", nargs="+", default=[], metavar="FILE", help="JSON lines, Parquet, text, folders, globs (default: text of this Python)"
    )
    one.add_argument("--text-field", default="text", metavar="NAME", help="the field or column with the text (default text)")
    one.add_argument(
        "--tokenizer", metavar="FILE|NAME", help="tokenizer.json, a folder, or a hub name (default: a BPE trained on the data)"
    )
    one.add_argument("--eos-id", type=int, metavar="ID", help="the token that ends a document, where the tokenizer's names do not tell")
    one.add_argument(
        "--protocol", default="default", choices=("default", "first-512"), help="which documents are held out, and how much of each"
    )
    one.add_argument(
        "--recipe", default="olmodebug", metavar="NAME", help="olmodebug (the default), short, datadecide-4M ... datadecide-1B"
    )
    one.add_argument("--steps", type=positive, metavar="N", help="steps (default: the recipe's)")
    one.add_argument("--batch-size", type=positive, metavar="N", help="windows a step (default: the recipe's)")
    one.add_argument("--seq-len", type=positive, metavar="N", help="tokens a window (default: the recipe's)")
    one.add_argument("--learning-rate", type=float, metavar="RATE", help="all rates, scaled so that the matrices' is this")
    one.add_argument("--dtype", choices=DTYPES, help="default: float16 on CUDA, on a CPU bfloat16 where it is not slower than float32")
    one.add_argument("--tf32", action="store_true", help="let float32 products on CUDA use TF32")
    one.add_argument("--device", default="cpu", help="where the model runs (default cpu)")
    one.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the data (default 0)")
    one.add_argument("--compare", action="store_true", help="train olmo1-4M, GPT-NeoX and GPT-NeoX with SwiGLU, and lay them side by side")
    one.add_argument("--ranks", type=positive, metavar="N", help="train on N processes; torchrun's own are used as they are")
    one.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="how the model is spread over the processes (default ddp)")
    one.add_argument("--output", metavar="DIR", help="where results.json, the checkpoint and the state go (default: the run's record)")
    one.add_argument("--resume", metavar="DIR", help="go on with an interrupted run, from the DIR of its state")
    one.add_argument("--save-every", type=positive, default=50, metavar="N", help="steps between saved states (default 50)")
    one.add_argument(
        "--adapter", metavar="FILE.py:NAME", help="a function (model, input_ids, ...) -> logits, where the call cannot be guessed"
    )
    one.add_argument("--timeout", type=seconds, default=300.0, metavar="SECONDS", help="the longest that a step may take (default 300)")
    add_output(one)


def train(arguments: argparse.Namespace) -> int:
    """Train for a hundred steps: an honest perplexity, a falling loss, a sample, a checkpoint that loads."""
    from ..render.training import Live
    from ..store import new_run
    from ..supervise import InternalFault
    from ..training.trainer import run_training

    check_output(arguments)
    world = _world(arguments)
    if world.rank:
        return _follow(arguments, world)
    run = new_run(Path.cwd())
    if run.problem:
        say(f"olmodebug: {run.problem}")
    if arguments.compare and arguments.resume:
        raise UsageError("--resume goes on with one run, and --compare makes three; give the subject and the DIR of the one")
    home = _home(arguments, run.folder)
    order = _order(arguments, world, cache=str(run.folder.parents[1] / "tokenizers") if run.folder else None)
    specs = [str(job["spec"]) for job in order.jobs]
    folders = [home / spec.rpartition(":")[2] for spec in specs] if arguments.compare else [home]
    stop = home / "stop"
    stop.unlink(missing_ok=True)
    with Live(order.recipe, say) as live, _stopping(stop):
        try:
            report = run_training(order, run, folders, live, stop=stop)
        except InternalFault as fault:
            raise RuntimeError(f"the training process failed:\n{fault}") from None
    stopped = stop.exists()
    stop.unlink(missing_ok=True)
    report = run.save(report, {"command": order.command})
    if arguments.output:
        report.write(home / "results.json")
    code = deliver(arguments, report)
    if stopped:
        place = f"{home}, in the folder of the subject, and with that subject instead of --compare" if arguments.compare else str(home)
        say(f"olmodebug: stopped; go on with the same command and --resume {place}")
        return 130
    return code


def _follow(arguments: argparse.Namespace, world: "RankOf") -> int:
    """A rank of torchrun other than the first: it trains its share, and the first one reports."""
    import tempfile

    from ..store import Run
    from ..training.trainer import run_training

    with tempfile.TemporaryDirectory(prefix="olmodebug-") as scratch:
        home = Path(arguments.resume).resolve() if arguments.resume else Path(scratch)
        order = _order(arguments, world, cache=None)
        folders = [home / str(job["spec"]).rpartition(":")[2] for job in order.jobs] if arguments.compare else [home]
        report = run_training(order, Run(id="", folder=None), folders, lambda _: None, stop=home / "stop")
    for finding in report.findings:
        if finding.severity == "error":
            say(f"olmodebug: {finding.message}")
    return 1 if any(finding.severity == "error" for finding in report.findings) else 0


def _order(arguments: argparse.Namespace, world: "RankOf", *, cache: str | None) -> "TrainOrder":
    from ..training.trainer import TrainOrder

    specs = _compared() if arguments.compare else (arguments.subject,)
    return TrainOrder(
        jobs=tuple(_job(arguments, spec) for spec in specs),
        recipe=_recipe(arguments).to_dict(),
        data=tuple(arguments.data),
        text_field=arguments.text_field,
        tokenizer=arguments.tokenizer,
        eos_id=arguments.eos_id,
        protocol=arguments.protocol,
        dtype=arguments.dtype,
        tf32=arguments.tf32,
        resume=arguments.resume is not None,
        save_every=arguments.save_every,
        cache=cache,
        timeout_seconds=arguments.timeout,
        command=shlex.join(["olmodebug", *arguments.argv]),
        world=world,
    )


def _world(arguments: argparse.Namespace) -> "RankOf":
    """The ranks that were asked for, or those that torchrun has started, of which this process is one."""
    from ..training.trainer import RankOf

    started, rank = os.environ.get("WORLD_SIZE"), os.environ.get("RANK")
    if started is not None and rank is not None and started.isdigit() and rank.isdigit() and "MASTER_ADDR" in os.environ:
        if arguments.ranks is not None:
            raise UsageError("--ranks starts processes of its own, and torchrun has started some already; give one of the two")
        return RankOf(size=int(started), strategy=arguments.strategy, rank=int(rank) if int(started) > 1 else None)
    return RankOf(size=arguments.ranks or 1, strategy=arguments.strategy)


def _job(arguments: argparse.Namespace, spec: str) -> dict[str, Any]:
    from ..spec_text import parse_config

    return {
        "spec": spec,
        "config": parse_config(arguments.config),
        "seed": arguments.seed,
        "adapter": arguments.adapter,
        "device": arguments.device,
        "whole": True,
    }


def _compared() -> tuple[str, ...]:
    return ("olmo1-4M", "olmodebug.training.architectures:gpt_neox", "olmodebug.training.architectures:hybrid")


def _recipe(arguments: argparse.Namespace) -> "Recipe":
    """The recipe with what the command line changes of it; the warmup keeps its share of the steps."""
    from dataclasses import replace

    from ..training.recipe import recipe

    chosen = recipe(arguments.recipe)
    if arguments.steps:
        warmup = max(1, round(chosen.warmup_steps * arguments.steps / chosen.steps)) if chosen.warmup_steps else 0
        chosen = replace(chosen, steps=arguments.steps, warmup_steps=min(warmup, arguments.steps))
    if arguments.batch_size:
        chosen = replace(chosen, batch_size=arguments.batch_size)
    if arguments.seq_len:
        if arguments.seq_len < 2:
            raise UsageError("--seq-len: a window of 1 token predicts nothing; give at least 2")
        chosen = replace(chosen, seq_len=arguments.seq_len)
    if arguments.learning_rate is not None:
        if not arguments.learning_rate > 0:
            raise UsageError(f"--learning-rate {arguments.learning_rate}: expected a number above 0")
        factor = arguments.learning_rate / chosen.learning_rate
        rates = {name: getattr(chosen, name) * factor for name in ("embedding_rate", "norm_rate")}
        chosen = replace(chosen, learning_rate=arguments.learning_rate, **rates)
    return chosen


def _home(arguments: argparse.Namespace, record: Path | None) -> Path:
    """The folder of what the run leaves; UsageError where it cannot be made or resumed from."""
    if arguments.resume:
        old = Path(arguments.resume)
        if not (old / "resume.pt").is_file():
            raise UsageError(f"--resume {old}: there is no resume.pt in it")
        return old.resolve()
    home = Path(arguments.output) if arguments.output else (record / "training" if record else None)
    if home is None:
        raise UsageError("the run cannot be recorded here; give a folder with --output")
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {home}: cannot be made ({error.strerror})") from None
    return home.resolve()


@contextlib.contextmanager
def _stopping(stop: Path) -> Iterator[None]:
    """Ctrl-C asks the run to end after its step and leave its state; a second one ends it at once."""

    def ask(_: int, __: FrameType | None) -> None:
        if stop.exists():
            raise KeyboardInterrupt
        stop.touch()
        say("\nolmodebug: stopping after this step, with a state to resume from; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
