"""Objects by file and by module: what is executed, under which name, and whose error an error is."""

import sys
from pathlib import Path

import pytest

from olmodebug.errors import SubjectError
from olmodebug.load import SubjectCodeError, candidates, load_attribute, load_file

pytestmark = pytest.mark.usefixtures("imports_restored")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_executed_once_under_a_name_made_of_its_whole_path(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.py", "import sys\ncalls = []\ncalls.append(1)\nassert sys.modules[__name__].__file__ == __file__\n")
    module = load_file(file)
    assert load_file(file) is module
    assert module.calls == [1]
    assert module.__name__ != "mine"
    assert "mine" not in sys.modules
    assert sys.path[0] == str(tmp_path), "neighbours are importable, as when Python runs a script"


def test_dataclasses_with_postponed_annotations_load(tmp_path: Path) -> None:
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass C:\n    x: int = 3\n"
    assert load_attribute(f"{write(tmp_path / 'mine.py', text)}:C")().x == 3  # type: ignore[operator]


def test_a_file_that_raises_leaves_no_module_behind_and_can_be_loaded_once_mended(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.py", "raise ValueError('first')\n")
    with pytest.raises(SubjectCodeError) as error:
        load_file(file)
    assert (error.value.stage, str(error.value.__cause__)) == ("import", "first")
    assert not [name for name in sys.modules if name.endswith("mine_py")]
    write(file, "value = 7  # mended, and of another length\n")
    assert load_file(file).value == 7


def test_a_package_by_path_is_imported_under_its_package_name(tmp_path: Path) -> None:
    write(tmp_path / "outer_for_test/__init__.py", "")
    write(tmp_path / "outer_for_test/parts.py", "value = 5\n")
    file = write(tmp_path / "outer_for_test/mine.py", "from .parts import value\n")
    module = load_file(file)
    assert (module.__name__, module.value) == ("outer_for_test.mine", 5)


def test_a_package_that_shadows_another_is_never_answered_by_the_other(tmp_path: Path) -> None:
    for place, value in (("a", 1), ("b", 2)):
        write(tmp_path / place / "models_for_test/__init__.py", "")
        write(tmp_path / place / "models_for_test/mine.py", f"value = {value}\n")
    assert load_file(tmp_path / "a/models_for_test/mine.py").value == 1
    try:
        assert load_file(tmp_path / "b/models_for_test/mine.py").value == 2
    except SubjectError as error:  # refusing is right too; the first file's answer is not
        assert "models_for_test" in str(error)


def test_dots_reach_into_objects(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.py", "class A:\n    class B:\n        c = 4\n")
    assert load_attribute(f"{file}:A.B.c") == 4
    with pytest.raises(SubjectError, match="has no attribute A.B.d"):
        load_attribute(f"{file}:A.B.d")


@pytest.mark.parametrize("name", ["buld", "Build"])
def test_near_names_are_offered(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "mine.py", "def build(): pass\n_build = 1\n")
    with pytest.raises(SubjectError, match=r"did you mean build\?"):
        load_attribute(f"{file}:{name}")


def test_a_module_that_is_missing_differs_from_one_whose_import_is_missing(tmp_path: Path) -> None:
    sys.path.insert(0, str(tmp_path))
    write(tmp_path / "needs_it_for_test.py", "import no_such_package_for_test\n")
    with pytest.raises(SubjectError, match="no module named nowhere_for_test"):
        load_attribute("nowhere_for_test.deeper:build")
    with pytest.raises(SubjectCodeError) as error:
        load_attribute("needs_it_for_test:build")
    assert isinstance(error.value.__cause__, ModuleNotFoundError)


def test_candidates_are_found_without_running_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.py", "raise SystemExit\ndef build(): pass\nclass Model:\n    def inner(self): pass\nx = 1\n")
    assert candidates(file) == ["build", "Model"]
    assert candidates(write(tmp_path / "bad.py", "def (")) == []
    assert candidates(tmp_path / "nowhere.py") == []
