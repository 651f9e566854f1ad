"""Two executions of one model in this process: clean ones agree, and a fault is found where it is."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor

import olmodebug.report
from olmodebug.environment import environment
from olmodebug.executions.bundle import Bundle, Writer, read_bundle
from olmodebug.executions.cases import cases_of
from olmodebug.executions.compare import compare
from olmodebug.executions.execution import parse
from olmodebug.executions.findings import findings
from olmodebug.executions.run import Options, bits, run_parity
from olmodebug.records import Event, Where
from olmodebug.report import plain
from olmodebug.spec import Job, resolve
from olmodebug.tracing.recording import Moment

SCHEMA = json.loads(Path(olmodebug.report.__file__).with_name("report.schema.json").read_text(encoding="utf-8"))
PARITY = SCHEMA["properties"]["sections"]["properties"]["parity"]


SILU = 102  # the index of the one silu of a padded forward


def ran(
    folder: Path,
    execution: str,
    *,
    only: tuple[str, ...] = ("padded", "step"),
    weights: str = "bfloat16",
    replace: Any = None,
    **config: Any,
) -> Bundle:
    """The bundle of one execution of the smallest OLMo 2."""
    job = Job(spec="olmo2-tiny", config={"num_hidden_layers": 1, **config})
    subject, how = resolve(job), parse(execution)
    writer = Writer(folder=folder)
    head = {"execution": {**asdict(how), "flags": list(how.flags)}, "words": how.words, "weights": weights, "job": {"spec": job.spec}}
    writer.open(head | {"environment": plain(environment(seed=0, command="test")), "subject": plain(subject.info())})
    options = Options(judged=how.dtype != "float64", journal=False, repeat=False, replace=replace)
    run_parity(subject, how, cases_of(subject, only), writer, tell=lambda *_, **__: None, options=options, weights=weights)
    writer.close()
    return read_bundle(folder)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return ran(tmp_path_factory.mktemp("truth"), "cpu,float64")


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return ran(tmp_path_factory.mktemp("low"), "cpu,bfloat16")


def test_bfloat16_agrees_with_float64_and_every_op_is_judged(truth: Bundle, low: Bundle) -> None:
    found = compare(truth, low)
    section = found.section
    jsonschema.validate({"runs": [section]}, PARITY)
    assert section["verdict"] == "agrees"
    assert section["coverage"] == 1.0
    assert section["first"] is None
    assert section["ops"]["diverged"] == section["ops"]["explained"] == 0
    assert 1e-4 < next(row["drift"] for row in section["layers"] if row["module"] == "lm_head") < 0.1
    assert [item["behaves_like"] for item in section["products"]] == ["float32 sums, one rounding to bf16"]
    assert section["decisions"]["changed"] == 0
    assert findings(found, low, scripts=None) == []


def test_hidden_positions_are_not_compared(low: Bundle) -> None:
    (case,) = (c for c in cases_of(resolve(Job(spec="olmo2-tiny")), ("padded",)))
    mask = case.case.attention_mask
    assert mask is not None
    logits = low.tensor("padded/logits")
    assert logits is not None and logits.shape[:2] == (1, sum(map(sum, mask)))


def attention(output: Tensor, *rest: Tensor, bias: Tensor | None = None) -> Moment:
    event = Event(index=0, op="_scaled_dot_product_efficient_attention", where=Where())
    return Moment(event=event, spot=None, arguments={"attn_bias": bias}, inputs=[], outputs=[output, *rest])


def test_what_fused_attention_leaves_undefined_is_not_asked_to_repeat() -> None:
    output, other = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4)
    bias = torch.zeros(1, 1, 3, 3)
    bias[:, :, 0] = -torch.inf  # the first query sees nothing
    blind = output.clone()
    blind[:, :, 0] = 7.0
    assert bits(attention(output, torch.tensor(1))) == bits(attention(output, torch.tensor(2)))
    assert bits(attention(output, bias=bias)) == bits(attention(blind, bias=bias))
    assert bits(attention(output)) != bits(attention(blind))
    assert bits(attention(output, bias=bias)) != bits(attention(other, bias=bias))


def test_a_backward_op_is_judged_like_a_forward_one(low: Bundle) -> None:
    phases = {op["phase"] for op in low.of("op") if op["judged"]["verdict"] == "within"}
    assert phases >= {"forward", "backward"}


def test_another_eps_is_named_before_any_number(truth: Bundle, tmp_path: Path) -> None:
    other = ran(tmp_path, "cpu,float64", norm_eps=1e-5)
    found = findings(compare(truth, other), other, scripts=None)
    assert found[0].probe == "parity.arguments"
    assert "1e-05, and with 1e-06 on the left" in found[0].message
    assert found[0].where.function == "OlmoRMSNorm.forward"


def test_a_weight_that_is_not_the_same_is_named(truth: Bundle, tmp_path: Path) -> None:
    other = read_bundle(truth.folder)
    digests = next(other.of("weights"))["digests"]
    digests["model.layers.0.mlp.up_proj.weight"] += 1
    found = findings(compare(truth, other), other, scripts=None)
    assert found[0].probe == "parity.weights"
    assert found[0].message.startswith("model.layers.0.mlp.up_proj.weight did not start from the same numbers")


def test_a_wrong_op_comes_with_its_line_and_a_script_that_shows_it_alone(
    truth: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess
    import sys

    def wrong_element(index: int, outputs: list[torch.Tensor]) -> None:
        if index == SILU:
            outputs[0].view(-1)[5] += 0.01

    bundle = ran(tmp_path / "run", "cpu,bfloat16", only=("padded",), replace=wrong_element)
    monkeypatch.chdir(tmp_path)
    found = findings(compare(truth, bundle), bundle, scripts=tmp_path / "scripts")
    assert [f.probe for f in found if f.severity == "error"] == ["parity.ops"]
    first = found[0]
    assert (first.where.op, first.where.function) == ("silu", "OlmoMLP.forward")
    assert str(first.evidence["elements_outside"]).startswith("1 of ")
    done = subprocess.run([sys.executable, str(first.evidence["script"])], capture_output=True, text=True, check=True)
    recorded, again = done.stdout.splitlines()
    assert recorded.startswith("recorded largest error 0.0099")
    assert float(again.split()[3]) < 1e-2  # the genuine kernel
