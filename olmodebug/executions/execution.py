"""How a subject is run: on which device, in which dtype, with which attention, compiled or not, under which flags.

The text form has its parts in any order, with commas: `cpu,bfloat16,sdpa`, `cuda,float32,tf32`, `cpu,float32,compile`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import UsageError
from ..process import launched
from .policies import BF16_POLICY, LOW_POLICY, REDUCED_POLICY, TF32_POLICY

DTYPES = {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}
ATTENTIONS = ("eager", "sdpa")
BACKENDS = ("inductor", "aot_eager", "eager")
FLAGS = {
    "tf32": "float32 products may be rounded to TF32",
    "reduced": "16-bit products may add partial sums in 16 bits",
    "medium": "float32 products may be rounded to bfloat16",
    "deterministic": "torch.use_deterministic_algorithms",
}
POLICIES = {"tf32": (TF32_POLICY,), "reduced": (REDUCED_POLICY, LOW_POLICY), "medium": (TF32_POLICY, BF16_POLICY)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One way to run a subject. `attention` and `compile` are None where the subject's own choice stands."""

    device: str = "cpu"
    dtype: str = "float32"
    attention: str | None = None
    compile: str | None = None
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        compiled = f"compile={self.compile}" if self.compile else None
        return ",".join(part for part in (self.device, self.dtype, self.attention, compiled, *self.flags) if part)

    @property
    def words(self) -> str:
        """For people: `cpu float64`."""
        return str(self).replace(",", " ").replace("compile=", "compiled with ")

    @property
    def declared(self) -> frozenset[str]:
        """The named policies that its flags ask for."""
        return frozenset(policy for flag in self.flags for policy in POLICIES.get(flag, ()))

    @property
    def environment(self) -> dict[str, str]:
        """What must stand in the process's environment before the device starts."""
        known = launched(self.device)
        return known | ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if known and "deterministic" in self.flags else {})


def parse(text: str, *, default: Execution | None = None) -> Execution:
    """The execution that a text names; UsageError for a part that means nothing."""
    execution = default or Execution()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = part.partition("=")
        dtype = DTYPES.get(part, part)
        if dtype in DTYPES.values():
            execution = replace(execution, dtype=dtype)
        elif part in ATTENTIONS:
            execution = replace(execution, attention=part)
        elif name == "compile":
            if equals and value not in BACKENDS:
                raise UsageError(f"execution {text!r}: compile={value} is none of {', '.join(BACKENDS)}")
            execution = replace(execution, compile=value or BACKENDS[0])
        elif part in FLAGS:
            execution = replace(execution, flags=tuple(dict.fromkeys((*execution.flags, part))))
        elif part.partition(":")[0] in ("cpu", "cuda", "mps", "xpu", "meta") and part != "meta":
            execution = replace(execution, device=part)
        else:
            known = ["cpu", "cuda", *DTYPES.values(), *ATTENTIONS, "compile", *FLAGS]
            raise UsageError(f"execution {text!r}: {part!r} is none of {', '.join(known)}")
    return execution


@contextlib.contextmanager
def applied(execution: Execution) -> Iterator[None]:
    """torch's switches as the execution asks for them, and as they were afterwards."""
    import torch

    matmul = torch.backends.cuda.matmul
    before = (
        torch.get_float32_matmul_precision(),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cudnn.allow_tf32,
    )
    deterministic = torch.are_deterministic_algorithms_enabled()
    reduced = "reduced" in execution.flags
    try:
        precision = "medium" if "medium" in execution.flags else "high" if "tf32" in execution.flags else "highest"
        torch.set_float32_matmul_precision(precision)
        matmul.allow_fp16_reduced_precision_reduction = reduced
        matmul.allow_bf16_reduced_precision_reduction = reduced
        torch.backends.cudnn.allow_tf32 = "tf32" in execution.flags
        if "deterministic" in execution.flags:  # the setter imports torch's compiler, two seconds of it
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = before[1], before[2]
        torch.backends.cudnn.allow_tf32 = before[3]
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)


def defaults(device: str, dtype: str | None) -> tuple[Execution, list[Execution]]:
    """The truth and what is compared with it: all precisions of a device in turn, or the one that is asked for."""
    truth = Execution(device="cpu", dtype="float64")
    if dtype is not None:
        return truth, [parse(f"{device},{dtype}")]
    kinds = ["float32", "bfloat16", "float16"]
    if device.partition(":")[0] == "cuda":
        kinds.insert(1, "float32,tf32")
    return truth, [parse(f"{device},{kind}") for kind in kinds]
