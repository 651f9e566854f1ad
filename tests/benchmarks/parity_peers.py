"""The rules of others for two tensors that should agree, as their sources or documents state them, re-implemented here.

Each takes candidate, reference and float64 baseline of one op, all of free-running models, and says whether it flags the op.
`TorchLens` compares with the baseline alone; `AWS` and `same` are given a float64 baseline, which favours AWS (float32).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCES = {torch.float32: (1.3e-6, 1e-5), torch.float16: (1e-3, 1e-5), torch.bfloat16: (1.6e-2, 1e-5)}


def assert_close(candidate: Tensor, reference: Tensor, baseline: Tensor, dtype: torch.dtype) -> bool:
    """torch.testing.assert_close with its own defaults for the dtype."""
    relative, absolute = TOLERANCES[dtype]
    error = (candidate - reference).abs()
    return bool((~(error <= absolute + relative * reference.abs()) & ~(candidate == reference)).any())


def msprobe(candidate: Tensor, reference: Tensor, baseline: Tensor, dtype: torch.dtype) -> bool:
    """msprobe's first difference: a summary statistic (max, min, mean, norm) that differs by half of itself."""
    for statistic in (torch.amax, torch.amin, torch.mean, torch.linalg.vector_norm):
        a, b = float(statistic(candidate)), float(statistic(reference))
        if b != 0 and not abs((a - b) / b) <= 0.5:
            return True
    return False


def aws_ratio(candidate: Tensor, reference: Tensor, baseline: Tensor, dtype: torch.dtype) -> bool:
    """AWS Neuron's three-way rule: the error over the reference's own error, in the largest and the Euclidean norm, at 1.5."""
    mine, own = candidate - baseline, reference - baseline
    for norm in (math.inf, 2):
        a, b = (float(torch.linalg.vector_norm(e, ord=norm)) for e in (mine, own))
        if not a <= 0 and not a < 1.5 * b:
            return True
    return False


def torch_same(candidate: Tensor, reference: Tensor, baseline: Tensor, dtype: torch.dtype) -> bool:
    """torch._dynamo.utils.same with a float64 reference: allclose at 1e-3, else root mean squares within two or three times."""
    tolerance = 1e-3
    if torch.allclose(reference, candidate, atol=tolerance, rtol=tolerance):
        return False
    multiplier = 3.0 if dtype != torch.float32 or candidate.numel() < 1000 else 2.0
    mine, own = (float((x - baseline).square().mean().sqrt()) for x in (candidate, reference))
    return not mine <= multiplier * own + tolerance / 10


def sglang(candidate: Tensor, reference: Tensor, baseline: Tensor, dtype: torch.dtype) -> bool:
    """SGLang's comparator: 1 - 2<x,y> / (|x|^2 + |y|^2) above 1e-3; two tensors of zeros are equal."""
    if torch.equal(candidate, reference):
        return False
    return not float(1 - 2 * (candidate * reference).sum() / (candidate.square().sum() + reference.square().sum() + 1e-300)) <= 1e-3


def torchlens(candidate: Tensor, reference: Tensor, baseline: Tensor, dtype: torch.dtype) -> bool:
    """TorchLens' bisect_precision: against the model in float64, rtol the root of the dtype's eps and atol ten of them."""
    eps = torch.finfo(dtype).eps
    error = (candidate - baseline).abs()
    return bool((~(error <= 10 * eps + math.sqrt(eps) * baseline.abs()) & ~(candidate == baseline)).any())


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor, torch.dtype], bool]] = {
    "assert_close": assert_close,
    "msprobe first difference 0.5": msprobe,
    "AWS ratio 1.5": aws_ratio,
    "PyTorch same()": torch_same,
    "SGLang rel_diff 1e-3": sglang,
    "TorchLens bisect": torchlens,
}
