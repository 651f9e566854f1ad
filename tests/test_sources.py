"""Which file is the subject's own, and which line of it is running."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import olmodebug.model
import olmodebug.subject
from olmodebug.caches import new_cache
from olmodebug.first_run import from_model
from olmodebug.members import attribute_place
from olmodebug.model import Olmo
from olmodebug.presets import preset
from olmodebug.sources import NEAR, OUTSIDE, OWN, Sources, Spot, code_of, excerpt, is_ours, short_path
from olmodebug.tracing.copies import digest
from olmodebug.tracing.tracer import record

HERE = str(Path(__file__).resolve())


class Mine(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner() -> torch.Tensor:
            return super(Mine, self).forward(x)  # <- inner

        return inner()


def module_at(path: Path, text: str) -> ModuleType:
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"at_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_files_are_sorted_into_own_near_and_outside() -> None:
    sources = Sources(Mine(2, 2))
    assert sources.rank(HERE) == OWN
    assert sources.rank(str(Path(nn.__file__).parent / "modules" / "linear.py")) == OUTSIDE
    assert sources.rank(str(Path(olmodebug.subject.__file__))) == OUTSIDE
    assert sources.rank(str(Path(json_file()))) == OUTSIDE
    assert sources.rank("<string>") == OUTSIDE
    assert sources.rank(str(Path(pytest.__file__))) == OUTSIDE
    assert sources.rank("/home/somebody/project/helpers.py") == OWN


def json_file() -> str:
    return str(importlib.import_module("json").__file__)


def test_the_shipped_probes_are_never_the_subjects_own() -> None:
    probe = importlib.import_module("olmodebug.probes.causality")
    assert Sources(Mine(2, 2)).rank(str(probe.__file__)) == OUTSIDE


def test_the_reference_is_its_own_subject() -> None:
    from olmodebug.presets import preset

    model = olmodebug.model.Olmo(preset("olmo1-tiny"))
    assert Sources(model).rank(str(Path(olmodebug.model.__file__))) == OWN
    assert Sources(Mine(2, 2)).rank(str(Path(olmodebug.model.__file__))) == OUTSIDE


def test_a_transformers_model_owns_its_modeling_file_and_is_near_the_rest() -> None:
    import transformers

    from olmodebug.tiny import build_tiny

    sources = Sources(build_tiny("LlamaForCausalLM")[0])
    root = Path(transformers.__file__).parent
    assert sources.rank(str(root / "models" / "llama" / "modeling_llama.py")) == OWN
    assert sources.rank(str(root / "modeling_utils.py")) == NEAR
    assert sources.rank(str(root / "models" / "gpt2" / "modeling_gpt2.py")) == NEAR


def test_the_innermost_own_frame_of_an_exception_is_its_place() -> None:
    model = Mine(2, 2)
    with pytest.raises(RuntimeError) as error:
        model(torch.zeros(3, 5))
    spot = Sources(model).spot_of(error.value)
    assert spot is not None
    lines = Path(HERE).read_text(encoding="utf-8").splitlines()
    assert (spot.file, spot.function) == (__file__, "Mine.forward.inner")
    assert lines[spot.line - 1].endswith("# <- inner")


def test_an_exception_that_never_entered_the_subject_has_no_place() -> None:
    error = ValueError("made here, raised nowhere")
    assert Sources(Mine(2, 2)).spot_of(error) is None


def test_a_spot_spans_the_expression_that_was_running(tmp_path: Path) -> None:
    text = "def f(x):\n    return x.bad() + (\n        x.worse()\n    )\n"
    module = module_at(tmp_path / "spans.py", text)

    class Bad:
        def bad(self) -> int:
            return 1

        def worse(self) -> int:
            raise KeyError

    with pytest.raises(KeyError) as error:
        module.f(Bad())
    trace = error.value.__traceback__
    assert trace is not None
    frame = trace.tb_next
    assert frame is not None
    spot = Spot(frame.tb_frame.f_code, frame.tb_lasti, frame.tb_lineno)
    assert spot.span == (3, 3, 8, 17)
    assert (spot.line, spot.file, spot.function) == (3, str(tmp_path / "spans.py"), "f")


def test_an_excerpt_stops_at_the_ends_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "short.py"
    file.write_text("one\ntwo\nthree\n", encoding="utf-8")
    assert excerpt(str(file), 1) == ((1, "one"), (2, "two"))
    assert excerpt(str(file), 3) == ((2, "two"), (3, "three"))
    assert excerpt(str(file), 2, around=0) == ((2, "two"),)
    assert excerpt(None, 2) == excerpt(str(file), None) == excerpt(str(tmp_path / "nowhere.py"), 2) == ()


def test_a_path_is_shown_from_the_working_directory_where_it_lies_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_path(str(tmp_path / "a" / "b.py")) == str(Path("a") / "b.py")
    assert short_path("/elsewhere/b.py") == "/elsewhere/b.py"


def test_an_exception_of_an_instrument_is_ours_and_one_of_an_op_or_of_the_reference_is_not() -> None:
    model = Olmo(preset("olmo1-tiny"))
    ids = torch.tensor([[5, 6, 7]])

    def raised(call: Callable[[], object]) -> Exception:
        with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - whatever it raises is judged below
            call()
        return caught.value

    def consumer(_: object) -> None:
        raise RuntimeError("a consumer of this test, which is no instrument")

    too_large, wrong_mask = ids + 1000, torch.ones(1, 9)
    assert not is_ours(raised(lambda: record(model, lambda: model(too_large))))
    assert not is_ours(raised(lambda: model(ids, wrong_mask)))
    assert not is_ours(raised(lambda: record(model, lambda: model(ids), on_event=consumer)))
    assert is_ours(raised(lambda: digest(torch.eye(3).to_sparse())))


def test_the_code_of_a_decorated_function_is_the_one_that_was_written() -> None:
    """transformers wraps __init__ and forward in decorators of its own; findings name the class's lines, not the wrapper's."""

    def kept(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    def written() -> int:
        return 1

    assert code_of(kept(kept(written))) is written.__code__
    assert (code_of(len), code_of(nn.Linear), code_of("text")) == (None, None, None)

    class Decorated(nn.Module):
        @kept
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(2))

    place = attribute_place(Decorated(), "table")
    assert str(place.function).endswith("Decorated.__init__")
    assert place.line == Decorated.__init__.__wrapped__.__code__.co_firstlineno + 3  # type: ignore[attr-defined]


class OfItsOwnMind(nn.Module):
    """Its cache is emptied with an argument that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 8), nn.Linear(8, 31)

    def reset_cache(self, *, how: str) -> None:
        raise AssertionError(how)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def test_a_method_that_wants_to_be_called_otherwise_is_no_fault_of_the_instruments() -> None:
    with pytest.raises(TypeError) as caught:
        new_cache(from_model(OfItsOwnMind()), 1, 4)
    assert not is_ours(caught.value)
