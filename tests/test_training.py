"""The loop: a resumed run repeats its losses bit for bit, overflow and NaN are seen, and what was captured is the loss."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from olmodebug.errors import UsageError
from olmodebug.first_run import from_model
from olmodebug.spec import Job, resolve
from olmodebug.subject import Subject
from olmodebug.training.checkpoint import load_state
from olmodebug.training.child import _sized
from olmodebug.training.dataset import Dataset, open_dataset
from olmodebug.training.diagnose_step import diagnose
from olmodebug.training.head import find_head
from olmodebug.training.loop import Ending, LossOf, Options, train
from olmodebug.training.recipe import OURS, Recipe

RECIPE = dataclasses.replace(OURS, steps=8, batch_size=2, seq_len=16, warmup_steps=2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    words = ["the", "a", "cat", "dog", "sees", "is", "here", "and"]
    draw = torch.Generator().manual_seed(0)
    for i in range(40):
        picks = torch.randint(len(words), (60,), generator=draw).tolist()
        (folder / f"{i:02d}.txt").write_text(" ".join(words[pick] for pick in picks))
    return open_dataset([str(folder)], vocab_size=290, cache=None)


def subject(**config: Any) -> Subject:
    return resolve(Job(spec="olmo2-tiny", config={"vocab_size": 300, "pad_token_id": None, "eos_token_id": 0, **config}))


def run(
    under_test: Subject, dataset: Dataset, folder: Path, *, dtype: str = "float32", recipe: Recipe = RECIPE, **options: Any
) -> tuple[Ending, list[dict[str, Any]]]:
    steps: list[dict[str, Any]] = []
    chosen = Options(dtype=dtype, seed=4, folder=folder, save_every=3, **options)
    return train(under_test, dataset, recipe, chosen, lambda _, value: steps.append(value)), steps


def losses(steps: list[dict[str, Any]]) -> list[float]:
    return [step["loss"] for step in steps]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_run_resumes_to_the_same_losses_bit_for_bit(dataset: Dataset, tmp_path: Path, dtype: str) -> None:
    _, whole = run(subject(), dataset, tmp_path, dtype=dtype)

    class Killed(BaseException):
        pass

    def kill(_: str, value: dict[str, Any]) -> None:
        if value["step"] == 5:  # the state on disk is that after step 3
            raise Killed

    killed = tmp_path / "killed"
    killed.mkdir()
    with pytest.raises(Killed):
        train(subject(), dataset, RECIPE, Options(dtype=dtype, seed=4, folder=killed, save_every=3), kill)
    ending, rest = run(subject(), dataset, killed, dtype=dtype, resume=True)
    assert losses(rest) == losses(whole)[3:]
    assert losses(ending.watch.steps) == losses(whole)
    assert losses(whole)[-1] < losses(whole)[0]


def test_a_run_that_is_asked_to_stop_leaves_a_state_to_go_on_from(dataset: Dataset, tmp_path: Path) -> None:
    _, whole = run(subject(), dataset, tmp_path)
    asked = iter([False, False, True])
    folder = tmp_path / "stopped"
    folder.mkdir()
    ending, first = run(subject(), dataset, folder, should_stop=lambda: next(asked))
    assert ending.stopped == "interrupted" and len(first) == 2
    _, rest = run(subject(), dataset, folder, resume=True)
    assert losses(first) + losses(rest) == losses(whole)


def test_resuming_with_other_settings_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    run(subject(), dataset, tmp_path, recipe=dataclasses.replace(RECIPE, steps=1))
    with pytest.raises(UsageError, match=r"another recipe \(steps 1, now 8"):
        run(subject(), dataset, tmp_path, resume=True)


def test_overflowing_gradients_skip_the_step_and_halve_the_scale(dataset: Dataset, tmp_path: Path) -> None:
    under_test = subject()
    calls = iter(range(100))

    def blow_up(grad: torch.Tensor) -> torch.Tensor:
        return grad * float("inf") if next(calls) < 2 else grad

    under_test.model.model.norm.weight.register_hook(blow_up)
    before = [p.detach().clone() for p in under_test.model.parameters()]
    ending, steps = run(under_test, dataset, tmp_path, dtype="float16")
    skipped = [step["step"] for step in steps if step["skipped"]]
    assert skipped[:2] == [1, 2] and len(skipped) < 8  # from 65,536 a few more overflow by themselves
    assert [step["loss_scale"] for step in steps[:3]] == [65536.0, 32768.0, 16384.0]
    assert ending.watch.skipped == skipped
    assert any(not torch.equal(a, b) for a, b in zip(before, under_test.model.parameters(), strict=True))


def test_clipping_sees_the_gradient_without_its_loss_scale(dataset: Dataset, tmp_path: Path) -> None:
    still = dataclasses.replace(RECIPE, learning_rate=0.0, embedding_rate=0.0, norm_rate=0.0)
    _, exact = run(subject(), dataset, tmp_path, recipe=still)
    _, half = run(subject(), dataset, tmp_path, dtype="float16", recipe=still)
    norms = [(step["grad_norm"], step["step"]) for step in half if not step["skipped"]]
    assert len(norms) >= 2
    for norm, step in norms:
        assert norm == pytest.approx(exact[step - 1]["grad_norm"], rel=0.01)


def test_a_nan_stops_the_run_and_the_op_that_made_it_is_named(dataset: Dataset, tmp_path: Path) -> None:
    class Divides(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(300, 8)
            self.head = torch.nn.Linear(8, 300, bias=False)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(input_ids)
            if input_ids.shape[1] == 16:
                hidden = hidden / (hidden - hidden)
            return self.head(hidden)  # type: ignore[no-any-return]

    under_test = from_model(Divides(), seed=0)
    ending, steps = run(under_test, dataset, tmp_path)
    assert ending.stopped == "nan" and len(steps) == 1 and ending.batch is not None
    finding = diagnose(under_test, ending.batch, ending.steps, "float32", reason="nan")
    assert "div" in (finding.where.op or "") and finding.where.file == "tests/test_training.py"
    assert finding.cause == "division by 0"
    kept = load_state(tmp_path / "resume.pt")  # the weights before the step, and the steps that they have taken
    assert kept["step"] == 0 and kept["steps"] == [] and bool(kept["model"]["head.weight"].isfinite().all())
    assert isinstance(finding.evidence["largest_input"], float) and 0 < finding.evidence["largest_input"] < 10


def test_weights_that_are_not_finite_are_named_and_no_op_is_blamed(dataset: Dataset, tmp_path: Path) -> None:
    under_test = subject()
    with torch.no_grad():
        under_test.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    ending, _ = run(under_test, dataset, tmp_path)
    assert ending.batch is not None
    finding = diagnose(under_test, ending.batch, ending.steps, "float32", reason="nan")
    assert finding.message.startswith("step 1: model.layers.1.mlp.up_proj.weight holds nan or inf before the forward pass")
    assert finding.where.op is None
    assert not (tmp_path / "resume.pt").exists()


def test_a_parameter_without_gradient_is_listed(dataset: Dataset, tmp_path: Path) -> None:
    under_test = subject()
    under_test.model.model.extra = torch.nn.Linear(3, 3)
    ending, _ = run(under_test, dataset, tmp_path, recipe=dataclasses.replace(RECIPE, steps=2))
    assert ending.watch.untouched == {"model.extra.weight", "model.extra.bias"}


@pytest.mark.parametrize("spec", ["olmo1-tiny", "transformers:LlamaForCausalLM", "transformers:GPTNeoXForCausalLM"])
def test_the_loss_behind_a_head_is_the_plain_loss_and_cutting_leaves_no_hook(spec: str) -> None:
    under_test = resolve(Job(spec=spec))
    head = find_head(under_test)
    assert head is not None
    batch = torch.randint(2, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    under_test.model.eval()
    with torch.no_grad():
        logits = under_test.model(batch).logits[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(logits, batch[:, 1:].flatten())
        assert float(LossOf(under_test, head, "float32")(batch)) == pytest.approx(float(expected), rel=1e-6)
    assert not head.module._forward_pre_hooks


def test_logits_changed_behind_the_head_are_not_cut_off() -> None:
    class Capped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(30, 8), torch.nn.Linear(8, 30, bias=False)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return 5 * torch.tanh(self.head(self.embed(input_ids)) / 5)

    assert find_head(from_model(Capped())) is None


def test_frequencies_are_counted_and_duplicates_of_training_documents_not_evaluated(tmp_path: Path) -> None:
    import json

    texts = [f"text {i} of many" for i in range(20)]
    texts[18] = texts[0]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = open_dataset([str(tmp_path / "a.jsonl")], vocab_size=280, cache=tmp_path / "cache")
    assert (found.train_documents, len(found.validation), len(found.test), found.duplicates) == (18, 0, 1, 1)
    assert 0 < found.unigram_entropy < 6
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]
    again: Iterator[str] = found.train_texts()
    assert next(again) == texts[0]


def test_a_tokenizer_fits_a_model_that_reads_values_and_so_does_not_run_without_memory(tmp_path: Path) -> None:
    file = tmp_path / "reads.py"
    file.write_text(
        "import torch\n"
        "class Reads(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.embed, self.head = torch.nn.Embedding(300, 8), torch.nn.Linear(8, 300)\n"
        "        self.register_buffer('table', torch.ones(4))\n"
        "    def forward(self, input_ids):\n"
        "        assert not self.table[0] == 0\n"
        "        return self.head(self.embed(input_ids))\n"
    )
    order = {"recipe": {"initializer_range": None}, "tokenizer": None}
    assert _sized(Job(spec=f"{file}:Reads"), order)[1] == 300
