"""What CUDA kernels take from the allocator inside one operator and give back before it returns: no tensor shows it.

Measured on an H100 with torch 2.11 (`python -m tests.gpu_scratch`, `reports/gpu/scratch.json`), and named by the sources. What is
not in the table counts as nothing, and the low figure of an estimate leaves the table out.
"""

from collections.abc import Callable
from typing import Any

FLASH_ROW_BLOCK = 128  # flash-attention rounds the sequence to it, the head size to 32 (64 above 128)
CUDNN_BYTES = 256
LOCK_BYTES = 16  # beside each tile of the efficient kernel's float32 gradient of the query: a lock and a counter
TILE = 64
WIDE_HEAD = 128  # up to here the efficient kernel's output stays in registers
UNSORTED_INDICES = 3072  # EmbeddingBackward.cu: up to here, without padding_idx, a kernel that needs no sorting
ROWS_PER_PARTIAL = 10  # EmbeddingBackwardKernel.cu, NROWS_PER_THREAD
WARP = 32
MOST_THREADS = 512  # of a block that reduces
REDUCED_TOGETHER = 4  # float32 outputs that one thread makes
PROCESSORS = 132  # of an H100; fewer hand over less

Blocks = tuple[tuple[int, ...], ...]


def scratch_blocks(op: str, args: Any) -> Blocks:
    """The bytes of what an operator takes beside its outputs: groups one after the other, each alive at once."""
    rule = RULES.get(op)
    return () if rule is None else tuple(tuple(size for size in group if size) for group in rule(args) if any(group))


def _flash_backward(args: Any) -> Blocks:
    """A row sum and dq in float32 (flash_api.cpp, mha_bwd); with fewer key heads, dk and dv of every query head."""
    query, key = args[1], args[2]
    batch, heads, rows, width = query.shape
    rows = _up(rows, FLASH_ROW_BLOCK)
    accumulated = batch * rows * heads * _up(width, 32 if width <= 128 else 64) * 4
    expanded = batch * key.shape[2] * heads * width * query.element_size() if key.shape[1] != heads else 0
    return ((batch * heads * rows * 4, accumulated, expanded, expanded),)


def _cudnn_forward(args: Any) -> Blocks:
    del args
    return ((CUDNN_BYTES,),)


def _cudnn_backward(args: Any) -> Blocks:
    """One block: dq in float32, a row sum, and with fewer key heads dk and dv of every query head."""
    query, key = args[1], args[2]
    batch, heads, rows, width = query.shape
    expanded = 2 * batch * heads * key.shape[2] * width * query.element_size() if key.shape[1] != heads else 0
    return ((batch * heads * rows * (width + 1) * 4 + expanded + CUDNN_BYTES,),)


def _efficient_forward(args: Any) -> Blocks:
    """With 16 bits and wide heads, the output in float32."""
    query, value = args[0], args[2]
    wide = query.element_size() < 4 and value.shape[-1] > WIDE_HEAD
    return ((query.shape[0] * query.shape[1] * query.shape[2] * value.shape[-1] * 4 if wide else 0,),)


def _efficient_backward(args: Any) -> Blocks:
    """Row sums of gradient times output, and the workspace of kernel_backward.h: dq in tiles of float32, each with a lock.

    With float32 torch makes the product itself, and its row sums twice over. With 16 bits and wide heads dk and dv are in
    the workspace too.
    """
    query, key = args[1], args[2]
    batch, heads, rows, width = query.shape
    half = query.element_size() < 4
    high = 2 * TILE if half and TILE < width <= WIDE_HEAD else TILE
    wide = TILE if width <= TILE else 2 * TILE
    share = -(-rows // high) * -(-width // wide) * (LOCK_BYTES + high * wide * 4)
    if half and width > WIDE_HEAD:
        share += 2 * _up(key.shape[2], TILE) * _up(width, TILE) * 4
    sums, workspace = batch * heads * rows * 4, batch * heads * share
    if half:
        return ((sums, workspace),)
    return ((batch * heads * rows * width * 4, sums), (sums, sums), (sums, workspace))


def _embedding_backward(args: Any) -> Blocks:
    """Sorted indices, their places and cub's copies of both, and a float32 row for each partial segment."""
    gradient, indices, rows, padding = args[:4]
    count, width = indices.numel(), gradient.shape[-1]
    if count <= UNSORTED_INDICES and padding < 0:
        return ()
    segments = count // ROWS_PER_PARTIAL + min(count, rows)
    return ((8 * count, 8 * count, 8 * count, 8 * count, segments * _up(width, WARP) * 4),)


def _sum(args: Any) -> Blocks:
    """What blocks of threads hand to each other where a tensor is added up over all but its last dimension, as for the
    gradient of a norm's weight (Reduce.cuh: setReduceConfig and global_memory_size): float32, of 16 bits too."""
    terms, dims = args[0], args[1] if len(args) > 1 else None
    if not terms.ndim > 1 or dims is None or terms.element_size() not in (2, 4) or not terms.is_floating_point():
        return ()
    outputs = terms.shape[-1]
    if sorted(d % terms.ndim for d in dims) != list(range(terms.ndim - 1)) or outputs % REDUCED_TOGETHER or not terms.is_contiguous():
        return ()
    rows = terms.numel() // max(1, outputs)
    width = min(WARP, _power_below(outputs // REDUCED_TOGETHER))
    height = min(_power_below(rows), MOST_THREADS // REDUCED_TOGETHER // width)
    each = -(-rows // height)  # values that a thread adds up
    if rows < max(height, 1) * 16 or each < 16:
        return ()
    grid = -(-(outputs // REDUCED_TOGETHER) // width)
    parts = max(min(-(-PROCESSORS * (2048 // (width * height)) // grid), -(-each // 16)), -(-each // 256))
    return ((4 * outputs * parts * width * REDUCED_TOGETHER,),) if parts > 1 else ()


RULES: dict[str, Callable[[Any], Blocks]] = {
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_cudnn_attention": _cudnn_forward,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
    "_scaled_dot_product_efficient_attention": _efficient_forward,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "embedding_dense_backward": _embedding_backward,
    "sum": _sum,
}


def _power_below(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
