"""Whether a folder holds records of ranks, asked without torch."""

from pathlib import Path


def ranks_in(folder: Path) -> int:
    """How many ranks have a record in a folder; 0 where it is none."""
    return sum(1 for _ in folder.glob("rank-*.jsonl")) if folder.is_dir() else 0
