"""A compiled run against the same run uncompiled: right models agree, and what compiling changes is found and placed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from olmodebug.executions.compiled import compiler_of, departed
from olmodebug.spec import Job, resolve

ROOT = Path(__file__).parents[1]
HEAD = '''"""A tiny OLMo 2 whose second layer does something else when it is compiled."""
import torch
from olmodebug.model import Olmo, OlmoMLP
from olmodebug.presets import preset

def build():
    torch.manual_seed(0)
    model = Olmo(preset("olmo2-tiny"))
    model.model.layers[1].mlp.__class__ = Faulty
    return model

'''
BRANCH = """
class Faulty(OlmoMLP):
    def forward(self, hidden_states):
        if torch.compiler.is_compiling():
            hidden_states = hidden_states * 1.001
        return super().forward(hidden_states)
"""
IMPURE = """
class Faulty(OlmoMLP):
    def forward(self, hidden_states):
        COUNT.append(1)
        return super().forward(hidden_states * (1 + 0.01 * (len(COUNT) % 2)))
COUNT = []
"""
REFUSED = """
@torch.library.custom_op("olmodebug_test::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x * 2

@opaque.register_fake
def _(x):
    return x.new_empty(3)  # another shape

class Faulty(OlmoMLP):
    def forward(self, hidden_states):
        return super().forward(opaque(hidden_states.detach()))
"""
MUTATES = """
@torch.library.custom_op("olmodebug_test::wipe", mutates_args=())
def wipe(x: torch.Tensor) -> torch.Tensor:
    x.zero_()  # not declared
    return x.new_ones(1)

@wipe.register_fake
def _(x):
    return x.new_empty(1)

class Faulty(OlmoMLP):
    def forward(self, hidden_states):
        used, kept = hidden_states * 2, hidden_states * 2  # compiling makes one of the two
        return super().forward(kept * wipe(used.detach()))
"""


def test_the_compiler_is_the_one_that_cxx_names(tmp_path: Path) -> None:
    assert compiler_of({"CXX": "no-such-compiler"}) is None
    (tmp_path / "mine").write_text("#!/bin/sh\n")
    (tmp_path / "mine").chmod(0o755)
    assert compiler_of({"CXX": str(tmp_path / "mine")}) == str(tmp_path / "mine")


def test_a_branch_that_is_taken_while_compiling_departs_in_float64(tmp_path: Path) -> None:
    (tmp_path / "twin.py").write_text(HEAD + BRANCH)
    subject = resolve(Job(spec=f"{tmp_path / 'twin.py'}:build"))
    found = departed(subject, subject.first_case(), "eager")
    assert found is not None
    assert (found.backend, found.module, found.where.function) == ("eager", "model.layers.1.mlp", "Faulty.forward")


def olmodebug(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        **environment,
    }
    line = [sys.executable, "-m", "olmodebug", "parity", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=known, timeout=600, check=False)


def compiled(folder: Path, spec: str, backend: str, *more: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = olmodebug(folder, spec, "--left", "cpu,float32", "--right", f"cpu,float32,compile={backend}", "--json", "out.json", *more)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done, json.loads((folder / "out.json").read_text())


@pytest.mark.slow
def test_without_a_compiler_there_is_one_line_and_exit_2(tmp_path: Path) -> None:
    done = olmodebug(tmp_path, "olmo2-tiny", "--right", "cpu,float32,compile", CXX="no-such-compiler")
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(
            "olmodebug: cpu,float32,compile=inductor: torch.compile needs a C++ compiler to generate code, and there is none (no-such-compiler)"
        )
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_branch_that_is_taken_while_compiling_is_found_in_its_module(tmp_path: Path) -> None:
    (tmp_path / "twin.py").write_text(HEAD + BRANCH)
    done, report = compiled(tmp_path, "twin.py:build", "eager", "--case", "long")
    assert done.returncode == 1, done.stdout
    finding = report["findings"][0]
    assert finding["probe"] == "parity.compiled"
    assert finding["where"]["module"] == "model.layers.1.mlp"
    assert finding["where"]["function"] == "Faulty.forward"
    assert "as soon as its Python code is captured" in finding["cause"]
    run = report["sections"]["parity"]["runs"][0]
    assert (run["verdict"], run["compiled"][0]["verdict"]) == ("parts", "parts")
    assert (run["first"]["module"], run["first"]["op"]) == ("model.layers.1.mlp", "compiled with eager")


@pytest.mark.slow
def test_an_undeclared_mutation_is_found_where_the_graph_is_made_functional(tmp_path: Path) -> None:
    (tmp_path / "twin.py").write_text(HEAD + MUTATES)
    done, report = compiled(tmp_path, "twin.py:build", "aot_eager", "--case", "step")
    assert done.returncode == 1, done.stdout
    finding = report["findings"][0]
    assert (finding["probe"], finding["where"]["module"]) == ("parity.compiled", "model.layers.1.mlp")
    assert "an op does not do what it declares" in finding["cause"]


@pytest.mark.slow
def test_what_torch_compile_refuses_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "twin.py").write_text(HEAD + REFUSED)
    done, report = compiled(tmp_path, "twin.py:build", "aot_eager", "--case", "long")
    assert done.returncode == 1
    assert "uncompiled the model runs, compiled with aot_eager it raises" in report["findings"][0]["message"]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_model_that_is_another_at_every_call_is_not_judged(tmp_path: Path) -> None:
    (tmp_path / "twin.py").write_text(HEAD + IMPURE)
    done, report = compiled(tmp_path, "twin.py:build", "eager", "--case", "long")
    assert report["sections"]["parity"]["runs"][0]["verdict"] == "undecided"
    assert "the uncompiled run gives other results when it is repeated" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("spec", ["olmo1-tiny", "olmo2-tiny", "olmo3-tiny", "transformers:LlamaForCausalLM"])
def test_a_right_model_agrees_when_it_is_compiled(spec: str, backend: str, tmp_path: Path) -> None:
    done, report = compiled(tmp_path, spec, backend)
    assert done.returncode == 0, done.stdout
    run = report["sections"]["parity"]["runs"][0]
    assert run["verdict"] == "agrees"
    (found,) = run["compiled"]
    assert found["graphs"] > 0
    assert {row["what"] for row in found["results"]} == {"logits", "loss", "gradient"}
    assert next(o["status"] for o in report["outcomes"] if o["probe"] == "parity.compiled") == "passed"


@pytest.mark.slow
def test_what_compiles_nothing_is_not_said_to_agree(tmp_path: Path) -> None:
    (tmp_path / "twin.py").write_text(HEAD + "class Faulty(OlmoMLP): ...\nOlmo.forward = torch.compiler.disable(Olmo.forward)\n")
    done, report = compiled(tmp_path, "twin.py:build", "eager", "--case", "long")
    assert report["sections"]["parity"]["runs"][0]["verdict"] == "undecided"
    assert "nothing was compiled" in done.stdout
