"""Recipes: the ladder as published, the schedule, and which parameter goes to which optimizer."""

import pytest
import torch
from torch import nn

from olmodebug.errors import UsageError
from olmodebug.model import Olmo
from olmodebug.presets import PRESETS, preset
from olmodebug.training.loop import is_spike
from olmodebug.training.optimizer import kinds, make_optimizers, zero_residual_outputs
from olmodebug.training.recipe import LADDER, OURS, SHORT, recipe

# DataDecide's table: name, batch, rate to two digits, warmup steps. 1B: the launcher computed 2.24e-3 from the nominal size.
PUBLISHED = {
    "4M": (32, 1.4e-2, 57),
    "6M": (32, 1.2e-2, 92),
    "8M": (32, 1.1e-2, 130),
    "10M": (32, 1.0e-2, 151),
    "14M": (32, 9.2e-3, 219),
    "16M": (32, 8.9e-3, 244),
    "20M": (64, 8.4e-3, 146),
    "60M": (96, 5.8e-3, 290),
    "90M": (160, 4.9e-3, 299),
    "150M": (192, 4.2e-3, 381),
    "300M": (320, 3.3e-3, 458),
    "530M": (448, 2.8e-3, 578),
    "750M": (576, 2.5e-3, 636),
    "1B": (704, 2.2e-3, 694),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_ladder_is_the_published_one(size: str) -> None:
    batch, rate, warmup = PUBLISHED[size]
    found = recipe(f"datadecide-{size}")
    assert found.batch_size == batch
    assert float(f"{found.learning_rate:.1e}") == rate
    assert found.warmup_steps == warmup
    assert (found.betas, found.weight_decay, found.clip_norm, found.final_share) == ((0.9, 0.95), 0.05, 1.0, 0.01)


@pytest.mark.parametrize("size", list(LADDER)[:9])
def test_the_ladders_steps_are_a_hundred_tokens_a_parameter_and_ten_more(size: str) -> None:
    steps, batch, count = LADDER[size]
    assert steps == -(-100 * int(count) // (batch * 2048)) + 10
    stated = PRESETS[f"datadecide-{size}"]
    assert count == stated.parameters - stated.config.vocab_size * stated.config.hidden_size


def test_a_rate_warms_up_and_ends_at_its_share() -> None:
    ladder = recipe("datadecide-4M")
    assert ladder.rate_share(0) == 0 and ladder.rate_share(57) == 1
    assert ladder.rate_share(ladder.steps) == pytest.approx(0.01)
    assert SHORT.rate_share(0) == 0.1 and SHORT.rate_share(9) == 1.0
    shares = [OURS.rate_share(step) for step in range(OURS.warmup_steps, OURS.steps)]
    assert shares == sorted(shares, reverse=True)


def test_the_short_setting_is_the_one_people_start_from() -> None:
    assert (SHORT.steps, SHORT.batch_size, SHORT.seq_len, SHORT.learning_rate) == (100, 8, 512, 1.4e-2)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="such as datadecide-4M"):
        recipe("datadecide-4m")


@pytest.mark.parametrize("name", ["olmo1-tiny", "datadecide-tiny", "olmo3-tiny"])
def test_every_parameter_is_in_one_group_once(name: str) -> None:
    model = Olmo(preset(name))
    for chosen in (OURS, SHORT):
        optimizers = make_optimizers(model, chosen, head=model.lm_head)
        ids = [id(p) for optimizer in optimizers.each for group in optimizer.param_groups for p in group["params"]]
        assert sorted(ids) == sorted({id(p) for p in model.parameters()})


def test_tables_are_no_matrices_and_vectors_are_neither() -> None:
    model = Olmo(preset("datadecide-tiny"))
    found = kinds(model, model.lm_head)
    assert {id(p) for p in found["embedding"]} == {id(model.lm_head.weight), id(model.model.embed_tokens.weight)}
    assert all(p.ndim == 1 for p in found["vector"]) and len(found["vector"]) == 5
    assert len(found["matrix"]) == 2 * 7


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    assert not kinds(model)["embedding"]


def test_a_layer_whose_output_begins_at_zero_is_the_identity_and_learns() -> None:
    model = Olmo(preset("olmo1-tiny"))
    zero_residual_outputs(model)
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    hidden = model.model(ids, None, None, None)
    assert torch.equal(hidden, model.model.norm(model.model.embed_tokens(ids)))
    model(ids, labels=ids).loss.backward()
    assert all(layer.mlp.down_proj.weight.grad.any() and layer.self_attn.o_proj.weight.grad.any() for layer in model.model.layers)


def test_rates_of_a_step_keep_their_proportion() -> None:
    optimizers = make_optimizers(Olmo(preset("olmo2-tiny")), OURS)
    optimizers.set_rates(0.5)
    rates = [group["lr"] for optimizer in optimizers.each for group in optimizer.param_groups]
    assert rates == [OURS.embedding_rate / 2, OURS.norm_rate / 2, OURS.learning_rate / 2]
    assert isinstance(optimizers.each[1], torch.optim.Muon)


def test_a_loss_is_a_spike_beside_losses_on_the_same_kind_of_windows() -> None:
    ours = recipe("olmodebug")
    assert (ours.first_of_kind(79), ours.first_of_kind(80), recipe("short").first_of_kind(99)) == (0, 80, 0)
    flat: list[float | None] = [4.0] * 80
    assert is_spike(flat, 5.5, first=ours.first_of_kind(79))
    assert not is_spike(flat, 5.5, first=ours.first_of_kind(80))  # the windows with which documents begin are harder
    assert is_spike([*flat, *([5.4] * 10)], 6.5, first=ours.first_of_kind(90))
    assert not is_spike(flat[:5], 9.0, first=0)
