"""Our loop beside transformers' Trainer: `python -m tests.benchmarks.training [--batch-size 8] [--seq-len 2048] [--steps 3]`.

The same transformers OLMo (the sizes of olmo1-4M, the same weights), the same batches, AdamW, float32 on a CPU and float16 on
CUDA. Each side runs in a process of its own, so that its peak memory is its own; the first step is left out of the times. On a
CPU that others use too, tokens per second of CPU time say more than tokens per second of the clock.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoConfig, OlmoForCausalLM

from olmodebug.first_run import from_model
from olmodebug.presets import preset
from olmodebug.training.checkpoint import hugging_face_config
from olmodebug.training.head import find_head
from olmodebug.training.loop import LossOf
from olmodebug.training.optimizer import make_optimizers
from olmodebug.training.recipe import SHORT

RATE = 1e-3

Times = tuple[float, float]  # seconds of the clock and of the process's CPU


def now() -> Times:
    return time.perf_counter(), time.process_time()


def since(begun: Times) -> Times:
    clock, cpu = now()
    return clock - begun[0], cpu - begun[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training", description=__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--side", choices=("ours", "trainer"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps({"ours": ours, "trainer": trainer}[arguments.side](arguments)))
        return 0
    found: dict[str, dict[str, Any]] = {}
    for side in ("trainer", "ours"):
        sizes = [f"--{name}={getattr(arguments, name.replace('-', '_'))}" for name in ("batch-size", "seq-len", "steps")]
        command = [sys.executable, "-m", "tests.benchmarks.training", "--side", side, *sizes]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            found[side] = {"failed": f"exit {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"}
        else:
            found[side] = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"batch {arguments.batch_size} x {arguments.seq_len}, {arguments.steps} steps, torch {torch.__version__}, {found['ours'].get('device')}"
    )
    print(f"{'':22s}{'tokens/s':>10s}{'per CPU s':>10s}{'peak MiB':>10s}{'first loss':>12s}{'last loss':>12s}")
    for side, name in (("trainer", "transformers Trainer"), ("ours", "olmodebug")):
        value = found[side]
        if "failed" in value:
            print(f"{name:22s}{value['failed']}")
            continue
        first, last = value["losses"][0], value["losses"][-1]
        speed = f"{value['tokens_per_second']:10,.0f}{value['tokens_per_cpu_second']:10,.0f}"
        print(f"{name:22s}{speed}{value['peak_bytes'] / 2**20:10,.0f}{first:12.4f}{last:12.4f}")
    if all("failed" not in value for value in found.values()):
        faster, cheaper = (found["ours"][name] / found["trainer"][name] for name in ("tokens_per_second", "tokens_per_cpu_second"))
        smaller = found["trainer"]["peak_bytes"] / found["ours"]["peak_bytes"]
        print(f"{faster:.2f} times the tokens/s, {cheaper:.2f} times per CPU second, 1/{smaller:.1f} of the peak memory")
    return 0


def model() -> OlmoForCausalLM:
    torch.manual_seed(0)
    values = hugging_face_config(preset("olmo1-4M"))
    return OlmoForCausalLM(
        OlmoConfig(**{name: value for name, value in values.items() if name not in ("architectures", "model_type", "dtype")})
    )


def batches(arguments: argparse.Namespace) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(2, 50277, (arguments.steps, arguments.batch_size, arguments.seq_len), generator=draw)


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import replace

    cuda = torch.cuda.is_available()
    subject = from_model(model().to("cuda" if cuda else "cpu"))
    head = find_head(subject)
    subject.model.train()
    recipe = replace(SHORT, learning_rate=RATE, embedding_rate=RATE, norm_rate=RATE)
    optimizers = make_optimizers(subject.model, recipe, head=head.module if head else None)
    scaler = torch.amp.GradScaler("cuda" if cuda else "cpu", enabled=cuda)
    losses: list[float] = []
    times: list[Times] = []
    for batch in batches(arguments):
        begun = now()
        loss = LossOf(subject, head, "float16" if cuda else "float32")(batch.to(subject.device))
        scaler.scale(loss).backward()
        for optimizer in optimizers.each:
            scaler.unscale_(optimizer)
        optimizers.set_rates(1.0)
        norm = torch.nn.utils.clip_grad_norm_(subject.model.parameters(), 1.0)
        if bool(torch.isfinite(norm)):
            for optimizer in optimizers.each:
                optimizer.step()
        scaler.update()
        optimizers.zero_grad()
        losses.append(float(loss.detach()))
        times.append(since(begun))
    return result(arguments, losses, times)


def trainer(arguments: argparse.Namespace) -> dict[str, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    rows = batches(arguments).flatten(0, 1)
    times: list[Times] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        begun: Times = (0.0, 0.0)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(since(self.begun))

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:  # the batches as `ours` sees them; a new name shuffles
            return torch.utils.data.SequentialSampler(rows)

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=str(Path(folder) / "out"),
            per_device_train_batch_size=arguments.batch_size,
            max_steps=arguments.steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            max_grad_norm=1.0,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            fp16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        InOrder(model=model(), args=settings, train_dataset=data, callbacks=[Clock()]).train()
    return result(arguments, losses, times)


def result(arguments: argparse.Namespace, losses: list[float], times: list[Times]) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    used = times[1:] or times
    clock, cpu = (sum(column) for column in zip(*used, strict=True))
    tokens = arguments.batch_size * arguments.seq_len * len(used)
    return {
        "tokens_per_second": tokens / clock,
        "tokens_per_cpu_second": tokens / cpu,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": losses,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


if __name__ == "__main__":
    raise SystemExit(main())
