"""`olmodebug parity` as people run it: children that die, hang and run out, bundles, a revision, and no CUDA."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command import run_here

ROOT = Path(__file__).parents[1]
HEAD = '''"""A subject that fails in its second layer, and only while it is compared."""
import os, time
import torch
from olmodebug.model import Olmo, OlmoMLP
from olmodebug.presets import preset

def build():
    torch.manual_seed(0)
    model = Olmo(preset("olmo2-tiny"))
    model.model.layers[1].mlp.__class__ = Failing
    return model

class Failing(OlmoMLP):
    def forward(self, hidden_states):
        if hidden_states.shape[1] > 20:
            {action}
        return super().forward(hidden_states)
'''


def olmodebug(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "olmodebug", "parity", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment, timeout=300, check=False, **options)


def failing(folder: Path, action: str) -> str:
    (folder / "twin.py").write_text(HEAD.format(action=action))
    return "twin.py:build"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_a_cuda_execution_is_one_line_and_exit_2(tmp_path: Path) -> None:
    done = olmodebug(tmp_path, "olmo2-tiny", "--left", "cuda,float32", "--right", "cuda,float16")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("olmodebug: --device cuda: CUDA is not available here")


def test_a_bundle_that_is_none_and_an_execution_that_means_nothing_are_exit_2(tmp_path: Path) -> None:
    done = run_here(tmp_path, "parity", "a.bundle", "b.bundle")
    assert done.returncode == 2
    assert "a.bundle is no bundle" in done.stderr
    done = run_here(tmp_path, "parity", "olmo2-tiny", "--right", "cpu,float31")
    assert done.returncode == 2
    assert "'float31' is none of cpu" in done.stderr


@pytest.mark.parametrize("spec", ["transformers:LlamaForCausalLM", "transformers:GPT2LMHeadModel"])
def test_a_right_model_of_transformers_agrees_in_bfloat16(spec: str, tmp_path: Path) -> None:
    done = run_here(tmp_path, "parity", spec, "--dtype", "bfloat16", "--case", "long", "--once", "--json", "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert [finding["message"] for finding in report["findings"] if finding["severity"] != "note"] == []
    assert (done.returncode, report["verdict"]) == (0, "pass")
    assert {outcome["probe"] for outcome in report["outcomes"] if outcome["status"] == "passed"} >= {"parity.runs", "parity.ops"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "says"),
    [
        ("os.abort()", "died of SIGABRT while it ran the case long"),
        ("os.kill(os.getpid(), 9)", "died of SIGKILL while it ran the case long"),
        ("time.sleep(600)", "gave no answer for 12 s while it ran the case long"),
        ("torch.empty(1 << 45, dtype=torch.uint8)", "ran out of memory"),
        ("torch.zeros(4)[torch.arange(5)]", "raises IndexError: index 4 is out of bounds"),
    ],
)
def test_a_child_that_dies_is_a_finding_with_the_line(tmp_path: Path, action: str, says: str) -> None:
    done = olmodebug(tmp_path, failing(tmp_path, action), "--dtype", "bfloat16", "--once", "--case", "long", "--timeout", "12")
    assert done.returncode == 1, done.stderr
    assert says in done.stdout
    # What is killed from outside leaves no frame: the last op that began is in the layer around it.
    place = "module model.layers.1" if "SIGKILL" in says else "twin.py:16 in "
    assert place in done.stdout
    assert "Traceback" not in done.stderr


RAISES = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 12), nn.Linear(12, 31)

    def forward(self, idx):
        return self.head(self.embed(idx) @ torch.zeros(3, 3))
"""


def test_a_model_whose_every_forward_raises_is_a_finding_and_no_fault_of_ours(tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text(RAISES)
    done = run_here(tmp_path, "parity", "raises.py:Model", "--dtype", "bfloat16")
    assert done.returncode == 1, done.stderr
    assert "raises.py:11 in Model.forward" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_case_that_is_not_for_this_model_is_no_pass(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(RAISES.replace(" @ torch.zeros(3, 3)", ""))
    done = run_here(tmp_path, "parity", "plain.py:Model", "--dtype", "bfloat16", "--case", "decode")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("olmodebug: --case decode: not for this model")


WRONG_GATE = """
class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.nn.functional.silu(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.sigmoid(ctx.saved_tensors[0])
"""


@pytest.mark.slow
def test_a_wrong_backward_carries_a_script_that_runs_alone(tmp_path: Path) -> None:
    spec = failing(tmp_path, "return self.down_proj(Gate.apply(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))")
    text = (tmp_path / "twin.py").read_text().replace("if hidden_states.shape[1] > 20", "if True")
    (tmp_path / "twin.py").write_text(text + WRONG_GATE)
    done = olmodebug(tmp_path, spec, "--dtype", "bfloat16", "--case", "long", "--once", "--json", "out.json")
    assert done.returncode == 1, done.stderr
    findings = json.loads((tmp_path / "out.json").read_text())["findings"]
    (wrong,) = (f for f in findings if f["probe"] == "parity.derivative")
    line = [sys.executable, "-I", str(tmp_path / wrong["evidence"]["script"])]
    alone = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path.parent, check=True)
    gap, size = next(row for row in alone.stdout.splitlines() if row.startswith("gate_proj.weight")).split()[3::2]
    assert float(gap) > 0.01 * float(size)


@pytest.mark.slow
def test_bundles_are_kept_and_compared_later(tmp_path: Path) -> None:
    first = olmodebug(tmp_path, "olmo2-tiny", "--dtype", "bfloat16", "--case", "padded", "--once", "--keep")
    assert first.returncode == 0, first.stdout + first.stderr
    bundles = sorted(str(p) for p in tmp_path.glob(".olmodebug/runs/*/bundles/*.bundle"))
    again = olmodebug(tmp_path, *bundles)
    assert again.returncode == 0, again.stderr
    assert "agrees  cpu bfloat16 against cpu float64" in again.stdout
    assert "parity.derivative: a bundle holds no model to ask" in again.stdout
    events = Path(bundles[0]) / "events.jsonl"
    events.write_text("\n".join(events.read_text().splitlines()[:-1]))
    cut = olmodebug(tmp_path, *bundles)
    assert cut.returncode == 2
    assert "truncated" in cut.stderr


@pytest.mark.slow
def test_eager_and_sdpa_agree_and_a_revision_with_another_eps_does_not(tmp_path: Path) -> None:
    done = olmodebug(tmp_path, "olmo2-tiny", "--left", "cpu,float32,eager", "--right", "cpu,float32,sdpa", "--case", "padded", "--once")
    assert done.returncode == 0, done.stdout + done.stderr
    text = "import torch\nfrom olmodebug.presets import preset\nfrom olmodebug.model import Olmo\nfrom dataclasses import replace\n"
    text += "def build():\n    torch.manual_seed(0)\n    return Olmo(replace(preset('olmo2-tiny'), norm_eps={eps}))\n"
    (tmp_path / "model.py").write_text(text.format(eps="1e-6"))
    for line in (["init", "-q"], ["add", "model.py"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first"]):
        subprocess.run(["git", *line], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "model.py").write_text(text.format(eps="1e-5"))
    done = olmodebug(
        tmp_path, "model.py:build", "--left", "git:HEAD:model.py:build@cpu,float32", "--right", "cpu,float32", "--case", "padded"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "add is called with other 1e-05, and with 1e-06 on the left" in done.stdout


@pytest.mark.slow
def test_an_interrupt_ends_the_child_too(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "olmodebug", "parity", failing(tmp_path, "time.sleep(600)"), "--case", "long", "--once"]
    process = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(tmp_path.glob(".olmodebug/runs/*/bundles/*/events.jsonl")):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--map", "m.json"), "--map belongs to --reference without"),
        (
            ("--reference", "olmo2-tiny", "--dtype", "float32", "--reference-config", "a=1"),
            "--reference-config belongs to --reference without",
        ),
        (("--reference", "olmo2-tiny", "--case", "decode"), "--case decode: --reference without"),
    ],
)
def test_an_option_that_would_not_be_looked_at_is_exit_2(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = run_here(tmp_path, "parity", "olmo2-tiny", *arguments)
    assert done.returncode == 2
    assert f"olmodebug: {says}" in done.stderr
