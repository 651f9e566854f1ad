"""`olmodebug parity --reference` as people run it: a git revision of the file itself, a script that needs no olmodebug, --map."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from olmodebug.errors import SubjectError, UsageError
from olmodebug.executions.check import git_source
from olmodebug.implementations.comparison import compare
from tests.benchmarks.implementations import subject_of
from tests.mutants.catalog import CLEAN
from tests.test_implementations_neox import FUSED, SPLIT

ROOT = Path(__file__).parents[1]
WITHOUT = """import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "olmodebug":
            raise ImportError("olmodebug is not here")
sys.meta_path.insert(0, Absent())
import runpy
runpy.run_path(sys.argv[1], run_name="__main__")
"""


GATE = """

class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return nn.functional.gelu(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.special.ndtr(x)  # without x times the density
"""


def olmodebug(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "olmodebug", "parity", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment, timeout=300, check=False)


def report_in(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = olmodebug(folder, *arguments, "--json", "out.json")
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.returncode, json.loads((folder / "out.json").read_text())


def committed(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for line in (["init", "-q"], ["add", "."], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first"]):
        subprocess.run(["git", *line], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model whose rotation lies in a second file, committed."""
    head, _, rest = SPLIT.partition("def rotate")
    body, _, tail = rest.partition("class Attention")
    (tmp_path / "rotation.py").write_text(f"import torch\n\ndef rotate{body}")
    (tmp_path / "model.py").write_text(f"{head}from rotation import rotate\n\nclass Attention{tail}")
    committed(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("git:nowhere:model.py:build", "git knows no revision nowhere"),
        ("git:HEAD:absent.py:build", "absent.py' does not exist in 'HEAD'"),
        ("git:HEAD:model.py", "expected git:REVISION:path.py:attribute"),
    ],
)
def test_a_revision_or_path_that_does_not_exist_is_one_line(
    spec: str, says: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    with pytest.raises(UsageError, match=says) as error:
        git_source(spec, repository / "record")
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_repository_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text(SPLIT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UsageError, match="not a git repository"):
        git_source("git:HEAD:model.py:build", tmp_path / "record")


def test_a_file_of_a_package_comes_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "things"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "size.py").write_text("SIZE = 3\n")
    (package / "model.py").write_text("from .size import SIZE\n")
    committed(tmp_path)
    (package / "size.py").write_text("SIZE = 4\n")
    monkeypatch.chdir(tmp_path)
    found = Path(git_source("git:HEAD:things/model.py:build", tmp_path / "record").rpartition(":")[0])
    assert found.parts[-2:] == ("things", "model.py")
    assert (found.parent / "size.py").read_text() == "SIZE = 3\n"


@pytest.mark.slow
def test_the_working_file_against_a_revision_of_itself(repository: Path) -> None:
    code, report = report_in(repository, "model.py:build", "--reference", "git:HEAD:model.py:build")
    assert (code, report["findings"]) == (0, [])
    assert report["sections"]["implementations"]["reference"] == "git:HEAD:model.py:build"
    model = repository / "model.py"
    text = model.read_text()
    model.write_text(text.replace("self.width**-0.5", "self.width**-1"))
    code, report = report_in(repository, "model.py:build", "--reference", "git:HEAD:model.py:build")
    (finding,) = report["findings"]
    line = 1 + next(i for i, row in enumerate(model.read_text().splitlines()) if "self.width**-1" in row)
    assert (code, finding["evidence"]["cause"], finding["where"]["file"], finding["where"]["line"]) == (1, "scale", "model.py", line)
    model.write_text(text)
    # A module that the file imports has a revision, too.
    rotation = repository / "rotation.py"
    rotation.write_text(rotation.read_text().replace("torch.cat((-second, first), dim=-1)", "torch.cat((second, -first), dim=-1)"))
    code, report = report_in(repository, "model.py:build", "--reference", "git:HEAD:model.py:build")
    assert code == 1
    assert report["findings"][0]["where"]["file"] == "rotation.py"


@pytest.mark.slow
def test_a_revision_or_attribute_that_is_wrong_is_exit_2(repository: Path) -> None:
    for spec in ("git:nowhere:model.py:build", "git:HEAD:absent.py:build", "git:HEAD:model.py:built"):
        done = olmodebug(repository, "model.py:build", "--reference", spec)
        assert done.returncode == 2, done.stdout
        assert done.stderr.strip().splitlines()[-1].startswith("olmodebug: ")
        assert "Traceback" not in done.stderr


def ran_without_olmodebug(script: str, folder: Path) -> list[str]:
    """What a script prints in a fresh interpreter that has no olmodebug."""
    (folder / "without.py").write_text(WITHOUT)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    line = [sys.executable, "-I", str(folder / "without.py"), script]
    return subprocess.run(line, capture_output=True, text=True, cwd=elsewhere, check=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("q, k = rotate(q, cos, sin), rotate(k, cos, sin)", "q, k = rotate(q, cos, sin), k"),
        pytest.param("self.width**-0.5", "self.width**-1", marks=pytest.mark.slow),
        pytest.param("F.gelu(self.fc_in", "F.relu(self.fc_in", marks=pytest.mark.slow),
    ],
)
def test_a_finding_carries_a_script_that_shows_it_without_olmodebug(old: str, new: str, tmp_path: Path) -> None:
    assert SPLIT.count(old) == 1
    (tmp_path / "right.py").write_text(SPLIT)
    (tmp_path / "wrong.py").write_text(SPLIT.replace(old, new))
    sides = [subject_of(tmp_path / f"{name}.py", "build") for name in ("wrong", "right")]
    script = str(compare(*sides, scripts=tmp_path / "scripts").findings[0].evidence["script"])
    assert len(Path(script).read_text().splitlines()) <= 13
    place, inputs, gap = ran_without_olmodebug(script, tmp_path)
    assert f"{tmp_path}" in place or "wrong.py" in place
    assert not inputs.startswith("inputs that are equal: 0")
    assert float(gap.split()[2]) > 1e-3 * float(gap.split()[4])


@pytest.mark.parametrize(
    ("base", "edit", "parts"),
    [
        ("hf_style", (".mean(-1, keepdim=True)", ".mean(-1, keepdim=True).detach()"), "input 0"),
        pytest.param("nanogpt_style", ("y = att @ v  #", "y = att.detach() @ v  #"), "c_attn.weight", marks=pytest.mark.slow),
        pytest.param("nanogpt_style", ("x = self.gelu(x)\n", "x = Gate.apply(x)\n"), "c_fc.weight", marks=pytest.mark.slow),
    ],
    ids=["variance detached", "attention weights detached", "a backward of its own"],
)
def test_a_finding_on_gradients_carries_a_script_of_the_backward_alone(
    base: str, edit: tuple[str, str], parts: str, tmp_path: Path
) -> None:
    text = (CLEAN / f"{base}.py").read_text()
    assert text.count(edit[0]) == 1
    (tmp_path / "wrong.py").write_text(text.replace(*edit) + GATE)
    sides = [subject_of(path, "build") for path in (tmp_path / "wrong.py", CLEAN / f"{base}.py")]
    finding = next(f for f in compare(*sides, scripts=tmp_path / "scripts").findings if f.probe == "parity.gradients")
    lines = ran_without_olmodebug(str(finding.evidence["script"]), tmp_path)
    gaps = {name: float(gap) / float(size) for name, gap, size in (re.split(" largest difference | of ", line) for line in lines)}
    assert gaps[parts] > 1e-2


def test_slices_of_a_fused_projection_can_be_stated(tmp_path: Path) -> None:
    text = SPLIT
    for old, new in FUSED:
        text = text.replace(old, new.replace("query_key_value", "mixed"))
    (tmp_path / "fused.py").write_text(text)
    (tmp_path / "split.py").write_text(SPLIT)
    split, fused = (subject_of(tmp_path / f"{name}.py", "build") for name in ("split", "fused"))
    with pytest.raises(SubjectError, match="no counterpart"):
        compare(split, fused)
    stated = {
        f"layers.{layer}.attention.{name}_proj.{kind}": f"layers.{layer}.attention.mixed.{kind}[{48 * i}:{48 * (i + 1)}]"
        for layer in range(2)
        for i, name in enumerate("qkv")
        for kind in ("weight", "bias")
    }
    report = compare(split, fused, stated=stated)
    assert report.findings == ()
    rows = {row["subject"]: row["reference"] for row in report.sections["implementations"]["mapping"]}
    assert rows["layers.1.attention.k_proj.weight"] == "layers.1.attention.mixed.weight[48:96]"
    crossed = {name: place.replace("[0:48]", "[48:96]") if "q_proj" in name else place for name, place in stated.items()}
    assert compare(split, fused, stated=crossed).verdict == "fail"


def test_a_stated_name_that_does_not_exist_is_named() -> None:
    subject = subject_of(CLEAN / "hf_style.py", "build")
    with pytest.raises(UsageError, match=r"has no parameter 'nothing\[0:3\]'"):
        compare(subject, subject, stated={"model.embed_tokens.weight": "nothing[0:3]"})
