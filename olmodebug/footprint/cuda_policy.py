"""CUDA's choices made on CPU tensors, fake or real: what autocast casts, which attention kernel runs, the masks of transformers.

Autograd on fake `cuda` tensors needs a card, so a prediction runs on fake CPU tensors; these are the places where the CPU
would allocate something else. Everything is put back on leaving, also after an exception.

The lists of autocast are read from the headers of the installed torch (include/ATen/autocast_mode.h), so they are those
of the version in use.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from .gpus import Gpu

AttentionKernel = Literal["cudnn", "flash", "efficient", "math"]

LOW = (torch.float16, torch.bfloat16)
FLASH_MOST_HEAD_DIM = 256
CUDNN_FIRST = ((9, 0), (10, 0))  # compute capabilities on which torch prefers cuDNN's attention
CUDNN_MOST_HEAD_DIM = 256
ALIGNED_BYTES = 16
KEY = "AutocastCPU"

# The macros of the header and what each list of operators gets.
LISTS = {
    "AT_FORALL_LOWER_PRECISION_FP": "lower",
    "AT_FORALL_FP32": "float32",
    "AT_FORALL_FP32_SET_OPT_DTYPE": "float32 dtype",
    "AT_FORALL_PROMOTE": "promote",
}


@contextmanager
def cuda_policies(gpu: Gpu, *, autocast: bool) -> Iterator[None]:
    """Inside, operators on CPU tensors choose dtypes and kernels as torch does on this GPU."""
    with ExitStack() as stack:
        with warnings.catch_warnings():  # torch says once that kernels are overridden, which is what this is for
            warnings.simplefilter("ignore", UserWarning)
            if autocast:
                stack.callback(_emulate_autocast()._destroy)
            stack.callback(_emulate_attention(gpu)._destroy)
        stack.enter_context(values_unread())
        yield


@contextmanager
def values_unread() -> Iterator[None]:
    """Inside, torch and transformers do with fake tensors what they do with real ones, in two places where they would not."""
    with no_packed_sequences(), grouped_products():
        yield


@contextmanager
def grouped_products() -> Iterator[None]:
    """The grouped product of experts in any dtype, as its kernels take it; torch's rule for fake tensors refuses all but bfloat16.

    Its output has a row for each row that comes in, wherever the router sends it, so no routing need be assumed.
    """
    if not hasattr(torch.ops.aten, "_grouped_mm"):
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        library.impl("_grouped_mm", _grouped_product, "Meta", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _grouped_product(
    left: Tensor, right: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """What the product allocates: [rows, columns] of rows and a stack of matrices, or the other way round; a stack of two."""
    rows, columns = left.shape[-2], right.shape[-1]
    stack = left.shape[0] if left.dim() == right.dim() == 3 else len(offs) if left.dim() == right.dim() and offs is not None else None
    return left.new_empty((rows, columns) if stack is None else (stack, rows, columns), dtype=out_dtype or left.dtype)


@contextmanager
def no_packed_sequences() -> Iterator[None]:
    """transformers looks for packed documents in the values of position_ids, which fake tensors do not have; it then
    builds a full mask, which it would not on real ones. The name is internal to transformers: where it is gone, nothing
    is changed."""
    import sys

    masks = sys.modules.get("transformers.masking_utils")
    if masks is None or not hasattr(masks, "find_packed_sequence_indices"):
        yield
        return
    with mock.patch.object(masks, "find_packed_sequence_indices", lambda *args, **kwargs: None):
        yield


@cache
def autocast_lists() -> dict[str, str]:
    """Operator, as `softmax.int`, to its policy under CUDA autocast: `lower`, `float32`, `float32 dtype` or `promote`."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    text = header.read_text(encoding="utf-8")
    policies = {}
    for macro, policy in LISTS.items():
        match = re.search(rf"#define {macro}\(_\)(.*?)\n[ \t]*\n", text, re.S)
        if match is None:
            raise RuntimeError(f"{header} has no {macro}: this torch states its autocast lists in another way")
        for name, overload in re.findall(r"_\((\w+)(?:,\s*(\w+))?", match[1]):
            policies[f"{name}.{overload}" if overload else name] = policy
    return policies


def attention_kernel(
    gpu: Gpu, *, dtype: torch.dtype, head_dim: int, masked: bool, dropout: float = 0.0, value_dim: int | None = None
) -> AttentionKernel:
    """The kernel of scaled_dot_product_attention on this GPU; `value_dim` where the values have another size of head.

    flash: float16 or bfloat16, no mask, one head_dim up to 256, Ampere and later. efficient: float32 too, masks, and values
    of another size; bfloat16 from Ampere on; rows of 16 bytes wherever it uses tensor cores (sdp_utils.cpp). cudnn: on Hopper
    and data-centre Blackwell before all others, masks too, heads of up to 256 in multiples of 8 (seen on an H100, torch 2.11).
    """
    ampere = gpu.capability >= (8, 0)
    value_dim = head_dim if value_dim is None else value_dim
    if gpu.capability in CUDNN_FIRST and dtype in LOW and max(head_dim, value_dim) <= CUDNN_MOST_HEAD_DIM:
        if head_dim % 8 == value_dim % 8 == 0:
            return "cudnn"
    if ampere and dtype in LOW and not masked and head_dim == value_dim <= FLASH_MOST_HEAD_DIM:
        return "flash"
    tensor_cores = ampere or (gpu.capability >= (7, 0) and dtype in LOW)
    aligned = not tensor_cores or all(size * dtype.itemsize % ALIGNED_BYTES == 0 for size in (head_dim, value_dim))
    if aligned and (dtype in (torch.float32, torch.float16) or (dtype == torch.bfloat16 and ampere)):
        return "efficient"
    return "math"


def _operator(name: str) -> Any:
    base, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, base, None)
    return None if packet is None else getattr(packet, overload or "default", None)


def _emulate_autocast() -> torch.library.Library:
    """CUDA's autocast policies registered for CPU tensors; `_destroy()` takes them back.

    Private: DispatchKeySet and the guard that excludes a key are what torch's own Python kernels for autocast use. Without
    them an operator would be cast again inside its own kernel, without end.
    """
    library = torch.library.Library("aten", "IMPL")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    registered = {name.removeprefix("aten::") for name in torch._C._dispatch_get_registrations_for_dispatch_key(KEY)}
    policies = autocast_lists()
    for name in registered | set(policies):
        policy = policies.get(name, "none")
        operator = _operator(name)
        # torch's own kernels for the CPU cast to the lower precision and remember cast weights, as those for CUDA do.
        if operator is None or (policy == "lower" and name in registered):
            continue
        library.impl(name, _kernel(operator, policy, keys), KEY, allow_override=True)
    return library


def _kernel(operator: Any, policy: str, keys: Any) -> Callable[..., Any]:
    names = [argument.name for argument in operator._schema.arguments]

    def run(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = [item for item in _flat(given.values()) if isinstance(item, Tensor) and item.is_floating_point()]
        to: torch.dtype | None = None
        if policy == "lower":
            to = torch.get_autocast_dtype("cpu")
        elif policy == "float32":
            to = torch.float32
        elif policy == "promote":
            to = torch.float32 if any(t.dtype == torch.float32 for t in tensors) else None
        elif policy == "float32 dtype" and tensors and tensors[0].dtype in LOW and given.get("dtype") is None and "dtype" in names:
            given["dtype"] = torch.float32
        with torch._C._ExcludeDispatchKeyGuard(keys):
            if to is not None:
                given = {name: _cast(value, to) for name, value in given.items()}
            return _call(operator, names, given)

    return run


def _call(operator: Any, names: list[str], given: dict[str, Any]) -> Any:
    positional = [a.name for a in operator._schema.arguments if not a.kwarg_only]
    args = []
    for name in positional:
        if name not in given:
            break
        args.append(given[name])
    rest = {name: value for name, value in given.items() if name not in positional[: len(args)]}
    return operator(*args, **rest)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    if isinstance(value, list | tuple):
        return [_cast(item, dtype) for item in value]
    return value


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _emulate_attention(gpu: Gpu) -> torch.library.Library:
    """scaled_dot_product_attention of CPU tensors through the operators that CUDA would call; fake tensors only.

    At the dispatcher and not as a function mode, so that the recomputation of a checkpoint goes the same way.
    """
    library = torch.library.Library("aten", "IMPL")

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        aten = torch.ops.aten
        head_dim = query.shape[-1]
        kernel = attention_kernel(
            gpu, dtype=query.dtype, head_dim=head_dim, masked=attn_mask is not None, dropout=dropout_p, value_dim=value.shape[-1]
        )
        if kernel == "efficient" and (enable_gqa and key.shape[-3] != query.shape[-3]):
            kernel = "math"  # the efficient kernel takes as many key heads as query heads
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            zero = torch.zeros((), dtype=query.dtype, device=query.device)
            attn_mask = torch.where(attn_mask, zero, torch.full_like(zero, -torch.inf))
        if kernel == "cudnn" and not _cudnn_can_be_fake():
            kernel = "flash"  # its outputs have the same sizes
        if kernel == "cudnn":
            scale = head_dim**-0.5 if scale is None else scale
            if attn_mask is not None:
                attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
            gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
            return aten._scaled_dot_product_cudnn_attention(
                query, key, value, attn_mask, gradient, dropout_p, is_causal, False, scale=scale
            )[0]
        if kernel == "flash":
            scale = head_dim**-0.5 if scale is None else scale
            short = -head_dim % 8
            if short:  # the kernel takes multiples of 8; torch pads copies
                query, key, value = (torch.nn.functional.pad(t, (0, short)) for t in (query, key, value))
            output = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
            return output[..., :head_dim] if short else output
        if kernel == "efficient":
            if attn_mask is not None:
                attn_mask = _aligned(attn_mask).expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
            gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
            return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, gradient, dropout_p, is_causal, scale=scale)[
                0
            ]
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]

    library.impl("scaled_dot_product_attention", attention, "AutogradCPU", allow_override=True)
    return library


@cache
def _cudnn_can_be_fake() -> bool:
    """Whether this torch knows the shapes of cuDNN's attention, forward and backward, without a card.

    Private, and the only way to ask: without it a torch that does not know them would fail in the middle of a prediction.
    """
    import torch._meta_registrations  # noqa: F401 - registers them

    names = ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward")
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta") for name in names)


def _aligned(mask: Tensor) -> Tensor:
    """The mask with rows of a multiple of 16 elements, which the efficient kernel reads; torch pads a copy."""
    short = -mask.shape[-1] % 16
    if not short:
        return mask
    return torch.nn.functional.pad(mask, (0, short))[..., : mask.shape[-1]]
