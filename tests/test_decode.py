"""Logs decoded: assertion lines folded, kernels named, causes ranked, memory verdicts."""

import subprocess
import sys
from pathlib import Path

import pytest

from olmodebug.cli import main
from olmodebug.guards.decode import decode
from olmodebug.guards.signatures import SIGNATURES

THREADS = "".join(
    f"../aten/src/ATen/native/cuda/IndexKernel.cu:92: operator(): block: [0,0,0], thread: [{i},0,0] Assertion "
    '`index >= -sizes[i] && index < sizes[i] && "index out of bounds"` failed.\n'
    for i in range(40)
)
TRACEBACK = """Traceback (most recent call last):
  File "/home/me/train.py", line 31, in <module>
    loss = model(ids)
  File "/home/me/env/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1750, in _call_impl
    return forward_call(*args, **kwargs)
  File "/home/me/model.py", line 88, in forward
    cos = self.cos[position_ids]
RuntimeError: CUDA error: device-side assert triggered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
"""
LOSS = (
    "../aten/src/ATen/native/cuda/Loss.cu:250: nll_loss_forward_reduce_cuda_kernel_2d: block: [0,0,0], thread: [4,0,0] "
    "Assertion `t >= 0 && t < n_classes` failed."
)
EMBEDDING = (
    "/pytorch/aten/src/ATen/native/cuda/Indexing.cu:1289: indexSelectLargeIndex: block: [193,0,0], thread: [64,0,0] "
    "Assertion `srcIndex < srcSelectDimSize` failed."
)
SCATTER = (
    "ScatterGatherKernel.cu:144: operator(): block: [3,0,0], thread: [24,0,0] "
    'Assertion `idx_dim >= 0 && idx_dim < index_size && "index out of bounds"` failed.'
)
MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.07 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
    "1.20 GiB is free. Including non-PyTorch memory, this process has 77.90 GiB memory in use. Of the allocated memory "
    "60.10 GiB is allocated by PyTorch, and {} GiB is reserved by PyTorch but unallocated."
)


def test_dozens_of_assertion_lines_are_one_fault_with_the_users_line() -> None:
    (found,) = decode(THREADS + TRACEBACK)
    assert found.name == "index-kernel"
    assert found.folded == 40
    assert found.place == "/home/me/model.py:88 in forward"
    assert found.asynchronous
    assert found.causes[0].because  # cos and position stand in the traceback
    assert "position" in found.causes[0].cause.text
    assert found.command == "olmodebug run --guard index -- YOUR COMMAND"


@pytest.mark.parametrize(
    ("log", "name"),
    [
        (LOSS, "cross-entropy-target"),
        (EMBEDDING, "embedding"),
        (SCATTER, "gather-scatter"),
        ("IndexError: Target 10 is out of bounds.", "cross-entropy-target"),
        ("IndexError: index out of range in self", "embedding"),
        ("RuntimeError: probability tensor contains either `inf`, `nan` or element < 0", "multinomial"),
        ("RuntimeError: The size of tensor a (2) must match the size of tensor b (11) at non-singleton dimension 2", "shapes"),
        ("RuntimeError: mat1 and mat2 shapes cannot be multiplied (22x48 and 64x97)", "matmul"),
        ("RuntimeError: shape '[2, 4, 11, 13]' is invalid for input of size 1056", "view"),
        ("RuntimeError: view size is not compatible with input tensor's size and stride (at least one dimension spans", "strides"),
        ("RuntimeError: Trying to backward through the graph a second time (or directly access saved tensors", "second-backward"),
        ("RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn", "no-gradient"),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", "illegal-access"),
        ("step 120 loss: nan lr 3e-4", "nan-loss"),
        ("RuntimeError: CUDA error: device-side assert triggered", "device-assert"),
        ("RuntimeError: expected scalar type Half but found Float", "dtypes"),
        ("Error(s) in loading state_dict for OlmoForCausalLM:\n Missing key(s)", "state-dict"),
    ],
)
def test_each_text_is_known_by_its_name(log: str, name: str) -> None:
    assert [found.name for found in decode(log)] == [name]


@pytest.mark.parametrize(
    ("log", "name"),
    [
        ("RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5030", "peer-lost"),
        ("RuntimeError: Application timeout caused pair closure", "collective-timeout"),
        (
            "torch.distributed.DistStoreError: wait timeout after 300000ms, keys: /default_pg/0//cuda//0",
            "collective-timeout",
        ),
        (
            "RuntimeError: Some tensors share memory, this will lead to duplicate memory on disk and potential differences when loading "
            "them again: [{'lm_head.weight', 'model.embed_tokens.weight'}].",
            "shared-tensors",
        ),
        (
            "RuntimeError: DataLoader worker (pid 4711) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
            "shared memory. Please try to raise your shared memory limit.",
            "worker-bus-error",
        ),
        ("RuntimeError: DataLoader worker (pid 4711) is killed by signal: Killed.", "cpu-memory"),
        ("RuntimeError: DataLoader worker (pid(s) 4711, 4712) exited unexpectedly", "worker-gone"),
        ("torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found in ...", "compile-failed"),
        ("RuntimeError: FlashAttention only support fp16 and bf16 data type", "flash-dtype"),
        ("huggingface/tokenizers: The current process just got forked, after parallelism has already been used.", "tokenizers-fork"),
    ],
)
def test_texts_of_processes_and_kernels_around_the_model_are_known(log: str, name: str) -> None:
    found = decode(f"step 10 loss 3.2\n{log}\n")
    assert [each.name for each in found] == [name]


def test_what_the_cpu_really_raises_is_known() -> None:
    import torch
    import torch.nn.functional as F

    x = torch.randn(5, 10)
    runs = {
        "index-kernel": lambda: x[torch.tensor([5])],
        "embedding": lambda: F.embedding(torch.tensor([5]), x),
        "cross-entropy-target": lambda: F.cross_entropy(x, torch.tensor([1, 2, 3, 10, 5])),
        "multinomial": lambda: torch.multinomial(torch.tensor([0.5, float("nan")]), 1),
        "shapes": lambda: x + torch.randn(4, 10),
        "matmul": lambda: x @ x,
        "view": lambda: x.view(3, 17),
        "strides": lambda: x.T.view(-1),
        "no-gradient": lambda: x.sum().backward(),
        "dtypes": lambda: x @ x.T.double(),
    }
    for name, run in runs.items():
        with pytest.raises((RuntimeError, IndexError)) as raised:
            run()
        assert [found.name for found in decode(f"{type(raised.value).__name__}: {raised.value}")] == [name]


def test_memory_in_pieces_is_told_from_memory_that_is_missing() -> None:
    pieces, need = decode(MEMORY.format("16.80"))[0], decode(MEMORY.format("0.40"))[0]
    assert pieces.verdict is not None and pieces.verdict.startswith("fragmentation: 16.8 GiB")
    assert need.verdict is not None and need.verdict.startswith("need: 410 MiB")


def test_an_ordinary_log_says_nothing() -> None:
    assert decode("epoch 3 loss 2.31 lr 3e-4\nsaved checkpoint\n") == ()
    assert decode("loss: information at step 3\nnan_to_num applied") == ()


def test_every_signature_has_causes_that_can_be_told_apart() -> None:
    for signature in SIGNATURES:
        assert signature.causes and all(cause.text and cause.tell for cause in signature.causes), signature.name


def test_explain_reads_a_file_and_standard_input_and_probes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.txt"
    log.write_text(THREADS + TRACEBACK)
    assert main(["explain", str(log)]) == 0
    assert "40 assertion lines" in capsys.readouterr().out
    assert main(["explain", "causality.no-future"]) == 0
    assert capsys.readouterr().out.startswith("causality.no-future")
    assert main(["explain", "index.in-bounds"]) == 0
    assert "before the kernel is launched" in capsys.readouterr().out
    assert main(["explain", "causality.no-futur"]) == 2
    assert "causality.no-future" in capsys.readouterr().err
    log.write_text("nothing of interest")
    assert main(["explain", str(log)]) == 5


def test_explain_loads_no_torch() -> None:
    code = "import sys; from olmodebug.cli import main; main(['explain', 'index.in-bounds']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
