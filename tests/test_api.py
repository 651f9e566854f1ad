"""What `import olmodebug` offers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import olmodebug
from olmodebug.errors import SubjectError, UsageError
from olmodebug.model import Olmo
from olmodebug.presets import preset


def test_the_public_names_are_these() -> None:
    assert sorted(olmodebug.__all__) == [
        "Finding",
        "MemoryEstimate",
        "ProbeFailure",
        "Report",
        "check",
        "guard",
        "memory",
        "parametrize_with_probes",
        "parity",
        "shapes",
        "trace",
    ]


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, olmodebug; print([m for m in ('torch', 'transformers', 'rich', 'hypothesis', 'pytest') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_live_model_is_checked_and_left_as_it_was() -> None:
    model = Olmo(preset("olmo1-tiny"))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    report = olmodebug.check(model, select_probes="causality or loss or vocab")
    assert report.exit_code == 0, report
    assert report.counts.passed >= 4
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert "pass" in repr(report)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (3, {}, "expected an nn.Module or a spec such as 'my_model.py:build', not a int"),
        (Olmo, {}, "not a type .call it, and give what it returns"),
        ("olmo1-tiny", {"select_probes": "causalty.no-future"}, "no probe matches 'causalty.no-future'; did you mean causality.no-future"),
    ],
)
def test_what_cannot_be_checked_is_told_and_never_a_pass(model: object, options: dict[str, str], words: str) -> None:
    with pytest.raises((SubjectError, UsageError), match=words):
        olmodebug.check(model, **options)  # type: ignore[arg-type]


def test_a_model_that_raises_is_a_finding_not_an_exception() -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(97, 8)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.embed(input_ids) @ torch.ones(9, 97)

    report = olmodebug.check(Broken())
    assert report.exit_code == 1
    assert report.findings[0].probe == "build.runs"
    assert report.findings[0].where.function == "test_a_model_that_raises_is_a_finding_not_an_exception.Broken.forward"


def test_a_trace_names_module_function_and_line_of_every_op() -> None:
    model = Olmo(preset("olmo1-tiny"))
    recording = olmodebug.trace(model, lambda: model(torch.tensor([[5, 6, 7]])))
    softmax = [event for event in recording if "softmax" in event.op or "scaled_dot" in event.op]
    assert softmax
    assert softmax[0].where.module == "model.layers.0.self_attn"
    assert softmax[0].where.file is not None
    assert softmax[0].where.file.endswith("model.py")


def test_a_notebook_gets_a_fragment_that_says_what_the_report_says_and_escapes_it() -> None:
    from tests.test_render_formats import FINDING, REPORT

    hostile = replace(REPORT, findings=(replace(FINDING, message="<script>alert(1)</script>"),))
    text = hostile._repr_html_()
    assert "<script" not in text
    assert "<b>olmo_model.py:OLMo</b> fail: 4 ran (1 pass, 2 fail, 1 expected-fail)" in text
    assert "the scores weight[bold] get no causal mask" in text
    assert text.count("<details open>") == 1
    assert "\n" not in repr(hostile)


def test_a_notebook_gets_the_tree_of_shapes_and_python_one_line() -> None:
    tree = olmodebug.shapes(Olmo(preset("olmo1-tiny")))
    assert repr(tree).startswith("<ShapeTree Olmo: ")
    assert "\n" not in repr(tree)
    assert "q_proj" in tree._repr_html_()


def test_a_notebook_gets_the_ops_of_a_trace_and_a_long_one_is_cut_in_its_middle() -> None:
    model = Olmo(preset("olmo1-tiny"))
    recording = olmodebug.trace(model, lambda: model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward())
    text = recording._repr_html_()
    assert text.startswith("<div><p>&lt;Recording of ")
    assert "model.layers.0.self_attn" in text and "model.py:" in text and "i64[1,3]" in text
    assert text.count("<tr>") == min(len(recording), 200) + 1 and f"{len(recording) - 200} more" in text
    values = json.loads(json.dumps(recording.to_dict()))
    assert len(values["events"]) == len(recording) and values["events"][0]["op"] == recording.events[0].op


def test_every_value_has_one_line_for_python_a_fragment_for_a_notebook_and_json() -> None:
    model = Olmo(preset("olmo1-tiny"))
    ids = torch.tensor([[5, 6, 7]])
    values = {
        "Report": olmodebug.check(model, select_probes="vocab"),
        "ShapeTree": olmodebug.shapes(model),
        "Recording": olmodebug.trace(model, lambda: model(ids)),
        "MemoryEstimate": olmodebug.memory(model, batch_size=2, seq_len=16),
    }
    told = {}
    for name, value in values.items():
        assert repr(value).startswith(f"<{name} ") or repr(value).startswith(f"<{name}: "), repr(value)
        assert "\n" not in repr(value) and len(repr(value)) < 200
        assert value._repr_html_().startswith("<")
        told[name] = json.loads(value.to_json(), parse_constant=pytest.fail)
    assert told["MemoryEstimate"]["figures"]["tensors"]["expected"] == values["MemoryEstimate"].tensors.expected
    assert "at the peak, by category" in values["MemoryEstimate"]._repr_html_()
    assert told["ShapeTree"]["parameters"] == values["ShapeTree"].parameters


def test_the_package_says_that_it_is_typed() -> None:
    assert Path(olmodebug.__file__).with_name("py.typed").is_file()


@pytest.mark.slow
def test_parity_gives_a_report_with_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    same = olmodebug.parity("olmo2-tiny", dtype="bfloat16", cases=["step"])
    assert (same.exit_code, same.sections["parity"]["runs"][0]["verdict"]) == (0, "agrees")
    assert "\n" not in repr(same)


def test_live_models_are_compared_with_each_other_and_left_alone() -> None:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    models = [Olmo2ForCausalLM(Olmo2Config(**sizes, rms_norm_eps=eps, pad_token_id=None)).eval() for eps in (1e-5, 1e-5, 1e-3)]
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    assert olmodebug.parity(models[0], models[1]).verdict == "pass"  # unlike weights: both copies get those of the first
    broken = olmodebug.parity(models[2], models[0])
    assert broken.exit_code == 1
    assert "eps" in f"{broken.findings[0].message} {broken.findings[0].cause}"
    assert broken.sections["implementations"]
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(SubjectError, match=r"compared as parity\(a, b\)"):
        olmodebug.parity(models[0], models[1], dtype="bfloat16")


def test_what_runs_in_a_process_of_its_own_needs_a_spec_and_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SubjectError, match="needs a spec such as my_model.py:build"):
        olmodebug.parity(torch.nn.Linear(1, 1))
    with pytest.raises(UsageError, match="cannot be meant"):
        olmodebug.parity("olmo2-tiny", seed="zero")  # type: ignore[arg-type]
    assert "invalid int value: 'zero'" in capsys.readouterr().err
