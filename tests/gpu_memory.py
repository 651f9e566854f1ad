"""The matrix of memory predictions against a card: at least forty commands for `python -m tests.gpu --only REGEX`.

A group of one model size takes a call of its own (`--only 'memory-4M-'`), so that each stays under ten minutes. The 1B
entries want a card of 80 GB.
"""

from __future__ import annotations

MODELS = {  # name: (subject, batch size, sequence length)
    "4M": ("olmo1-4M", 8, 1024),
    "60M": ("datadecide-60M", 4, 1024),
    "150M": ("datadecide-150M", 4, 1024),
    "1B": ("datadecide-1B", 1, 1024),
}
PRECISIONS = {
    "fp32": ["--dtype", "float32"],
    "fp16": ["--dtype", "float16"],
    "bf16": ["--dtype", "bfloat16"],
    "pure-bf16": ["--dtype", "bfloat16", "--pure"],
}
VARIANTS = {
    "plain": [],
    "checkpointing": ["--checkpointing"],
    "chunked": ["--loss", "chunked"],
    "fused": ["--optimizer", "adamw-fused"],
}
EXTRA = {
    "memory-4M-fp16-accumulation": ["olmo1-4M", "--accumulation", "2", "--seq-len", "1024"],
    "memory-4M-fp16-sgd": ["olmo1-4M", "--optimizer", "sgd", "--seq-len", "1024"],
    "memory-4M-fp16-for-loop": ["olmo1-4M", "--optimizer", "adamw-for-loop", "--seq-len", "1024"],
    "memory-4M-fp16-everything": ["olmo1-4M", "--checkpointing", "--loss", "chunked", "--seq-len", "1024"],
    "memory-4M-fp16-inference": ["olmo1-4M", "--inference", "--seq-len", "1024"],
    "memory-4M-oom": ["olmo1-4M", "--seq-len", "1024", "--budget", "2GiB"],
    "memory-llama-fp16": [
        "transformers:LlamaForCausalLM",
        "--config",
        "hidden_size=512",
        "--config",
        "vocab_size=32000",
        "--seq-len",
        "128",
    ],
    "memory-gpt2-fp16": ["transformers:GPT2LMHeadModel", "--config", "n_embd=512", "--config", "vocab_size=50257", "--seq-len", "128"],
}


def commands() -> dict[str, list[str]]:
    """Name to command line of each entry."""
    made = {}
    for size, (subject, batch, length) in MODELS.items():
        for precision, dtype in PRECISIONS.items():
            for variant, options in VARIANTS.items():
                line = ["memory", subject, "--batch-size", str(batch), "--seq-len", str(length), *dtype, *options, "--no-what-ifs"]
                made[f"memory-{size}-{precision}-{variant}"] = line
    return made | {name: ["memory", *line, "--no-what-ifs"] for name, line in EXTRA.items()}
