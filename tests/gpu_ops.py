"""Torch's CUDA kernels, op by op, against the bound: `python -m tests.gpu_ops --json FILE`.

A kernel of torch is no bug of a model: every verdict here must be `exact`, `within` or `range`. Two rows show the other
side: products under TF32 must be found to be TF32 products.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from olmodebug.executions.execution import Execution, applied
from olmodebug.executions.judge import Judgement, expect, judge
from olmodebug.executions.policies import TF32_POLICY
from olmodebug.report import plain
from tests.test_judge_ops import DTYPES, OPS, Draw

SEEDS = 12
LEGAL = ("exact", "within", "range", "unverified")


class Judging(TorchDispatchMode):
    """Judges every op that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Judgement]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        expected = expect(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        self.found.append((func._schema.name, judge(expected, [t for t in tree_leaves(result) if isinstance(t, Tensor)])))
        return result


def functions() -> dict[str, Callable[[Draw], Tensor]]:
    """What models call, forward, on tensors that ask for gradients."""

    def ask(tensor: Tensor) -> Tensor:
        return tensor.cuda().requires_grad_()

    def attention(d: Draw, *, masked: bool, causal: bool) -> Tensor:
        length, width = d.random.choice([1, 5, 33, 130, 700]), d.random.choice([8, 16, 64, 128])
        query, key, value = (ask(d.of(2, 4, length, width)) for _ in range(3))
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril() if masked else None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)

    def loss(d: Draw) -> Tensor:
        rows, classes = d.random.choice([7, 130]), d.random.choice([97, 5003])
        labels = torch.randint(0, classes, (rows,), generator=d.generator)
        labels[0] = -100
        return F.cross_entropy(ask(d.of(rows, classes, scale=4.0)), labels.cuda())

    def linear(d: Draw) -> Tensor:
        inner, outer = d.random.choice([33, 256, 2048]), d.random.choice([7, 512])
        return F.linear(ask(d.of(3, 65, inner)), ask(d.of(outer, inner, scale=0.05)), ask(d.of(outer)))

    def embedding(d: Draw) -> Tensor:
        return F.embedding(torch.randint(0, 97, (4, 300), generator=d.generator).cuda(), ask(d.of(97, 64)))

    return {
        "attention": lambda d: attention(d, masked=False, causal=False),
        "attention-causal": lambda d: attention(d, masked=False, causal=True),
        "attention-masked": lambda d: attention(d, masked=True, causal=False),
        "cross-entropy": loss,
        "linear": linear,
        "embedding": embedding,
        "layer-norm": lambda d: F.layer_norm(x := ask(d.of(40, 200)), [200], ask(d.of(200)), ask(d.of(200))) + 0 * x,
        "rms-norm": lambda d: F.rms_norm(ask(d.of(40, 200)), [200], ask(d.of(200)), 1e-6),
        "rotated": lambda d: (x := ask(d.of(2, 3, 50, 16))) * d.of(50, 16).cuda().cos() + x.flip(-1) * d.of(50, 16).cuda().sin(),
        "gated": lambda d: F.silu(ask(d.of(40, 90))) * ask(d.of(40, 90)),
    }


def judged() -> Iterator[dict[str, Any]]:
    """One row for each op and dtype: how often each verdict, the largest margin, and the worst judgement."""
    for name, op, make in OPS:
        if "for_cpu" in op._schema.name:
            continue
        for dtype in DTYPES:
            yield _row(name, dtype, lambda d, op=op, make=make: [_alone(op, *make(d))])
    for name, function in functions().items():
        for dtype in DTYPES:
            yield _row(f"model:{name}", dtype, lambda d, function=function: _with_backward(function, d))
    torch.set_float32_matmul_precision("high")
    yield _row("tf32:linear", torch.float32, lambda d: _with_backward(functions()["linear"], d)) | {"policy": TF32_POLICY}


def _row(name: str, dtype: torch.dtype, run: Callable[[Draw], list[tuple[str, Judgement]]]) -> dict[str, Any]:
    counts: dict[str, int] = {}
    worst: tuple[str, Judgement] | None = None
    reasons: set[str] = set()
    order = (*LEGAL, "explained", "nondeterministic", "diverged")
    for seed in range(SEEDS):
        try:
            found = run(Draw(dtype, seed))
        except (RuntimeError, NotImplementedError) as error:
            reasons.add(str(error).partition("\n")[0][:160])
            continue
        for op, judgement in found:
            counts[judgement.verdict] = counts.get(judgement.verdict, 0) + 1
            if judgement.verdict == "unverified":
                reasons.add(f"{op}: {judgement.reason}")
            rank = (order.index(judgement.verdict), judgement.margin)
            if worst is None or rank > (order.index(worst[1].verdict), worst[1].margin):
                worst = op, judgement
    row: dict[str, Any] = {"name": name, "dtype": str(dtype).removeprefix("torch."), "counts": counts, "reasons": sorted(reasons)}
    return row | {"worst": {"op": worst[0], **plain(worst[1])} if worst else None}


def _alone(op: Any, args: Any, kwargs: Any) -> tuple[str, Judgement]:
    args, kwargs = tree_map_only(Tensor, lambda t: t.cuda(), (args, kwargs))
    expected = expect(op, args, kwargs)
    result = op(*args, **kwargs)
    return op._schema.name, judge(expected, [t for t in tree_leaves(result) if isinstance(t, Tensor)])


def _with_backward(function: Callable[[Draw], Tensor], d: Draw) -> list[tuple[str, Judgement]]:
    with Judging() as judging:
        output = function(d)
        output.backward(d.of(*output.shape).cuda() if output.ndim else None)
    return judging.found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_ops", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run and nothing was written", file=sys.stderr)
        return 2
    with applied(Execution(device="cuda")):
        rows = list(judged())
    here = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "seeds": SEEDS}
    command = "python -m tests.gpu_ops"
    arguments.json.write_text(json.dumps({"command": command, "environment": here, "rows": rows}, indent=1, default=str), encoding="utf-8")
    wrong = [row for row in rows if not row["name"].startswith("tf32:") and set(row["counts"]) - set(LEGAL)]
    for row in wrong:
        print(f"{row['name']:24s} {row['dtype']:9s} {row['counts']} {row['worst']}")
    found = [row for row in rows if "policy" in row and (row["worst"] or {}).get("policy") == row["policy"]]
    judgements = sum(sum(row["counts"].values()) for row in rows)
    print(f"{len(rows)} rows, {judgements} judgements, {len(wrong)} rows outside; TF32 found: {bool(found)}", file=sys.stderr)
    return int(bool(wrong) or not found)


if __name__ == "__main__":
    raise SystemExit(main())
