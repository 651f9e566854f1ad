"""Every way in to a subject, and for every wrong turn one clear sentence: exit 2 or a finding, as the design divides them."""

import importlib
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from olmodebug.errors import SubjectError
from olmodebug.examine import build
from olmodebug.first_run import from_model
from olmodebug.model import Olmo
from olmodebug.report import Finding
from olmodebug.spec import Job, resolve

MODEL = """
    import torch
    from dataclasses import dataclass
    from torch import nn

    @dataclass
    class Config:
        vocab_size: int = 31
        hidden: int = 8

    class Model(nn.Module):
        def __init__(self, config: Config):
            super().__init__()
            self.config = config
            self.embed = nn.Embedding(config.vocab_size, config.hidden)
            self.head = nn.Linear(config.hidden, config.vocab_size)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids))

    class Plain(Model):
        def __init__(self):
            super().__init__(Config())

    class Bare(Model):
        def __init__(self, config):
            super().__init__(config)

    class Sized(Model):
        def __init__(self, rows, hidden=8):
            super().__init__(Config(rows, hidden))

    model = Plain()
    def factory(): return Plain()
    def with_config(): return Plain(), {"vocab_size": 31, "num_attention_heads": 2}
    def optional(rows=17): return Model(Config(rows))
    def gives_class(): return Plain
    class Zoo:
        inner = Plain
    number = 3
"""


pytestmark = pytest.mark.usefixtures("imports_restored")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write(path: str, text: str = MODEL) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text), encoding="utf-8")
    return file


def refused(spec: str, **job: object) -> str:
    """The sentence of a spec that is exit 2."""
    with pytest.raises(SubjectError) as error:
        build(Job(spec=spec, **job))  # type: ignore[arg-type]
    text = str(error.value)
    assert "\n" not in text
    return text


def finding(spec: str, probe: str = "build.constructs") -> Finding:
    """The only finding of a spec whose own code is at fault."""
    building = build(Job(spec=spec))
    assert building.subject is None
    (found,) = [f for result in building.results for f in result.findings]
    assert (found.probe, found.severity) == (probe, "error")
    assert "\n" not in found.message
    return found


# Ways in


def test_a_preset_is_built_and_the_same_seed_gives_the_same_weights() -> None:
    first, again, other = (resolve(Job(spec="olmo1-tiny", seed=seed)) for seed in (1, 1, 2))
    assert isinstance(first.model, Olmo)
    weights = [subject.model.model.embed_tokens.weight for subject in (first, again, other)]  # type: ignore[union-attr]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.rebuild is not None
    assert torch.equal(first.rebuild().model.model.embed_tokens.weight, weights[0])  # type: ignore[union-attr,arg-type]


def test_a_preset_takes_config_and_what_follows_from_it() -> None:
    config = resolve(Job(spec="olmo1-tiny", config={"num_hidden_layers": 3, "num_attention_heads": 4})).config
    assert (config.num_hidden_layers, len(config.layer_types), config.num_key_value_heads) == (3, 3, 4)  # type: ignore[attr-defined]
    scaling = {"factor": 2.0, "original_max_position_embeddings": 32}
    assert resolve(Job(spec="olmo3-tiny", config={"rope_scaling": scaling})).config.rope_scaling.factor == 2.0  # type: ignore[attr-defined]


def test_a_large_preset_is_checked_on_a_small_copy_and_says_so() -> None:
    subject = resolve(Job(spec="olmo2-32B"))
    assert sum(p.numel() for p in subject.model.parameters()) < 40_000_000
    assert any("32,234,279,936 parameters" in text for text in subject.assumptions)
    assert subject.model.config.qk_norm  # type: ignore[union-attr]
    assert subject.model.config.num_attention_heads // subject.model.config.num_key_value_heads == 5  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["model", "Plain", "factory", "with_config", "optional", "gives_class", "Zoo.inner", "Model", "Sized"])
@pytest.mark.parametrize("place", ["mine.py", "folder.mine"])
def test_a_file_or_module_attribute_may_be_a_model_a_class_or_a_function(here: Path, name: str, place: str) -> None:
    write("mine.py" if place == "mine.py" else "folder/mine.py")
    subject = resolve(Job(spec=f"{place}:{name}", config={"rows": 31} if name == "Sized" else {}))
    assert subject.embedding_rows == (17 if name == "optional" else 31)
    assert subject.convention.ids == "input_ids"
    if name == "with_config":
        assert subject.setting("num_attention_heads") == 2


def test_config_pairs_fill_a_config_class_a_factory_and_a_namespace(here: Path) -> None:
    write("mine.py")
    for name, config in (("Model", {"vocab_size": 19}), ("Sized", {"rows": 19}), ("optional", {"rows": 19})):
        assert resolve(Job(spec=f"mine.py:{name}", config=config)).embedding_rows == 19
    assert resolve(Job(spec="mine.py:Bare", config={"vocab_size": 19, "hidden": 4})).embedding_rows == 19


def test_a_live_model_keeps_its_identity() -> None:
    model = resolve(Job(spec="olmo1-tiny")).model
    subject = from_model(model)
    assert subject.model is model
    assert (subject.spec, subject.rebuild) == ("Olmo", None)


def test_a_checkpoint_folder_and_a_transformers_class_are_loaded(here: Path) -> None:
    tiny = resolve(Job(spec="transformers:LlamaForCausalLM", config={"num_hidden_layers": 1, "vocab_size": 97}))
    assert (tiny.model.config.num_hidden_layers, tiny.vocab_size) == (1, 97)  # type: ignore[union-attr]
    assert any("tiny random weights" in text for text in tiny.assumptions)
    tiny.model.save_pretrained(here / "checkpoint")  # type: ignore[operator]
    loaded = resolve(Job(spec=str(here / "checkpoint")))
    assert type(loaded.model) is type(tiny.model)
    for name, weight in tiny.model.state_dict().items():
        assert torch.equal(weight, loaded.model.state_dict()[name]), name


def test_an_adapter_states_the_call(here: Path) -> None:
    write("mine.py")
    write(
        "odd.py",
        """
        from torch import nn
        from mine import Plain

        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Plain()

            def forward(self, mode, batch):
                return {"scores": self.inner(batch["ids"])}

        def call(model, input_ids):
            return model("plain", {"ids": input_ids})["scores"]
        """,
    )
    assert "mode" in refused("odd.py:Odd") or "--adapter" in refused("odd.py:Odd")
    subject = resolve(Job(spec="odd.py:Odd", adapter="odd.py:call"))
    assert subject.logits(importlib.import_module("olmodebug.records").Case(name="", input_ids=((1, 2, 3),))).shape == (1, 3, 31)
    assert "is no function" in refused("odd.py:Odd", adapter="mine.py:number")


def test_relative_imports_work_inside_a_package(here: Path) -> None:
    write("outer/__init__.py", "")
    write("outer/inner/__init__.py", "")
    write("outer/parts.py")
    write("outer/inner/mine.py", "from ..parts import Plain\n\ndef build():\n    return Plain()\n")
    assert resolve(Job(spec="outer/inner/mine.py:build")).embedding_rows == 31


def test_two_files_with_one_stem_are_two_modules(here: Path) -> None:
    write("a/mine.py", MODEL + "\n    rows = 31\n")
    write("b/mine.py", MODEL.replace("vocab_size: int = 31", "vocab_size: int = 23"))
    assert [resolve(Job(spec=f"{folder}/mine.py:Plain")).embedding_rows for folder in "aba"] == [31, 23, 31]


def test_a_file_may_import_its_neighbour_and_ask_for_its_own_name(here: Path) -> None:
    write("deep/parts.py")
    write("deep/mine.py", "import sys\nfrom parts import Plain\nassert sys.modules[__name__].__file__ == __file__\nbuild = Plain\n")
    assert resolve(Job(spec="deep/mine.py:build")).embedding_rows == 31


# Wrong turns that are the user's spec: exit 2


def test_a_missing_file_offers_the_near_name(here: Path) -> None:
    write("olmo_model.py")
    text = refused("olmo_modle.py:Plain")
    assert "no such file" in text
    assert "olmo_model.py" in text


def test_a_missing_attribute_offers_the_near_name(here: Path) -> None:
    write("mine.py")
    text = refused("mine.py:factroy")
    assert "has no attribute factroy" in text
    assert "did you mean factory" in text


def test_a_file_without_an_attribute_lists_what_it_defines(here: Path) -> None:
    write("mine.py")
    text = refused("mine.py")
    assert "needs an attribute" in text
    assert "factory" in text
    assert "no such file" in refused("yours.py")


def test_a_missing_module_is_named(here: Path) -> None:
    assert "no module named nowhere" in refused("nowhere.models:build")
    write("folder/mine.py")
    assert "no module named folder.yours" in refused("folder.yours:build")


def test_a_class_that_needs_arguments_says_which_and_how(here: Path) -> None:
    write("mine.py")
    text = refused("mine.py:Sized")
    assert "needs arguments (rows)" in text
    assert "--config" in text
    assert "needs a config" in refused("mine.py:Bare")


BESIDE = """
    from dataclasses import dataclass
    from torch import nn

    @dataclass
    class DataConfig:
        folder: str = "."

    @dataclass
    class GPTConfig:
        vocab_size: int = 31
        hidden: int = 8

    class GPT(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.embed = nn.Embedding(config.vocab_size, config.hidden)
            self.head = nn.Linear(config.hidden, config.vocab_size)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids))

    class Keyed(GPT):
        def __init__(self, cfg):
            nn.Module.__init__(self)
            self.embed = nn.Embedding(cfg["vocab_size"], cfg["hidden"])
            self.head = nn.Linear(cfg["hidden"], cfg["vocab_size"], bias=cfg.bias)
            self.cfg = cfg
"""


def test_the_config_class_beside_a_model_fills_what_is_not_given(here: Path) -> None:
    write("mine.py", BESIDE)
    subject = resolve(Job(spec="mine.py:GPT", config={"hidden": 4}))
    assert (subject.embedding_rows, subject.model.head.in_features) == (31, 4)  # type: ignore[union-attr]
    assert "GPTConfig: vocab_size, hidden" in refused("mine.py:GPT")


def test_a_given_config_is_read_by_attribute_and_by_key_and_what_it_lacks_is_asked_for(here: Path) -> None:
    write("mine.py", BESIDE)
    config = {"vocab_size": 19, "hidden": 4, "bias": False}
    subject = resolve(Job(spec="mine.py:Keyed", config=config))
    assert (subject.embedding_rows, subject.vocab_size, subject.twin().runs()) == (19, 19, True)
    text = refused("mine.py:Keyed", config={"vocab_size": 19, "hidden": 4})
    assert "asks its config for 'bias': give it with --config bias=value (given: vocab_size, hidden)" in text
    assert "'hidden'" in refused("mine.py:Keyed", config={"vocab_size": 19, "bias": 1})


def test_config_that_fits_nothing_is_refused(here: Path) -> None:
    write("mine.py")
    assert "takes no argument colour" in refused("mine.py:optional", config={"colour": 1})
    assert "nothing to fill" in refused("mine.py:model", config={"rows": 1})
    assert "colour" in refused("mine.py:Model", config={"colour": 1})
    assert "colour" in refused("olmo1-tiny", config={"colour": 1})
    assert "num_attention_heads" in refused("olmo1-tiny", config={"num_attention_heads": 7})
    text = refused("transformers:LlamaForCausalLM", config={"hidden_sise": 8})
    assert "hidden_size" in text, "the near name is not offered"


def test_a_config_class_that_refuses_its_values_is_refused_with_its_words(here: Path) -> None:
    write(
        "mine.py",
        MODEL
        + """
    class Strict:
        def __init__(self, vocab_size=31):
            if vocab_size % 2 == 0: raise ValueError("vocab_size must be odd")
            self.vocab_size, self.hidden = vocab_size, 8

    class Picky(Model):
        def __init__(self, config: Strict):
            super().__init__(config)
""",
    )
    assert resolve(Job(spec="mine.py:Picky", config={"vocab_size": 33})).embedding_rows == 33
    assert "vocab_size must be odd" in refused("mine.py:Picky", config={"vocab_size": 32})


def test_what_is_no_model_class_or_function_is_refused(here: Path) -> None:
    write("mine.py")
    assert "is a int" in refused("mine.py:number") or "is an int" in refused("mine.py:number")


def test_a_name_that_is_nothing_lists_the_ways_in(here: Path) -> None:
    text = refused("olmo1-4m")
    assert "olmo1-4M" in text
    assert "file.py:attribute" in text
    Path("empty").mkdir()
    assert "without config.json" in refused("empty")


def test_a_checkpoint_that_cannot_be_loaded_is_refused_with_the_reason(here: Path) -> None:
    assert "--download" in refused("hf:nobody/no-such-model")
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{", encoding="utf-8")
    assert "broken" in refused("broken")
    tiny = resolve(Job(spec="transformers:LlamaForCausalLM", config={"num_hidden_layers": 1}))
    tiny.model.save_pretrained("damaged")  # type: ignore[operator]
    Path("damaged/model.safetensors").write_bytes(b"no tensors here")
    assert "cannot load the checkpoint damaged" in refused("damaged")


def test_an_unknown_transformers_class_offers_near_names() -> None:
    assert "LlamaForCausalLM" in refused("transformers:LamaForCausalLM")


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"device": "gpu9"}, "no such kind of device"),
        ({"dtype": "int8"}, "expected float32"),
        ({"dtype": "float"}, ""),
        ({"tokenizer": "no.json"}, "no such tokenizer"),
    ],
)
def test_an_unknown_device_dtype_or_tokenizer_is_refused(job: dict[str, str], words: str) -> None:
    if job == {"dtype": "float"}:
        assert resolve(Job(spec="olmo1-tiny", dtype="float")).dtype == torch.float32
        return
    assert words in refused("olmo1-tiny", **job)


def test_a_dtype_casts_the_model_first() -> None:
    assert resolve(Job(spec="olmo1-tiny", dtype="bfloat16")).dtype == torch.bfloat16


# Wrong turns that are the subject's own code: a finding


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError('heads do not divide')", "ValueError: heads do not divide"),
        ("return None", "None (is the `return` missing?)"),
        ("return torch.zeros(2)", "a Tensor"),
        ("return {'model': Plain()}", "a dict"),
        ("import sys; sys.exit(4)", "sys.exit(4)"),
        ("import no_such_package", "no_such_package"),
        ("return Plain(), 1, 2", "a tuple"),
    ],
)
def test_a_factory_that_gives_no_model_is_a_finding(here: Path, body: str, words: str) -> None:
    file = write("mine.py", MODEL + f"\n    def build():\n        {body}\n")
    found = finding("mine.py:build")
    assert words in found.message
    if body.startswith(("raise", "import no")):
        assert (found.where.function, found.where.line) == ("build", len(file.read_text().splitlines()))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("x = 1\nimport no_such_package.part\n", 2, ["no_such_package", "install"]),
        ("x = 1\nraise RuntimeError('at import')\n", 2, ["RuntimeError: at import"]),
        ("x = 1\ny = (\n", 2, ["SyntaxError"]),
        ("import sys\nsys.exit(0)\n", None, ["sys.exit(0)", "while it is imported"]),
        ("from .sibling import build\n", 1, ["relative import"]),
    ],
)
def test_a_file_that_does_not_import_is_a_finding_at_its_line(here: Path, text: str, line: int | None, words: list[str]) -> None:
    Path("mine.py").write_text(text, encoding="utf-8")
    found = finding("mine.py:build")
    said = f"{found.message} {found.fix}"
    assert all(word in said for word in words), said
    if line is not None:
        assert (found.where.file, found.where.line) == ("mine.py", line)
    assert "mine.py:build" not in sys.modules


def test_a_module_whose_own_import_is_missing_is_a_finding_not_a_missing_module(here: Path) -> None:
    write("folder/mine.py", "import no_such_package\n")
    assert "no_such_package" in finding("folder.mine:build").message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise RuntimeError('no forward yet')", "RuntimeError: no forward yet"),
        ("return None", "NoneType"),
        ("return input_ids", "int64"),
        ("return self.head(self.embed(input_ids)).mean(2)", "(2, 5)"),
        ("return {'hidden': self.embed(input_ids)}", "without a `logits` tensor"),
    ],
)
def test_a_model_that_does_not_run_or_gives_no_logits_is_a_finding(here: Path, body: str, words: str) -> None:
    write("mine.py", MODEL + f"\n    class Wrong(Plain):\n        def forward(self, input_ids):\n            {body}\n")
    found = finding("mine.py:Wrong", "build.runs")
    assert words in found.message
    assert str(found.where.function).endswith("Wrong.forward")


def test_a_forward_that_needs_what_cannot_be_guessed_is_refused(here: Path) -> None:
    write("mine.py", MODEL + "\n    class Wrong(Plain):\n        def forward(self, input_ids, temperature):\n            return 1\n")
    text = refused("mine.py:Wrong")
    assert "temperature" in text
    assert "--adapter" in text


def test_a_scripted_model_is_refused_with_the_way_out() -> None:
    class Hidden(nn.Module):
        forward = staticmethod(max)  # a callable whose signature cannot be read

    with pytest.raises(SubjectError, match="--adapter"):
        from_model(Hidden())


def test_building_restores_the_random_state_and_the_default_dtype(here: Path) -> None:
    write(
        "mine.py",
        MODEL
        + "\n    def build():\n        torch.set_default_dtype(torch.float64)\n        torch.manual_seed(9)\n        return Plain()\n",
    )
    torch.manual_seed(3)
    before = torch.get_rng_state()
    resolve(Job(spec="mine.py:build"))
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), before)
