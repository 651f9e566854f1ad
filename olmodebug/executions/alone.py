"""A script that shows one op alone, or one op of each side, without olmodebug: its inputs lie beside it in safetensors."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEAD = '''"""{title}"""
import torch
from safetensors.torch import load_file

tensors = load_file(__file__.removesuffix("py") + "safetensors")
as_list = lambda v: [v] if isinstance(v, torch.Tensor) else list(v)
'''


def op_code(name: str) -> str:
    """How a script calls an op: `torch.ops.aten.mm` for `mm` or `aten.mm.default`."""
    short = name.removeprefix("aten.").removesuffix(".default")
    return f"torch.ops.aten.{short}"


def arguments_code(arguments: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor]) -> str:
    """A dictionary of arguments as Python code; the tensors in it are put into `tensors` under `prefix`."""
    return "{" + ", ".join(f'"{name}": {_code(value, f"{prefix}{name}", tensors)}' for name, value in arguments.items()) + "}"


def _code(value: Any, key: str, tensors: dict[str, Tensor]) -> str:
    if isinstance(value, Tensor):
        tensors[key] = value.detach().to("cpu").clone().contiguous()
        return f'tensors["{key}"]'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_code(item, f"{key}/{i}", tensors) for i, item in enumerate(value)) + "]"
    if isinstance(value, torch.device):
        return f'torch.device("{value.type}")'
    if isinstance(value, str) and value.startswith("torch."):  # a dtype, as a bundle has it
        return value
    return f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)


def write_script(folder: Path, name: str, text: str, tensors: Mapping[str, Tensor], beside: Mapping[str, str] | None = None) -> str | None:
    """Write a script, its tensors and other files beside it; its path from the working directory, None where the disk does not take it."""
    from safetensors.torch import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), folder / f"{name}.safetensors")
        for file, content in {f"{name}.py": text, **(beside or {})}.items():
            (folder / file).write_text(content, encoding="utf-8")
    except OSError:
        return None
    path = folder / f"{name}.py"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
