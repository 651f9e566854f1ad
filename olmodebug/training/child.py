"""`python -m olmodebug.training.child`: build one subject, train it, measure it, in a process that may die of it.

The order comes as JSON on standard input, and every step and result goes to the journal before the next begins.
"""

import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..serve import Tell, serve

SAMPLE_TOKENS, PROMPT_TOKENS = 48, 16
SAMPLE_TEMPERATURE = 0.8


def run(order: dict[str, Any], tell: Tell) -> None:
    """Train one subject as ordered."""
    from ..errors import OlmodebugError
    from ..load import SubjectCodeError
    from ..report import plain

    if order["world"]["size"] > 1:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // order["world"]["size"]))
    try:
        _run(order, tell)
    except OlmodebugError as error:
        tell("unusable", text=str(error))
    except SubjectCodeError as error:
        tell("failed", finding=plain(_raising(error, error.stage)), stopped="raised")


@contextmanager
def _of_the_subject(subject: Any, what: str) -> Iterator[None]:
    """What the subject's own code raises inside is SubjectCodeError; anything else is a fault of ours and goes on."""
    from ..errors import OlmodebugError
    from ..load import SubjectCodeError

    try:
        yield
    except OlmodebugError:
        raise
    except Exception as error:
        if subject.sources.spot_of(error) is None:
            raise
        raise SubjectCodeError(what, subject=subject) from error


def _raising(error: Any, what: str) -> Any:
    """The finding on what the subject's code raised."""
    from ..explain import explain

    finding = explain(error).finding()
    message = finding.message if finding.message.startswith(what) else f"{what} raises: {finding.message}"
    return finding.told(probe="train.runs", message=message)


def _run(order: dict[str, Any], tell: Tell) -> None:
    import torch

    from ..environment import environment
    from ..examine import build
    from ..report import plain
    from ..spec import Job
    from .dataset import PROTOCOLS, Protocol, open_dataset
    from .head import find_head
    from .optimizer import zero_residual_outputs
    from .precision import default_dtype
    from .recipe import Recipe

    recipe = Recipe(**{**order["recipe"], "betas": tuple(order["recipe"]["betas"])})
    protocol: Protocol = PROTOCOLS[order["protocol"]]
    job = Job(**order["job"])
    tell("environment", value=plain(environment(seed=job.seed, command=order["command"], device=job.device)))
    tell("start", step="reading the data")
    job, vocab_size = _sized(job, order)
    dataset = open_dataset(
        order["data"],
        text_field=order["text_field"],
        tokenizer=order["tokenizer"],
        eos_id=order["eos_id"],
        vocab_size=vocab_size,
        protocol=protocol,
        cache=Path(order["cache"]) if order["cache"] else None,
    )
    tell("data", value=_data_section(dataset))
    tell("start", step="build.constructs")
    building = build(job)
    for result in building.results:
        tell("result", outcome=plain(result.outcome), findings=[plain(finding) for finding in result.findings])
    subject = building.subject
    if subject is None:
        return
    tell("subject", value=plain(subject.info()))
    _must_fit(subject, dataset)
    if recipe.zero_residual and _is_ours(job.spec):
        zero_residual_outputs(subject.model)
    if order["tf32"]:
        torch.backends.cuda.matmul.allow_tf32 = True
    dtype, why = (order["dtype"], f"dtype {order['dtype']}, as asked") if order["dtype"] else default_dtype(subject.device)
    tell("said", text=why)
    _train(order, tell, subject, dataset, recipe, dtype, find_head(subject), time.perf_counter())


def _sized(job: Any, order: dict[str, Any]) -> tuple[Any, int]:
    """The job, with a preset's vocabulary set to that of a tokenizer trained here; and how large that tokenizer is to be."""
    from dataclasses import replace

    from ..presets import PRESETS
    from .tokenization import TRAINED_VOCABULARY

    config = dict(job.config)
    if _is_ours(job.spec) and order["recipe"]["initializer_range"] is not None:
        config = {"initializer_range": order["recipe"]["initializer_range"], **config}
        job = replace(job, config=config)
    if order["tokenizer"]:
        return job, TRAINED_VOCABULARY
    given = job.config.get("vocab_size")
    size = given if isinstance(given, int) else TRAINED_VOCABULARY
    if job.spec in PRESETS:
        config = {"vocab_size": size, "pad_token_id": None, "eos_token_id": 0, **config}
        return replace(job, config=config), size
    if job.spec.startswith(("transformers:", "olmodebug.training.architectures:")):
        return replace(job, config={"vocab_size": size, **config}), size
    from ..load import SubjectCodeError
    from ..spec import resolve

    for meta in (True, False):  # some read values as they are built or first run, which the meta device has not
        try:
            return job, min(resolve(replace(job, meta=meta)).vocab_size, TRAINED_VOCABULARY)
        except SubjectCodeError:
            continue
    return job, TRAINED_VOCABULARY  # building it for the run makes the finding


def _is_ours(spec: str) -> bool:
    """Whether a recipe may choose how the weights begin: somebody's own model keeps what it drew."""
    from ..presets import PRESETS

    return spec in PRESETS or spec.startswith("olmodebug.training.architectures:")


def _must_fit(subject: Any, dataset: Any) -> None:
    """UsageError where the tokenizer gives ids that the model has no row for."""
    from ..errors import UsageError

    rows = subject.vocab_size
    if dataset.encoder.rows > rows:
        raise UsageError(
            f"{subject.spec} has {rows} token ids and the tokenizer {dataset.encoder.name} needs {dataset.encoder.rows}: "
            f"give --config vocab_size={dataset.encoder.rows}, or another tokenizer"
        )


def _train(order: dict[str, Any], tell: Tell, subject: Any, dataset: Any, recipe: Any, dtype: str, head: Any, started: float) -> None:
    from ..report import plain
    from ..spec import Job, resolve
    from .checkpoint import STATE
    from .diagnose_step import diagnose
    from .head import find_head
    from .loop import Options, StepFailed, train
    from .world import gathered, join_world, leave_world

    folder, stop = Path(order["folder"]), Path(order["stop"])
    longest = subject.max_positions
    if longest is not None and recipe.seq_len > longest:
        from ..errors import UsageError

        raise UsageError(f"{subject.spec} knows {longest} positions; --seq-len {recipe.seq_len} is longer")
    leads = order["world"]["rank"] == 0

    def evaluate(part: str, when: str) -> None:
        tell("start", step=f"{part} perplexity {when}")
        with _of_the_subject(subject, f"{part} perplexity {when} training"):
            tell("evaluated", part=part, when=when, value=_evaluated(subject, dataset, part, head, recipe.seq_len))

    def sample(when: str) -> None:
        with _of_the_subject(subject, f"writing a sample {when} training"):
            tell("sample", when=when, value=_sample(subject, dataset))

    if leads:
        evaluate("validation", "before")
        sample("before")
    tell("start", step="meeting the other ranks" if order["world"]["size"] > 1 else "train.runs")
    world = join_world({**order, "dtype": dtype})
    options = Options(
        world=world,
        dtype=dtype,
        seed=int(order["job"]["seed"]),
        folder=folder,
        save_every=order["save_every"],
        resume=order["resume"],
        should_stop=stop.exists,
    )
    tell("start", step="train.runs")
    try:
        ending = train(subject, dataset, recipe, options, tell)
    except StepFailed as failed:
        _step_failed(tell, failed, subject, ranks=world.size)
        return
    ended = _ended(ending, subject, head, recipe, dtype)
    if world.size == 1:
        ended["of_own_loss"] = sorted(subject.reached_by_own_loss(subject.first_case(), ended["untouched"]))
    tell("ended", value=ended)
    if world.size > 1:
        weights = gathered(subject.model.state_dict())
        leave_world(world)
        if not world.leads:
            return
        subject = resolve(_sized(Job(**order["job"]), order)[0])  # a whole model again, whatever the ranks made of this one
        subject.model.load_state_dict(weights)
        head = find_head(subject)
    if ending.stopped in ("nan", "overflow"):
        tell("start", step="train.finite")
        if (state := folder / STATE).is_file():
            tell("said", text=f"the last state with finite weights is kept in {state}")
        assert ending.batch is not None
        diagnosis = diagnose(subject, ending.batch, ending.steps, dtype, reason=ending.stopped)
        tell("failed", finding=plain(diagnosis), stopped=ending.stopped)
        return
    if ending.stopped == "interrupted":
        return
    for part in ("validation", "test"):
        evaluate(part, "after")
    sample("after")
    tell("start", step="train.checkpoint")
    _checkpoint(tell, subject, dataset, folder / "checkpoint")


def _step_failed(tell: Tell, failed: Any, subject: Any, *, ranks: int) -> None:
    """Tell why a step was not taken: another rank is lost, the memory does not suffice, or what the subject raised."""
    from ..group import lost_a_peer
    from ..load import SubjectCodeError
    from ..report import plain
    from .head import as_case

    cause = failed.__cause__
    assert cause is not None
    if ranks > 1 and lost_a_peer(cause):
        tell("raised", text=f"lost another rank in step {failed.step + 1}: {_first_line(cause).partition('. ')[0]}", lost_a_peer=True)
        return
    if _out_of_memory(cause):
        tell("failed", finding=plain(_memory_finding(failed, cause, subject)), stopped="out of memory")
    else:
        error = SubjectCodeError("training step", subject=subject, case=as_case(failed.batch[:2]))
        error.__cause__ = cause
        tell("failed", finding=plain(_raising(error, f"step {failed.step + 1}")), stopped="raised")
    _raised(tell, failed, cause)


def _raised(tell: Tell, failed: Any, cause: BaseException) -> None:
    """For the other ranks: this one has ended the run, by something of its own."""
    tell("raised", text=f"step {failed.step + 1} raises {_first_line(cause)}", lost_a_peer=False)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _ended(ending: Any, subject: Any, head: Any, recipe: Any, dtype: str) -> dict[str, Any]:
    import torch

    from .precision import reachable_flops

    used = ending.watch.steps[1:] or ending.watch.steps  # the first one loads kernels
    seconds = sum(step["seconds"] for step in used)
    rate = sum(step["tokens"] for step in used) / seconds if seconds else None
    per_token = _flops_per_token(subject, head, recipe.seq_len)
    reachable = reachable_flops(getattr(torch, dtype), subject.device)
    peak = torch.cuda.max_memory_allocated() if subject.device.type == "cuda" else _resident_peak()
    return {
        "stopped": ending.stopped,
        "steps": ending.watch.steps,
        "spikes": ending.watch.spikes,
        "skipped": ending.watch.skipped,
        "untouched": sorted(ending.watch.untouched),
        "seconds": ending.seconds,
        "tokens_per_second": rate,
        "flop_utilisation": rate * per_token / reachable if rate else None,
        "peak_bytes": peak,
        "chunked_loss": head is not None,
    }


def _flops_per_token(subject: Any, head: Any, seq_len: int) -> float:
    """Six for each weight of a matrix product, and the two products of attention over half the window on average."""
    from torch import nn

    tables = {id(m.weight) for m in subject.model.modules() if isinstance(m, nn.Embedding)}
    if head is not None:
        tables.discard(id(head.module.weight))
    weights = sum(p.numel() for p in subject.model.parameters() if p.ndim == 2 and id(p) not in tables)
    hidden = subject.setting("hidden_size", "n_embd", "d_model") or 0
    layers = subject.setting("num_hidden_layers", "n_layer", "num_layers") or 0
    return 6.0 * weights + 6.0 * layers * hidden * seq_len


def _resident_peak() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _evaluated(subject: Any, dataset: Any, part: str, head: Any, window: int) -> dict[str, Any] | None:
    from .perplexity import measure

    documents = [(item.ids, item.text_bytes) for item in getattr(dataset, part)]
    if not documents:
        return None
    found = measure(subject, documents, window=window, head=head)

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "perplexity": number(found.perplexity),
        "loss": number(found.loss),
        "bits_per_byte": number(found.bits_per_byte),
        "tokens": found.tokens,
        "documents": len(documents),
    }


def _sample(subject: Any, dataset: Any) -> dict[str, str] | None:
    """A prompt from a held-out document and what the model goes on with, drawn at a temperature from a seed of its own."""
    import torch

    from ..convention import find_logits
    from .head import run_on

    documents = dataset.validation
    if not documents:
        return None
    prompt = list(documents[0].ids[:PROMPT_TOKENS])
    ids = torch.tensor([prompt], device=subject.device)
    draw = torch.Generator().manual_seed(0)
    window = len(prompt) + SAMPLE_TOKENS
    subject.model.eval()
    with torch.no_grad():
        for _ in range(SAMPLE_TOKENS):
            try:
                result = run_on(subject, ids[:, -window:])
            except (IndexError, RuntimeError):  # more positions than it has, which no config declares
                window = subject.usable_positions or window
                if window >= ids.shape[1]:
                    raise
                result = run_on(subject, ids[:, -window:])
            logits = find_logits(result, batch_size=1, seq_len=min(window, ids.shape[1])).logits[0, -1].float().cpu()
            logits = logits[: dataset.encoder.rows]
            if not bool(torch.isfinite(logits).all()):
                return None
            chosen = torch.multinomial((logits / SAMPLE_TEMPERATURE).softmax(-1), 1, generator=draw)
            ids = torch.cat([ids, chosen[None].to(ids.device)], dim=1)
    subject.model.train()
    return {"prompt": dataset.encoder.decode(prompt), "text": dataset.encoder.decode(ids[0, len(prompt) :].tolist())}


def _checkpoint(tell: Tell, subject: Any, dataset: Any, folder: Path) -> None:
    """Save, load as transformers does, and compare the logits bit for bit but for rounding."""
    import torch

    from ..first_run import from_model
    from ..own_code import quiet
    from ..report import Finding, plain
    from ..settle import settled
    from .checkpoint import save_checkpoint

    subject.model.eval()
    loadable = save_checkpoint(subject.model, folder, dataset.encoder)
    if not loadable:
        tell("checkpoint", loadable=False, finding=None)
        return
    finding = None
    with settled(seed=0), quiet():
        from transformers import AutoModelForCausalLM

        case = subject.first_case()
        try:
            loaded = from_model(AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval())
            difference = float((loaded.logits(case) - subject.logits(case).float().cpu()).abs().max())
            scale = float(subject.logits(case).abs().max())
            # Two implementations of the same float32 arithmetic; facts of this project put a real bug at 1e-3 and more.
            if not difference <= 1e-4 * max(1.0, scale):
                message = f"the checkpoint loads as another model: its logits differ by {difference:.3g} of {scale:.3g}"
                finding = Finding(probe="train.checkpoint", severity="error", message=message, case=case)
        except Exception as error:
            message = f"the checkpoint does not load: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            finding = Finding(probe="train.checkpoint", severity="error", message=message)
    tell("checkpoint", loadable=finding is None, finding=plain(finding) if finding else None)


def _out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _memory_finding(failed: Any, cause: BaseException, subject: Any) -> Any:
    from ..report import Finding

    rows, length = failed.batch.shape
    return Finding(
        probe="train.runs",
        severity="error",
        message=f"step {failed.step + 1} runs out of memory at a batch of {rows} x {length} tokens",
        fix="a smaller --batch-size or --seq-len; olmodebug memory tells what is needed",
        raised=f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}",
        evidence={"parameters": sum(p.numel() for p in subject.model.parameters())},
    )


def _data_section(dataset: Any) -> dict[str, Any]:
    return {
        "source": dataset.source,
        "protocol": dataset.protocol.name,
        "train_documents": dataset.train_documents,
        "validation_documents": len(dataset.validation),
        "test_documents": len(dataset.test),
        "duplicates": dataset.duplicates,
        "counted_tokens": dataset.counted_tokens,
        "tokenizer": Path(dataset.encoder.name).name,
        "tokenizer_trained": dataset.encoder.trained,
        "vocab_size": dataset.encoder.rows,
        "unigram_entropy": dataset.unigram_entropy,
        "unigram_perplexity": dataset.unigram_perplexity if math.isfinite(dataset.unigram_perplexity) else None,
        "problems": [{"file": p.file, "line": p.line, "text": p.text} for p in dataset.problems.first],
        "problem_count": dataset.problems.count,
    }


if __name__ == "__main__":
    serve(run)
