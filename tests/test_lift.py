"""Two implementations in float64, each module on the other's inputs: every place where they part, and no other."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from olmodebug.executions.backward_alone import MOST_OPS, script_of_backward
from olmodebug.executions.derivative import underived
from olmodebug.executions.lift import calls_of, departures
from olmodebug.model import OlmoMLP
from olmodebug.records import Case
from olmodebug.spec import Job, resolve
from olmodebug.subject import Subject


@pytest.fixture(scope="module")
def reference() -> Subject:
    return resolve(Job(spec="olmo2-tiny", config={"attn_implementation": "eager"})).fresh_twin()


def case_of(subject: Subject) -> Case:
    batch, length = subject.sizes()
    return Case(name="a batch", input_ids=subject.token_ids(batch, length))


def changed(reference: Subject, change: Callable[[Any], None]) -> Subject:
    model = copy.deepcopy(reference.model)
    change(model)
    return replace(reference, model=model, _twins={}, _last=[])


class UpFirst(OlmoMLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(hidden_states)) * self.gate_proj(hidden_states))


class Detached(OlmoMLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)).detach() * self.up_proj(hidden_states))


class WrongGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * torch.sigmoid(x)  # without x * s * (1 - s)


class RightGate(WrongGate):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return gradient * gate * (1 + x * (1 - gate))


class Custom(OlmoMLP):
    gate: Any = WrongGate

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.gate.apply(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class CustomRight(Custom):
    gate = RightGate


def mlp(kind: type) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.model.layers[1].mlp.__class__ = kind

    return change


def test_a_copy_departs_nowhere(reference: Subject) -> None:
    assert departures(reference, changed(reference, lambda model: None), case_of(reference)) == []


def test_swapped_projections_are_found_in_their_module_and_not_behind_it(reference: Subject) -> None:
    found = departures(reference, changed(reference, mlp(UpFirst)), case_of(reference))
    assert [d.module for d in found] == ["model.layers.1.mlp"]
    assert found[0].where.function == "UpFirst.forward"


def test_two_faults_are_two_places(reference: Subject) -> None:
    def both(model: Any) -> None:
        model.model.layers[0].post_attention_layernorm.eps = 1e-3
        mlp(UpFirst)(model)

    found = departures(reference, changed(reference, both), case_of(reference))
    assert [d.module for d in found] == ["model.layers.0.post_attention_layernorm", "model.layers.1.mlp"]
    assert found[0].what == "add: other is 0.001, and 1e-06 in the reference"


def test_a_gradient_that_is_cut_is_found_though_the_forward_is_equal(reference: Subject) -> None:
    found = departures(reference, changed(reference, mlp(Detached)), case_of(reference))
    assert [(d.module, d.kind) for d in found] == [("model.layers.1.mlp", "backward")]


def test_a_backward_that_is_no_derivative_is_found_without_any_reference(reference: Subject) -> None:
    wrong = underived(changed(reference, mlp(Custom)), case_of(reference))
    assert [(item.module, item.function) for item in wrong] == [("model.layers.1.mlp", "WrongGate")]
    assert wrong[0].where.function == "WrongGate.backward"
    assert underived(changed(reference, mlp(CustomRight)), case_of(reference)) == []


def shown(script: str | None) -> dict[str, float]:
    """What a script of a backward alone prints, by name: the largest difference as a share."""
    done = subprocess.run([sys.executable, "-I", str(script)], capture_output=True, text=True, check=True)
    rows = [re.split(" largest difference | of ", line) for line in done.stdout.splitlines()]
    return {name: float(gap) / float(size) for name, gap, size in rows}


def test_a_wrong_backward_carries_a_script_that_shows_it(reference: Subject, tmp_path: Path) -> None:
    (wrong,) = underived(changed(reference, mlp(Custom)), case_of(reference), scripts=tmp_path)
    (cut,) = departures(reference, changed(reference, mlp(Detached)), case_of(reference), scripts=tmp_path)
    for script, least in ((wrong.script, 0.01), (cut.script, 0.99)):
        gaps = shown(script)
        assert gaps["gate_proj.weight"] > least
        assert max(gaps["up_proj.weight"], gaps["down_proj.weight"]) < 1e-12


def test_a_long_backward_has_its_ops_in_a_file_beside_the_script(reference: Subject, tmp_path: Path) -> None:
    """A model of one module has no smaller part that fails alone."""
    cut = changed(reference, mlp(Detached))
    call = calls_of(cut, case_of(reference))["model", 0]
    script = script_of_backward(cut.model.get_submodule("model"), "model", call.arguments, tmp_path)
    assert len(Path(str(script)).read_text().splitlines()) < 20
    assert len((tmp_path / "backward-model.ops.py").read_text().splitlines()) > MOST_OPS
    gaps = shown(script)
    assert gaps["layers.1.mlp.gate_proj.weight"] > 0.99
    assert gaps["norm.weight"] < 1e-6


def test_no_script_where_a_module_gives_the_gradients_of_its_ops(reference: Subject, tmp_path: Path) -> None:
    right = changed(reference, mlp(CustomRight))
    call = calls_of(right, case_of(right))["model.layers.1.mlp", 0]
    assert script_of_backward(right.model.get_submodule("model.layers.1.mlp"), "mlp", call.arguments, tmp_path) is None


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Quantized(Custom):
    gate = Rounded


def test_no_script_of_a_quantizer_whose_forward_has_no_derivative(reference: Subject, tmp_path: Path) -> None:
    quantized = changed(reference, mlp(Quantized))
    call = calls_of(quantized, case_of(quantized))["model.layers.1.mlp", 0]
    assert script_of_backward(quantized.model.get_submodule("model.layers.1.mlp"), "mlp", call.arguments, tmp_path) is None
