"""The repeated blocks of a model, what stands behind them, and what they are when their branches give nothing."""

import re

import torch
from torch import Tensor, nn

from ..tracing.norms import acts_as_norm, norm_width

# What people call the norm behind the last block, as a module or as a bare parameter.
FINAL_NORM = re.compile(
    r"(^|\.)(norm|ln_f|norm_f|ln_out|ln_final|final_norm|final_layernorm|final_layer_norm|model_norm|out_norm)(\.weight)?$"
)
HOLDERS = (nn.ModuleList, nn.ModuleDict)  # they have no forward


def blocks_of(model: nn.Module, *, alike: bool = True) -> list[tuple[str, nn.Module]]:
    """(path, module) of the repeated blocks: the list of modules of one class that holds the most parameters.

    Where they need not be alike, also a ModuleList of several classes that all run: a hybrid has blocks of attention and of
    recurrence.
    """
    best: list[tuple[str, nn.Module]] = []
    most = 0
    for path, holder in model.named_modules():
        if not isinstance(holder, nn.ModuleList | nn.Sequential) or len(holder) == 0:
            continue
        size = sum(p.numel() for p in holder.parameters())
        one_class = len({type(child) for child in holder}) == 1
        several = not alike and isinstance(holder, nn.ModuleList) and not any(isinstance(child, HOLDERS) for child in holder)
        if (one_class or several) and size > most:
            best = [(f"{path}.{name}" if path else name, child) for name, child in holder.named_children()]
            most = size
    return best


def final_norm(model: nn.Module) -> str | None:
    """The path of the module or bare parameter beside the blocks that is called like a final norm and is shaped like one."""
    blocks = blocks_of(model)
    if not blocks:
        return None
    owner = blocks[0][0].rpartition(".")[0].rpartition(".")[0]
    around = {owner, owner.rpartition(".")[0], ""}
    for path, module in model.named_modules():
        width = norm_width(module)
        if path.rpartition(".")[0] in around and FINAL_NORM.search(path) and width and acts_as_norm(_in_float64(module), width):
            return path
    widths = {p.shape[-1] for name, p in model.named_parameters() if p.ndim == 2}
    for name, parameter in model.named_parameters():
        owned_by_module = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.LayerNorm)
        bare = parameter.ndim == 1 and parameter.shape[0] in widths and not owned_by_module
        if bare and name.rpartition(".")[0] in around and FINAL_NORM.search(name) and not name.endswith(".weight"):
            return name
    return None


def silence_branches(block: nn.Module, *, but: str | None = None) -> int:
    """Set every matrix and every bias of a block, `but` those of one child, to zero, so that its branches give nothing; how
    many were set.

    Norm weights stay as they are: a norm of zero is zero.
    """
    count = 0
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if but is not None and name.startswith(f"{but}."):
                continue
            if parameter.ndim >= 2 or name.rpartition(".")[2] in ("bias", "b", "beta"):
                parameter.zero_()
                count += 1
    return count


def hidden_of(value: object) -> Tensor | None:
    """The hidden states `[batch, seq_len, width]` in what a block returns."""
    if isinstance(value, Tensor):
        return value if value.ndim == 3 else None
    if isinstance(value, tuple | list) and value:
        return hidden_of(value[0])
    return None


def _in_float64(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module).double()
