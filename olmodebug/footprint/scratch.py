"""What CUDA kernels take from the allocator inside one operator and give back before it returns: no tensor shows it.

Sizes as the sources state them; none was measured here. What is not in the table counts as nothing, and the low figure of
an estimate leaves the table out.
"""

from typing import Any

from torch import Tensor

FLASH_ROW_BLOCK = 128  # flash-attention rounds the sequence to it, the head size to 32 (64 above 128)
UNSORTED_INDICES = 3072  # EmbeddingBackward.cu: up to here, without padding_idx, a kernel that needs no sorting
ROWS_PER_PARTIAL = 10  # EmbeddingBackwardKernel.cu, NROWS_PER_THREAD
WARP = 32


def scratch_bytes(op: str, args: Any, kwargs: Any, out: Any) -> int:
    """The bytes that an operator takes for its duration beside its outputs."""
    if op == "_scaled_dot_product_flash_attention_backward":
        return _flash_backward(args[1], args[2])
    if op == "_scaled_dot_product_efficient_attention_backward":
        return _efficient_backward(args[1])
    if op == "embedding_dense_backward":
        return _embedding_backward(args[0], args[1], args[2], args[3])
    return 0


def _flash_backward(query: Tensor, key: Tensor) -> int:
    """dq in float32 and a row sum (flash_api.cpp, mha_bwd); with fewer key heads, dk and dv of every query head."""
    batch, heads, rows, width = query.shape
    rows = _up(rows, FLASH_ROW_BLOCK)
    accumulated = batch * rows * heads * _up(width, 32 if width <= 128 else 64) * 4
    row_sums = batch * heads * rows * 4
    expanded = 2 * batch * key.shape[2] * heads * width * query.element_size() if key.shape[1] != heads else 0
    return accumulated + row_sums + expanded


def _efficient_backward(query: Tensor) -> int:
    """A row sum, and dq in float32 where the inputs have 16 bits (attention_backward.cu)."""
    batch, heads, rows, width = query.shape
    return batch * heads * rows * 4 + (batch * heads * rows * width * 4 if query.element_size() < 4 else 0)


def _embedding_backward(gradient: Tensor, indices: Tensor, rows: int, padding: int) -> int:
    """Sorted indices, their places and cub's copies of both, and a float32 row for each partial segment."""
    count, width = indices.numel(), gradient.shape[-1]
    if count <= UNSORTED_INDICES and padding < 0:
        return 0
    segments = count // ROWS_PER_PARTIAL + min(count, rows)
    return 4 * 8 * count + segments * _up(width, WARP) * 4


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
