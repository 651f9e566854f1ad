"""Broken models in the way that courses and tutorials write decoders: `clean/course_style.py` with a few lines exchanged.

Sixty faults were first put into four such models, of which the tool at that time found 45, with no false alarm on the four
as they were; what it missed stands here, beside its neighbours.
"""

from __future__ import annotations

from .catalog import Mutant, _mutant, _neutral

# Faults written, and of these detected, before anything was mended.
FIRST_CONTACT = (60, 45)

_GROUPED, _SCAN, _SAMPLER = "build_grouped", "build_scan", "build_sampler"

COURSES: tuple[Mutant, ...] = (
    # ---------------------------------------------------------------- norms
    _mutant(
        "course/norm-without-root",
        "N02",
        "ScaledNorm.forward",
        "norm",
        "variance|root|sqrt",
        ("torch.sqrt(variance + self.eps)", "(variance + self.eps)"),
    ),
    _mutant(
        "course/norm-unbiased",
        "N02",
        "ScaledNorm.forward",
        "norm",
        "n - 1|unbiased",
        ("unbiased=False", "unbiased=True"),
        severity="warning",
    ),
    _mutant(
        "course/norm-of-the-sum",
        "N02",
        "RMSNorm.forward",
        "norm",
        "sum of squares|length 1",
        ("wide.pow(2).mean(-1, keepdim=True)", "wide.pow(2).sum(-1, keepdim=True)"),
        severity="warning",
        build=_GROUPED,
    ),
    _mutant(
        "course/norm-over-tokens",
        "N02",
        "RMSNorm.forward",
        "causality batch",
        "later|future|mean|sequence|dim",
        ("wide.pow(2).mean(-1, keepdim=True)", "wide.pow(2).mean((-1, -2), keepdim=True)"),
        build=_GROUPED,
    ),
    _mutant(
        "course/final-norm-for-the-loss-alone",
        "N05",
        "Sampler.forward",
        "logits",
        "last|position|one position",
        ("return self.out_head(x[:, [-1], :])", "return self.out_head(block(x)[:, [-1], :])"),
        build=_SAMPLER,
    ),
    # ---------------------------------------------------------------- the residual stream
    _mutant(
        "course/stale-shortcut",
        "N05",
        "Layer.forward",
        "norm",
        "never leaves|before it",
        ("        x = x + shortcut\n        shortcut = x\n", "        x = x + shortcut\n"),
        severity="warning",
    ),
    _mutant(
        "course/shortcut-behind-the-norm",
        "N05",
        "Layer.forward",
        "norm",
        "norm's output|normalised",
        (
            "        shortcut = x\n        x = self.drop(self.att(self.norm1(x), use_cache=use_cache))",
            "        x = self.norm1(x)\n        shortcut = x\n        x = self.drop(self.att(x, use_cache=use_cache))",
        ),
        severity="warning",
    ),
    _mutant(
        "course/mixer-without-residual",
        "N05",
        "ScanBlock.forward",
        "norm",
        "residual is not added|zeros",
        ("return self.mixer(self.norm(x)) + x", "return self.mixer(self.norm(x))"),
        severity="warning",
        build=_SCAN,
    ),
    # ---------------------------------------------------------------- positions
    _mutant(
        "course/positions-zero",
        "R17",
        "CourseGPT.forward",
        "position",
        "row 0|all the same",
        ("positions = torch.arange(start, start + seq_len, device=in_idx.device)", "positions = torch.zeros_like(in_idx[0])"),
        severity="warning",
    ),
    _mutant(
        "course/rotation-sign",
        "R01",
        "rotate",
        "rope",
        "rotat|distance|sign",
        ("torch.cat((-x[..., half:], x[..., :half]), dim=-1)", "torch.cat((x[..., half:], x[..., :half]), dim=-1)"),
        build=_GROUPED,
    ),
    _mutant(
        "course/theta-of-the-config-ignored",
        "R05",
        "GroupedDecoder.__init__",
        "rope",
        "theta|config",
        (
            'rope_tables(cfg["head_dim"], cfg["rope_base"], cfg["context_length"])',
            'rope_tables(cfg["head_dim"], 10_000, cfg["context_length"])',
        ),
        build=_GROUPED,
        also="rope_tables",
    ),
    # ---------------------------------------------------------------- attention
    _mutant(
        "course/mask-out-of-place",
        "M02",
        "SelfAttention.forward",
        "causality",
        "mask|later|future",
        ("scores.masked_fill_(hidden, -torch.inf)", "scores.masked_fill(hidden, -torch.inf)"),
    ),
    _mutant(
        "course/mask-tiny",
        "M05",
        "SelfAttention.forward",
        "causality",
        "mask|-1e-09|later",
        ("hidden, -torch.inf)\n        weights = self.dropout", "hidden, -1e-9)\n        weights = self.dropout"),
    ),
    _mutant(
        "course/keys-tiled",
        "A05",
        "GroupedAttention.forward",
        "attention",
        "key head|order|repeat",
        ("keys = keys.repeat_interleave(self.heads // self.groups, dim=1)", "keys = keys.repeat(1, self.heads // self.groups, 1, 1)"),
        build=_GROUPED,
    ),
    _mutant(
        "course/values-tiled-by-expand",
        "A05",
        "GroupedAttention.forward",
        "attention",
        "key head|order|repeat",
        (
            "values = values.repeat_interleave(self.heads // self.groups, dim=1)",
            "values = values[:, None].expand(-1, self.heads // self.groups, -1, -1, -1).flatten(1, 2)",
        ),
        build=_GROUPED,
    ),
    _mutant(
        "course/normed-scores-multiplied",
        "A01",
        "GroupedAttention.forward",
        "attention",
        "multiplied|sqrt",
        ("scores / self.size**0.5", "scores * self.size**0.5"),
        severity="warning",
        build=_GROUPED,
    ),
    _mutant(
        "course/heads-not-transposed-back",
        "A03",
        "SelfAttention.forward",
        "causality",
        "transpose|later|heads|order",
        ("(weights @ values).transpose(1, 2).reshape(x.shape)", "(weights @ values).reshape(x.shape)"),
    ),
    # ---------------------------------------------------------------- parts that nobody reads
    _mutant(
        "course/gate-for-value",
        "P02",
        "GatedFeedForward.forward",
        "gradients",
        "not used|split|outputs",
        ("self.down(F.silu(gate) * value)", "self.down(F.silu(gate) * gate)"),
        severity="warning",
        build=_GROUPED,
    ),
    _mutant(
        "course/scan-gates-itself",
        "P02",
        "Scan.forward",
        "gradients",
        "not used|split|outputs",
        ("self.out_proj(y * F.silu(gate))", "self.out_proj(y * F.silu(y))"),
        severity="warning",
        build=_SCAN,
    ),
    # ---------------------------------------------------------------- scans
    _mutant(
        "course/scan-grows",
        "",
        "Scan.forward",
        "logits",
        "infinite|range",
        ("step[..., None] * -self.log_decay.exp()", "step[..., None] * self.log_decay.exp()"),
        build=_SCAN,
    ),
    _mutant(
        "course/convolution-from-the-end",
        "M02",
        "Scan.forward",
        "causality",
        "later|future|conv|padding",
        ("self.conv(value.transpose(1, 2))[..., : x.shape[1]]", "self.conv(value.transpose(1, 2))[..., -x.shape[1] :]"),
        build=_SCAN,
    ),
    # ---------------------------------------------------------------- caches
    _mutant(
        "course/handed-cache-mask-rows",
        "K01",
        "GroupedDecoder.forward",
        "cache",
        "logits|mask",
        (".triu(1)[start:stop]", ".triu(1)[:seq_len]"),
        build=_GROUPED,
    ),
    _mutant(
        "course/handed-cache-keys-restart",
        "K02",
        "GroupedAttention.forward",
        "cache",
        "logits|position",
        ("keys = rotate(keys, cos, sin, offset=start)", "keys = rotate(keys, cos, sin)"),
        build=_GROUPED,
        also="rotate",
    ),
    _mutant(
        "course/handed-cache-values-turned",
        "K03",
        "KVCache.extend",
        "cache",
        "logits|order",
        ("values = torch.cat([self.layers[layer][1], values], dim=2)", "values = torch.cat([values, self.layers[layer][1]], dim=2)"),
        build=_GROUPED,
    ),
    _mutant(
        "course/handed-cache-forgets",
        "K03",
        "KVCache.extend",
        "cache",
        "lines up|logits",
        ("self.layers[layer] = keys, values\n", "self.layers[layer] = keys[:, :, -3:], values[:, :, -3:]\n"),
        build=_GROUPED,
        also="GroupedAttention.forward GroupedDecoder.forward",
    ),
    _mutant(
        "course/switched-cache-positions-restart",
        "K02",
        "CourseGPT.forward",
        "cache",
        "logits|position",
        ("start = self.current_pos if use_cache else 0", "start = 0"),
    ),
    _mutant(
        "course/switched-cache-counts-calls",
        "K02",
        "SelfAttention.forward",
        "cache",
        "logits|mask|position",
        ("self.seen += x.shape[1]", "self.seen += 1"),
    ),
    _mutant(
        "course/switched-cache-not-reset",
        "K05",
        "CourseGPT.reset_kv_cache",
        "cache",
        "logits|lines up|position",
        ("            block.att.reset_cache()\n        self.current_pos = 0", "            block.att.reset_cache()"),
        also="CourseGPT.forward",
    ),
    # ---------------------------------------------------------------- one position
    _mutant(
        "course/first-position-sampled",
        "K06",
        "Sampler.forward",
        "logits",
        "position 0",
        ("x[:, [-1], :]", "x[:, [0], :]"),
        build=_SAMPLER,
    ),
    _mutant(
        "course/targets-shifted-again",
        "L02",
        "Sampler.forward",
        "loss",
        "shift",
        (
            "F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)",
            "F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-1)",
        ),
        build=_SAMPLER,
    ),
)

LEGAL: tuple[Mutant, ...] = (
    _neutral(
        "course/rotates-the-other-way",
        ("torch.cat((-x[..., half:], x[..., :half]), dim=-1)", "torch.cat((x[..., half:], -x[..., :half]), dim=-1)"),
        build=_GROUPED,
    ),
    _neutral(
        "course/tiles-both",
        (
            "keys = keys.repeat_interleave(self.heads // self.groups, dim=1)\n        values = values.repeat_interleave(self.heads // self.groups, dim=1)",
            "keys = keys.repeat(1, self.heads // self.groups, 1, 1)\n        values = values.repeat(1, self.heads // self.groups, 1, 1)",
        ),
        build=_GROUPED,
    ),
    _neutral("course/scores-of-mup", ("scores / self.size**0.5", "scores / self.size"), build=_GROUPED),
    _neutral("course/gate-added", ("F.silu(gate) * value", "F.silu(gate) + value"), build=_GROUPED),
    _neutral(
        "course/parallel-branches",
        (
            "        x = x + shortcut\n        shortcut = x\n        x = self.drop(self.ff(self.norm2(x)))\n        return x + shortcut",
            "        return x + shortcut + self.drop(self.ff(self.norm2(shortcut)))",
        ),
    ),
    _neutral(
        "course/unit-vectors-with-a-scale",
        ("wide.pow(2).mean(-1, keepdim=True)", "wide.pow(2).sum(-1, keepdim=True)"),
        ("torch.rsqrt(mean_square + self.eps)", "torch.rsqrt(mean_square + self.eps) * x.shape[-1] ** 0.5"),
        build=_GROUPED,
    ),
)
