"""The README says what is true today: its generated parts, its examples, and every command in it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from olmodebug.cli import _parser, main
from olmodebug.probe import declared_probes
from tests.readme import README, ROOT, SHOWN, probe_table, renewed

TEXT = README.read_text(encoding="utf-8")
CLEAN = ROOT / "tests" / "mutants" / "clean" / "nanogpt_style.py"

# What is run in the default suite; the others are marked slow.
CHEAP = ("report", "probes", "env", "explain")
TRAINING_SCRIPT = """
import torch
from my_model import build

model = build()
loss = model(torch.randint(0, 90, (2, 8)))[0].square().mean()
loss.backward()
"""
LOG = "RuntimeError: CUDA error: device-side assert triggered\n"
SIZES = (
    '{"block_size": 64, "vocab_size": 97, "n_layer": 3, "n_head": 5, "n_embd": 60, "dropout": 0.0, "bias": true,'
    ' "flash": false, "position": "rope", "rope_theta": 10000.0}'
)


def commands() -> list[str]:
    """Every command line of olmodebug and pytest in the README: in blocks and in the table of questions."""
    lines, language = [], None
    for line in TEXT.splitlines():
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language == "":
            lines.append(re.split(r"\s#", line)[0].strip())
    lines += re.findall(r"^\| .*\| `((?:olmodebug|pytest) .*?)` \|$", TEXT, flags=re.MULTILINE)
    return list(dict.fromkeys(line for line in lines if re.match(r"olmodebug [a-z]|pytest --olmodebug", line)))


def examples() -> dict[str, str]:
    """The files that the README shows."""
    return dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every name of the README's commands leads somewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model.py").write_text(CLEAN.read_text(encoding="utf-8") + "\n\nbuild = build_rope\n", encoding="utf-8")
    for name, text in {**examples(), "train.py": TRAINING_SCRIPT, "crash.log": LOG, "sizes.json": SIZES}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name in ("reports", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def cheap(line: str) -> bool:
    return shlex.split(line)[1] in CHEAP


def test_the_table_of_probes_is_up_to_date() -> None:
    assert probe_table() in TEXT, "run python -m tests.readme"


def test_the_generated_parts_are_up_to_date() -> None:
    assert renewed(TEXT) == TEXT, "run python -m tests.readme"


def test_every_command_in_it_can_be_parsed() -> None:
    lines = [line for line in commands() if line.startswith("olmodebug ")]
    assert len(lines) >= 18
    for line in lines:
        arguments = _parser().parse_args(shlex.split(line)[1:])
        assert arguments.command


@pytest.mark.parametrize("line", [line for line in commands() if cheap(line)])
def test_a_command_that_needs_no_torch_runs(line: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(line)[1:]) == 0
    out, err = capsys.readouterr()
    assert out
    assert err == ""


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in commands() if not cheap(line) and line != "olmodebug replay"])
def test_a_command_runs(line: str, workspace: Path) -> None:
    prepare(workspace)
    first, *rest = shlex.split(line)
    module = ["-m", "olmodebug"] if first == "olmodebug" else ["-m", "pytest", *plugin()]
    done = subprocess.run([sys.executable, *module, *rest], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert "this is a fault of olmodebug" not in done.stdout + done.stderr
    if done.returncode and first == "olmodebug":
        assert "error" in done.stdout + done.stderr


@pytest.mark.slow
def test_the_failed_probes_of_a_run_are_replayed(workspace: Path) -> None:
    assert main(["check", "tests/mutants/bugs/inv_freq_twice.py:build"]) == 1
    assert main(["replay"]) == 1


@pytest.mark.slow
def test_the_python_of_the_readme_runs(workspace: Path) -> None:
    (block,) = re.findall(r"<!-- run -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert "<Report GPT: pass" in done.stdout


@pytest.mark.slow
def test_the_suite_of_the_readme_runs(workspace: Path) -> None:
    command = [sys.executable, "-m", "pytest", *plugin(), "-v", "-rA", "test_model.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert "test_model[rope.relative-shift]" in done.stdout
    assert "PASSED test_model.py::test_no_future" in done.stdout
    assert "state.leaves-things-alone passes, though it was expected to fail" in done.stdout  # strict: this model is right


def test_the_probe_of_the_readme_runs_and_a_name_given_twice_is_an_error(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = [line for line in commands() if "--probes" in line]
    assert main(shlex.split(line)[1:]) == 0
    assert "3 ran (3 pass), of 3 probes" in capsys.readouterr().out
    (workspace / "causality.py").write_text(examples()["my_probes.py"].replace("head_has_no_bias", "no_future"), encoding="utf-8")
    assert main(["check", "olmo1-tiny", "--probes", "causality.py"]) == 2
    assert "two probes are called causality.no-future; rename one" in capsys.readouterr().err


def test_its_pictures_are_the_ones_that_are_made_and_its_links_lead_somewhere() -> None:
    assert re.findall(r"\(reports/pictures/(\S+?)\.svg\)", TEXT) == list(SHOWN)
    for target in re.findall(r"\]\((?!http)(\S+?)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_its_numbers_of_faults_are_those_of_the_catalogs() -> None:
    from tests.mutants import implementation_faults, mixed, parallel, pipeline
    from tests.scripts import catalog

    broken = sum(len(kind.MUTANTS) for kind in (parallel, pipeline, mixed))
    assert f"{len(catalog.FAULTS)} faults in ten small training scripts" in TEXT and len(catalog.SCRIPTS) == 10
    assert f"{len(implementation_faults.FAULTS)} seeded faults against a reference implementation" in TEXT
    assert f"{broken} broken parallel training steps" in TEXT
    assert "57 faults" in (ROOT / "reports" / "parity-faults.md").read_text(encoding="utf-8") and "57 faults in the reference" in TEXT


def test_it_names_every_probe() -> None:
    assert all(f"`{item.name}`" in TEXT for item in declared_probes())


def test_every_probe_says_what_must_hold_why_and_what_it_catches() -> None:
    for item in declared_probes():
        assert re.search(r"^Why: ", item.doc, flags=re.MULTILINE), item.name
        assert re.search(r"^Catches: ", item.doc, flags=re.MULTILINE), item.name


def plugin() -> list[str]:
    from importlib.metadata import entry_points

    return [] if entry_points(group="pytest11", name="olmodebug") else ["-p", "_olmodebug_pytest"]


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def prepare(folder: Path) -> None:
    """What only some commands need: a checkpoint and a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "path" / "to" / "checkpoint")
    Tokenizer(WordLevel({f"w{i}": i for i in range(90)}, unk_token="w0")).save(str(folder / "tokenizer.json"))
