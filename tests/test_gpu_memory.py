"""The matrix for a card: enough of it, every variant in it, and every line one that the command takes."""

from olmodebug.cli import _parser

from .gpu_memory import commands


def test_the_matrix_has_at_least_forty_lines_that_the_command_takes() -> None:
    made = commands()
    assert len(made) >= 40
    for line in made.values():
        assert _parser().parse_args([*line, "--timeout", "120"]).command == "memory"
    texts = [" ".join(line) for line in made.values()]
    for part in ("float32", "float16", "bfloat16 --pure", "--checkpointing", "--loss chunked", "adamw-fused", "datadecide-1B", "olmo1-4M"):
        assert any(part in text for text in texts), part
