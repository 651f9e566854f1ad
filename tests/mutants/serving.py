"""Broken models of the served style: a cache inside, start_pos or input_pos, inference mode."""

from .catalog import Mutant, _mutant

SERVING: tuple[Mutant, ...] = (
    _mutant(
        "serving/phases-from-zero",
        "R06",
        "Served.forward",
        "cache",
        "positions restart",
        ("table = self.table[start_pos : start_pos + new]", "table = self.table[:new]"),
    ),
    _mutant(
        "serving/phases-from-zero-for-the-last",
        "R06",
        "Served.forward",
        "cache",
        "positions restart",
        ("table = self.table[start_pos : start_pos + new]", "table = self.table[:new]"),
        build="build_last",
    ),
    _mutant(
        "serving/values-of-the-prompt-only",  # what the full forward left in the cache is what is missing here
        "",
        "Attention.forward",
        "cache",
        "the new tokens",
        ("        self.values[:batch, start_pos:end] =", "        if new > 1:\n            self.values[:batch, start_pos:end] ="),
    ),
    _mutant(
        "serving/queries-not-turned",
        "R19",
        "Attention.forward",
        "rope",
        "keys are rotated and queries are not",
        ("q = turn(self.wq(x).view(batch, new, c.heads, c.width), table)", "q = self.wq(x).view(batch, new, c.heads, c.width)"),
        also="turn",
    ),
    _mutant(
        "serving/latent-key-not-turned",
        "R19",
        "Latent.forward",
        "rope",
        "queries are rotated and keys are not",
        ("turn(key.unsqueeze(2), table).squeeze(2)", "key"),
        build="build_last",
        also="turn",
    ),
    _mutant(
        "serving/norm-unused",
        "N04",
        "Block.forward",
        "gradients",
        "no op of forward computes with it",
        ("y = self.mlp_norm(x)", "y = self.attention_norm(x)"),
        severity="warning",
    ),
    _mutant(
        "serving/mask-of-the-future",
        "M02",
        "PreparedAttention.forward",
        "causality",
        "the causal mask is inverted",
        ("torch.tril(torch.ones(max_seq_length", "torch.triu(torch.ones(max_seq_length"),
        build="build_prepared",
    ),
    _mutant(
        "serving/mask-without-the-past",
        "M09",
        "Latent.forward",
        "cache",
        "new tokens alone",
        ("            mask = torch.hstack([torch.zeros(new, start_pos, device=tokens.device), mask]).type_as(x)\n", ""),
        severity="warning",
        build="build_last",
        also="Served.forward",
    ),
)
