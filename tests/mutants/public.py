"""Faults that were first seeded in public models and missed there, or told with no cause or with the wrong one."""

from .catalog import Mutant, _mutant, _neutral

_GROUPED = "build_grouped"

PUBLIC: tuple[Mutant, ...] = (
    # ---------------------------------------------------------------- positions of new tokens
    _mutant(
        "hf/decode-positions-lag",
        "R16",
        "MyModel.forward",
        "cache",
        "positions are off by -1",
        (
            "torch.arange(past_length, past_length + seq_len, device=input_ids.device)[None, :]",
            "torch.arange(past_length, past_length + seq_len, device=input_ids.device)[None, :] - int(past_length > 0)",
        ),
    ),
    _mutant(
        "course/rotated-one-late",
        "R16",
        "rotate",
        "cache",
        "positions are off by 1: the chunk at position 2 gets what a table holds for position 3",
        ("keys = rotate(keys, cos, sin, offset=start)", "keys = rotate(keys, cos, sin, offset=start + (start > 0))"),
        build=_GROUPED,
    ),
    _mutant(
        "serving/phases-lag",
        "R16",
        "Served.forward",
        "cache",
        "positions are off by -1",
        ("table = self.table[start_pos : start_pos + new]", "table = self.table[max(start_pos - 1, 0) :][:new]"),
        build="build_last",
    ),
    _mutant(
        "lit/freqs-one-late",
        "R16",
        "GPT.forward",
        "cache",
        "positions are off by 1",
        ("freqs_cis = self.freqs_cis[input_pos]", "freqs_cis = self.freqs_cis[input_pos + (input_pos[0] > 0)]"),
    ),
    _mutant(
        "flex/bias-one-late",
        "M14",
        "PositionBias.forward",
        "cache",
        "positions are off by 1",
        ("bias = self.bias(T, kv_len, offset, x)", "bias = self.bias(T, kv_len, offset + int(offset > 0), x)"),
        also="Decoder.forward",
    ),
    # ---------------------------------------------------------------- masks with fewer queries than keys
    _mutant(
        "course/triu-without-past",
        "M09",
        "GroupedDecoder.forward",
        "cache",
        "aligned top-left: with 2 tokens in the cache the first new query, position 2, sees key 0 only",
        (
            "torch.ones(stop, stop, dtype=torch.bool, device=in_idx.device).triu(1)[start:stop]",
            "torch.ones(seq_len, stop, dtype=torch.bool, device=in_idx.device).triu(1)",
        ),
        build=_GROUPED,
    ),
    _mutant(
        "course/mask-rows-from-zero",
        "M09",
        "SelfAttention.forward",
        "cache",
        "aligned top-left",
        ("[start : start + x.shape[1], : keys", "[: x.shape[1], : keys"),
    ),
    _mutant(
        "lit/mask-rows-from-zero",
        "M09",
        "GPT.forward",
        "cache",
        "aligned top-left",
        ("mask = self.mask_cache[input_pos]", "mask = self.mask_cache[:T]"),
        also="CausalSelfAttention.scaled_dot_product_attention",
    ),
    _mutant(
        "moe/tril-one-short",
        "M09",
        "make_mask",
        "cache",
        "ends 1 too early",
        (".tril(diagonal=past_len)", ".tril(diagonal=max(past_len - 1, 0))"),
    ),
    # ---------------------------------------------------------------- slots of a cache
    _mutant(
        "serving/keys-and-values-into-slot-0",
        "K01",
        "Attention.forward",
        "cache",
        "the token at position 2 is written into slot 0 of the cache, and is read from slot 2",
        ("self.keys[:batch, start_pos:end] = k", "self.keys[:batch, :new] = k"),
        ("self.values[:batch, start_pos:end]", "self.values[:batch, :new]"),
    ),
    _mutant(
        "serving/values-one-slot-late",
        "K01",
        "Attention.forward",
        "cache",
        "is written into slot 3 of the cache",
        ("self.values[:batch, start_pos:end]", "self.values[:batch, start_pos + int(start_pos > 0) :][:, :new]"),
    ),
    _mutant(
        "lit/keys-one-slot-early",
        "K01",
        "KVCache.forward",
        "cache",
        "the token at position 1 is written into slot 0 of the cache",
        ("self.k[:n, :, input_pos] = k", "self.k[:n, :, (input_pos - 1).clamp(min=0)] = k"),
    ),
    _mutant(
        "serving/slots-one-late-and-around",
        "K01",
        "Cache.update",
        "causality",
        "the token at position 0 is written into slot 1",
        ("        self.keys[:, :, places] = k", "        places = (places + 1) % self.keys.shape[2]\n        self.keys[:, :, places] = k"),
        build="build_prepared",
    ),
)

LEGAL: tuple[Mutant, ...] = (
    _neutral(  # slots may be taken in any order that mask and readers agree on
        "serving/slots-from-the-end",
        ("        self.keys[:, :, places] = k", "        places = self.keys.shape[2] - 1 - places\n        self.keys[:, :, places] = k"),
        ("        return self.keys, self.values", "        return self.keys.flip(2), self.values.flip(2)"),
        build="build_prepared",
    ),
)
