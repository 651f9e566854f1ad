"""A model cut at its linear head: the hidden states that go in, so that the loss can be taken chunk by chunk.

The head is the linear layer whose output the model returns as its logits, bit for bit. Where there is none (logits capped,
scaled or biased after it, or several heads) there is no cut, and the plain loss is taken.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..convention import ids_tensor
from ..own_code import quiet
from ..records import Case
from ..settle import settled
from ..subject import Subject


class _Reached(BaseException):  # noqa: N818 - no Exception: a subject's own `except Exception` must let it pass
    """The forward has come to the head."""


class HeadNotCalled(RuntimeError):
    """A forward went past the head."""


@dataclass(frozen=True, slots=True)
class Head:
    """The module whose output is the logits."""

    module: nn.Linear

    def hidden_states(self, run: Callable[[], Any]) -> Tensor:
        """What goes into the head in `run()`, `[batch, seq_len, hidden]`; the head itself is not run. HeadNotCalled where nothing does."""
        kept: list[Tensor] = []

        def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            kept.append(inputs[0])
            raise _Reached

        handle = self.module.register_forward_pre_hook(stop)
        try:
            run()
        except _Reached:
            return kept[0]
        finally:
            handle.remove()
        raise HeadNotCalled("the model returned without running its head")


def find_head(subject: Subject) -> Head | None:
    """The head of a subject, found in one short run; None where cutting it off would change the loss."""
    case = subject.first_case()
    outputs: list[tuple[nn.Linear, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda module, _, output: outputs.append((module, output)))
        for module in subject.model.modules()
        if type(module) is nn.Linear and module.bias is None
    ]
    try:
        with settled(subject.model, seed=subject.seed), torch.no_grad(), quiet():
            subject.model.eval()
            logits = subject.call(case).logits
    finally:
        for handle in handles:
            handle.remove()
    for module, output in reversed(outputs):
        if output.shape == logits.shape and torch.equal(output, logits):
            called = sum(other is module for other, _ in outputs)
            return Head(module) if called == 1 else None
    return None


def run_on(subject: Subject, ids: Tensor, *, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Any:
    """One plain call of the model on a batch of ids, no cache kept."""
    form = subject.convention
    arguments: dict[str, Any] = {form.ids: ids}
    if form.attention_mask and attention_mask is not None:
        arguments[form.attention_mask] = attention_mask == 0 if form.mask_hides else attention_mask
    if form.position_ids and position_ids is not None:
        arguments[form.position_ids] = position_ids
    if form.use_cache:
        arguments[form.use_cache] = False
    if form.labels and form.logits_need_labels:
        arguments[form.labels] = ids.clone()
    return subject.forward(arguments)


def as_case(ids: Tensor) -> Case:
    """A batch as a case, for findings."""
    return Case(name="training batch", input_ids=tuple(tuple(row) for row in ids.tolist()))


__all__ = ["Head", "as_case", "find_head", "ids_tensor", "run_on"]
