"""`with olmodebug.guard(model):`, memory that runs out, and the callbacks of the usual trainers."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import olmodebug
import olmodebug.report
from olmodebug.errors import UsageError
from olmodebug.guarding import huggingface_callback, lightning_callback, olmo_core_callback
from olmodebug.guards.memory import requested_bytes

SCHEMA = json.loads(Path(olmodebug.report.__file__).with_name("report.schema.json").read_text())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 64), nn.Linear(64, 31)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.silu(self.embed(ids)))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_a_clean_block_passes_and_its_report_fits_the_schema() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with olmodebug.guard(model) as watched:
        for _ in range(3):
            loss_of(model, torch.randint(0, 31, (2, 12))).backward()
            optimizer.step()
            optimizer.zero_grad()
    report = watched.report()
    assert (report.verdict, report.findings) == ("pass", ())
    assert report.sections["guard"]["processes"][0]["steps"] == 3
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(report.to_json()))


def test_an_exception_leaves_the_block_and_is_explained() -> None:
    model = Model()
    with pytest.raises(IndexError), olmodebug.guard(model, guards=["index", "shape"]) as watched:
        model(torch.tensor([[3, 40]]))
    assert [f.probe for f in watched.findings] == ["index.in-bounds"]
    assert watched.report().exit_code == 1


def test_the_scripts_own_exception_is_no_finding() -> None:
    with pytest.raises(ValueError), olmodebug.guard() as watched:
        torch.zeros(3).add(1)
        raise ValueError("no such file in the data set")
    assert not watched.findings


def test_unknown_guards_are_refused_and_a_guard_is_entered_once() -> None:
    with pytest.raises(UsageError, match="expected some of index"):
        olmodebug.guard(guards=["speed"])
    with olmodebug.guard(guards=["index"]) as watched:
        pass
    with pytest.raises(UsageError, match="entered before"):
        watched.__enter__()


def test_an_allocation_that_fails_shows_what_was_live_by_category_and_line() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model, torch.randint(0, 31, (2, 12))).backward()
    optimizer.step()
    with pytest.raises(RuntimeError), olmodebug.guard(model, guards=["oom", "shape"]) as watched:
        kept = [model(torch.randint(0, 31, (64, 128))) for _ in range(3)]
        torch.empty(2**50, dtype=torch.uint8)
    (finding,) = watched.findings
    assert finding.probe == "memory.fits"
    assert finding.evidence["requested_bytes"] == 2**50
    memory = watched.report().sections["guard"]["memory"]
    holders = {(h["category"], h["place"].partition(" in ")[2]): h for h in memory["holders"]}
    logits = next(h for (category, place), h in holders.items() if category == "activation" and "(head)" in place)
    assert (logits["count"], logits["bytes"]) == (3, sum(t.numel() * 4 for t in kept))
    parameters = sum(h["bytes"] for h in memory["holders"] if h["category"] == "parameter")
    assert parameters >= sum(p.numel() * 4 for p in model.parameters())
    assert any(h["category"] == "optimizer state" for h in memory["holders"])
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(watched.report().to_json()))


def test_memory_is_not_kept_alive_by_being_followed() -> None:
    from torch.multiprocessing.reductions import StorageWeakRef

    with olmodebug.guard(guards=["oom"]):
        big = torch.zeros(10_000)
        reference = StorageWeakRef(big.untyped_storage())
        del big
        assert reference.expired()


def test_the_requested_size_is_read_from_the_allocators_words() -> None:
    assert requested_bytes(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 204000000 bytes.")) == 204000000
    assert requested_bytes(RuntimeError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has")) == 3 << 29
    assert requested_bytes(RuntimeError("shape mismatch")) is None


def test_the_transformers_callback_watches_a_training() -> None:
    pytest.importorskip("accelerate")
    import tempfile

    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(vocab_size=53, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 53, (12, 10))]
    callback = huggingface_callback()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"max_steps": 3, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        arguments = TrainingArguments(folder, **options, dataloader_pin_memory=False)
        Trainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=data, callbacks=[callback]).train()
    assert callback.guard.report().verdict == "pass", callback.guard.findings
    assert callback.guard.watch.steps == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_lightning_callback_watches_a_fit_and_its_exception() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return loss_of(self.model, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    def fit(top: int) -> Any:
        callback = lightning_callback()
        options: dict[str, Any] = {"max_steps": 3, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(**options, accelerator="cpu", callbacks=[callback], enable_model_summary=False)
        loader = torch.utils.data.DataLoader(list(torch.randint(0, top, (12, 10))), batch_size=4)
        try:
            trainer.fit(Module(), loader)
        except IndexError:
            callback.raised = True
        return callback

    clean = fit(31)
    assert (clean.guard.report().verdict, clean.guard.watch.steps) == ("pass", 3), clean.guard.findings
    assert [f.probe for f in fit(60).guard.findings] == ["index.in-bounds"]


def test_the_olmo_core_callback_is_one_of_its_callbacks() -> None:
    callbacks = pytest.importorskip("olmo_core.train.callbacks")
    callback = olmo_core_callback(guards=["index"])
    assert isinstance(callback, callbacks.Callback)
    callback.pre_train()
    callback.post_train()
    assert callback.guard.report().exit_code in (0, 5)
