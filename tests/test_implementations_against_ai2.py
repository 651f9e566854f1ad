"""The reference model against ai2-olmo and OLMo-core by `compare`: fused and renamed weights, equal logits and gradients.

Skipped where they are not installed: `pip install ai2-olmo datasets`, `pip install ai2-olmo-core`.
"""

from dataclasses import replace

import pytest
import torch

from olmodebug.first_run import from_model
from olmodebug.implementations.comparison import compare
from olmodebug.model import Olmo
from olmodebug.presets import preset

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("name", ["olmo1", "olmo1-clipped-tied", "datadecide", "olmo2", "olmo2-grouped"])
def test_ai2_olmo_gives_the_same_logits_and_gradients_both_ways_round(name: str) -> None:
    pytest.importorskip("olmo", reason="ai2-olmo cannot be imported: pip install ai2-olmo datasets")
    from tests.test_model_against_ai2_olmo import CONFIGS, ai2_model

    config = CONFIGS[name]
    torch.manual_seed(0)
    ours = from_model(Olmo(config), spec=f"ours-{name}", config=config)
    theirs = from_model(ai2_model(config), spec=f"ai2-{name}")
    for one, other in ((ours, theirs), (theirs, ours)):
        report = compare(one, other)
        assert report.findings == ()
        assert report.sections["implementations"]["gradients"]["differing"] == 0


def test_olmo_core_gives_the_same_logits_and_gradients_both_ways_round() -> None:
    transformer = pytest.importorskip("olmo_core.nn.transformer", reason="OLMo-core cannot be imported: pip install ai2-olmo-core")
    base = preset("olmo2-tiny")
    core = transformer.TransformerConfig.llama_like(
        d_model=base.hidden_size,
        vocab_size=base.vocab_size,
        n_layers=base.num_hidden_layers,
        n_heads=base.num_attention_heads,
        qk_norm=True,
        rope_theta=int(base.rope_theta),
        layer_norm_eps=base.norm_eps,
        hidden_size_multiple_of=4,
        block_name=transformer.TransformerBlockType.reordered_norm,
    ).build(init_device="cpu")
    width = dict(core.named_parameters())["blocks.0.feed_forward.w1.weight"].shape[0]
    torch.manual_seed(0)
    config = replace(base, intermediate_size=width)
    ours = from_model(Olmo(config), spec="ours", config=config)
    heads = {"n_heads": base.num_attention_heads, "vocab_size": base.vocab_size}
    theirs = from_model(core.eval(), spec="core", vocab_size=base.vocab_size, config=heads)
    for one, other in ((ours, theirs), (theirs, ours)):
        report = compare(one, other)
        assert report.findings == ()
        assert report.sections["implementations"]["gradients"]["differing"] == 0
