"""What happens on a device that is no CPU, as far as it can be shown without one: bad indices, lost contexts, no memory.

`python -m tests.gpu --only bug` shows the same on a card.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from olmodebug.casts import cast
from olmodebug.child import run
from olmodebug.device_errors import is_lost, memory_left
from olmodebug.errors import SubjectError
from olmodebug.examine import first_cause, run_probe
from olmodebug.on_device import _IndexChecked, index_checked
from olmodebug.probe import select, shipped_probes
from olmodebug.process import launched
from olmodebug.spec import Job, resolve
from olmodebug.subject import Subject
from olmodebug.tracing.tracer import record

ASSERT = "CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in the manual"


@pytest.mark.parametrize(
    "op",
    [
        lambda: nn.functional.embedding(torch.tensor([[1, 7]]), torch.rand(7, 3)),
        lambda: torch.rand(4, 3)[torch.tensor([0, 4])],
        lambda: torch.rand(4, 3).gather(1, torch.tensor([[3]])),
        lambda: nn.functional.cross_entropy(torch.rand(2, 5), torch.tensor([1, 5])),
        lambda: torch.multinomial(torch.tensor([0.5, float("nan")]), 1),
    ],
    ids=["embedding", "index", "gather", "label", "multinomial"],
)
def test_a_bad_index_raises_the_words_of_the_cpu_before_the_op_runs(op, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((IndexError, RuntimeError)) as plain:
        op()
    ran: list[str] = []
    cpu = Tensor.cpu

    def host(tensor: Tensor, *args: object) -> Tensor:
        ran.append("looked at on the host")
        return cpu(tensor)

    monkeypatch.setattr(Tensor, "cpu", host)
    with pytest.raises(type(plain.value)) as checked, _IndexChecked():
        op()
    assert ran and str(checked.value) == str(plain.value)


def test_a_bad_index_is_met_under_the_tracer_too_and_good_ones_pass() -> None:
    table = nn.Embedding(7, 3)
    with _IndexChecked():
        recording = record(table, lambda: table(torch.tensor([1, 6])))
        assert recording.events[-1].op == "embedding"
        with pytest.raises(IndexError):
            record(table, lambda: table(torch.tensor([1, 7])))


def test_on_the_cpu_nothing_is_looked_at() -> None:
    assert not isinstance(index_checked(torch.device("cpu")), _IndexChecked)
    assert isinstance(index_checked(torch.device("cuda")), _IndexChecked)
    assert launched("cpu") == {} and launched("cuda:1") == {"CUDA_LAUNCH_BLOCKING": "1"}


def test_an_assert_is_a_loss_and_no_memory_is_none() -> None:
    assert is_lost(RuntimeError(ASSERT))
    outer = ValueError("first run")
    outer.__cause__ = RuntimeError(ASSERT)
    assert is_lost(outer)
    assert not is_lost(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_lost(RuntimeError("CUDA error: out of memory"))
    assert not is_lost(RuntimeError("The size of tensor a (3) must match"))


def test_an_assert_in_a_group_of_errors_is_a_loss_too() -> None:
    """As hypothesis raises it: the first failing run stops the device, and each that repeats it fails elsewhere."""
    both = ExceptionGroup("Inconsistent results from replaying a test case!", [RuntimeError(ASSERT), RuntimeError(ASSERT)])
    assert is_lost(both) and first_cause(both) is both.exceptions[0]
    assert not is_lost(ExceptionGroup("two checks failed", [ValueError("a shape"), torch.OutOfMemoryError("CUDA out of memory")]))


def stopping(subject: Subject, message: str) -> Subject:
    """The subject on a device that stops at its next forward."""

    def forward(*args: object, **kwargs: object) -> None:
        raise RuntimeError(message)

    subject.model.forward = forward  # type: ignore[method-assign]
    return replace(subject, _twins={}, _last=[])


def test_a_lost_device_is_one_finding_and_what_comes_after_is_left_out() -> None:
    subject = stopping(resolve(Job(spec="olmo2-tiny")), ASSERT)
    first, second = select(shipped_probes(), "causality.no-future or batch.rows-independent")
    results = [run_probe(probe, subject) for probe in (first, second)]
    (finding,) = results[0].findings
    assert results[0].outcome.status == "failed"
    assert finding.message == "the device stopped: CUDA error: device-side assert triggered"
    assert results[1].outcome.status == "skipped" and results[1].outcome.reason == f"the device was lost under {first.name}"


def test_a_child_ends_where_its_device_is_lost_so_that_another_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict] = []  # type: ignore[type-arg]

    class Ended(BaseException):
        pass

    def leave(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("olmodebug.examine.resolve", lambda job: stopping(resolve(job), ASSERT))
    job = {"spec": "olmo2-tiny"}
    order = {"job": job, "select": "causality.no-future or batch.rows-independent", "own_probes": [], "quick": False, "expected": {}}
    with pytest.raises(Ended):
        run(
            {**order, "command": "test", "stored": {}, "done": [], "failed": []},
            lambda event, **fields: told.append({"event": event, **fields}),
        )
    results = [event["outcome"] for event in told if event["event"] == "result"]
    assert [outcome["status"] for outcome in results] == ["passed", "passed", "failed"]


class Full(nn.Module):
    def to(self, *args: object, **kwargs: object) -> nn.Module:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")


def test_a_device_without_memory_for_the_model_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 8 << 30))
    with pytest.raises(SubjectError, match=r"^--device cuda: no memory for the model there \(1.00 GiB of 8.00 GiB are free\)$"):
        cast(Full(), None, device=torch.device("cuda"))
    monkeypatch.undo()
    assert memory_left(torch.device("cuda")) == "" or torch.cuda.is_available()


def test_weights_are_cast_before_they_are_moved() -> None:
    class Told(nn.Module):
        def to(self, target: object) -> nn.Module:  # type: ignore[override]
            asked.append(target)
            return self

    asked: list[object] = []
    cast(Told(), torch.bfloat16, device=torch.device("cpu"))
    assert asked == [torch.bfloat16, torch.device("cpu")]
