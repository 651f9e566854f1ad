"""Builds every causal language-model class that transformers ships, tiny, and runs it once.

`python -m tests.zoo [--only REGEX] [--json FILE]`. Each model type runs in a child process of its own with a time
limit, so that one that hangs or dies does not stop the walk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 60  # the slowest type needs a few seconds
WORKERS = 2
MEMORY_BYTES = 16 * 2**30  # address space of one child: a config that fell through the table fails instead of swapping


def model_types() -> list[str]:
    """Every model type that transformers maps to a causal language-model class, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(model_type: str) -> tuple[Any, Any]:
    """The tiny model of a model type and its config, of the type's own config class where types share a model class."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from olmodebug.tiny import build_from_config, tiny_config

    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config_class = transformers.CONFIG_MAPPING[model_type]
    if model_class.config_class in config_class.sub_configs.values():  # the language model of a multimodal type
        config_class = model_class.config_class
    config = tiny_config(config_class)
    return build_from_config(model_class, config), config


def run_once(model_type: str) -> dict[str, Any]:
    """Builds a model type and runs one forward; ValueError where the logits are not those of a language model."""
    import torch

    torch.set_num_threads(1)
    start = time.perf_counter()
    model, config = build(model_type)
    vocab_size = config.get_text_config(decoder=True).vocab_size
    input_ids = torch.randint(10, 110, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits
    if tuple(logits.shape) != (2, 11, vocab_size):
        raise ValueError(f"logits: expected {(2, 11, vocab_size)}, observed {tuple(logits.shape)}")
    if not logits.isfinite().all():
        raise ValueError("logits are not finite")
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - start, 2),
    }


def walk(job: Callable[[str], dict[str, Any]], types: list[str]) -> Iterator[dict[str, Any]]:
    """Runs the job on each type, each in a child; yields the type, `ok`, and the job's own values or the `error`."""
    import transformers.modeling_utils  # noqa: F401  loaded once here, so that the children fork with it

    with ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(lambda each: _in_child(job, each), types)


def _in_child(job: Callable[[str], dict[str, Any]], model_type: str) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(job, model_type, sender))
    child.start()
    sender.close()
    try:
        if not receiver.poll(LIMIT_SECONDS):
            child.kill()
            return {"type": model_type, "ok": False, "error": f"no answer within {LIMIT_SECONDS} s"}
        return {"type": model_type, **receiver.recv()}
    except EOFError:
        child.join()
        return {"type": model_type, "ok": False, "error": f"the child died with exit code {child.exitcode}"}
    finally:
        child.join()
        receiver.close()


def _child(job: Callable[[str], dict[str, Any]], model_type: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        sender.send({"ok": True, **job(model_type)})
    except Exception as error:  # noqa: BLE001  whatever a class raises is the content of its row
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = (str(error).strip() or "no message").replace("\n", " ")
        sender.send({"ok": False, "error": f"{type(error).__name__}: {line} ({where.filename}:{where.lineno})"})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--only", metavar="REGEX", default="", help="the model types whose name this matches")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    options = parser.parse_args(argv)
    types = [each for each in model_types() if re.search(options.only, each)]
    rows = []
    for row in walk(run_once, types):
        rows.append(row)
        rest = f"{row['class']:45} {row['parameters']:>9,} {row['seconds']:6.2f} s" if row["ok"] else row["error"]
        print(f"{row['type']:28} {rest}", flush=True)
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} model types build and run")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
