"""The checkpoint of every OLMo generation loads in transformers as the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from olmodebug.model import Olmo
from olmodebug.presets import preset
from olmodebug.training.architectures import HybridForCausalLM, gpt_neox, hybrid
from olmodebug.training.checkpoint import save_checkpoint


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("olmo1-tiny", "OlmoForCausalLM"),
        ("datadecide-tiny", "LlamaForCausalLM"),
        ("olmo2-tiny", "Olmo2ForCausalLM"),
        ("olmo3-tiny", "Olmo3ForCausalLM"),
    ],
)
def test_a_reference_model_loads_as_its_transformers_class(name: str, kind: str, tmp_path: Path) -> None:
    model = Olmo(preset(name), generator=torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    assert save_checkpoint(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded).__name__ == kind
    ids = torch.randint(50, (2, 23), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, observed = model(ids).logits, loaded(ids).logits
    assert float((expected - observed).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_transformers_class_saves_itself(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert save_checkpoint(LlamaForCausalLM(LlamaConfig(vocab_size=31, **sizes)), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_a_model_of_somebodys_own_gives_its_weights_and_says_that_this_is_all(tmp_path: Path) -> None:
    assert not save_checkpoint(torch.nn.Linear(3, 4), tmp_path)
    assert (tmp_path / "model.safetensors").is_file() and not (tmp_path / "config.json").exists()


def test_the_fallback_has_the_parameters_it_is_known_for() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in gpt_neox().parameters()) == 6_835_456
        # 8 layers: three matrices of 64 x 256 without biases for two with 256 + 64 biases
        assert sum(p.numel() for p in hybrid().parameters()) == 6_835_456 + 8 * (64 * 256 - 256 - 64)


def test_the_hybrid_takes_labels_and_comes_back_from_its_own_folder(tmp_path: Path) -> None:
    model = hybrid(vocab_size=61).eval()
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not save_checkpoint(model, tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_trainer_of_transformers_trains_the_hybrid_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(61, (8, 9), generator=torch.Generator().manual_seed(0))]
    torch.manual_seed(0)
    model = hybrid(vocab_size=61)
    options: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), **options, disable_tqdm=True, dataloader_pin_memory=False, logging_steps=1)
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
