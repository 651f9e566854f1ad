"""Broken models as ordinary people write them: a GPT-2 with `past`, an OLMo 2 with a cache of its own, a llama of plain functions.

Each clean file was written before its mutants, and these before any probe had seen them. Here is what the probes missed, or
told wrongly, at first contact.
"""

from __future__ import annotations

from .catalog import Mutant, _mutant, _neutral

ORDINARY: tuple[Mutant, ...] = (
    # ---------------------------------------------------------------- gpt2: the cache comes back from every call
    _mutant(
        "gpt2/cached-behind-the-new",
        "K03",
        "Attention.forward",
        "cache",
        "order|front",
        ("k = torch.cat((pk, k), dim=-2)", "k = torch.cat((k, pk), dim=-2)"),
        ("v = torch.cat((pv, v), dim=-2)", "v = torch.cat((v, pv), dim=-2)"),
    ),
    _mutant(
        "gpt2/mask-top-left",
        "M09",
        "Attention._attn",
        "cache",
        "top-left",
        ("self.bias[:, :, ns - nd : ns, :ns]", "self.bias[:, :, :nd, :ns]"),
    ),
    _mutant(
        "gpt2/values-cached-as-keys",
        "K03",
        "Attention.forward",
        "cache",
        "another tensor",
        ("present = torch.stack((k, v))", "present = torch.stack((v, k))"),
    ),
    _mutant(
        "gpt2/cached-after-what-comes-again",
        "K03",
        "Attention.forward",
        "cache",
        "a second time",
        ("        present = torch.stack((k, v))", "        k = torch.tanh(k)\n        present = torch.stack((k, v))"),
    ),
    _mutant(
        "gpt2/no-query-sees-itself",
        "M05",
        "Attention._attn",
        "causality padding",
        "own key",
        ("torch.tril(torch.ones(n, n, dtype=torch.bool))", "torch.tril(torch.ones(n, n, dtype=torch.bool), diagonal=-1)"),
    ),
    _mutant(
        "gpt2/decode-positions-restart",
        "R16",
        "GPT2.forward",
        "cache",
        "restart",
        ("torch.arange(past_length, past_length + t, device=input_ids.device)", "torch.arange(0, t, device=input_ids.device)"),
    ),
    _mutant(
        "gpt2/positions-clamped",
        "",
        "GPT2.forward",
        "position",
        "one row",
        ("self.wpe(position_ids))", "self.wpe(position_ids.clamp(max=self.config.n_positions // 2)))"),
        severity="warning",
    ),
    _mutant(
        "gpt2/as-many-first-keys-hidden-as-are-padded",
        "M12",
        "Attention._attn",
        "causality padding",
        "sees no key at all",
        (
            "key_mask = attention_mask[:, None, None, :]",
            "pads = (attention_mask == 0).sum(-1)\n"
            "            key_mask = (torch.arange(attention_mask.size(-1), device=input_ids.device)[None] >= pads[:, None])[:, None, None, :]",
        ),
        also="GPT2.forward",
    ),
    _mutant(
        "gpt2/positions-never-looked-at",
        "R19",
        "GPT2.forward",
        "position",
        "accepted and not used",
        ("self.wpe(position_ids)", "self.wpe.weight[0]"),
    ),
    _mutant(
        "postnorm/exponent-over-the-width",
        "R13",
        "Rotary.__init__",
        "rope",
        "model's width",
        ("torch.arange(0, dim, 2).float() / dim", "torch.arange(0, dim, 2).float() / config.hidden_size"),
        also="Rotary.forward",
    ),
    # ---------------------------------------------------------------- rotary angles in 16 bits
    _mutant(
        "postnorm/angles-in-the-models-dtype",
        "R01,R02",
        "Rotary.forward",
        "rope",
        "computed in bfloat16",
        (
            "position_ids[:, :, None].float() * self.inv_freq[None, None, :].float()",
            "position_ids[:, :, None].to(self.inv_freq.dtype) * self.inv_freq[None, None, :]",
        ),
        severity="warning",
    ),
    _mutant(
        "postnorm/cosines-cast-down",
        "R01",
        "Rotary.forward",
        "rope",
        "casts cosines and sines to bfloat16",
        ("return emb.cos(), emb.sin()", "return emb.cos().bfloat16(), emb.sin().bfloat16()"),
        severity="warning",
    ),
    _mutant(
        "postnorm/last-head-unrotated",
        "R19",
        "apply_rotary",
        "rope",
        "query heads 5 are not rotated",
        (
            "    q = q * cos + rotate_half(q) * sin\n",
            "    q = torch.cat([(q * cos + rotate_half(q) * sin)[:, :-1], q[:, -1:]], dim=1)\n",
        ),
    ),
    _mutant(
        "postnorm/mask-of-a-float32-constant",
        "M04",
        "TinyOlmoForCausalLM.build_bias",
        "precision",
        "beyond 65504",
        ("torch.finfo(x.dtype).min)", "-3.0e38)"),
        severity="warning",
    ),
    # ---------------------------------------------------------------- norms and activations
    _mutant(
        "postnorm/mean-square-of-n-minus-1",
        "N08",
        "OlmoNorm.forward",
        "norm",
        "n - 1",
        ("variance = x.pow(2).mean(-1, keepdim=True)", "variance = x.pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1)"),
        severity="warning",
    ),
    _mutant(
        "postnorm/key-norm-with-another-eps",
        "N01",
        "OlmoAttention.__init__",
        "norm",
        "k_norm is made with 0.001",
        (
            "self.k_norm = OlmoNorm(self.n_kv * self.head_dim, config.rms_norm_eps)",
            "self.k_norm = OlmoNorm(self.n_kv * self.head_dim, 1e-3)",
        ),
        severity="warning",
    ),
    _mutant(
        "gpt2/gelu-exact",
        "P02",
        "MLP.forward",
        "mlp",
        "exact gelu",
        ("self.c_proj(gelu_new(self.c_fc(x)))", "self.c_proj(nn.functional.gelu(self.c_fc(x)))"),
    ),
    _mutant("gpt2/gelu-constant", "P02", "gelu_new", "mlp", "constants", ("0.044715", "0.44715"), severity="warning"),
    _mutant(
        "postnorm/attention-output-left-unscaled",
        "I01",
        "TinyOlmoForCausalLM._init_weights",
        "init",
        "depth scale is on one of them",
        ('("o_proj.weight", "down_proj.weight")', '("out_proj.weight", "down_proj.weight")'),
        severity="warning",
        also="TinyOlmoForCausalLM.__init__",
    ),
    # ---------------------------------------------------------------- windows
    _mutant(
        "plain/window-plus-one",
        "M06",
        "window_mask",
        "window",
        "off by one",
        ("(k > q - window)", "(k >= q - window)"),
    ),
    _mutant(
        "plain/full-mask-for-every-layer",
        "M08",
        "attend",
        "window",
        "gets the full causal one",
        ("attn_mask=mask, dropout_p=p)", "attn_mask=mask | torch.ones_like(mask).tril(), dropout_p=p)"),
    ),
    _mutant(
        "plain/mask-before-the-softcap",
        "M03",
        "attend",
        "window",
        "back within reach",
        (
            "    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p).transpose(1, 2)",
            "    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -1e9)\n"
            "    scores = 50 * torch.tanh(scores / 50)\n"
            "    return (F.dropout(scores.softmax(-1), p) @ v).transpose(1, 2)",
        ),
    ),
    # ---------------------------------------------------------------- branches for dropout
    _mutant(
        "plain/mask-lost-with-dropout",
        "M02",
        "attend",
        "causality",
        "no causal mask",
        ("attn_mask=mask, dropout_p=p)", "attn_mask=mask if p == 0 else None, dropout_p=p)"),
    ),
    _mutant(
        "postnorm/sdpa-mask-lost-with-dropout",
        "M02",
        "sdpa_attention",
        "causality",
        "no causal mask",
        ("attn_mask=bias, dropout_p", "attn_mask=None if dropout > 0 else bias, dropout_p"),
    ),
    # ---------------------------------------------------------------- plain: the cache is made by setup_caches
    _mutant(
        "plain/cache-of-row-zero",
        "K03",
        "Layer.attention",
        "cache",
        "not its own",
        ("k = keys[:b, : start_pos + t]", "k = keys[:1, : start_pos + t].expand(b, -1, -1, -1)"),
        also="attend",
    ),
    _mutant(
        "plain/values-written-at-zero",
        "K03",
        "Layer.attention",
        "cache",
        "slot",
        ("values[:b, start_pos : start_pos + t] = v", "values[:b, :t] = v"),
    ),
    # ---------------------------------------------------------------- gradients
    _mutant(
        "postnorm/one-head-detached",
        "",
        "OlmoAttention.forward",
        "gradients",
        "detach cuts",
        (
            "        q, k = apply_rotary(q, k, cos, sin)\n",
            "        q, k = apply_rotary(q, k, cos, sin)\n        q = torch.cat([q[:, :1].detach(), q[:, 1:]], dim=1)\n",
        ),
        severity="warning",
    ),
    _mutant(
        "postnorm/silu-with-a-wrong-backward",
        "",
        "FastSilu.backward",
        "gradients",
        "not the derivative of its forward",
        (
            "class OlmoMLP(nn.Module):",
            "class FastSilu(torch.autograd.Function):\n"
            "    @staticmethod\n"
            "    def forward(ctx, x):\n"
            "        ctx.save_for_backward(x)\n"
            "        return x * torch.sigmoid(x)\n\n"
            "    @staticmethod\n"
            "    def backward(ctx, grad):\n"
            "        (x,) = ctx.saved_tensors\n"
            "        s = torch.sigmoid(x)\n"
            "        return grad * (s + x * s)\n\n\n"
            "class OlmoMLP(nn.Module):",
        ),
        ("F.silu(self.gate_proj(x))", "FastSilu.apply(self.gate_proj(x))"),
        severity="warning",
    ),
    _mutant(
        "plain/keys-under-no-grad",
        "",
        "Layer.attention",
        "gradients",
        "no_grad cuts the path",
        ("        k = self.wk(x).view", "        with torch.no_grad():\n            k = self.wk(x)\n        k = k.view"),
        severity="warning",
    ),
    _mutant(
        "gpt2/weights-without-gradient",
        "",
        "Attention._attn",
        "gradients",
        "no_grad cuts",
        (
            "        w = self.attn_dropout(torch.softmax(w, dim=-1))\n",
            "        with torch.no_grad():\n            w = torch.softmax(w, dim=-1)\n        w = self.attn_dropout(w)\n",
        ),
        severity="warning",
    ),
    _mutant(
        "plain/generate-one-late",
        "R16",
        "Llama.generate",
        "generate",
        "where forward finds",
        ("start_pos=tokens.shape[1] - 1)", "start_pos=tokens.shape[1])"),
        ("self.setup_caches(tokens.shape[0], tokens.shape[1] + n)", "self.setup_caches(tokens.shape[0], tokens.shape[1] + n + 1)"),
        severity="warning",
    ),
    # ---------------------------------------------------------------- models of two configs
    _mutant(
        "plain/table-shared-by-configs",
        "",
        "Llama.__init__",
        "rope",
        "from one model to the next",
        ("def precompute_freqs_cis", "TABLES = {}\n\n\ndef precompute_freqs_cis"),
        (
            "        freqs_cis = precompute_freqs_cis(args.dim // args.n_heads, args.max_seq_len, args.rope_theta)\n",
            "        key = (args.dim // args.n_heads, args.max_seq_len)\n"
            "        if key not in TABLES:\n"
            "            TABLES[key] = precompute_freqs_cis(*key, args.rope_theta)\n"
            "        freqs_cis = TABLES[key]\n",
        ),
        also="precompute_freqs_cis",
        severity="warning",
    ),
)

# Legal designs in the same files.
LEGAL: tuple[Mutant, ...] = (
    _neutral(
        "gpt2/gelu-written-as-erf",
        (
            "    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))",
            "    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))",
        ),
        ('"gelu_new"', '"gelu"'),
    ),
    _neutral(
        "plain/last-logits-in-decode",
        ("        logits = self.output(h)\n", "        if use_cache:\n            h = h[:, -1:]\n        logits = self.output(h)\n"),
    ),
    _neutral(
        "plain/rounded-activations",  # BitNet's: the value of the rounding, the gradient of what was rounded
        (
            "    return w2(F.silu(w1(x)) * w3(x))",
            "    s = 7 / x.detach().abs().amax(-1, keepdim=True)\n    x = x + ((x * s).round() / s - x).detach()\n    return w2(F.silu(w1(x)) * w3(x))",
        ),
    ),
    _neutral(
        "postnorm/embedding-learns-slower",  # CogView's: a tenth of the gradient, the same value
        (
            "        x = self.embed_tokens(input_ids)\n",
            "        x = self.embed_tokens(input_ids)\n        x = x * 0.1 + x.detach() * 0.9\n",
        ),
    ),
    _neutral(
        "gpt2/gradient-scaled",
        (
            "class MLP(nn.Module):",
            "class Slower(torch.autograd.Function):\n"
            "    @staticmethod\n"
            "    def forward(ctx, x):\n"
            "        return x.view_as(x)\n\n"
            "    @staticmethod\n"
            "    def backward(ctx, grad):\n"
            "        return 0.1 * grad\n\n\n"
            "class MLP(nn.Module):",
        ),
        ("gelu_new(self.c_fc(x))", "gelu_new(self.c_fc(Slower.apply(x)))"),
    ),
)
