"""The cross-entropy of a linear head, computed in chunks of rows, so that the logits of a whole batch never exist.

Equal to the plain loss to rounding. The gradients are computed in the forward pass, where each chunk's probabilities are at
hand: three matrix products and one softmax, as in the plain loss, and nothing is computed twice. No second derivative.

Why not torch's own `F.linear_cross_entropy`, which torch 2.13 has: in chunks it sums in the dtype of what it is given, so that
bfloat16 states gave 8.0 for a loss of 10.9, and it was slower on a CPU (`python -m tests.benchmarks.loss` shows both).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import IGNORE_INDEX, at_least_float32

# Rows of logits at a time. On a CPU the chunk should stay in the last cache (128 rows of 50,277 float32 are 26 MB); a GPU
# wants larger products, and 2,048 rows of float32 are 412 MB.
CHUNK_ROWS_CPU, CHUNK_ROWS_GPU = 128, 2048


def linear_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The mean loss of `hidden_states @ weight.T` `[N, V]` against `targets` `[N]`; rows with -100 do not count.

    `dtype` is that of the three matrix products (default: that of the hidden states); probabilities and loss are taken in
    float32 or more. 0 where no row counts.
    """
    if not (hidden_states.requires_grad or weight.requires_grad):
        return _no_gradient(hidden_states, weight, targets, dtype or hidden_states.dtype)
    loss: Tensor = _LinearCrossEntropy.apply(hidden_states, weight, targets, dtype or hidden_states.dtype)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        precise = at_least_float32(hidden_states.dtype)
        with torch.autocast(hidden_states.device.type, enabled=False):
            states, table = hidden_states.to(dtype), weight.to(dtype)
            counted = targets != IGNORE_INDEX
            count = counted.sum().clamp(min=1)
            labels = targets.masked_fill(~counted, 0)
            grad_states = torch.empty(hidden_states.shape, dtype=precise, device=hidden_states.device)
            grad_weight = torch.zeros(weight.shape, dtype=precise, device=weight.device)
            total = torch.zeros((), dtype=precise, device=weight.device)
            for rows in _chunks(len(targets), hidden_states.device):
                logits = states[rows] @ table.T
                probabilities = logits.softmax(-1, dtype=precise)
                keep = counted[rows]
                total += (_log_sum(logits, probabilities) - _of_label(logits, labels[rows])).to(precise).mul(keep).sum()
                # The one-hot of the label is taken off below, from rows of the table and not from a matrix of this size.
                probabilities = probabilities.to(dtype).mul_(keep[:, None])
                grad_states[rows] = (probabilities @ table).to(precise)
                if precise == dtype:
                    grad_weight.addmm_(probabilities.T, states[rows])
                else:
                    grad_weight.add_(probabilities.T @ states[rows])
                del logits, probabilities
            kept_labels, kept = labels[counted], states[counted].to(precise)
            grad_states[counted] -= table[kept_labels].to(precise)
            grad_weight.index_add_(0, kept_labels, kept, alpha=-1)
            ctx.save_for_backward(grad_states.div_(count), grad_weight.div_(count))
            ctx.dtypes = hidden_states.dtype, weight.dtype
            return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        grad_states, grad_weight = ctx.saved_tensors
        of_states, of_weight = ctx.dtypes
        return (grad_states * grad).to(of_states), grad_weight.mul_(grad).to(of_weight), None, None


def _no_gradient(hidden_states: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    total, count = nll_sum(hidden_states, weight, targets, dtype=dtype)
    return total / max(count, 1)


@torch.no_grad()
def nll_sum(hidden_states: Tensor, weight: Tensor, targets: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, int]:
    """The summed loss over the rows that count, and how many do."""
    dtype = dtype or hidden_states.dtype
    total = torch.zeros((), dtype=at_least_float32(dtype), device=hidden_states.device)
    table = weight.to(dtype)
    with torch.autocast(hidden_states.device.type, enabled=False):
        for rows in _chunks(len(targets), hidden_states.device):
            logits = (hidden_states[rows].to(dtype) @ table.T).to(total.dtype)
            total += F.cross_entropy(logits, targets[rows], ignore_index=IGNORE_INDEX, reduction="sum")
    return total, int((targets != IGNORE_INDEX).sum())


def _chunks(rows: int, device: torch.device) -> list[slice]:
    size = CHUNK_ROWS_CPU if device.type == "cpu" else CHUNK_ROWS_GPU
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _log_sum(logits: Tensor, probabilities: Tensor) -> Tensor:
    """log(sum(exp(logits))) of each row: at the largest logit, whose probability is at least 1/V, it follows without loss."""
    return logits.amax(-1).to(probabilities.dtype) - probabilities.amax(-1).log()


def _of_label(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None]).squeeze(1).to(at_least_float32(logits.dtype))
