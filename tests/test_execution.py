"""Executions as text, and torch's switches while one runs."""

import pytest
import torch

from olmodebug.errors import UsageError
from olmodebug.executions.execution import Execution, applied, defaults, parse


def test_the_parts_of_an_execution_stand_in_any_order() -> None:
    expected = Execution(device="cuda:1", dtype="bfloat16", attention="sdpa", compile="aot_eager", flags=("tf32",))
    assert parse("sdpa,cuda:1,tf32,bf16,compile=aot_eager") == expected
    assert str(expected) == "cuda:1,bfloat16,sdpa,compile=aot_eager,tf32"
    assert parse(str(expected)) == expected


def test_a_part_that_means_nothing_is_named() -> None:
    with pytest.raises(UsageError, match="'gpu' is none of cpu, cuda"):
        parse("gpu,float32")
    with pytest.raises(UsageError, match="compile=fast is none of inductor"):
        parse("compile=fast")


def test_cuda_is_compared_in_four_precisions_and_the_cpu_in_three() -> None:
    truth, rights = defaults("cuda", None)
    assert str(truth) == "cpu,float64"
    assert [str(r) for r in rights] == ["cuda,float32", "cuda,float32,tf32", "cuda,bfloat16", "cuda,float16"]
    assert [r.dtype for r in defaults("cpu", None)[1]] == ["float32", "bfloat16", "float16"]


def test_a_device_gets_blocking_launches_before_it_starts_and_the_cpu_nothing() -> None:
    assert parse("cuda,float32").environment == {"CUDA_LAUNCH_BLOCKING": "1"}
    assert parse("cpu,float32,tf32").environment == {}


def test_switches_are_put_back_also_after_an_exception() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    with pytest.raises(ZeroDivisionError), applied(parse("cpu,float32,medium")):
        assert torch.get_float32_matmul_precision() == "medium"
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        raise ZeroDivisionError
    assert (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction) == before
