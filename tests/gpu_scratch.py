"""What CUDA kernels take from the allocator inside one operator: `python -m tests.gpu_scratch --json FILE`.

Each row is an operator on given shapes, with the bytes of every block that it allocated, outputs first where they are
known, and what `olmodebug.footprint.scratch` says of it.
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from olmodebug.footprint.scratch import scratch_blocks

HALF = torch.float16
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Allocations(TorchDispatchMode):
    """The blocks that every op allocates, from the allocator's history."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        before = len(_history())
        result = func(*args, **(kwargs or {}))
        blocks = [int(entry["size"]) for entry in _history()[before:] if entry["action"] == "alloc"]
        name = func._overloadpacket.__name__
        outputs = [t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_cuda]
        known = scratch_blocks(name, args)
        self.rows.append({"op": name, "blocks": blocks, "outputs": outputs, "scratch": known, "thread": _thread()})
        return result


def _history() -> list[Any]:
    return list(torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()])


def _thread() -> str:
    import threading

    return threading.current_thread().name


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """A name and what is run; backward passes included."""

    def ask(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)

    def attention(
        backend: str, batch: int, heads: int, rows: int, width: int, dtype: torch.dtype, *, causal: bool, mask: bool, kv: int
    ) -> None:
        query = ask(batch, heads, rows, width, dtype=dtype)
        key, value = ask(batch, kv, rows, width, dtype=dtype), ask(batch, kv, rows, width, dtype=dtype)
        bias = torch.zeros(batch, 1, rows, rows, device="cuda", dtype=dtype) if mask else None
        with sdpa_kernel(BACKENDS[backend]):
            F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal, enable_gqa=kv != heads).sum().backward()

    yield "first product", lambda: F.linear(ask(64, 64), ask(64, 64), ask(64)).sum().backward()
    yield "first product in float32", lambda: F.linear(ask(64, 64, dtype=torch.float32), ask(64, 64, dtype=torch.float32)).sum().backward()
    for backend, dtype in (("efficient", torch.float32), ("efficient", HALF), ("flash", HALF), ("cudnn", HALF)):
        for batch, heads, rows, width in (
            (8, 8, 1024, 8),
            (2, 12, 1024, 64),
            (2, 16, 2048, 128),
            (3, 4, 200, 64),
            (1, 4, 300, 32),
            (2, 2, 512, 256),
        ):
            for causal, mask in ((True, False), (False, True)):
                if mask and backend == "flash":
                    continue
                name = f"{backend} {str(dtype)[6:]} {batch}x{heads}x{rows}x{width} {'mask' if mask else 'causal'}"
                yield (
                    name,
                    lambda b=backend, s=(batch, heads, rows, width), d=dtype, c=causal, m=mask, h=heads: attention(
                        b, *s, d, causal=c, mask=m, kv=h
                    ),
                )
    for backend in ("flash", "cudnn"):
        yield f"{backend} grouped 2x8(2)x512x64", lambda b=backend: attention(b, 2, 8, 512, 64, HALF, causal=True, mask=False, kv=2)
    for tokens, rows, width in ((8192, 50277, 64), (8192, 50304, 768), (3000, 50304, 256), (1024, 97, 128), (4096, 50304, 2048)):
        for zeros in (True, False):
            ids = torch.zeros(tokens, dtype=torch.long) if zeros else torch.randint(rows, (tokens,))
            yield (
                f"embedding {tokens} of {rows}x{width} {'zeros' if zeros else 'random'}",
                lambda i=ids, r=rows, w=width: F.embedding(i.cuda(), ask(r, w, dtype=torch.float32)).sum().backward(),
            )
    for rows, width in ((8192, 64), (8192, 768), (1024, 2048)):
        yield f"layer norm {rows}x{width}", lambda r=rows, w=width: F.layer_norm(ask(r, w), [w], ask(w), ask(w)).sum().backward()
        yield f"rms norm {rows}x{width}", lambda r=rows, w=width: F.rms_norm(ask(r, w), [w], ask(w)).sum().backward()
    for dtype in (torch.float32, HALF):
        for rows, inner, outer in ((8192, 64, 256), (8192, 64, 50277), (4096, 768, 3072), (1024, 2048, 8192), (64, 2048, 64)):
            yield (
                f"linear {str(dtype)[6:]} {rows}x{inner}x{outer}",
                lambda d=dtype, s=(rows, inner, outer): F.linear(ask(s[0], s[1], dtype=d), ask(s[2], s[1], dtype=d)).sum().backward(),
            )
    yield (
        "cross entropy 1024x50277",
        lambda: F.cross_entropy(ask(1024, 50277, dtype=torch.float32), torch.zeros(1024, dtype=torch.long, device="cuda")).backward(),
    )
    for kind in ({"foreach": True}, {"fused": True}, {"foreach": False}):
        yield f"adamw {kind}", lambda k=kind: _step(k, scaled=False)
        yield f"adamw scaled {kind}", lambda k=kind: _step(k, scaled=True)


def _step(kind: dict[str, bool], *, scaled: bool) -> None:
    weights = [torch.randn(n, 64, device="cuda", requires_grad=True) for n in (300, 600, 1000)]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, **kind)
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(sum(w.square().sum() for w in weights)).backward()
        scaler.step(optimizer)
        scaler.update()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_scratch", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run and nothing was written", file=sys.stderr)
        return 2
    rows = []
    for name, run in cases():
        row: dict[str, Any] = {"name": name}
        try:
            if not name.startswith("first "):
                run()  # libraries take their workspaces on first use
            torch.cuda.memory._record_memory_history(max_entries=100_000, stacks="python")
            with Allocations() as seen:
                run()
            row["ops"] = [one for one in seen.rows if one["blocks"] and "randn" not in one["op"]]
        except Exception as error:  # a kernel that this card or this torch does not have
            row["error"] = str(error).partition("\n")[0]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        rows.append(row)
    here = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    arguments.json.write_text(json.dumps({"command": "python -m tests.gpu_scratch", "environment": here, "rows": rows}), encoding="utf-8")
    print(f"{len(rows)} rows, {sum('error' in row for row in rows)} refused", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
