"""The matrices of a model as an initialisation sees them: their role, their std, and the std that most of them share."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from .subject import Subject

# A sample std of n normal numbers is off by 1/sqrt(2n) of itself; 5 of these leave one false alarm in a million tensors.
SIGMAS = 5.0
RESIDUAL = ("o_proj", "out_proj", "c_proj", "wo", "w2", "down_proj", "dense_4h_to_h", "fc2", "fc_out", "ff_out", "attn_out", "w_out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A matrix of the model: its path, the last part of its module's name, its std and how many numbers it is made of."""

    name: str
    role: str
    tensor: Tensor
    std: float

    def near(self, std: float) -> bool:
        """Whether its std can be this one, within sampling error."""
        error = SIGMAS / math.sqrt(2 * self.tensor.numel())
        return abs(self.std / std - 1) <= max(error, 0.03) if std > 0 else self.std == 0


def weights_of(model: nn.Module) -> list[Weight]:
    weights = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and min(parameter.shape) > 1 and parameter.is_floating_point():
            role = name.split(".")[-2] if name.endswith((".weight", ".bias")) else name.split(".")[-1]
            weights.append(Weight(name=name, role=role, tensor=parameter.detach(), std=float(parameter.detach().double().std())))
    return weights


def shared_std(subject: Subject, weights: list[Weight]) -> float | None:
    """The std that most matrices share: the declared one where it fits, else that of the first of them."""
    others = [w for w in weights if w.role not in RESIDUAL]
    declared = subject.setting("initializer_range", "init_std")
    candidates = [declared] if isinstance(declared, float) and declared > 0 else []
    candidates += [w.std for w in sorted(others, key=lambda w: -w.tensor.numel())[:3] if w.std > 0]
    for candidate in candidates:
        if 2 * sum(w.near(candidate) for w in others) > len(others):
            return float(candidate)
    return None
