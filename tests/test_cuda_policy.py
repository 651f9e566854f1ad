"""CUDA's choices on CPU tensors: the dtypes of autocast against torch's own lists, the attention kernels by card."""

import sys
import types
from functools import partial

import pytest
import torch
from torch import Tensor

from olmodebug.footprint.cuda_policy import attention_kernel, autocast_lists, cuda_policies, no_packed_sequences, values_unread
from olmodebug.footprint.fake_model import fake_mode
from olmodebug.footprint.gpus import GPUS

A = torch.ones(4, 4)


def under(dtype: torch.dtype, run: object, *, emulate: bool = True) -> Tensor:
    with cuda_policies(GPUS["A100"], autocast=emulate), torch.autocast("cpu", dtype=dtype):
        return run()  # type: ignore[operator,no-any-return]


def test_the_lists_of_the_installed_torch_are_read_whole() -> None:
    lists = autocast_lists()
    assert lists["linear"] == lists["matmul"] == lists["scaled_dot_product_attention"] == "lower"
    assert lists["layer_norm"] == lists["pow.Tensor_Scalar"] == lists["nll_loss"] == "float32"
    assert lists["softmax.int"] == lists["sum"] == lists["cumsum"] == "float32 dtype"
    assert lists["index_put"] == "promote"
    assert len(lists) > 90


LOW, FULL = torch.float16, torch.float32
UNARY = [
    ("softmax", lambda x: torch.softmax(x, -1)),
    ("log_softmax", lambda x: torch.log_softmax(x, -1)),
    ("layer_norm", lambda x: torch.nn.functional.layer_norm(x, (4,))),
    ("pow", lambda x: x.pow(2)),
    ("rsqrt", lambda x: x.rsqrt()),
    ("exp", lambda x: x.exp()),
    ("sum", lambda x: x.sum()),
    ("norm", lambda x: x.norm()),
]


@pytest.mark.parametrize(("name", "run"), UNARY, ids=[name for name, _ in UNARY])
def test_what_cuda_lists_as_float32_is_float32(name: str, run: object) -> None:
    assert under(LOW, lambda: run(A.half())).dtype == FULL  # type: ignore[operator]


@pytest.mark.parametrize(
    "run",
    [lambda: A @ A, lambda: torch.nn.functional.linear(A, A), lambda: torch.bmm(A[None], A[None]), lambda: torch.einsum("ij,jk", A, A)],
)
def test_products_are_in_the_lower_precision(run: object) -> None:
    assert under(LOW, run).dtype == LOW
    assert under(torch.bfloat16, run).dtype == torch.bfloat16


@pytest.mark.parametrize("run", [lambda: A.half() + 1, lambda: torch.relu(A.half()), lambda: A.half().mean(), lambda: A.half().tanh()])
def test_what_no_list_names_keeps_its_dtype(run: object) -> None:
    assert under(LOW, run).dtype == LOW


def test_the_cpu_differs_where_the_emulation_changes_it_and_is_put_back() -> None:
    plain = [under(LOW, partial(run, A.half()), emulate=False).dtype for _, run in UNARY]
    assert LOW in plain
    with pytest.raises(ZeroDivisionError), cuda_policies(GPUS["A100"], autocast=True):
        raise ZeroDivisionError
    assert [under(LOW, partial(run, A.half()), emulate=False).dtype for _, run in UNARY] == plain


@pytest.mark.parametrize(
    ("gpu", "dtype", "head_dim", "masked", "kernel"),
    [
        ("A100", torch.float16, 64, False, "flash"),
        ("H100", torch.bfloat16, 128, False, "cudnn"),
        ("H100", torch.float16, 64, True, "cudnn"),
        ("H100", torch.float16, 20, False, "flash"),
        ("H100", torch.float32, 64, False, "efficient"),
        ("A100", torch.float16, 64, True, "efficient"),
        ("A100", torch.float32, 64, False, "efficient"),
        ("A100", torch.float16, 512, False, "efficient"),
        ("A100", torch.float16, 20, True, "math"),  # rows of 40 bytes: tensor cores read 16 at a time
        ("T4", torch.float32, 9, True, "efficient"),  # no tensor cores for float32 before Ampere
        ("T4", torch.float16, 64, False, "efficient"),
        ("T4", torch.bfloat16, 64, False, "math"),
        ("H100", torch.float64, 64, False, "math"),
    ],
)
def test_the_attention_kernel_follows_card_dtype_head_and_mask(
    gpu: str, dtype: torch.dtype, head_dim: int, masked: bool, kernel: str
) -> None:
    assert attention_kernel(GPUS[gpu], dtype=dtype, head_dim=head_dim, masked=masked) == kernel


def test_values_of_another_head_size_go_to_the_efficient_kernel_and_keep_it() -> None:
    with fake_mode(), cuda_policies(GPUS["A100"], autocast=False):
        query = torch.empty(2, 4, 16, 24, dtype=torch.float16, requires_grad=True)
        value = torch.empty(2, 4, 16, 16, dtype=torch.float16, requires_grad=True)
        out = torch.nn.functional.scaled_dot_product_attention(query, query, value, is_causal=True)
        out.sum().backward()
        assert out.shape == value.shape and value.grad is not None and value.grad.shape == value.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("left", "right", "rows"),
    [((10, 8), (3, 8, 16), 10), ((3, 10, 8), (3, 8, 16), None), ((16, 24), (24, 16), 24), ((3, 10, 8), (8, 24), 24)],
)
def test_grouped_products_of_fake_tensors_have_the_shape_and_dtype_of_real_ones(
    dtype: torch.dtype, left: tuple[int, ...], right: tuple[int, ...], rows: int | None
) -> None:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")

    def product() -> tuple[torch.Size, torch.dtype, int]:
        ends = None if rows is None else torch.tensor([0, 8, rows], dtype=torch.int32)
        out = torch.nn.functional.grouped_mm(torch.ones(left, dtype=dtype), torch.ones(right, dtype=dtype), offs=ends)
        return out.shape, out.dtype, out.untyped_storage().nbytes()

    with fake_mode(), values_unread():
        fake = product()
    assert fake == product()


@pytest.mark.parametrize(("heads", "masked"), [(4, False), (2, False), (4, True)])
def test_attention_with_fewer_key_heads_masks_and_odd_head_sizes_runs_forward_and_backward(heads: int, masked: bool) -> None:
    with fake_mode(), cuda_policies(GPUS["A100"], autocast=False):
        query = torch.empty(2, 4, 16, 12, dtype=torch.float16, requires_grad=True)
        key = torch.empty(2, heads, 16, 12, dtype=torch.float16, requires_grad=True)
        mask = torch.empty(1, 1, 16, 16, dtype=torch.bool) if masked else None
        out = torch.nn.functional.scaled_dot_product_attention(query, key, key, mask, is_causal=not masked, enable_gqa=heads != 4)
        assert out.shape == query.shape and out.dtype == torch.float16
        out.sum().backward()
        assert query.grad is not None and key.grad is not None and key.grad.shape == key.shape


def test_the_search_for_packed_documents_is_off_inside_and_on_again_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("transformers.masking_utils")
    module.find_packed_sequence_indices = lambda position_ids: "searched"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", module)
    with no_packed_sequences():
        assert module.find_packed_sequence_indices(None) is None
    assert module.find_packed_sequence_indices(None) == "searched"
