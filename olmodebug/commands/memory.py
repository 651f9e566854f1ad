"""`olmodebug memory`: will it fit, what is at the peak, what would make it smaller."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .shared import (
    DEFAULT_SUBJECT,
    SUBJECT_HELP,
    Commands,
    Progress,
    add_command,
    add_output,
    check_output,
    deliver,
    positive,
    say,
    seconds,
)

if TYPE_CHECKING:
    from ..footprint.run import MemoryOrder
    from ..report import Report

SNAPSHOTS = (".pickle", ".pkl")
PRECISIONS = {"float32": "fp32", "float16": "fp16-amp", "bfloat16": "bf16-amp"}
PURE = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def declare(commands: Commands) -> None:
    """The arguments of `memory`."""
    one = add_command(commands, memory)
    one.add_argument(
        "subject", nargs="*", default=[DEFAULT_SUBJECT], metavar="SUBJECT",
        help=f"{SUBJECT_HELP}; or a snapshot.pickle of torch.cuda.memory; or two of these to compare (reports by file or run id, snapshots)",
    )  # fmt: skip
    one.add_argument("--config", action="append", default=[], metavar="KEY=VALUE|FILE", help="what a class that needs a config gets")
    step = one.add_argument_group("the step")
    step.add_argument("--batch-size", type=positive, default=8, metavar="N", help="sequences of a micro-batch (default 8)")
    step.add_argument("--seq-len", type=positive, metavar="N", help="tokens of a sequence (default 2048, or what the model declares)")
    step.add_argument(
        "--dtype", choices=tuple(PRECISIONS), default="float16",
        help="what is computed in: float16 (autocast, GradScaler; the default), bfloat16 (autocast), float32",
    )  # fmt: skip
    step.add_argument("--pure", action="store_true", help="weights, gradients and optimizer state in --dtype too, without autocast")
    step.add_argument(
        "--optimizer", choices=("adamw", "adamw-fused", "adamw-for-loop", "sgd", "sgd-momentum"), default="adamw",
        help="adamw is torch's default on CUDA, foreach",
    )  # fmt: skip
    step.add_argument("--checkpointing", action="store_true", help="each block is recomputed in the backward pass")
    step.add_argument("--loss", choices=("model", "chunked"), default="model", help="chunked: head and cross-entropy over chunks of tokens")
    step.add_argument("--accumulation", type=positive, default=1, metavar="N", help="micro-batches of a step (default 1)")
    step.add_argument(
        "--keep-outputs",
        action="store_true",
        help="the outputs live through the backward pass, as in out = model(...); out.loss.backward()",
    )
    step.add_argument("--inference", action="store_true", help="no training: a prompt of --seq-len, then --new-tokens from the cache")
    step.add_argument("--new-tokens", type=positive, default=2, metavar="N", help="tokens decoded after the prompt (default 2)")
    card = one.add_argument_group("the card")
    card.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what the prediction is for (default cuda; needs none)")
    card.add_argument("--gpu", metavar="NAME", help="T4, V100, A10, A100, A100-40GB, L4, L40S, RTX4090, H100, H200, B200 ...")
    card.add_argument("--budget", metavar="SIZE", help="the memory of the card, such as 8GiB; exit 1 when it does not fit")
    card.add_argument(
        "--expandable-segments", action="store_true", help="as PYTORCH_ALLOC_CONF=expandable_segments:True, which is read too"
    )
    work = one.add_argument_group("the work")
    work.add_argument("--predict-only", action="store_true", help="no run on real tensors after the prediction")
    work.add_argument("--confirm-batch-size", type=positive, metavar="N", help="sequences of the run on the CPU (default 2)")
    work.add_argument("--confirm-seq-len", type=positive, metavar="N", help="tokens of a sequence of the run on the CPU (default 64)")
    work.add_argument("--no-what-ifs", action="store_true", help="the prediction alone, without changes and largest sizes")
    work.add_argument("--chrome-trace", metavar="FILE", help="also write the timeline for chrome://tracing and Perfetto")
    work.add_argument("--seed", type=int, default=0, help="seed of weights and data (default 0)")
    work.add_argument("--timeout", type=seconds, default=300.0, metavar="SECONDS", help="the longest any one step may take (default 300)")
    work.add_argument("--download", action="store_true", help="let hf:org/name use the network")
    add_output(one)


def memory(arguments: argparse.Namespace) -> int:
    """Predict the memory of a training step, module by module, without a GPU: will it fit, and what would make it smaller.

    A short training then shows that the prediction is true. Exit 1 when it does not fit.
    """
    from .shared import must_be_writable

    check_output(arguments)
    must_be_writable(arguments.chrome_trace, option="--chrome-trace")
    return deliver(arguments, _report(arguments))


def _report(arguments: argparse.Namespace) -> "Report":
    if len(arguments.subject) > 2:
        raise UsageError(f"memory: expected a subject, a snapshot, or two reports to compare; observed {len(arguments.subject)} arguments")
    if len(arguments.subject) == 2:
        return _compared(arguments)
    if Path(arguments.subject[0]).suffix in SNAPSHOTS:
        return _snapshot(arguments)
    if Path(arguments.subject[0]).suffix == ".json":
        raise UsageError(f"{arguments.subject[0]} is one report: give two to compare; olmodebug report {arguments.subject[0]} draws it")
    return _predicted(arguments)


def _compared(arguments: argparse.Namespace) -> "Report":
    from ..footprint.section import compare, section

    left, right = (_side(name) for name in arguments.subject)
    both = compare(left, right, arguments.subject)
    notes = []
    if "snapshot" in (left["kind"], right["kind"]):
        notes = ["of a snapshot, tensors are those of its recorded peak, reserved is what it had at its end"]
    if both["by"] is None:
        notes.append("a prediction is divided by category, a snapshot by place: only their figures stand side by side")
    return _read(arguments, "memory.compared", section(kind="comparison", comparison=both, notes=notes))


def _side(name: str) -> "dict[str, Any]":
    """One side of a comparison: the section of a stored report, or of a snapshot."""
    if Path(name).suffix in SNAPSHOTS:
        from ..footprint.snapshot import snapshot_section

        return snapshot_section(Path(name))
    from ..store import load_report

    found = load_report(Path.cwd(), name).sections.get("memory")
    if found is None or not (found["categories"] or found["snapshot"]):
        raise UsageError(f"{name} holds no memory prediction and no snapshot to compare")
    return found


def _snapshot(arguments: argparse.Namespace) -> "Report":
    from ..footprint.snapshot import snapshot_section

    return _read(arguments, "memory.snapshot-read", snapshot_section(Path(arguments.subject[0])))


def _read(arguments: argparse.Namespace, probe: str, body: "dict[str, Any]") -> "Report":
    """The report on what was read and not run."""
    import shlex
    import time
    from datetime import UTC, datetime

    from ..environment import environment
    from ..report import Outcome, Report, SubjectInfo
    from ..store import new_run

    started = time.perf_counter()
    run = new_run(Path.cwd())
    command = shlex.join(["olmodebug", *arguments.argv])
    report = Report(
        subject=SubjectInfo(spec=" ".join(arguments.subject)),
        environment=environment(seed=0, command=command),
        outcomes=(Outcome(probe=probe, status="passed"),),
        sections={"memory": body},
        seconds=round(time.perf_counter() - started, 3),
        created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        id=run.id,
    )
    return run.save(report, {"command": command})


def _predicted(arguments: argparse.Namespace) -> "Report":
    from ..footprint.run import MemoryFault, run_memory
    from ..store import new_run

    order = _order(arguments)
    run = new_run(Path.cwd())
    if run.problem:
        say(f"olmodebug: {run.problem}")
    progress = Progress(noun="parts")
    try:
        report = run_memory(order, run, progress)
    except MemoryFault as fault:
        progress.clear()
        raise RuntimeError(f"the memory process failed:\n{fault}") from None
    progress.clear()
    return run.save(report, {name: getattr(order, name) for name in type(order).__dataclass_fields__})


def _order(arguments: argparse.Namespace) -> "MemoryOrder":
    import shlex

    from ..footprint.allocator import VARIABLES, settings_from
    from ..footprint.gpus import DEFAULT_GPU, bytes_from, gpu_named
    from ..footprint.run import MemoryOrder
    from ..spec_text import parse_config

    cuda = arguments.device == "cuda"
    if not cuda and (arguments.gpu or arguments.expandable_segments):
        raise UsageError("--gpu and --expandable-segments are for --device cuda")
    gpu = gpu_named(arguments.gpu or DEFAULT_GPU) if cuda else None
    budget = bytes_from(arguments.budget) if arguments.budget else gpu.total_bytes if gpu and arguments.gpu else None
    allocator = next((os.environ[name] for name in VARIABLES if os.environ.get(name)), "")
    if arguments.expandable_segments:
        allocator = ",".join(filter(None, [allocator, "expandable_segments:True"]))
    settings_from(allocator)  # a UsageError now and not in the child
    return MemoryOrder(
        job={
            "spec": arguments.subject[0],
            "config": parse_config(arguments.config),
            "seed": arguments.seed,
            "download": arguments.download,
        },
        plan={
            "batch_size": arguments.batch_size,
            "seq_len": arguments.seq_len or 0,
            "precision": (PURE if arguments.pure or arguments.inference else PRECISIONS)[arguments.dtype],
            "optimizer": arguments.optimizer,
            "loss": arguments.loss,
            "checkpointing": arguments.checkpointing,
            "accumulation": arguments.accumulation,
            "keep_outputs": arguments.keep_outputs,
            "inference": arguments.inference,
            "new_tokens": arguments.new_tokens if arguments.inference else 0,
        },
        gpu=gpu.name if gpu else None,
        budget_bytes=budget,
        allocator=allocator,
        device=arguments.device,
        confirm=None
        if arguments.predict_only
        else {"batch_size": arguments.confirm_batch_size, "seq_len": arguments.confirm_seq_len, "limited": bool(arguments.budget)},
        what_ifs=not arguments.no_what_ifs,
        timeout_seconds=arguments.timeout,
        command=shlex.join(["olmodebug", *arguments.argv]),
    )
