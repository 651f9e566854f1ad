"""Runs every probe on models that other people wrote outside transformers, and prints what was flagged.

`python -m tests.third_party [--only REGEX] [-k EXPR] [--json FILE] [--markdown FILE]`. Needs the packages themselves
(`pip install ai2-olmo ai2-olmo-core litgpt x-transformers`, best in an environment of their own); what does not import
is listed as such. Every model is built tiny with random weights from seed 0, in a child process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests import zoo
from tests.sweep import examine, line_of, print_row

zoo.LIMIT_SECONDS = 300
PACKAGES = ("ai2-olmo", "ai2-olmo-core", "litgpt", "x-transformers")


def ai2_olmo(**settings: Any) -> tuple[Any, Any]:
    """OLMo 1 as Ai2's first training code has it."""
    from olmo.config import InitFnType, LayerNormType, ModelConfig
    from olmo.model import OLMo

    config = ModelConfig(
        d_model=48,
        n_heads=6,
        n_layers=3,
        mlp_hidden_size=192,
        rope=True,
        attention_dropout=0.0,
        residual_dropout=0.0,
        embedding_dropout=0.0,
        layer_norm_type=LayerNormType.default,
        layer_norm_with_affine=False,
        bias_for_layer_norm=False,
        include_bias=False,
        max_sequence_length=64,
        vocab_size=103,
        embedding_size=103,
        weight_tying=False,
        eos_token_id=0,
        pad_token_id=1,
        init_device="cpu",
        init_fn=InitFnType.normal,
    )
    for name, value in settings.items():
        setattr(config, name, value)
    return OLMo(config), config


def ai2_olmo_rms() -> tuple[Any, Any]:
    from olmo.config import LayerNormType

    return ai2_olmo(layer_norm_type=LayerNormType.rms, layer_norm_with_affine=True, norm_after=True, attention_layer_norm=True)


def olmo_core(name: str, **settings: Any) -> tuple[Any, Any]:
    """A model of OLMo-core, from its own builder for that family."""
    from olmo_core.nn.transformer import TransformerConfig

    config = getattr(TransformerConfig, name)(d_model=64, vocab_size=103, n_layers=3, n_heads=4, hidden_size_multiple_of=8, **settings)
    model = config.build(init_device="cpu")
    model.init_weights()
    return model, config


def lit_gpt(name: str, **settings: Any) -> tuple[Any, Any]:
    """A named configuration of lit-gpt made small."""
    from litgpt import GPT, Config

    small = {
        "n_layer": 3,
        "n_embd": 48,
        "n_head": 6,
        "block_size": 64,
        "vocab_size": 103,
        "padded_vocab_size": 103,
        "intermediate_size": 88,
    }
    config = Config.from_name(name, **(small | settings))
    model = GPT(config)
    return model, config


def x_transformers(**settings: Any) -> tuple[Any, Any]:
    """A causal decoder of x-transformers."""
    from x_transformers import Decoder, TransformerWrapper

    model = TransformerWrapper(num_tokens=103, max_seq_len=64, attn_layers=Decoder(dim=48, depth=3, heads=4, attn_dim_head=12, **settings))
    return model, {"num_tokens": 103, "max_seq_len": 64}


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "ai2-olmo/olmo1": ai2_olmo,
    "ai2-olmo/olmo1-tied": functools.partial(ai2_olmo, weight_tying=True),
    "ai2-olmo/alibi": functools.partial(ai2_olmo, rope=False, alibi=True),
    "ai2-olmo/learned-positions": functools.partial(ai2_olmo, rope=False),
    "ai2-olmo/post-norm-qk-norm": ai2_olmo_rms,
    "olmo-core/llama-like": functools.partial(olmo_core, "llama_like"),
    "olmo-core/llama-like-qk-norm": functools.partial(olmo_core, "llama_like", qk_norm=True, n_kv_heads=2),
    "olmo-core/ngpt": functools.partial(olmo_core, "ngpt_like"),
    "litgpt/pythia-70m": functools.partial(lit_gpt, "pythia-70m"),
    "litgpt/llama-3": functools.partial(lit_gpt, "Llama-3.2-1B", n_query_groups=3, head_size=8),
    "litgpt/olmo-2": functools.partial(lit_gpt, "OLMo-2-1124-7B", n_query_groups=6, head_size=8),
    "litgpt/gemma-2": functools.partial(lit_gpt, "Gemma-2-2b", n_query_groups=3, head_size=8, sliding_window_size=6),
    "litgpt/mistral": functools.partial(lit_gpt, "Mistral-7B-v0.1", n_query_groups=3, head_size=8),
    "litgpt/phi-2": functools.partial(lit_gpt, "phi-2", head_size=20),
    "litgpt/falcon": functools.partial(lit_gpt, "falcon-7b", n_query_groups=1, head_size=8),
    "litgpt/mixtral": functools.partial(lit_gpt, "Mixtral-8x7B-v0.1", n_query_groups=3, head_size=8, n_expert=5),
    "litgpt/qwen3": functools.partial(lit_gpt, "Qwen3-0.6B", n_query_groups=3, head_size=8),
    "x-transformers/learned-positions": x_transformers,
    "x-transformers/rotary-swiglu-rmsnorm": functools.partial(
        x_transformers, rotary_pos_emb=True, use_rmsnorm=True, ff_swish=True, ff_glu=True
    ),
    "x-transformers/alibi": functools.partial(x_transformers, alibi_pos_bias=True),
    "x-transformers/t5-bias-sandwich": functools.partial(x_transformers, rel_pos_bias=True, sandwich_norm=True),
    "x-transformers/grouped-qk-norm": functools.partial(x_transformers, rotary_pos_emb=True, attn_kv_heads=2, attn_qk_norm=True),
    "x-transformers/flash": functools.partial(x_transformers, rotary_pos_emb=True, attn_flash=True),
}


def check_model(expression: str | None, name: str) -> dict[str, Any]:
    """Every probe's outcome and finding on one model."""
    import torch

    torch.manual_seed(0)
    model, config = MODELS[name]()
    return examine(model, config, spec=name, expression=expression)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.third_party", description=__doc__)
    parser.add_argument("--only", default="", help="models that match this regular expression")
    parser.add_argument("-k", dest="select", help="only probes whose name fits")
    parser.add_argument("--json", type=Path, help="write every row here")
    parser.add_argument("--markdown", type=Path, help="write the page here")
    arguments = parser.parse_args(argv)
    rows = []
    for row in zoo.walk(functools.partial(check_model, arguments.select), [name for name in MODELS if re.search(arguments.only, name)]):
        rows.append(row)
        print_row(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(page(rows), encoding="utf-8")
    return 0


def page(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    checked = [row for row in rows if row.get("outcomes")]
    flagged = [row for row in checked if any(f["severity"] == "error" for f in row["findings"])]
    ran = sum(o["status"] in ("passed", "failed") for row in checked for o in row["outcomes"])
    lines = [
        "# Models that other people wrote",
        "",
        f"`python -m tests.third_party --markdown reports/third-party.md`, {', '.join(_installed(name) for name in PACKAGES)}, "
        f"torch {version('torch')}, Python {sys.version.split()[0]}, CPU, tiny random weights, seed 0.",
        "",
        f"- {len(rows)} models, {len(checked)} built and checked, {ran:,} probes ran",
        f"- {len(checked) - len(flagged)} without an error finding, {len(flagged)} with one",
        "",
        "| model | class | probes that ran | errors | warnings | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row.get("outcomes"):
            lines.append(f"| {row['type']} | not built: {str(row.get('error') or '')[:120].replace('|', '/')} | | | | |")
            continue
        counts = [sum(f["severity"] == severity for f in row["findings"]) for severity in ("error", "warning")]
        done = sum(o["status"] in ("passed", "failed") for o in row["outcomes"])
        lines.append(f"| {row['type']} | {row['class']} | {done} | {counts[0]} | {counts[1]} | {row['seconds']:.0f} |")
    lines += ["", "| model | severity | probe | what | where |", "|---|---|---|---|---|"]
    lines += [line_of(row, finding) for row in checked for finding in row["findings"] if finding["severity"] != "note"]
    return "\n".join(lines) + "\n"


def _installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


if __name__ == "__main__":
    raise SystemExit(main())
