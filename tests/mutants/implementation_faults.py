"""Faults of one implementation against another: what no property of the model alone can tell, and what shows either way.

Each is an edit of a clean file, or a mutant of the catalog, held against the clean file itself and, where there is one,
against the equivalent class of transformers. `cause` is what a right diagnosis calls it; None where no named cause fits,
so that none may be claimed.
"""

import re
from dataclasses import dataclass

from tests.mutants.catalog import MUTANTS, Mutant, _mutant

LLAMA, QWEN3, GPT2 = "transformers:LlamaForCausalLM", "transformers:Qwen3ForCausalLM", "transformers:GPT2LMHeadModel"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A faulty file, the causes that are right for it, and what it is held against beside the clean file."""

    mutant: Mutant
    causes: tuple[str, ...]
    equivalent: str | None = None
    functions: tuple[str, ...] = ()  # where the first wrong tensor is made, beside the mutant's own


def _known(name: str, causes: str, equivalent: str | None = None, also: str = "") -> Fault:
    mutant = next(m for m in MUTANTS if m.name == name)
    return Fault(mutant=mutant, causes=tuple(c for c in causes.split("|") if c), equivalent=equivalent, functions=tuple(also.split()))


def _new(
    name: str,
    row: str,
    function: str,
    causes: str,
    *edits: tuple[str, str],
    build: str = "build",
    equivalent: str | None = None,
    also: str = "",
) -> Fault:
    mutant = _mutant(name, row, function, "", "", *edits, build=build, also=also)
    return Fault(mutant=mutant, causes=tuple(c for c in causes.split("|") if c), equivalent=equivalent)


_HF_HALVES = """    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
"""
_HF_PAIRS = """    x1 = x[..., ::2]
    x2 = x[..., 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)
"""
_HF_REPEAT = """    hidden_states = hidden_states[:, :, None, :, :].expand(batch, num_key_value_heads, n_rep, seq_len, head_dim)
    return hidden_states.reshape(batch, num_key_value_heads * n_rep, seq_len, head_dim)
"""
_HF_NORMED = """        if self.q_norm is not None:
            query = self.q_norm(query)
            key = self.k_norm(key)
"""
_HF_ROTATED = "        query, key = apply_rotary_pos_emb(query, key, cos, sin)\n"
_HF_MLP_INIT = """        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
"""
_HF_FUSED = "        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)\n"
_HF_MLP = "        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))\n"
_LLAMA_PAIRS = """    xq_r, xq_i = xq.reshape(*xq.shape[:-1], -1, 2).unbind(-1)
    xk_r, xk_i = xk.reshape(*xk.shape[:-1], -1, 2).unbind(-1)
"""
_LLAMA_STACK = """    xq_out = torch.stack([xq_out_r, xq_out_i], dim=-1).flatten(3)
    xk_out = torch.stack([xk_out_r, xk_out_i], dim=-1).flatten(3)
"""
_LLAMA_REPEAT = """    x = x[:, :, :, None, :].expand(bs, slen, n_kv_heads, n_rep, head_dim)
    return x.reshape(bs, slen, n_kv_heads * n_rep, head_dim)
"""
_LLAMA_QKV = "        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)\n"
_GPT_SPLIT = "        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)\n"
_GPT_PAIRS = """    x1 = x[..., ::2]
    x2 = x[..., 1::2]
    x = torch.stack((-x2, x1), dim=-1)
    return x.flatten(-2)  # (..., x1 x2 x1 x2) -> the pairs lie side by side
"""

_LLAMA_BLOCK = """        normed = rms_norm(x, self.attention_norm, self.norm_eps)
        h = x + self.attention(normed, freqs_cos, freqs_sin, mask)
        normed = rms_norm(h, self.ffn_norm, self.norm_eps)
        out = h + self.feed_forward(normed)
"""
_GPT_BLOCK = """        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
"""
_EMBEDDED = "        h = self.tok_embeddings(tokens)\n"
_EXPERTS = "        for i, expert in enumerate(self.experts):\n"


def _block(attention: str, feed_forward: str) -> tuple[str, str]:
    """Another way to put a layer together: `a(...)` is the attention, `f(...)` the feed-forward, `n1` and `n2` are the norms."""
    parts = {
        "a(": "self.attention(freqs_cos=freqs_cos, freqs_sin=freqs_sin, mask=mask, x=",
        "f(": "self.feed_forward(",
        "n1(": "rms_norm(weight=self.attention_norm, eps=self.norm_eps, x=",
        "n2(": "rms_norm(weight=self.ffn_norm, eps=self.norm_eps, x=",
    }
    lines = []
    for name, text in (("h", attention), ("out", feed_forward)):
        for short, call in parts.items():
            text = re.sub(rf"(?<![\w.]){re.escape(short)}", call, text)
        lines.append(f"        {name} = {text}\n")
    return _LLAMA_BLOCK, "".join(lines)


# Fused gate and up, right: the same model as with two projections.
FUSED_MLP = ((_HF_MLP_INIT, _HF_FUSED), (_HF_MLP, "        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)\n        return self.down_proj(self.act_fn(gate) * up)\n"))  # fmt: skip

FAULTS: tuple[Fault, ...] = (
    # rotary positions
    _new(
        "hf/interleaved-rope", "R03", "rotate_half", "RoPE style", (_HF_HALVES, _HF_PAIRS), ("emb = torch.cat((freqs, freqs), dim=-1)", "emb = freqs.repeat_interleave(2, dim=-1)"),
        equivalent=LLAMA, also="apply_rotary_pos_emb MyRotaryEmbedding.forward",
    ),
    _new(
        "llama/half-rope", "R03", "apply_rotary_emb", "RoPE style",
        (_LLAMA_PAIRS, "    xq_r, xq_i = xq.chunk(2, dim=-1)\n    xk_r, xk_i = xk.chunk(2, dim=-1)\n"),
        (_LLAMA_STACK, "    xq_out = torch.cat([xq_out_r, xq_out_i], dim=-1)\n    xk_out = torch.cat([xk_out_r, xk_out_i], dim=-1)\n"),
    ),
    _new(
        "nanogpt/half-rope", "R03", "rotate_every_two", "RoPE style",
        (_GPT_PAIRS, "    x1, x2 = x.chunk(2, dim=-1)\n    return torch.cat((-x2, x1), dim=-1)\n"),
        ("cos = angle.cos().repeat_interleave(2, dim=-1)", "cos = angle.cos().repeat(1, 2)"),
        ("sin = angle.sin().repeat_interleave(2, dim=-1)", "sin = angle.sin().repeat(1, 2)"),
        build="build_rope", also="apply_rope",
    ),
    _known("hf/mixed-rope-styles", "", LLAMA, also="apply_rotary_pos_emb rotate_half"),
    _known("llama/mixed-rope-styles", ""),
    _known("hf/rope-theta-ignored", "RoPE theta", LLAMA),
    _new("llama/theta", "R05", "Transformer.make_freqs", "RoPE theta", ("self.params.max_seq_len, self.params.rope_theta, device)", "self.params.max_seq_len, 500000.0, device)"), equivalent=LLAMA, also="precompute_freqs_cis Transformer.forward"),
    _new("nanogpt/theta", "R05", "apply_rope", "RoPE theta", ("inv_freq = theta ** (", "inv_freq = 500000.0 ** ("), build="build_rope"),
    _known("hf/partial-rotary-exponent", "RoPE exponent"),
    _known("hf/partial-rotary-wrong-partner", ""),
    _known("hf/rope-scaling-ignored", "RoPE scaling"),
    _known("hf/attention-factor-twice", "constant factor|scale", also="apply_rotary_pos_emb"),
    # attention
    _known("hf/scale-by-hidden-size", "scale", LLAMA),
    _known("hf/scaled-twice", "scale|constant factor", LLAMA),
    _known("llama/scale-by-width", "scale", LLAMA),
    _known("llama/scale-missing", "scale", LLAMA),
    _known("nanogpt/scale-by-width", "scale", GPT2),
    _known("nanogpt/flash-scaled-twice", "scale|constant factor", GPT2),
    _new("hf/kv-tiled", "A04", "repeat_kv", "GQA order", (_HF_REPEAT, "    return hidden_states.repeat(1, n_rep, 1, 1)\n"), equivalent=LLAMA),
    _new("llama/kv-tiled", "A04", "repeat_kv", "GQA order", (_LLAMA_REPEAT, "    return x.repeat(1, 1, n_rep, 1)\n"), equivalent=LLAMA),
    _known("hf/heads-merged-without-transpose", "", LLAMA),
    _known("nanogpt/heads-split-without-transpose", "", GPT2),
    _known("llama/softmax-over-queries", "", LLAMA),
    _known("hf/softcap-dropped-by-sdpa", "softcap"),
    _known("hf/final-softcap-missing", "softcap"),
    _known("hf/window-off-by-one", "window"),
    _known("hf/no-causal-mask", "mask", LLAMA),
    _known("llama/causal-off-by-one", "mask", LLAMA),
    _new(
        "hf/key-value-swapped", "", "MyAttention.forward", "qkv order",
        ("key = self.k_proj(hidden_states)", "key = self.v_proj(hidden_states)"), ("value = self.v_proj(hidden_states)", "value = self.k_proj(hidden_states)"),
        equivalent=LLAMA,
    ),
    _new("llama/key-value-swapped", "", "Attention.forward", "qkv order", (_LLAMA_QKV, "        xq, xv, xk = self.wq(x), self.wk(x), self.wv(x)\n"), equivalent=LLAMA),
    _new("nanogpt/qkv-order", "", "CausalSelfAttention.forward", "qkv order", (_GPT_SPLIT, _GPT_SPLIT.replace("q, k, v", "k, q, v")), equivalent=GPT2),
    _new(
        "nanogpt/qkv-by-head", "", "CausalSelfAttention.forward", "fused projection order",
        (_GPT_SPLIT, "        q, k, v = (t.flatten(2) for t in self.c_attn(x).view(B, T, self.n_head, 3, C // self.n_head).unbind(3))\n"),
        equivalent=GPT2, also="CausalSelfAttention.forward.<genexpr>",
    ),
    _new(
        "hf/qk-norm-after-rope", "A12", "MyAttention.forward", "QK-norm order",
        (_HF_NORMED, ""), (_HF_ROTATED, _HF_ROTATED + _HF_NORMED), build="build_qk_norm", equivalent=QWEN3, also="apply_rotary_pos_emb rotate_half MyRMSNorm.forward",
    ),
    _new(
        "hf/o-proj-transposed", "", "MyAttention.forward", "transposed weight",
        ("        return self.o_proj(attn_output), present\n", "        return attn_output @ self.o_proj.weight, present\n"), equivalent=LLAMA,
    ),
    _new(
        "nanogpt/c-proj-transposed", "", "CausalSelfAttention.forward", "transposed weight",
        ("        y = self.resid_dropout(self.c_proj(y))\n", "        y = self.resid_dropout(y @ self.c_proj.weight + self.c_proj.bias)\n"), equivalent=GPT2,
    ),
    # norms
    _known("hf/eps-ignored", "eps", LLAMA),
    _known("llama/eps-ignored", "eps", LLAMA),
    _new("hf/eps-1e-5", "N01", "MyRMSNorm.forward", "eps", ("self.variance_epsilon = eps", "self.variance_epsilon = 1e-5"), equivalent=LLAMA, also="MyRMSNorm.__init__"),
    _new("nanogpt/eps-1e-6", "N01", "LayerNorm.forward", "eps", ("self.bias, 1e-5)", "self.bias, 1e-6)"), equivalent=GPT2),
    _new(
        "hf/final-norm-eps", "N01", "MyRMSNorm.forward", "eps",
        ("        self.norm = MyRMSNorm(config.hidden_size, eps=config.rms_norm_eps)\n", "        self.norm = MyRMSNorm(config.hidden_size, eps=1e-5)\n"),
        equivalent=LLAMA, also="MyModel.__init__",
    ),
    _known("hf/norm-used-twice", "weight used twice", LLAMA),
    _known("llama/norm-used-twice", "weight used twice", LLAMA),
    _known("nanogpt/norm-used-twice", "weight used twice", GPT2),
    _known("hf/norm-of-key-unused", "weight used twice", QWEN3),
    _known("hf/residual-overwritten-by-norm", "residual", LLAMA),
    _known("llama/residual-overwritten-by-norm", "residual", LLAMA),
    _known("nanogpt/residual-overwritten-by-norm", "residual", GPT2),
    _known("hf/final-norm-missing", "final norm missing", LLAMA, also="MyForCausalLM.forward"),
    _known("llama/final-norm-missing", "final norm missing", LLAMA),
    _known("nanogpt/final-norm-missing", "final norm missing", GPT2),
    # how a layer puts its parts together
    _new("llama/post-norm", "", "TransformerBlock.forward", "norm placement", _block("n1(x + a(x))", "n2(h + f(h))"), equivalent=LLAMA),
    _new("llama/norm-behind-the-part", "", "TransformerBlock.forward", "norm placement", _block("x + n1(a(x))", "h + n2(f(h))"), equivalent=LLAMA),
    _new("llama/norm-behind-attention", "", "TransformerBlock.forward", "norm placement", _block("x + n1(a(x))", "h + f(n2(h))"), equivalent=LLAMA),
    _new("llama/parallel-residual", "", "TransformerBlock.forward", "parallel residual", _block("x + a(n1(x))", "h + f(n2(x))"), equivalent=LLAMA),
    _new("llama/parallel-with-one-norm", "", "TransformerBlock.forward", "parallel residual|weight used twice", _block("x + a(n1(x))", "h + f(n1(x))"), equivalent=LLAMA),
    _new("nanogpt/parallel-residual", "", "Block.forward", "parallel residual", (_GPT_BLOCK, "        x = x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))\n"), equivalent=GPT2),
    _new("nanogpt/post-norm", "", "Block.forward", "norm placement", (_GPT_BLOCK, "        x = self.ln_1(x + self.attn(x))\n        x = self.ln_2(x + self.mlp(x))\n"), equivalent=GPT2),
    _new("llama/no-residual-around-attention", "", "TransformerBlock.forward", "residual", _block("a(n1(x))", "h + f(n2(h))"), equivalent=LLAMA),
    _new("nanogpt/no-residual-around-mlp", "", "Block.forward", "residual", (_GPT_BLOCK, _GPT_BLOCK.replace("x + self.mlp", "self.mlp")), equivalent=GPT2),
    # a step too many, or one that is missing
    _new("llama/embedding-normed", "", "Transformer.run_layers", "norm too many", (_EMBEDDED, _EMBEDDED + "        h = F.rms_norm(h, h.shape[-1:])\n"), equivalent=LLAMA),
    _new("llama/attention-normed", "", "TransformerBlock.forward", "norm too many", _block("x + F.rms_norm(a(n1(x)), x.shape[-1:])", "h + f(n2(h))"), equivalent=LLAMA),
    _new("llama/qk-normed", "", "Attention.forward", "norm too many", ("        output = attention(xq,", "        xq, xk = F.rms_norm(xq, xq.shape[-1:]), F.rms_norm(xk, xk.shape[-1:])\n        output = attention(xq,"), equivalent=LLAMA),
    _new("llama/qkv-clipped", "", "Attention.forward", "clamp too many", (_LLAMA_QKV, _LLAMA_QKV + "        xq, xk, xv = xq.clamp(-1.5, 1.5), xk.clamp(-1.5, 1.5), xv.clamp(-1.5, 1.5)\n"), equivalent=LLAMA),
    _new("llama/qkv-clipped-far-out", "", "Attention.forward", "clamp too many", (_LLAMA_QKV, _LLAMA_QKV + "        for t in (xq, xk, xv):\n            t.clamp_(min=-8.0, max=8.0)\n"), equivalent=LLAMA),
    # experts
    _new("llama/experts-reversed", "", "MoE.forward", "expert order", (_EXPERTS, _EXPERTS.replace("self.experts", "reversed(self.experts)")), build="build_moe"),
    _new("llama/experts-shifted", "", "MoE.forward", "expert order", (_EXPERTS, _EXPERTS.replace("self.experts", "[*self.experts[1:], self.experts[0]]")), build="build_moe"),
    _new("llama/one-expert", "", "MoE.forward", "chosen experts", ("self.top_k = args.n_experts_per_token", "self.top_k = 1"), build="build_moe", also="MoE.__init__"),
    _new("llama/three-experts", "", "MoE.forward", "chosen experts", ("self.top_k = args.n_experts_per_token", "self.top_k = 3"), build="build_moe", also="MoE.__init__"),
    _new("llama/expert-weights-renormalised", "", "MoE.forward", "routing", ("        if self.norm_topk_prob:\n", "        if True:\n"), build="build_moe"),
    # feed-forward
    _new("hf/gate-and-up-swapped", "P01", "MyMLP.forward", "gate and up swapped", (_HF_MLP, _HF_MLP.replace("gate_proj(x)) * self.up_proj", "up_proj(x)) * self.gate_proj")), equivalent=LLAMA),
    _new("llama/gate-and-up-swapped", "P01", "FeedForward.forward", "gate and up swapped", ("F.silu(self.w1(x)) * self.w3(x)", "F.silu(self.w3(x)) * self.w1(x)"), equivalent=LLAMA),
    _new("hf/fused-gate-up-interleaved", "P03", "MyMLP.forward", "fused gate and up order", FUSED_MLP[0], (_HF_MLP, FUSED_MLP[1][1].replace("gate, up = self.gate_up_proj(x).chunk(2, dim=-1)", "gate, up = self.gate_up_proj(x).unflatten(-1, (-1, 2)).unbind(-1)")), equivalent=LLAMA),
    _new("hf/fused-gate-up-swapped", "P03", "MyMLP.forward", "fused gate and up order|gate and up swapped", FUSED_MLP[0], (_HF_MLP, FUSED_MLP[1][1].replace("gate, up =", "up, gate =")), equivalent=LLAMA),
    _known("hf/wrong-activation", "activation", LLAMA),
    _new("llama/gelu-for-silu", "P02", "FeedForward.forward", "activation", ("F.silu(self.w1(x))", "F.gelu(self.w1(x))"), equivalent=LLAMA),
    _new("nanogpt/gelu-by-hand", "P02", "MLP.forward", "activation", ("        x = self.gelu(x)\n", "        x = 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))\n"), equivalent=GPT2),
    # embedding and head
    _new("hf/head-from-embedding", "E02", "MyForCausalLM.forward", "tied head", ("        logits = self.lm_head(hidden_states)\n", "        logits = F.linear(hidden_states, self.model.embed_tokens.weight)\n"), equivalent=LLAMA),
    _known("nanogpt/tied-by-data", "tied head", GPT2, also=""),
    _new("hf/embedding-scaled", "E03", "MyModel.forward", "constant factor", ("hidden_states = self.embed_tokens(input_ids)\n", "hidden_states = self.embed_tokens(input_ids) * self.config.hidden_size**0.5\n"), equivalent=LLAMA),
    _new("llama/embedding-scaled", "E03", "Transformer.run_layers", "constant factor", ("        h = self.tok_embeddings(tokens)\n", "        h = self.tok_embeddings(tokens) * math.sqrt(self.params.dim)\n"), equivalent=LLAMA),
    # backward only
    _known("hf/variance-detached", "gradient stopped", LLAMA),
    _known("nanogpt/attention-weights-detached", "gradient stopped", GPT2),
    _known("nanogpt/residual-branch-detached", "gradient stopped", GPT2),
)  # fmt: skip

# Right files that are held against one another: nothing may be reported. (subject, its edits, its build, the other side)
CLEAN: tuple[tuple[str, tuple[tuple[str, str], ...], str, str], ...] = (
    ("hf_style", (), "build", LLAMA),
    ("hf_style", (), "build_sdpa", LLAMA),
    ("hf_style", (), "build_tied", LLAMA),
    ("hf_style", (), "build_qk_norm", QWEN3),
    ("hf_style", (), "build_window", "clean:build_window_sdpa"),
    ("hf_style", (), "build_softcap", "clean:build_softcap_sdpa"),
    ("hf_style", FUSED_MLP, "build", LLAMA),
    ("llama_style", (), "build", LLAMA),
    ("llama_style", (), "build_positions", "clean:build"),
    ("nanogpt_style", (), "build", GPT2),
    ("nanogpt_style", (), "build_flash", GPT2),
    ("nanogpt_style", (), "build_rope", "clean:build_rope_flash"),
)
