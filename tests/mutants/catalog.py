"""The models the tool is judged on: deliberately broken ones that it must catch, and legal variants on which it must stay silent.

Each is a clean file of `clean/` with a few lines exchanged. `row` is the bug's id in the corpus of real bugs this project was
designed from (R rotary, M masks, A attention, N norms, P feed-forward, E embeddings, L loss, T training, K cache, I init).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CLEAN = Path(__file__).parent / "clean"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutant:
    """One edited model, and what a correct diagnosis of it looks like."""

    name: str  # "hf/no-causal-mask"
    base: str  # "hf_style"
    row: str  # "M02", or several: "R17,K01"; "" where the corpus has none
    edits: tuple[tuple[str, str], ...]  # (old, new), each old exactly once in the base
    function: str  # qualified name of the function that is wrong
    topics: tuple[str, ...]  # probe topics of which at least one must report it
    words: tuple[str, ...]  # at least one must occur, in lower case, in the message or the cause
    severity: str = "error"  # "warning": wrong only under a condition, or a likely slip that could be meant
    build: str = "build"  # the attribute to load
    also: tuple[str, ...] = ()  # functions where the damage first shows; a diagnosis there is right too
    loud: bool = False  # it raises by itself in the forward of its build


def source(mutant: Mutant) -> str:
    """The edited text; ValueError where an edit does not occur exactly once in the base."""
    text = (CLEAN / f"{mutant.base}.py").read_text()
    for old, _ in mutant.edits:
        if text.count(old) != 1:
            raise ValueError(f"{mutant.name}: expected this once in {mutant.base}.py, found {text.count(old)} times: {old!r}")
    for old, new in mutant.edits:
        text = text.replace(old, new)
    return text


def materialize(mutant: Mutant, folder: Path) -> Path:
    """Writes the edited file into a folder and returns its path."""
    path = folder / (mutant.name.replace("/", "_").replace("-", "_") + ".py")
    path.write_text(source(mutant))
    return path


_BASES = {
    "hf": "hf_style",
    "nanogpt": "nanogpt_style",
    "llama": "llama_style",
    "lit": "litgpt_style",
    "jax": "jax_style",
    "flex": "flex_style",
    "moe": "moe_style",
    "heads": "heads_style",
    "course": "course_style",
    "torchnn": "torchnn_style",
    "serving": "serving_style",
    "wordlm": "wordlm_style",
    "megatron": "megatron_style",
    "gpt2": "gpt2_style",
    "postnorm": "postnorm_style",
    "plain": "plain_style",
}


def _mutant(
    name: str,
    row: str,
    function: str,
    topics: str,
    words: str,
    *edits: tuple[str, str],
    severity: str = "error",
    build: str = "build",
    also: str = "",
    loud: bool = False,
) -> Mutant:
    """A Mutant from text: topics and functions separated by blanks, words by |."""
    return Mutant(
        name=name,
        base=_BASES[name.split("/")[0]],
        row=row,
        edits=edits,
        function=function,
        topics=tuple(topics.split()),
        words=tuple(words.split("|")),
        severity=severity,
        build=build,
        also=tuple(also.split()),
        loud=loud,
    )


def _neutral(name: str, *edits: tuple[str, str], build: str = "build") -> Mutant:
    return Mutant(name=name, base=_BASES[name.split("/")[0]], row="", edits=edits, function="", topics=(), words=(), build=build)


# --------------------------------------------------------------------------------------------------------------------------------
# Hugging Face style

_HF_ALLOWED = "    allowed = key_index <= query_index\n"
_HF_MASK = """    causal_mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    causal_mask = causal_mask.masked_fill(~allowed, min_value)
"""
_HF_PADDING = """    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, :].bool()
"""
_HF_SELF = """    # A padding query may have no key at all; let it see itself, so that its softmax is no 0/0.
    allowed = allowed | ((key_index == query_index) & ~allowed.any(dim=-1, keepdim=True))
"""
_HF_SOFTMAX = """    attn_weights = attn_weights + attention_mask
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
"""
_HF_POSITIONS = """        if position_ids is None:
            seq_len = input_ids.shape[1]
            position_ids = torch.arange(past_length, past_length + seq_len, device=input_ids.device)[None, :]
"""
_HF_ROTARY_APPLY = """        super()._apply(fn, recurse)
        self.reset_parameters()
        return self
"""
_HF_ROTARY_RESET = (
    """    def reset_parameters(self):
        self.inv_freq = self.compute_inv_freq(self.inv_freq.device)

    def _apply(self, fn, recurse=True):
        # A cast to bfloat16 would round the frequencies, and to_empty() would lose them: make them anew.
"""
    + _HF_ROTARY_APPLY
)
_HF_TIE_APPLY = """    def _apply(self, fn, recurse=True):
        # to_empty() gives each module its own memory: tie again.
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

"""
_HF_RESIDUAL = """            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(param, mean=0.0, std=residual_std)
"""
_HF_LOSS_LOGITS = "shift_logits = logits[:, :-1, :].reshape(-1, vocab_size).float()"
_HF_LOSS_LABELS = "shift_labels = labels[:, 1:].reshape(-1)"
_HF_QUERY = "query = self.q_proj(hidden_states).view(batch_size, query_length, self.num_heads, self.head_dim)"
_HF_FFN = """        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + self.dropout(hidden_states)
"""
_HF_ROTATE_HALF = """    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
"""
_HF_ROTATE_PAIRS = """    x1 = x[..., ::2]
    x2 = x[..., 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)
"""
_HF_ROTATED = """    query_rot = (query_rot * cos) + (rotate_half(query_rot) * sin)
    key_rot = (key_rot * cos) + (rotate_half(key_rot) * sin)
    return torch.cat((query_rot, query_pass), dim=-1), torch.cat((key_rot, key_pass), dim=-1)
"""
_HF_ALWAYS_EAGER = (
    '    return config.attn_implementation == "sdpa" and config.attn_logit_softcapping is None\n',
    "    return False  # SDPA has no argument for this\n",
)
_HF_NORM = """        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
"""

_HF_MUTANTS = (
    # --- who may look at whom
    _mutant(
        "hf/no-causal-mask",
        "M02",
        "make_causal_mask",
        "causality",
        "causal mask|future|later",
        (_HF_ALLOWED, "    allowed = torch.ones(query_length, key_length, dtype=torch.bool, device=device)\n"),
        also="eager_attention",
    ),
    _mutant(
        "hf/mask-polarity",
        "M01",
        "make_causal_mask",
        "causality mask",
        "polarity|inverted|future|later",
        (".masked_fill(~allowed, min_value)", ".masked_fill(allowed, min_value)"),
        also="eager_attention",
    ),
    _mutant(
        "hf/sdpa-bool-of-additive-mask",
        "M01",
        "sdpa_attention",
        "causality mask kernels window",
        "polarity|inverted|future|later",
        ("attn_mask=attention_mask,", "attn_mask=None if attention_mask is None else attention_mask.bool(),"),
        build="build_window_sdpa",
    ),
    _mutant(
        "hf/causal-mask-transposed",
        "M01",
        "make_causal_mask",
        "causality mask",
        "causal mask|future|later|triang|transposed",
        (_HF_ALLOWED, "    allowed = key_index >= query_index\n"),
        also="eager_attention",
    ),
    _mutant(
        "hf/causal-off-by-one",
        "M02",
        "make_causal_mask",
        "causality mask",
        "off by one|one position|future|next|later",
        (_HF_ALLOWED, "    allowed = key_index <= query_index + 1\n"),
        also="eager_attention",
    ),
    _mutant(
        "hf/zero-one-mask-added",
        "M13",
        "make_causal_mask",
        "causality mask padding",
        "0/1|added|zero|future|later",
        (_HF_MASK, "    causal_mask = allowed.to(dtype)\n"),
        also="eager_attention",
    ),
    _mutant(
        "hf/mask-minus-1e4",
        "M03",
        "make_causal_mask",
        "mask causality",
        "-1e4|-10000|-1e+04|finite|mask value|mask constant",
        ("min_value = torch.finfo(dtype).min", "min_value = -1e4"),
        severity="warning",
        also="eager_attention",
    ),
    _mutant(
        "hf/mask-planes-summed",
        "M04",
        "make_causal_mask",
        "mask padding precision",
        "-inf|summed|nan|finite|finfo",
        (_HF_PADDING, ""),
        (
            _HF_MASK,
            _HF_MASK
            + "    if attention_mask is not None:\n"
            + "        causal_mask = causal_mask + (1.0 - attention_mask[:, None, None, :].to(dtype)) * min_value\n",
        ),
        severity="warning",
        also="eager_attention",
    ),
    _mutant(
        "hf/fully-masked-row-nan",
        "M05",
        "make_causal_mask",
        "padding mask",
        "nan|fully masked|no key|not finite|non-finite",
        (_HF_SELF, ""),
        ("min_value = torch.finfo(dtype).min", 'min_value = float("-inf")'),
        also="eager_attention",
    ),
    _mutant(
        "hf/eager-without-mask",
        "M02",
        "eager_attention",
        "causality",
        "causal mask|future|later|mask",
        ("    attn_weights = attn_weights + attention_mask\n", ""),
    ),
    _mutant(
        "hf/sdpa-not-causal",
        "M02",
        "sdpa_attention",
        "causality kernels",
        "causal|future|later",
        ("is_causal = attention_mask is None and query.shape[2] > 1", "is_causal = False"),
        build="build_sdpa",
    ),
    _mutant(
        "hf/layer-1-without-mask",
        "M02",
        "MyModel.forward",
        "causality",
        "causal mask|future|later|mask",
        (
            "            layer_mask = masks[layer.attention_type]\n",
            (
                "            layer_mask = masks[layer.attention_type]\n"
                "            if i == 1:\n"
                "                layer_mask = None if layer_mask is None else torch.zeros_like(layer_mask)\n"
            ),
        ),
        also="eager_attention MyAttention.forward",
    ),
    _mutant(
        "hf/mask-after-softmax",
        "M02",
        "eager_attention",
        "causality mask",
        "softmax|before|normalis|normaliz|denominator|future|later",
        (
            _HF_SOFTMAX,
            (
                "    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)\n"
                "    attn_weights = attn_weights.masked_fill(attention_mask < 0, 0.0)\n"
            ),
        ),
    ),
    _mutant(
        "hf/centred-by-a-helper",
        "N09",
        "center",
        "causality",
        "mean|sequence|future|later",
        (
            "class MyModel(nn.Module):\n",
            (
                "def center(hidden_states):\n"
                "    return hidden_states - hidden_states.mean(dim=1, keepdim=True)\n\n\n"
                "class MyModel(nn.Module):\n"
            ),
        ),
        ("hidden_states = self.embed_tokens(input_ids)", "hidden_states = center(self.embed_tokens(input_ids))"),
    ),
    _mutant(
        "hf/norm-over-sequence",
        "N09",
        "MyRMSNorm.forward",
        "causality norm",
        "sequence|axis|dim|future|later",
        (
            "variance = hidden_states.pow(2).mean(-1, keepdim=True)",
            "variance = hidden_states.pow(2).mean(1, keepdim=True)",
        ),
    ),
    # --- padding
    _mutant(
        "hf/mask-not-forwarded",
        "M12",
        "MyForCausalLM.forward",
        "padding",
        "attention_mask|padding|pad ",
        (
            "            attention_mask=attention_mask,\n            position_ids",
            "            attention_mask=None,\n            position_ids",
        ),
        also="eager_attention MyModel.forward make_causal_mask",
    ),
    _mutant(
        "hf/key-mask-on-queries",
        "M12",
        "make_causal_mask",
        "padding mask",
        "key|padding|pad |query|queries",
        ("attention_mask[:, None, None, :].bool()", "attention_mask[:, None, :, None].bool()"),
        also="eager_attention",
    ),
    _mutant(
        "hf/mask-of-the-first-row",
        "M12",
        "make_causal_mask",
        "padding batch",
        "row|padding|pad |mask",
        ("attention_mask[:, None, None, :].bool()", "attention_mask[:1, None, None, :].bool()"),
        also="eager_attention",
    ),
    _mutant(
        "hf/learned-positions-count-padding",
        "R07",
        "MyModel.forward",
        "padding cache",
        "position|pad",
        (
            "        self.rotary_emb = MyRotaryEmbedding(config)\n\n    def forward",
            (
                "        self.rotary_emb = MyRotaryEmbedding(config)\n"
                "        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)\n\n"
                "    def forward"
            ),
        ),
        (
            "        position_embeddings = self.rotary_emb(hidden_states, position_ids)\n",
            (
                "        position_embeddings = self.rotary_emb(hidden_states, position_ids)\n"
                "        hidden_states = hidden_states + self.embed_positions(position_ids)\n"
            ),
        ),
    ),
    _mutant(
        "hf/decode-positions-count-padding",
        "R06",
        "MyModel.forward",
        "cache padding",
        "position|pad",
        (
            _HF_POSITIONS,
            (
                "        if position_ids is None:\n"
                "            seq_len = input_ids.shape[1]\n"
                "            if past_length == 0 and attention_mask is not None:\n"
                "                position_ids = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)\n"
                "            else:\n"
                "                position_ids = torch.arange(past_length, past_length + seq_len, device=input_ids.device)[None, :]\n"
            ),
        ),
        also="apply_rotary_pos_emb MyRotaryEmbedding.forward",
    ),
    # --- attention
    _mutant(
        "hf/heads-merged-without-transpose",
        "A06",
        "MyAttention.forward",
        "causality shapes",
        "transpose|head|reshape|future|later",
        (
            "attn_output = attn_output.reshape(batch_size,",
            "attn_output = attn_output.transpose(1, 2).reshape(batch_size,",
        ),
    ),
    _mutant(
        "hf/heads-split-without-transpose",
        "A07",
        "MyAttention.forward",
        "causality shapes",
        "transpose|head|view|future|later",
        (_HF_QUERY, "query = self.q_proj(hidden_states).view(batch_size, self.num_heads, query_length, self.head_dim)"),
        ("        query = query.transpose(1, 2)\n", ""),
    ),
    _mutant(
        "hf/softmax-over-queries",
        "A08",
        "eager_attention",
        "causality mask kernels",
        "softmax|axis|dim|sum to",
        ("F.softmax(attn_weights, dim=-1, dtype", "F.softmax(attn_weights, dim=-2, dtype"),
    ),
    _mutant(
        "hf/scale-missing-in-eager",
        "A02",
        "eager_attention",
        "kernels attention",
        "scale|scaling|sqrt",
        ("torch.matmul(query, key.transpose(2, 3)) * scaling", "torch.matmul(query, key.transpose(2, 3))"),
    ),
    _mutant(
        "hf/scale-missing-in-sdpa",
        "A02",
        "sdpa_attention",
        "kernels attention",
        "scale|scaling|sqrt",
        ("scale=scaling,", "scale=1.0,"),
        build="build_sdpa",
    ),
    _mutant(
        "hf/scale-by-hidden-size",
        "A01",
        "MyAttention.__init__",
        "structure kernels attention",
        "scale|scaling|sqrt|head_dim",
        ("self.scaling = self.head_dim**-0.5", "self.scaling = config.hidden_size**-0.5"),
        severity="warning",
        also="eager_attention",
    ),
    _mutant(
        "hf/scaled-twice",
        "A03",
        "MyAttention.forward",
        "structure kernels attention",
        "scale|scaling|sqrt|head_dim",
        (
            "        query, key = apply_rotary_pos_emb(query, key, cos, sin)\n",
            "        query, key = apply_rotary_pos_emb(query, key, cos, sin)\n        query = query * self.scaling\n",
        ),
        severity="warning",
        also="eager_attention",
    ),
    _mutant(
        "hf/repeat-kv-on-sequence",
        "A05",
        "repeat_kv",
        "build shapes",
        "repeat|head|num_key_value",
        (
            "    return hidden_states.reshape(batch, num_key_value_heads * n_rep, seq_len, head_dim)\n",
            "    return hidden_states.reshape(batch, num_key_value_heads, n_rep * seq_len, head_dim)\n",
        ),
        also="eager_attention",
        loud=True,
    ),
    _mutant(
        "hf/dropout-in-eval-sdpa",
        "A09",
        "sdpa_attention",
        "determinism",
        "dropout",
        ("dropout_p=dropout if training else 0.0,", "dropout_p=dropout,"),
        build="build_dropout_sdpa",
    ),
    _mutant(
        "hf/dropout-in-eval-eager",
        "A09",
        "eager_attention",
        "determinism",
        "dropout",
        ("F.dropout(attn_weights, p=dropout, training=training)", "F.dropout(attn_weights, p=dropout)"),
        build="build_dropout",
    ),
    _mutant(
        "hf/dropout-rate-forgotten-eager",
        "A09",
        "eager_attention",
        "determinism",
        "rate of its own",
        ("F.dropout(attn_weights, p=dropout, training=training)", "F.dropout(attn_weights, training=training)"),
        build="build_sdpa",
    ),
    _mutant(
        "hf/raises-in-eager-alone",
        "",
        "eager_attention",
        "attention logits",
        "with eager attention raises",
        ("    attn_output = torch.matmul(attn_weights, value)\n", ""),
        build="build_sdpa",
    ),
    _mutant(
        "hf/softcap-dropped-by-sdpa",
        "A10",
        "uses_sdpa",
        "kernels structure",
        "softcap|cap ",
        (
            'return config.attn_implementation == "sdpa" and config.attn_logit_softcapping is None',
            'return config.attn_implementation == "sdpa"',
        ),
        build="build_softcap_sdpa",
        also="sdpa_attention MyAttention.forward",
    ),
    _mutant(
        "hf/attention-softcap-missing",
        "A10",
        "eager_attention",
        "attention",
        "softcap of the config is not applied to the scores",
        ("        attn_weights = softcap * torch.tanh(attn_weights / softcap)\n", "        attn_weights = attn_weights * 1.0\n"),
        build="build_softcap",
    ),
    _mutant(
        "hf/activation-left-out",
        "",
        "MyMLP.forward",
        "mlp",
        "never called, and no other op bends",
        ("self.act_fn(self.gate_proj(x)) * self.up_proj(x)", "self.gate_proj(x) * self.up_proj(x)"),
    ),
    _mutant(
        "hf/final-softcap-missing",
        "A11",
        "MyForCausalLM.forward",
        "structure vocab attention",
        "softcap|cap ",
        (
            (
                "        softcap = self.config.final_logit_softcapping\n"
                "        if softcap is not None:\n"
                "            logits = softcap * torch.tanh(logits / softcap)\n"
            ),
            "",
        ),
        build="build_softcap",
    ),
    _mutant(
        "hf/softmax-in-bfloat16",
        "A16",
        "eager_attention",
        "precision kernels",
        "bf16|bfloat16|softmax|precision",
        (
            "F.softmax(attn_weights, dim=-1, dtype=torch.float32)",
            "F.softmax(attn_weights, dim=-1, dtype=torch.bfloat16)",
        ),
    ),
    # --- rotary embedding and positions
    _mutant(
        "hf/mixed-rope-styles",
        "R04",
        "rotate_half",
        "rope position",
        "pair|half|interleav|isometr|angle",
        (_HF_ROTATE_HALF, _HF_ROTATE_PAIRS),
        also="apply_rotary_pos_emb MyRotaryEmbedding.forward",
    ),
    _mutant(
        "hf/rope-on-query-only",
        "",
        "apply_rotary_pos_emb",
        "rope position",
        "key|relative|distance|shift|rotat",
        ("    key_rot = (key_rot * cos) + (rotate_half(key_rot) * sin)\n", ""),
    ),
    _mutant(
        "hf/inv-freq-rounded-by-cast",
        "R01",
        "MyRotaryEmbedding._apply",
        "precision rope lifecycle",
        "inv_freq|bf16|bfloat16|cast",
        (
            _HF_ROTARY_APPLY,
            (
                "        was_meta = self.inv_freq.is_meta\n"
                "        super()._apply(fn, recurse)\n"
                "        if was_meta:\n"
                "            self.reset_parameters()\n"
                "        return self\n"
            ),
        ),
        severity="warning",
        also="MyRotaryEmbedding.__init__ MyRotaryEmbedding.forward",
    ),
    _mutant(
        "hf/inv-freq-lost-by-to-empty",
        "R15",
        "MyRotaryEmbedding._apply",
        "lifecycle",
        "inv_freq|to_empty|meta|buffer",
        (
            _HF_ROTARY_RESET,
            (
                "    def _apply(self, fn, recurse=True):\n"
                "        inv_freq = self.inv_freq\n"
                "        super()._apply(fn, recurse)\n"
                "        if not inv_freq.is_meta:  # keep float32\n"
                "            self.inv_freq = inv_freq.to(self.inv_freq.device)\n"
                "        return self\n"
            ),
        ),
        severity="warning",
        also="MyRotaryEmbedding.__init__ MyRotaryEmbedding.forward",
    ),
    _mutant(
        "hf/positions-in-model-dtype",
        "R02",
        "MyRotaryEmbedding.forward",
        "precision rope position",
        "bf16|bfloat16|position|256",
        ("positions = position_ids.to(torch.float32)", "positions = position_ids.to(hidden_states.dtype)"),
        ("    max_position_embeddings: int = 64\n", "    max_position_embeddings: int = 1024\n"),
        severity="warning",
    ),
    _mutant(
        "hf/rope-theta-ignored",
        "R05",
        "MyRotaryEmbedding.compute_inv_freq",
        "rope",
        "theta|base|inv_freq|10000",
        ("1.0 / (self.config.rope_theta **", "1.0 / (10000.0 **"),
        also="MyRotaryEmbedding.__init__ MyRotaryEmbedding.forward",
    ),
    _mutant(
        "hf/positions-clamped",
        "R09",
        "MyRotaryEmbedding.forward",
        "rope position",
        "clamp|saturat|same|distinguish|alias|alike",
        (
            "positions = position_ids.to(torch.float32)",
            "positions = (position_ids.to(torch.float32) / 2).clamp(max=15)",
        ),
    ),
    _mutant(
        "hf/attention-factor-twice",
        "R11",
        "MyRotaryEmbedding.forward",
        "rope",
        "attention_factor|factor|norm|twice|scale",
        ("cos = emb.cos() * self.attention_factor", "cos = emb.cos() * self.attention_factor**2"),
        ("sin = emb.sin() * self.attention_factor", "sin = emb.sin() * self.attention_factor**2"),
        build="build_attention_factor",
    ),
    _mutant(
        "hf/partial-rotary-exponent",
        "R13",
        "MyRotaryEmbedding.compute_inv_freq",
        "rope",
        "rotary_dim|head_dim|partial|inv_freq|exponent",
        ("(steps / self.rotary_dim)", "(steps / self.config.head_dim)"),
        build="build_partial_rotary",
        also="MyRotaryEmbedding.__init__ MyRotaryEmbedding.forward",
    ),
    _mutant(
        "hf/partial-rotary-wrong-partner",
        "R14",
        "apply_rotary_pos_emb",
        "rope position",
        "pair|partner|partial|rotary_dim|isometr|angle",
        (
            "    rotary_dim = cos.shape[-1]\n",
            (
                "    missing = query.shape[-1] - cos.shape[-1]\n"
                "    cos = F.pad(cos, (0, missing), value=1.0)\n"
                "    sin = F.pad(sin, (0, missing))\n"
                "    rotary_dim = cos.shape[-1]\n"
            ),
        ),
        build="build_partial_rotary",
        also="rotate_half",
    ),
    _mutant(
        "hf/rope-scaling-ignored",
        "R18",
        "MyRotaryEmbedding.compute_inv_freq",
        "rope",
        "rope_scaling|factor|scaling|inv_freq",
        ("        scaling = self.config.rope_scaling\n", "        scaling = None\n"),
        build="build_linear_scaling",
        also="MyRotaryEmbedding.__init__ MyRotaryEmbedding.forward",
    ),
    _mutant(
        "hf/rope-no-op",
        "R19",
        "apply_rotary_pos_emb",
        "position rope",
        "position|not applied|no effect|unused|ignored|rotat",
        (_HF_ROTATED, "    return query, key\n"),
        also="MyAttention.forward",
    ),
    _mutant(
        "hf/position-ids-ignored",
        "R20",
        "MyModel.forward",
        "position packing",
        "position_ids|ignored|unused|no effect",
        (
            _HF_POSITIONS,
            (
                "        seq_len = input_ids.shape[1]\n"
                "        position_ids = torch.arange(past_length, past_length + seq_len, device=input_ids.device)[None, :]\n"
            ),
        ),
    ),
    _mutant(
        "hf/positions-of-the-first-row",
        "",
        "MyRotaryEmbedding.forward",
        "position batch",
        "position|row",
        ("positions = position_ids.to(torch.float32)", "positions = position_ids[:1].to(torch.float32)"),
        also="apply_rotary_pos_emb",
    ),
    # --- cache
    _mutant(
        "hf/decode-positions-restart",
        "R16",
        "MyModel.forward",
        "cache",
        "position|offset|past|restart",
        ("torch.arange(past_length, past_length + seq_len,", "torch.arange(0, seq_len,"),
        also="apply_rotary_pos_emb MyRotaryEmbedding.forward",
    ),
    _mutant(
        "hf/causal-mask-top-left",
        "M09",
        "make_causal_mask",
        "cache",
        "top-left|offset|past|align|mask|cache",
        ("query_index = torch.arange(past_length, key_length,", "query_index = torch.arange(0, query_length,"),
        also="eager_attention",
    ),
    _mutant(
        "hf/sdpa-causal-top-left",
        "M09",
        "make_causal_mask",
        "cache",
        "top-left|is_causal|align|mask|cache",
        ("and plain and (past_length == 0 or query_length == 1)", "and plain"),
        build="build_sdpa",
        also="sdpa_attention",
    ),
    _mutant(
        "hf/second-turn-masked-from-zero",
        "K02,M09",
        "make_causal_mask",
        "cache",
        "top-left|offset|past|align|mask|cache|chunk",
        (
            "query_index = torch.arange(past_length, key_length, device=device)[:, None]",
            "query_index = torch.arange(query_length, device=device)[:, None] + (past_length if query_length == 1 else 0)",
        ),
        also="eager_attention",
    ),
    _mutant(
        "hf/cached-keys-not-rotated",
        "K03",
        "MyAttention.forward",
        "cache",
        "cache|rotat|rope|position",
        (
            "        query, key = apply_rotary_pos_emb(query, key, cos, sin)\n",
            "        if past_key_value is None:\n            query, key = apply_rotary_pos_emb(query, key, cos, sin)\n",
        ),
        also="apply_rotary_pos_emb",
    ),
    _mutant(
        "hf/cached-values-in-wrong-order",
        "K03",
        "MyAttention.forward",
        "cache",
        "cache|order|value|past",
        ("torch.cat((past_key_value[1], value), dim=2)", "torch.cat((value, past_key_value[1]), dim=2)"),
        also="eager_attention",
    ),
    _mutant(
        "hf/position-stops-when-cache-is-full",
        "R17,K01",
        "MyAttention.forward",
        "cache",
        "cache|position|window|past|length",
        (
            "        present = (key, value) if use_cache else None\n",
            (
                "        window = self.config.sliding_window\n"
                "        present = (key[:, :, -window:], value[:, :, -window:]) if use_cache else None\n"
            ),
        ),
        build="build_window",
        also="MyModel.forward apply_rotary_pos_emb make_causal_mask eager_attention MyRotaryEmbedding.forward",
    ),
    _mutant(
        "hf/alibi-on-query-length",
        "M14",
        "eager_attention",
        "cache",
        "bias|cache|query|length|alibi|offset",
        (
            "    attn_weights = attn_weights + attention_mask\n",
            (
                "    slopes = 2.0 ** -torch.arange(1, query.shape[1] + 1, device=query.device)\n"
                "    distance = torch.arange(query.shape[2], device=query.device) - query.shape[2] + 1\n"
                "    attn_weights = attn_weights + slopes[:, None, None] * distance\n"
                "    attn_weights = attn_weights + attention_mask\n"
            ),
        ),
    ),
    # --- sliding window
    _mutant(
        "hf/window-off-by-one",
        "M06",
        "make_causal_mask",
        "window",
        "window|sliding",
        ("(key_index > query_index - sliding_window)", "(key_index >= query_index - sliding_window)"),
        build="build_window",
        also="eager_attention",
    ),
    _mutant(
        "hf/window-never-reaches-sdpa",
        "M07",
        "make_causal_mask",
        "window kernels",
        "window|sliding",
        ("plain = attention_mask is None and sliding_window is None", "plain = attention_mask is None"),
        build="build_window_sdpa",
        also="sdpa_attention",
    ),
    _mutant(
        "hf/mask-cache-without-window",
        "M08",
        "make_causal_mask",
        "window state cache",
        "window|sliding|state|key|call",
        ("def make_causal_mask(config,", "ALLOWED = {}\n\n\ndef make_causal_mask(config,"),
        (
            _HF_ALLOWED
            + "    if sliding_window is not None:\n"
            + "        allowed = allowed & (key_index > query_index - sliding_window)\n",
            (
                "    if (query_length, key_length) not in ALLOWED:\n"
                "        allowed = key_index <= query_index\n"
                "        if sliding_window is not None:\n"
                "            allowed = allowed & (key_index > query_index - sliding_window)\n"
                "        ALLOWED[query_length, key_length] = allowed\n"
                "    allowed = ALLOWED[query_length, key_length]\n"
            ),
        ),
        build="build_window",
        also="eager_attention",
    ),
    # --- state
    _mutant(
        "hf/padding-mask-of-an-earlier-call",
        "",
        "MyModel.forward",
        "state padding",
        "state|earlier|call|kept|padding|pad ",
        (
            "        self.rotary_emb = MyRotaryEmbedding(config)\n\n    def forward",
            "        self.rotary_emb = MyRotaryEmbedding(config)\n        self.kept_masks = {}\n\n    def forward",
        ),
        (
            '        masks = {"full_attention": make_causal_mask(self.config, attention_mask, hidden_states, past_length)}\n',
            (
                "        shape = (tuple(input_ids.shape), past_length, hidden_states.dtype)\n"
                "        if shape not in self.kept_masks:\n"
                "            self.kept_masks[shape] = make_causal_mask(self.config, attention_mask, hidden_states, past_length)\n"
                '        masks = {"full_attention": self.kept_masks[shape]}\n'
            ),
        ),
        also="eager_attention make_causal_mask",
    ),
    _mutant(
        "hf/labels-mutated-in-place",
        "L11",
        "causal_lm_loss",
        "state loss",
        "in place|in-place|modif|mutat|overwr|writes",
        ("    " + _HF_LOSS_LABELS, "    labels[labels == 0] = ignore_index\n    " + _HF_LOSS_LABELS),
    ),
    _mutant(
        "hf/key-positions-on-the-cpu",
        "",
        "make_causal_mask",
        "device",
        "device|cpu",
        ("key_index = torch.arange(key_length, device=device)", 'key_index = torch.arange(key_length, device="cpu")'),
    ),
    # --- norms, residual stream, feed-forward
    _mutant(
        "hf/eps-ignored",
        "N01",
        "MyRMSNorm.__init__",
        "norm",
        "eps",
        ("self.variance_epsilon = eps", "self.variance_epsilon = 1e-2"),
        also="MyRMSNorm.forward",
    ),
    _mutant(
        "hf/norm-without-division",
        "",
        "MyRMSNorm.forward",
        "norm",
        "normalises nothing",
        ("        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)\n", ""),
    ),
    _mutant(
        "hf/norm-squares-in-float16",
        "N02",
        "MyRMSNorm.forward",
        "precision norm",
        "overflow|float16|fp16|upcast|float32",
        ("        hidden_states = hidden_states.to(torch.float32)\n", ""),
        severity="warning",
    ),
    _mutant(
        "hf/norm-used-twice",
        "N04",
        "MyDecoderLayer.forward",
        "gradients structure",
        "gradient|unused|never|twice|post_attention_layernorm",
        (
            "hidden_states = self.post_attention_layernorm(hidden_states)",
            "hidden_states = self.input_layernorm(hidden_states)",
        ),
        also="MyDecoderLayer.__init__ MyRMSNorm.__init__",
    ),
    _mutant(
        "hf/residual-overwritten-by-norm",
        "N05",
        "MyDecoderLayer.forward",
        "structure norm",
        "residual",
        (
            "        residual = hidden_states\n        hidden_states = self.post_attention_layernorm(hidden_states)\n",
            "        hidden_states = self.post_attention_layernorm(hidden_states)\n        residual = hidden_states\n",
        ),
        severity="warning",
    ),
    _mutant(
        "hf/final-norm-missing",
        "N06",
        "MyModel.forward",
        "gradients norm structure",
        "final norm|norm.weight|gradient|unused|never",
        ("        hidden_states = self.norm(hidden_states)\n", ""),
        also="MyModel.__init__ MyRMSNorm.__init__",
    ),
    _mutant(
        "hf/norm-of-key-unused",
        "N04",
        "MyAttention.forward",
        "gradients structure",
        "k_norm|gradient|unused|never",
        ("            key = self.k_norm(key)\n", "            key = self.q_norm(key)\n"),
        build="build_qk_norm",
        also="MyAttention.__init__ MyRMSNorm.__init__",
    ),
    _mutant(
        "hf/batch-mean",
        "N09",
        "MyModel.forward",
        "batch",
        "batch|row",
        (
            "hidden_states = self.norm(hidden_states)",
            "hidden_states = self.norm(hidden_states - hidden_states.mean(dim=0))",
        ),
    ),
    _mutant(
        "hf/wrong-activation",
        "P02",
        "MyMLP.__init__",
        "structure mlp",
        "activation|gelu|silu|hidden_act",
        ("self.act_fn = ACT2FN[config.hidden_act]", "self.act_fn = F.gelu"),
        also="MyMLP.forward",
    ),
    # --- gradients
    _mutant(
        "hf/variance-detached",
        "D04",
        "MyRMSNorm.forward",
        "gradients",
        "gradient|detach|derivative|finite difference",
        (".mean(-1, keepdim=True)", ".mean(-1, keepdim=True).detach()"),
    ),
    _mutant(
        "hf/gate-detached",
        "",
        "MyMLP.forward",
        "gradients",
        "gradient|detach",
        ("self.act_fn(self.gate_proj(x)) *", "self.act_fn(self.gate_proj(x)).detach() *"),
        also="MyMLP.__init__",
    ),
    _mutant(
        "hf/reentrant-checkpointing",
        "T09",
        "MyModel.forward",
        "gradients kernels",
        "checkpoint|reentrant|gradient",
        ("use_reentrant=False", "use_reentrant=True"),
        severity="warning",
        build="build_checkpointing",
    ),
    _mutant(
        "hf/plain-list-of-layers",
        "",
        "MyModel.__init__",
        "structure gradients lifecycle",
        "list|registered|modulelist",
        (
            "nn.ModuleList([MyDecoderLayer(config, i) for i in range(config.num_hidden_layers)])",
            "[MyDecoderLayer(config, i) for i in range(config.num_hidden_layers)]",
        ),
    ),
    # --- vocabulary, tying
    _mutant(
        "hf/pad-token-outside",
        "E05",
        "MyConfig",
        "vocab",
        "pad_token_id|vocab|97",
        ("pad_token_id: int = 0", "pad_token_id: int = 97"),
        also="MyModel.__init__ MyForCausalLM.__init__ MyModel.forward",
    ),
    _mutant(
        "hf/head-wider-than-the-loss-expects",
        "E01",
        "causal_lm_loss",
        "vocab loss shapes",
        "vocab|104|97",
        (
            "self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)",
            "self.lm_head = nn.Linear(config.hidden_size, config.vocab_size + 7, bias=False)",
        ),
        also="MyForCausalLM.__init__ MyForCausalLM.forward",
    ),
    _mutant(
        "hf/zero-embedding-rows",
        "E07",
        "MyForCausalLM._init_weights",
        "init vocab",
        "zero|embedding|row",
        (
            "        elif isinstance(module, nn.Embedding):\n            nn.init.normal_(module.weight, mean=0.0, std=std)\n",
            (
                "        elif isinstance(module, nn.Embedding):\n            nn.init.normal_(module.weight, mean=0.0, std=std)\n"
                "            module.weight.data[-9:] = 0.0\n"
            ),
        ),
        severity="warning",
        also="MyModel.__init__",
    ),
    _mutant(
        "hf/tying-by-copy",
        "E02",
        "MyForCausalLM.tie_weights",
        "structure lifecycle init vocab",
        "tie",
        (
            "self.lm_head.weight = self.model.embed_tokens.weight",
            "self.lm_head.weight = nn.Parameter(self.model.embed_tokens.weight.detach().clone())",
        ),
        build="build_tied",
        also="MyForCausalLM.__init__",
    ),
    _mutant(
        "hf/tying-lost-by-to-empty",
        "E02",
        "MyForCausalLM.tie_weights",
        "lifecycle",
        "tie|tying",
        (_HF_TIE_APPLY, ""),
        severity="warning",
        build="build_tied",
        also="MyForCausalLM.__init__",
    ),
    # --- loss
    _mutant(
        "hf/labels-shifted-twice",
        "L01",
        "causal_lm_loss",
        "loss",
        "shift|t+2|twice|two",
        ("logits[:, :-1, :].reshape", "logits[:, :-2, :].reshape"),
        ("labels[:, 1:].reshape", "labels[:, 2:].reshape"),
        also="MyForCausalLM.forward",
    ),
    _mutant(
        "hf/labels-not-shifted",
        "L02",
        "causal_lm_loss",
        "loss",
        "shift|same position|copy",
        ("logits[:, :-1, :].reshape", "logits.reshape"),
        ("labels[:, 1:].reshape", "labels.reshape"),
        also="MyForCausalLM.forward",
    ),
    _mutant(
        "hf/both-cut-on-the-same-side",
        "L02",
        "causal_lm_loss",
        "loss",
        "shift|same position|copy",
        ("labels[:, 1:].reshape", "labels[:, :-1].reshape"),
        also="MyForCausalLM.forward",
    ),
    _mutant(
        "hf/shift-after-flattening",
        "L03",
        "causal_lm_loss",
        "loss batch",
        "flatten|row|boundar|shift",
        (_HF_LOSS_LOGITS, "shift_logits = logits.reshape(-1, vocab_size)[:-1].float()"),
        (_HF_LOSS_LABELS, "shift_labels = labels.reshape(-1)[1:]"),
        also="MyForCausalLM.forward",
    ),
    _mutant(
        "hf/loss-divided-by-all-labels",
        "L13",
        "causal_lm_loss",
        "loss",
        "ignore|all tokens|divid|count|-100",
        ("count = (shift_labels != ignore_index).sum()", "count = torch.tensor(shift_labels.numel())"),
        also="MyForCausalLM.forward",
    ),
    _mutant(
        "hf/ignored-labels-count",
        "L13",
        "causal_lm_loss",
        "loss",
        "ignore|-100",
        (_HF_LOSS_LABELS, "shift_labels = labels[:, 1:].reshape(-1).clamp(min=0)"),
        also="MyForCausalLM.forward",
    ),
    _mutant(
        "hf/all-labels-ignored-nan",
        "L09",
        "causal_lm_loss",
        "loss",
        "nan|ignored|0/0|no label",
        ("return total / count.clamp(min=1)", "return total / count"),
        severity="warning",
        also="MyForCausalLM.forward",
    ),
    _mutant(
        "hf/loss-in-bfloat16",
        "L12",
        "causal_lm_loss",
        "precision loss",
        "bf16|bfloat16|precision",
        (".reshape(-1, vocab_size).float()", ".reshape(-1, vocab_size).bfloat16()"),
        also="MyForCausalLM.forward",
    ),
    _mutant(
        "hf/embedding-scaled-for-ids-only",
        "E03",
        "MyModel.forward",
        "kernels",
        "inputs_embeds",
        (
            "class MyForCausalLM(nn.Module):\n",
            "class MyForCausalLM(nn.Module):\n    def get_input_embeddings(self):\n        return self.model.embed_tokens\n\n",
        ),
        (
            "    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False):\n",
            "    def forward(\n"
            "        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False, inputs_embeds=None\n"
            "    ):\n",
        ),
        (
            "        hidden_states = self.embed_tokens(input_ids)\n",
            "        if inputs_embeds is None:\n"
            "            hidden_states = self.embed_tokens(input_ids) * self.config.hidden_size**0.5\n"
            "        else:\n"
            "            hidden_states, input_ids = inputs_embeds, inputs_embeds[..., 0]\n",
        ),
        (
            "        input_ids,\n        attention_mask=None,\n",
            "        input_ids=None,\n        attention_mask=None,\n        inputs_embeds=None,\n",
        ),
        (
            "            input_ids,\n            attention_mask=attention_mask,\n",
            "            input_ids,\n            inputs_embeds=inputs_embeds,\n            attention_mask=attention_mask,\n",
        ),
        severity="warning",
        also="MyForCausalLM.forward",
    ),
    # --- initialisation
    _mutant(
        "hf/residual-init-never-applied",
        "I01",
        "MyForCausalLM.init_weights",
        "init",
        "residual|std|o_proj|depth",
        (
            'if name.endswith(("o_proj.weight", "down_proj.weight")):',
            'if name in ("o_proj.weight", "down_proj.weight"):',
        ),
        severity="warning",
        also="MyForCausalLM._init_weights MyForCausalLM.__init__ MyAttention.__init__",
    ),
    _mutant(
        "hf/residual-init-twice",
        "I03",
        "MyForCausalLM.init_weights",
        "init",
        "residual|std|o_proj|depth|twice",
        (
            "self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)",
            "self.config.initializer_range / (2 * self.config.num_hidden_layers)",
        ),
        severity="warning",
        also="MyForCausalLM._init_weights MyForCausalLM.__init__ MyAttention.__init__",
    ),
    _mutant(
        "hf/init-never-called",
        "I04",
        "MyForCausalLM.init_weights",
        "init",
        "std|init",
        ("        self.apply(self._init_weights)\n", ""),
        severity="warning",
        also="MyForCausalLM.__init__ MyModel.__init__ MyForCausalLM._init_weights",
    ),
    _mutant(
        "hf/value-and-output-both-zero",
        "I06",
        "MyForCausalLM.init_weights",
        "gradients init",
        "zero|gradient",
        (
            _HF_RESIDUAL,
            _HF_RESIDUAL
            + '            if name.endswith(("v_proj.weight", "o_proj.weight")):\n'
            + "                nn.init.zeros_(param)\n",
        ),
        also="MyForCausalLM.__init__ MyAttention.forward MyAttention.__init__",
    ),
)

# --------------------------------------------------------------------------------------------------------------------------------
# nanoGPT style

_GPT_ATT = """            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = F.softmax(att, dim=-1)
"""
_GPT_FILL = """            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
"""
_GPT_TRIL = "torch.tril(torch.ones(config.block_size, config.block_size)).view("
_GPT_LN = "return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)"
_GPT_ATTN = "        x = x + self.attn(self.ln_1(x))\n"
_GPT_MLP = "        x = x + self.mlp(self.ln_2(x))\n"
_GPT_LOSS = "F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)"
_GPT_TIE_APPLY = """    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.tie_weights()  # to_empty() on a meta model gives the two modules separate memory
        return self

"""
_GPT_WPE = "            pos_emb = self.transformer.wpe(pos)  # position embeddings of shape (t, n_embd)\n"
_GPT_BLOCKS = '            "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),\n'

_NANOGPT_MUTANTS = (
    _mutant(
        "nanogpt/no-causal-mask",
        "M02",
        "CausalSelfAttention.forward",
        "causality",
        "causal mask|future|later",
        (_GPT_FILL, ""),
    ),
    _mutant(
        "nanogpt/flash-not-causal",
        "M02",
        "CausalSelfAttention.forward",
        "causality kernels",
        "causal|future|later",
        ("is_causal=True", "is_causal=False"),
        build="build_flash",
    ),
    _mutant(
        "nanogpt/not-causal-in-training",
        "M02",
        "CausalSelfAttention.forward",
        "causality",
        "causal|future|later|train",
        ("is_causal=True", "is_causal=not self.training"),
        build="build_flash",
    ),
    _mutant(
        "nanogpt/mask-polarity",
        "M01",
        "CausalSelfAttention.forward",
        "causality mask logits",
        "polarity|inverted|future|later|hides what it should show",
        ("self.bias[:, :, :T, :T] == 0", "self.bias[:, :, :T, :T] == 1"),
    ),
    _mutant(
        "nanogpt/triu-for-tril",
        "M01",
        "CausalSelfAttention.__init__",
        "causality mask",
        "causal mask|future|later|triang|triu|inverted",
        (_GPT_TRIL, "torch.triu(torch.ones(config.block_size, config.block_size)).view("),
        also="CausalSelfAttention.forward",
    ),
    _mutant(
        "nanogpt/mask-minus-1e4",
        "M03",
        "CausalSelfAttention.forward",
        "mask causality",
        "-1e4|-10000|-1e+04|finite|mask value|mask constant",
        ('== 0, float("-inf"))', "== 0, -1e4)"),
        severity="warning",
    ),
    _mutant(
        "nanogpt/zero-one-mask-added",
        "M13",
        "CausalSelfAttention.forward",
        "causality mask",
        "0/1|added|zero|future|later",
        (_GPT_FILL, "            att = att + self.bias[:, :, :T, :T]\n"),
    ),
    _mutant(
        "nanogpt/causal-off-by-one",
        "M02",
        "CausalSelfAttention.__init__",
        "causality mask",
        "off by one|one position|future|next|later",
        (_GPT_TRIL, "torch.tril(torch.ones(config.block_size, config.block_size), diagonal=1).view("),
        also="CausalSelfAttention.forward",
    ),
    _mutant(
        "nanogpt/mask-after-softmax",
        "M02",
        "CausalSelfAttention.forward",
        "causality mask",
        "softmax|before|normalis|normaliz|denominator|future|later",
        (
            _GPT_ATT,
            (
                "            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))\n"
                "            att = F.softmax(att, dim=-1)\n"
                "            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, 0.0)\n"
            ),
        ),
    ),
    _mutant(
        "nanogpt/heads-merged-without-transpose",
        "A06",
        "CausalSelfAttention.forward",
        "causality shapes",
        "transpose|head|view|future|later",
        ("y = y.transpose(1, 2).contiguous().view(B, T, C)", "y = y.contiguous().view(B, T, C)"),
    ),
    _mutant(
        "nanogpt/heads-split-without-transpose",
        "A07",
        "CausalSelfAttention.forward",
        "causality shapes",
        "transpose|head|view|future|later",
        (
            "k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)",
            "k = k.reshape(B, self.n_head, T, C // self.n_head)",
        ),
    ),
    _mutant(
        "nanogpt/softmax-over-queries",
        "A08",
        "CausalSelfAttention.forward",
        "causality mask kernels",
        "softmax|axis|dim|sum to",
        ("att = F.softmax(att, dim=-1)", "att = F.softmax(att, dim=-2)"),
    ),
    _mutant(
        "nanogpt/scale-missing-in-manual",
        "A02",
        "CausalSelfAttention.forward",
        "kernels structure attention",
        "scale|scaling|sqrt",
        ("att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))", "att = q @ k.transpose(-2, -1)"),
    ),
    _mutant(
        "nanogpt/scale-by-width",
        "A01",
        "CausalSelfAttention.forward",
        "structure kernels attention",
        "scale|scaling|sqrt|head",
        ("(1.0 / math.sqrt(k.size(-1)))", "(1.0 / math.sqrt(C))"),
        severity="warning",
    ),
    _mutant(
        "nanogpt/flash-scaled-twice",
        "A03",
        "CausalSelfAttention.forward",
        "kernels structure attention",
        "scale|scaling|sqrt|twice",
        (
            "scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p",
            "scaled_dot_product_attention(q / math.sqrt(q.size(-1)), k, v, attn_mask=None, dropout_p",
        ),
        severity="warning",
        build="build_flash",
    ),
    _mutant(
        "nanogpt/dropout-in-eval-flash",
        "A09",
        "CausalSelfAttention.forward",
        "determinism",
        "dropout",
        ("dropout_p=self.dropout if self.training else 0,", "dropout_p=self.dropout,"),
        build="build_dropout_flash",
    ),
    _mutant(
        "nanogpt/dropout-without-training-flag",
        "A09",
        "MLP.forward",
        "determinism",
        "dropout",
        ("x = self.dropout(x)", "x = F.dropout(x, self.dropout.p)"),
        build="build_dropout",
    ),
    _mutant(
        "nanogpt/mixed-rope-styles",
        "R04",
        "apply_rope",
        "rope position",
        "pair|half|interleav|isometr|angle",
        ("cos = angle.cos().repeat_interleave(2, dim=-1)", "cos = angle.cos().repeat(1, 2)"),
        ("sin = angle.sin().repeat_interleave(2, dim=-1)", "sin = angle.sin().repeat(1, 2)"),
        build="build_rope",
        also="rotate_every_two",
    ),
    _mutant(
        "nanogpt/phase-in-bfloat16",
        "R01",
        "apply_rope",
        "rope precision",
        "bf16|bfloat16|precision|inv_freq|angle",
        ("angle = torch.outer(pos, inv_freq)", "angle = torch.outer(pos.bfloat16(), inv_freq.bfloat16()).float()"),
        build="build_rope",
    ),
    _mutant(
        "nanogpt/position-embedding-unused",
        "",
        "GPT.forward",
        "gradients position",
        "wpe|position|gradient|unused",
        ("            x = x + pos_emb\n", ""),
        also="GPT.__init__",
    ),
    _mutant(
        "nanogpt/mean-over-the-sequence",
        "N09",
        "Block.forward",
        "causality",
        "mean|sequence|future|later",
        (_GPT_MLP, "        x = x + self.mlp(self.ln_2(x - x.mean(dim=1, keepdim=True)))\n"),
    ),
    _mutant(
        "nanogpt/roll-instead-of-shift",
        "",
        "Block.forward",
        "causality",
        "roll|wrap|future|later|last",
        (_GPT_ATTN, "        x = x + self.attn(self.ln_1(x) + torch.roll(x, 1, dims=1))\n"),
    ),
    _mutant(
        "nanogpt/convolution-centred",
        "",
        "MLP.forward",
        "causality",
        "conv|future|later|padding",
        (
            "        self.gelu = nn.GELU()\n",
            (
                "        self.gelu = nn.GELU()\n"
                "        self.conv = nn.Conv1d(4 * config.n_embd, 4 * config.n_embd, 3, padding=1, groups=4 * config.n_embd)\n"
            ),
        ),
        ("        x = self.gelu(x)\n", "        x = self.gelu(self.conv(x.transpose(1, 2)).transpose(1, 2))\n"),
    ),
    _mutant(
        "nanogpt/batch-norm",
        "N09",
        "Block.forward",
        "batch causality state",
        "batch|row|future|later|running",
        (
            "        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)\n",
            "        self.ln_2 = nn.BatchNorm1d(config.n_embd)\n",
        ),
        (_GPT_MLP, "        x = x + self.mlp(self.ln_2(x.transpose(1, 2)).transpose(1, 2))\n"),
        also="Block.__init__",
    ),
    _mutant(
        "nanogpt/batch-mean",
        "N09",
        "LayerNorm.forward",
        "batch",
        "batch|row",
        (_GPT_LN, "input = input - input.mean(dim=0, keepdim=True)\n        " + _GPT_LN),
    ),
    _mutant(
        "nanogpt/norm-over-sequence",
        "N09",
        "LayerNorm.forward",
        "causality norm",
        "sequence|axis|dim|future|later",
        (
            _GPT_LN,
            (
                "mean = input.mean(dim=1, keepdim=True)\n"
                "        var = input.var(dim=1, keepdim=True, unbiased=False)\n"
                "        x = (input - mean) / torch.sqrt(var + 1e-5) * self.weight\n"
                "        return x if self.bias is None else x + self.bias"
            ),
        ),
    ),
    _mutant(
        "nanogpt/unbiased-std",
        "N08",
        "LayerNorm.forward",
        "norm",
        "unbiased|n-1|std|variance",
        (
            _GPT_LN,
            (
                "mean = input.mean(dim=-1, keepdim=True)\n"
                "        std = input.std(dim=-1, keepdim=True)\n"
                "        x = (input - mean) / (std + 1e-5) * self.weight\n"
                "        return x if self.bias is None else x + self.bias"
            ),
        ),
        severity="warning",
    ),
    _mutant(
        "nanogpt/norm-used-twice",
        "N04",
        "Block.forward",
        "gradients structure",
        "ln_2|gradient|unused|never|twice",
        (_GPT_MLP, "        x = x + self.mlp(self.ln_1(x))\n"),
        also="Block.__init__ LayerNorm.__init__",
    ),
    _mutant(
        "nanogpt/residual-overwritten-by-norm",
        "N05",
        "Block.forward",
        "structure norm",
        "residual",
        (_GPT_ATTN, "        x = self.ln_1(x)\n        x = x + self.attn(x)\n"),
        (_GPT_MLP, "        x = self.ln_2(x)\n        x = x + self.mlp(x)\n"),
        severity="warning",
    ),
    _mutant(
        "nanogpt/residual-forgotten",
        "N05",
        "Block.forward",
        "structure norm",
        "residual",
        (_GPT_MLP, "        x = self.mlp(self.ln_2(x))\n"),
        severity="warning",
    ),
    _mutant(
        "nanogpt/final-norm-missing",
        "N06",
        "GPT.forward",
        "gradients norm structure",
        "final norm|ln_f|gradient|unused|never",
        ("        x = self.transformer.ln_f(x)\n", ""),
        also="GPT.__init__ LayerNorm.__init__",
    ),
    _mutant(
        "nanogpt/plain-list-of-blocks",
        "",
        "GPT.__init__",
        "structure gradients lifecycle",
        "list|registered|modulelist",
        (_GPT_BLOCKS, ""),
        (
            "        self.lm_head = nn.Linear(",
            "        self.blocks = [Block(config) for _ in range(config.n_layer)]\n        self.lm_head = nn.Linear(",
        ),
        ("for block in self.transformer.h:", "for block in self.blocks:"),
    ),
    _mutant(
        "nanogpt/attention-weights-detached",
        "",
        "CausalSelfAttention.forward",
        "gradients",
        "gradient|detach",
        ("y = att @ v  #", "y = att.detach() @ v  #"),
    ),
    _mutant(
        "nanogpt/residual-branch-detached",
        "D04",
        "Block.forward",
        "gradients",
        "gradient|detach|derivative|finite difference",
        (_GPT_MLP, "        x = x + self.mlp(self.ln_2(x.detach()))\n"),
    ),
    _mutant(
        "nanogpt/tied-by-data",
        "E02",
        "GPT.tie_weights",
        "structure lifecycle",
        "tie|tying|storage|shared",
        (
            "self.transformer.wte.weight = self.lm_head.weight  #",
            "self.transformer.wte.weight.data = self.lm_head.weight.data  #",
        ),
        severity="warning",
        also="GPT.__init__",
    ),
    _mutant(
        "nanogpt/tying-lost-by-to-empty",
        "E02",
        "GPT.tie_weights",
        "lifecycle",
        "tie|tying",
        (_GPT_TIE_APPLY, ""),
        severity="warning",
        also="GPT.__init__",
    ),
    _mutant(
        "nanogpt/targets-shifted-again",
        "L01",
        "GPT.forward",
        "loss",
        "shift|twice|aligned",
        (
            _GPT_LOSS,
            (
                "F.cross_entropy(\n"
                "                logits[:, :-1].reshape(-1, logits.size(-1)), targets[:, 1:].reshape(-1), ignore_index=-1\n"
                "            )"
            ),
        ),
    ),
    _mutant(
        "nanogpt/ignored-targets-count",
        "L13",
        "GPT.forward",
        "loss",
        "ignore|-1",
        ("targets.view(-1), ignore_index=-1)", "targets.view(-1).clamp(min=0))"),
    ),
    _mutant(
        "nanogpt/loss-divided-by-all-targets",
        "L13",
        "GPT.forward",
        "loss",
        "ignore|all tokens|divid|count|-1",
        ("targets.view(-1), ignore_index=-1)", 'targets.view(-1), ignore_index=-1, reduction="sum") / targets.numel()'),
    ),
    _mutant(
        "nanogpt/logits-and-targets-flattened-differently",
        "L03",
        "GPT.forward",
        "loss batch",
        "flatten|row|transpos|order|shift|pair",
        (
            "F.cross_entropy(logits.view(-1, logits.size(-1)),",
            "F.cross_entropy(logits.transpose(0, 1).reshape(-1, logits.size(-1)),",
        ),
    ),
    _mutant(
        "nanogpt/loss-over-padded-vocabulary",
        "E06",
        "GPT.__init__",
        "vocab init",
        "vocab|padding|131|144",
        (
            "self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)",
            "self.lm_head = nn.Linear(config.n_embd, config.vocab_size + 13, bias=False)",
        ),
        severity="warning",
        also="GPT.forward",
    ),
    _mutant(
        "nanogpt/input-mutated-in-place",
        "L11",
        "GPT.forward",
        "state",
        "in place|in-place|modif|mutat|overwr",
        (
            "        device = idx.device\n",
            "        device = idx.device\n        idx.clamp_(max=63)  # guard against bad ids\n",
        ),
    ),
    _mutant(
        "nanogpt/position-embedding-kept",
        "",
        "GPT.forward",
        "state gradients lifecycle",
        "state|earlier|call|kept|backward|stale|second",
        ("        self.config = config\n\n", "        self.config = config\n        self.pos_cache = {}\n\n"),
        (
            _GPT_WPE,
            (
                "            if t not in self.pos_cache:\n"
                "                self.pos_cache[t] = self.transformer.wpe(pos)\n"
                "            pos_emb = self.pos_cache[t]\n"
            ),
        ),
    ),
    _mutant(
        "nanogpt/activations-carried-over",
        "",
        "Block.forward",
        "state determinism batch",
        "state|earlier|call|carr|previous|repeat",
        ("        self.mlp = MLP(config)\n\n", "        self.mlp = MLP(config)\n        self.previous = 0.0\n\n"),
        (
            _GPT_MLP,
            ("        x = x + self.mlp(self.ln_2(x + 0.1 * self.previous))\n        self.previous = x.detach().mean(dim=(0, 1))\n"),
        ),
    ),
    _mutant(
        "nanogpt/causal-mask-on-the-cpu",
        "",
        "CausalSelfAttention.forward",
        "device",
        "device|cpu",
        ("self.bias[:, :, :T, :T] == 0", "torch.ones(T, T).tril() == 0"),
    ),
    _mutant(
        "nanogpt/residual-init-never-applied",
        "I01",
        "GPT.__init__",
        "init",
        "residual|std|c_proj|depth",
        ('if pn.endswith("c_proj.weight"):', 'if pn == "c_proj.weight":'),
        severity="warning",
        also="GPT._init_weights CausalSelfAttention.__init__ MLP.__init__",
    ),
    _mutant(
        "nanogpt/init-never-called",
        "I04",
        "GPT.__init__",
        "init",
        "std|init",
        ("        self.apply(self._init_weights)\n", ""),
        severity="warning",
        also="CausalSelfAttention.__init__ MLP.__init__ GPT._init_weights",
    ),
    _mutant(
        "nanogpt/init-too-large",
        "I04",
        "GPT._init_weights",
        "init",
        "std|init|ln|log",
        ("std=0.02)\n            if module.bias is not None:", "std=1.0)\n            if module.bias is not None:"),
        severity="warning",
        also="GPT.__init__",
    ),
)

# --------------------------------------------------------------------------------------------------------------------------------
# Llama style

_LLAMA_MASK = '    mask = torch.full((seqlen, seqlen), float("-inf"), device=device)\n    return torch.triu(mask, diagonal=1)\n'
_LLAMA_ADD = "    scores = scores + mask  # (bs, n_heads, seqlen, seqlen)\n"
_LLAMA_SOFTMAX = "    scores = F.softmax(scores.float(), dim=-1).type_as(xq)\n"
_LLAMA_ATTN = "        h = x + self.attention(normed, freqs_cos, freqs_sin, mask)\n"
_LLAMA_FFN = """        normed = rms_norm(h, self.ffn_norm, self.norm_eps)
        out = h + self.feed_forward(normed)
"""
_LLAMA_APPLY = """        super()._apply(fn, recurse)
        self.reset_parameters()
        return self
"""
_LLAMA_RESET = (
    """    def reset_parameters(self):
        self.freqs_cos, self.freqs_sin = self.make_freqs(self.freqs_cos.device)

    def _apply(self, fn, recurse=True):
        # the table stays float32 whatever the weights are cast to, and to_empty() leaves no garbage in it
"""
    + _LLAMA_APPLY
)
_LLAMA_POSITIONS = """        if position_ids is None:
            position_ids = torch.arange(seqlen, device=tokens.device).expand(bsz, seqlen)
        cos = self.freqs_cos[position_ids]  # (bs, seqlen, head_dim / 2)
        sin = self.freqs_sin[position_ids]
"""
_LLAMA_TABLE = "precompute_freqs_cis(head_dim, self.params.max_seq_len, self.params.rope_theta, device)"
_LLAMA_NORM = """    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return y.type_as(x) * weight
"""

_LLAMA_MUTANTS = (
    _mutant(
        "llama/norm-result-unused",
        "",
        "rms_norm",
        "norm",
        "never used",
        ("    return y.type_as(x) * weight\n", "    return x * weight\n"),
    ),
    _mutant(
        "llama/norm-without-division",
        "",
        "rms_norm",
        "norm",
        "no op of a forward could be part of a norm",
        ("    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)\n", ""),
    ),
    _mutant("llama/no-causal-mask", "M02", "attention", "causality", "causal mask|future|later", (_LLAMA_ADD, "")),
    _mutant(
        "llama/causal-off-by-one",
        "M02",
        "causal_mask",
        "causality mask",
        "off by one|one position|future|next|later",
        ("torch.triu(mask, diagonal=1)", "torch.triu(mask, diagonal=2)"),
        also="attention",
    ),
    _mutant(
        "llama/tril-for-triu",
        "M01",
        "causal_mask",
        "causality mask",
        "polarity|inverted|future|later|triang|tril",
        ("torch.triu(mask, diagonal=1)", "torch.tril(mask, diagonal=-1)"),
        also="attention",
    ),
    _mutant(
        "llama/mask-transposed",
        "M01",
        "attention",
        "causality mask",
        "transpos|inverted|future|later|triang",
        (_LLAMA_ADD, "    scores = scores + mask.transpose(-2, -1)\n"),
    ),
    _mutant(
        "llama/mask-minus-1e4",
        "M03",
        "causal_mask",
        "mask causality",
        "-1e4|-10000|-1e+04|finite|mask value|mask constant",
        (
            'torch.full((seqlen, seqlen), float("-inf"), device=device)',
            "torch.full((seqlen, seqlen), -1e4, device=device)",
        ),
        severity="warning",
        also="attention",
    ),
    _mutant(
        "llama/zero-one-mask-added",
        "M13",
        "causal_mask",
        "causality mask",
        "0/1|added|zero|future|later",
        (_LLAMA_MASK, "    return torch.tril(torch.ones(seqlen, seqlen, device=device))\n"),
        also="attention",
    ),
    _mutant(
        "llama/layer-1-without-mask",
        "M02",
        "TransformerBlock.forward",
        "causality",
        "causal mask|future|later|mask",
        (_LLAMA_ATTN, "        if self.layer_id == 1:\n            mask = torch.zeros_like(mask)\n" + _LLAMA_ATTN),
        also="attention",
    ),
    _mutant(
        "llama/mask-after-softmax",
        "M02",
        "attention",
        "causality mask",
        "softmax|before|normalis|normaliz|denominator|future|later",
        (
            _LLAMA_ADD + _LLAMA_SOFTMAX,
            "    scores = F.softmax(scores.float(), dim=-1).type_as(xq)\n    scores = scores * (mask == 0)\n",
        ),
    ),
    _mutant(
        "llama/heads-merged-without-transpose",
        "A06",
        "attention",
        "causality shapes",
        "transpose|head|view|future|later",
        ("output.transpose(1, 2).contiguous().view(bsz, seqlen, -1)", "output.contiguous().view(bsz, seqlen, -1)"),
    ),
    _mutant(
        "llama/heads-split-without-transpose",
        "A07",
        "Attention.forward",
        "causality shapes",
        "transpose|head|view|future|later",
        (
            "xv = xv.view(bsz, seqlen, self.n_kv_heads, self.head_dim)",
            "xv = xv.view(bsz, self.n_kv_heads, seqlen, self.head_dim).transpose(1, 2)",
        ),
        also="repeat_kv attention",
    ),
    _mutant(
        "llama/softmax-over-queries",
        "A08",
        "attention",
        "causality mask",
        "softmax|axis|dim|sum to",
        ("F.softmax(scores.float(), dim=-1)", "F.softmax(scores.float(), dim=-2)"),
    ),
    _mutant(
        "llama/repeat-kv-on-sequence",
        "A05",
        "repeat_kv",
        "build shapes",
        "repeat|head|n_kv",
        (
            (
                "    x = x[:, :, :, None, :].expand(bs, slen, n_kv_heads, n_rep, head_dim)\n"
                "    return x.reshape(bs, slen, n_kv_heads * n_rep, head_dim)\n"
            ),
            "    return torch.repeat_interleave(x, dim=1, repeats=n_rep)\n",
        ),
        also="attention",
        loud=True,
    ),
    _mutant(
        "llama/scale-by-width",
        "A01",
        "attention",
        "structure kernels attention",
        "scale|scaling|sqrt|head",
        ("/ math.sqrt(head_dim)", "/ math.sqrt(head_dim * xq.shape[1])"),
        severity="warning",
    ),
    _mutant(
        "llama/scale-missing",
        "A03",
        "attention",
        "structure kernels attention",
        "scale|scaling|sqrt|head",
        (" / math.sqrt(head_dim)\n", "\n"),
        severity="warning",
    ),
    _mutant(
        "llama/dropout-without-training-flag",
        "A09",
        "Attention.forward",
        "determinism",
        "dropout",
        ("return self.wo(output)", "return F.dropout(self.wo(output), 0.1)"),
    ),
    _mutant(
        "llama/keys-rolled",
        "",
        "attention",
        "causality",
        "roll|wrap|future|later|last",
        ("keys = repeat_kv(xk, n_rep)", "keys = repeat_kv(xk + torch.roll(xk, 1, dims=1), n_rep)"),
    ),
    _mutant(
        "llama/mixed-rope-styles",
        "R04",
        "apply_rotary_emb",
        "rope position",
        "pair|half|interleav|isometr|angle|order|relative",
        (
            "xk_out = torch.stack([xk_out_r, xk_out_i], dim=-1).flatten(3)",
            "xk_out = torch.cat([xk_out_r, xk_out_i], dim=-1)",
        ),
        build="build_positions",
    ),
    _mutant(
        "llama/frequencies-in-bfloat16",
        "R01",
        "precompute_freqs_cis",
        "rope precision",
        "bf16|bfloat16|precision|inv_freq|angle",
        ("freqs = torch.outer(t, freqs)", "freqs = torch.outer(t.bfloat16(), freqs.bfloat16()).float()"),
        also="Transformer.__init__ Transformer.make_freqs",
    ),
    _mutant(
        "llama/table-rounded-by-cast",
        "R01",
        "Transformer._apply",
        "precision rope lifecycle",
        "freqs|bf16|bfloat16|cast|buffer",
        (
            _LLAMA_APPLY,
            (
                "        was_meta = self.freqs_cos.is_meta\n"
                "        super()._apply(fn, recurse)\n"
                "        if was_meta:\n"
                "            self.reset_parameters()\n"
                "        return self\n"
            ),
        ),
        severity="warning",
        also="Transformer.__init__ reshape_for_broadcast apply_rotary_emb",
    ),
    _mutant(
        "llama/table-lost-by-to-empty",
        "R15",
        "Transformer._apply",
        "lifecycle",
        "freqs|to_empty|meta|buffer",
        (
            _LLAMA_RESET,
            (
                "    def _apply(self, fn, recurse=True):\n"
                "        cos, sin = self.freqs_cos, self.freqs_sin\n"
                "        super()._apply(fn, recurse)\n"
                "        if not cos.is_meta:  # keep float32\n"
                "            self.freqs_cos, self.freqs_sin = cos.to(self.freqs_cos.device), sin.to(self.freqs_cos.device)\n"
                "        return self\n"
            ),
        ),
        severity="warning",
        also="Transformer.__init__",
    ),
    _mutant(
        "llama/rope-theta-ignored",
        "R05",
        "Transformer.make_freqs",
        "rope",
        "theta|base|10000",
        ("    rope_theta: float = 10000.0\n", "    rope_theta: float = 500000.0\n"),
        (_LLAMA_TABLE, "precompute_freqs_cis(head_dim, self.params.max_seq_len, device=device)"),
        also="precompute_freqs_cis Transformer.__init__",
    ),
    _mutant(
        "llama/table-too-short",
        "R08",
        "Transformer.make_freqs",
        "rope position shapes build",
        "table|max_seq_len|position|36|72|length|long",
        (_LLAMA_TABLE, "precompute_freqs_cis(head_dim, self.params.max_seq_len // 2, self.params.rope_theta, device)"),
        also="reshape_for_broadcast Transformer.forward precompute_freqs_cis Transformer.__init__",
    ),
    _mutant(
        "llama/rope-result-dropped",
        "R19",
        "Attention.forward",
        "position rope",
        "position|not applied|no effect|unused|ignored|rotat",
        (
            "        xq, xk = apply_rotary_emb(xq, xk, freqs_cos, freqs_sin)\n",
            "        apply_rotary_emb(xq, xk, freqs_cos, freqs_sin)\n",
        ),
        build="build_positions",
    ),
    _mutant(
        "llama/position-ids-ignored",
        "R20",
        "PositionedTransformer.forward",
        "position",
        "position_ids|ignored|unused|no effect",
        (
            _LLAMA_POSITIONS,
            (
                "        position_ids = torch.arange(seqlen, device=tokens.device).expand(bsz, seqlen)\n"
                "        cos = self.freqs_cos[position_ids]  # (bs, seqlen, head_dim / 2)\n"
                "        sin = self.freqs_sin[position_ids]\n"
            ),
        ),
        build="build_positions",
    ),
    _mutant(
        "llama/positions-of-the-first-row",
        "",
        "PositionedTransformer.forward",
        "position batch",
        "position|row",
        ("cos = self.freqs_cos[position_ids]", "cos = self.freqs_cos[position_ids[:1]]"),
        ("sin = self.freqs_sin[position_ids]", "sin = self.freqs_sin[position_ids[:1]]"),
        build="build_positions",
        also="apply_rotary_emb",
    ),
    _mutant(
        "llama/positions-of-an-earlier-call",
        "",
        "PositionedTransformer.forward",
        "state position",
        "state|earlier|call|kept|position",
        (
            ("        cos = self.freqs_cos[position_ids]  # (bs, seqlen, head_dim / 2)\n        sin = self.freqs_sin[position_ids]\n"),
            (
                '        if getattr(self, "kept_length", None) != seqlen:\n'
                "            self.kept = self.freqs_cos[position_ids], self.freqs_sin[position_ids]\n"
                "            self.kept_length = seqlen\n"
                "        cos, sin = self.kept\n"
            ),
        ),
        build="build_positions",
    ),
    _mutant(
        "llama/documents-not-isolated",
        "M10",
        "PackedTransformer.forward",
        "packing",
        "document|packed|pack",
        ("        if document_ids is not None:\n            mask = mask + document_mask(document_ids)\n", ""),
        build="build_packed",
        also="attention",
    ),
    _mutant(
        "llama/documents-of-the-first-row",
        "M10",
        "document_mask",
        "packing batch",
        "document|packed|pack|row",
        (
            "same = document_ids[:, :, None] == document_ids[:, None, :]",
            "same = document_ids[:1, :, None] == document_ids[:1, None, :]",
        ),
        build="build_packed",
        also="attention PackedTransformer.forward",
    ),
    _mutant(
        "llama/eps-ignored",
        "N01",
        "TransformerBlock.__init__",
        "norm",
        "eps",
        ("self.norm_eps = args.norm_eps", "self.norm_eps = 1e-2"),
        also="rms_norm TransformerBlock.forward",
    ),
    _mutant(
        "llama/norm-squares-in-float16",
        "N02",
        "rms_norm",
        "precision norm",
        "overflow|float16|fp16|upcast|float32",
        ("    y = x.float()\n", "    y = x\n"),
        severity="warning",
    ),
    _mutant(
        "llama/norm-over-sequence",
        "N09",
        "rms_norm",
        "causality norm",
        "sequence|axis|dim|future|later",
        ("y.pow(2).mean(-1, keepdim=True)", "y.pow(2).mean(1, keepdim=True)"),
    ),
    _mutant(
        "llama/norm-used-twice",
        "N04",
        "TransformerBlock.forward",
        "gradients structure",
        "ffn_norm|gradient|unused|never|twice",
        ("rms_norm(h, self.ffn_norm, self.norm_eps)", "rms_norm(h, self.attention_norm, self.norm_eps)"),
        also="TransformerBlock.__init__",
    ),
    _mutant(
        "llama/residual-overwritten-by-norm",
        "N05",
        "TransformerBlock.forward",
        "structure norm",
        "residual",
        (_LLAMA_FFN, "        h = rms_norm(h, self.ffn_norm, self.norm_eps)\n        out = h + self.feed_forward(h)\n"),
        severity="warning",
    ),
    _mutant(
        "llama/final-norm-missing",
        "N06",
        "Transformer.run_layers",
        "gradients norm structure",
        "final norm|norm|gradient|unused|never",
        ("        h = rms_norm(h, self.norm, self.params.norm_eps)\n", ""),
        also="Transformer.__init__",
    ),
    _mutant(
        "llama/depth-scale-lost-by-to-empty",
        "N07",
        "TransformerBlock.__init__",
        "lifecycle",
        "ln_scale|to_empty|meta|buffer",
        (
            "        self.ffn_norm = nn.Parameter(torch.ones(args.dim))\n",
            (
                "        self.ffn_norm = nn.Parameter(torch.ones(args.dim))\n"
                '        self.register_buffer("ln_scale", torch.tensor(1.0 / math.sqrt(layer_id + 1)), persistent=False)\n'
            ),
        ),
        (
            "normed = rms_norm(h, self.ffn_norm, self.norm_eps)",
            "normed = rms_norm(h, self.ffn_norm, self.norm_eps) * self.ln_scale",
        ),
        severity="warning",
        also="TransformerBlock.forward",
    ),
    _mutant(
        "llama/batch-mean",
        "N09",
        "Transformer.run_layers",
        "batch",
        "batch|row",
        ("        return self.output(h)\n", "        return self.output(h - h.mean(dim=0, keepdim=True))\n"),
    ),
    _mutant(
        "llama/gate-from-the-sequence-mean",
        "N09",
        "FeedForward.forward",
        "causality",
        "mean|sequence|future|later",
        ("* self.w3(x))", "* self.w3(x.mean(dim=1, keepdim=True)))"),
    ),
    _mutant(
        "llama/plain-list-of-layers",
        "",
        "Transformer.__init__",
        "structure gradients lifecycle",
        "list|registered|modulelist",
        ("        self.layers = nn.ModuleList()\n", "        self.layers = []\n"),
    ),
    _mutant(
        "llama/embedding-detached",
        "",
        "Transformer.run_layers",
        "gradients",
        "gradient|detach|tok_embeddings",
        ("h = self.tok_embeddings(tokens)", "h = self.tok_embeddings(tokens).detach()"),
        also="Transformer.__init__",
    ),
    _mutant(
        "llama/key-projection-through-data",
        "",
        "Attention.forward",
        "gradients",
        "gradient|detach|wk|data",
        ("xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)", "xq, xk, xv = self.wq(x), self.wk(x).data, self.wv(x)"),
        also="Attention.__init__",
    ),
    _mutant(
        "llama/router-without-gradient",
        "L16",
        "MoE.forward",
        "gradients",
        "gradient|router|gate|renormal",
        ("    norm_topk_prob: bool = False\n", "    norm_topk_prob: bool = True\n"),
        build="build_moe_top1",
        also="MoE.__init__",
    ),
    _mutant(
        "llama/router-weights-renormalised",
        "L15",
        "MoE.forward",
        "structure mlp",
        "norm_topk_prob|renormal|sum to|router|gate",
        (
            "        if self.norm_topk_prob:\n            weights = weights / weights.sum(dim=-1, keepdim=True)\n",
            "        weights = weights / weights.sum(dim=-1, keepdim=True)\n",
        ),
        severity="warning",
        build="build_moe",
    ),
    _mutant(
        "llama/mask-on-cuda",
        "",
        "causal_mask",
        "device build",
        "device|cuda",
        ('float("-inf"), device=device)', 'float("-inf"), device="cuda")'),
        loud=True,
    ),
    _mutant(
        "llama/residual-init-on-w3",
        "I02",
        "Transformer.init_weights",
        "init",
        "w2|w3|residual|std|depth",
        ('name.endswith(("wo.weight", "w2.weight"))', 'name.endswith(("wo.weight", "w3.weight"))'),
        severity="warning",
        also="Transformer.__init__ FeedForward.__init__",
    ),
    _mutant(
        "llama/residual-init-twice",
        "I03",
        "Transformer.init_weights",
        "init",
        "residual|std|depth|twice",
        (
            "residual_std = 0.02 / math.sqrt(2 * self.params.n_layers)",
            "residual_std = 0.02 / (2 * self.params.n_layers)",
        ),
        severity="warning",
        also="Transformer.__init__ FeedForward.__init__ Attention.__init__",
    ),
    _mutant(
        "llama/init-never-called",
        "I04",
        "Transformer.__init__",
        "init",
        "std|init",
        ("        self.init_weights()\n", ""),
        severity="warning",
        also="Transformer.init_weights FeedForward.__init__ Attention.__init__",
    ),
    _mutant(
        "llama/feed-forward-dead",
        "I06",
        "Transformer.init_weights",
        "gradients init",
        "zero|gradient",
        (
            "            elif p.ndim == 2:\n                nn.init.normal_(p, mean=0.0, std=0.02)\n",
            (
                "            elif p.ndim == 2:\n                nn.init.normal_(p, mean=0.0, std=0.02)\n"
                '            if name.endswith(("w2.weight", "w3.weight")):\n                nn.init.zeros_(p)\n'
            ),
        ),
        also="Transformer.__init__ FeedForward.forward FeedForward.__init__",
    ),
)

# --------------------------------------------------------------------------------------------------------------------------------
# lit-gpt style: written after the probes and before any of them had run on it (see reports/scoreboard.md)

_LIT_NORM = """        norm_x = torch.mean(x * x, dim=-1, keepdim=True)
        x_normed = x * torch.rsqrt(norm_x + self.eps)
"""
_LIT_APPLY = """    def _apply(self, fn, recurse=True):
        # a cast must not touch the rotation (torch drops the imaginary part), and to_empty() must not lose it
        del self.freqs_cis
        super()._apply(fn, recurse)
        self.register_buffer("freqs_cis", self.rope_cache(self.lm_head.weight.device), persistent=False)
        return self
"""
_LIT_SEQUENTIAL = """        x = attention_output + x
        x_normed = self.norm_2(x)
        return self.resid_dropout(self.mlp(x_normed)) + x
"""
_LIT_LOSS = "F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)"

_LIT_MUTANTS = (
    _mutant(
        "lit/not-causal-without-cache",
        "M02",
        "CausalSelfAttention.scaled_dot_product_attention",
        "causality",
        "causal|future|later",
        ("scale=scale, is_causal=mask is None)", "scale=scale)"),
    ),
    _mutant(
        "lit/softcap-mask-transposed",
        "M01",
        "CausalSelfAttention.scaled_dot_product_attention",
        "causality",
        "causal|future|later|triang|transposed",
        ("dtype=torch.bool, device=q.device).tril()\n            scores", "dtype=torch.bool, device=q.device).triu()\n            scores"),
        build="build_softcap",
    ),
    _mutant(
        "lit/softcap-after-mask",
        "M03",
        "CausalSelfAttention.scaled_dot_product_attention",
        "causality mask",
        "finite|cap|future|later|mask",
        (
            "            scores = torch.tanh(scores / cap) * cap\n            if mask is None:\n",
            "            if mask is None:\n",
        ),
        (
            '            scores = scores.masked_fill(~mask, float("-inf"))\n',
            '            scores = scores.masked_fill(~mask, float("-inf"))\n            scores = torch.tanh(scores / cap) * cap\n',
        ),
        build="build_softcap",
    ),
    _mutant(
        "lit/softcap-in-softmax-bf16",
        "A16",
        "CausalSelfAttention.scaled_dot_product_attention",
        "precision",
        "bf16|bfloat16|softmax|precision",
        ("F.softmax(scores, dim=-1, dtype=torch.float)", "F.softmax(scores.bfloat16(), dim=-1)"),
        build="build_softcap",
    ),
    _mutant(
        "lit/heads-merged-without-transpose",
        "A06",
        "CausalSelfAttention.scaled_dot_product_attention",
        "causality shapes",
        "transpose|head|reshape|future|later",
        ("        return y.transpose(1, 2)\n", "        return y\n"),
        also="CausalSelfAttention.forward",
    ),
    _mutant(
        "lit/qkv-split-without-permute",
        "A07",
        "CausalSelfAttention.forward",
        "causality shapes",
        "transpose|permute|head|view|future|later",
        (
            "        qkv = qkv.permute(0, 2, 3, 1, 4)  #",
            "        qkv = qkv.reshape(B, self.config.n_query_groups, total_qkv, T, self.config.head_size)  #",
        ),
    ),
    _mutant(
        "lit/scale-by-embedding",
        "A01",
        "CausalSelfAttention.scaled_dot_product_attention",
        "attention kernels structure",
        "scale|scaling|sqrt|head",
        ("scale = 1.0 / math.sqrt(self.config.head_size)", "scale = 1.0 / math.sqrt(self.config.n_embd)"),
        severity="warning",
    ),
    _mutant(
        "lit/keys-turned-backwards",
        "R04",
        "CausalSelfAttention.forward",
        "rope position",
        "conj|direction|relative|distance|shift|angle|sign",
        ("apply_rotary_emb(k[..., :n_elem], freqs_cis)", "apply_rotary_emb(k[..., :n_elem], freqs_cis.conj())"),
        also="apply_rotary_emb",
    ),
    _mutant(
        "lit/values-rotated-too",
        "",
        "CausalSelfAttention.forward",
        "rope position",
        "value|relative|distance|shift|rotat",
        (
            "        k = torch.cat((k_roped, k[..., n_elem:]), dim=-1)\n",
            "        k = torch.cat((k_roped, k[..., n_elem:]), dim=-1)\n        v = apply_rotary_emb(v, freqs_cis)\n",
        ),
        also="apply_rotary_emb",
        severity="warning",
    ),
    _mutant(
        "lit/rope-base-ignored",
        "R05",
        "GPT.rope_cache",
        "rope",
        "theta|base|10000|500000",
        ("    rope_base: int = 10000\n", "    rope_base: int = 500000\n"),
        (
            "self.config.rope_n_elem, self.config.rope_base, device)",
            "self.config.rope_n_elem, 10000, device)",
        ),
        also="precompute_freqs_cis GPT.__init__",
    ),
    _mutant(
        "lit/partial-rotary-exponent",
        "R13",
        "GPT.rope_cache",
        "rope",
        "rotary|head_size|head_dim|partial|inv_freq|exponent|frequenc",
        (
            "precompute_freqs_cis(self.config.block_size, self.config.rope_n_elem, self.config.rope_base, device)",
            (
                "precompute_freqs_cis(\n            self.config.block_size, self.config.head_size, self.config.rope_base, device\n"
                "        )[:, : self.config.rope_n_elem // 2]"
            ),
        ),
        build="build_partial",
        also="precompute_freqs_cis GPT.__init__ apply_rotary_emb",
    ),
    _mutant(
        "lit/angles-in-bfloat16",
        "R01",
        "precompute_freqs_cis",
        "rope precision",
        "bf16|bfloat16|precision|inv_freq|angle",
        ("idx_theta = torch.outer(seq_idx, theta)", "idx_theta = torch.outer(seq_idx.bfloat16(), theta.bfloat16()).float()"),
        also="GPT.rope_cache GPT.__init__",
    ),
    _mutant(
        "lit/rotation-lost-by-to-empty",
        "R15",
        "GPT.__init__",
        "lifecycle",
        "freqs_cis|to_empty|meta|buffer",
        (_LIT_APPLY, ""),
        severity="warning",
        also="GPT.rope_cache precompute_freqs_cis",
    ),
    _mutant(
        "lit/norm-in-model-dtype",
        "N02",
        "RMSNorm.forward",
        "precision norm",
        "overflow|float16|fp16|upcast|float32",
        ("        x = x.float()\n", ""),
        severity="warning",
    ),
    _mutant(
        "lit/norm-over-the-batch",
        "N09",
        "RMSNorm.forward",
        "batch norm",
        "batch|row|axis",
        ("norm_x = torch.mean(x * x, dim=-1, keepdim=True)", "norm_x = torch.mean(x * x, dim=(0, -1), keepdim=True)"),
    ),
    _mutant(
        "lit/eps-inside-config-ignored",
        "N01",
        "Block.__init__",
        "norm",
        "eps",
        ("    norm_eps: float = 1e-5\n", "    norm_eps: float = 1e-3\n"),
        ("self.norm_1 = RMSNorm(config.n_embd, eps=config.norm_eps)", "self.norm_1 = RMSNorm(config.n_embd)"),
        ("self.norm_2 = RMSNorm(config.n_embd, eps=config.norm_eps)", "self.norm_2 = RMSNorm(config.n_embd)"),
        also="RMSNorm.__init__ RMSNorm.forward",
    ),
    _mutant(
        "lit/norm-1-in-both-branches",
        "N04",
        "Block.forward",
        "gradients structure",
        "norm_2|gradient|unused|never|twice",
        ("        x_normed = self.norm_2(x)\n", "        x_normed = self.norm_1(x)\n"),
        also="Block.__init__ RMSNorm.__init__",
    ),
    _mutant(
        "lit/normed-residual",
        "N05",
        "Block.forward",
        "structure norm",
        "residual",
        (_LIT_SEQUENTIAL, _LIT_SEQUENTIAL.replace("(self.mlp(x_normed)) + x\n", "(self.mlp(x_normed)) + x_normed\n")),
        severity="warning",
    ),
    _mutant(
        "lit/parallel-residual-forgotten",
        "N05",
        "Block.forward",
        "structure norm",
        "residual",
        (
            "return x + attention_output + self.resid_dropout(self.mlp(self.norm_2(x)))",
            "return attention_output + self.resid_dropout(self.mlp(self.norm_2(x)))",
        ),
        build="build_parallel",
        severity="warning",
    ),
    _mutant(
        "lit/window-off-by-one",
        "M06",
        "CausalSelfAttention.sliding_window_mask",
        "window",
        "window|sliding",
        ("(distance < self.config.sliding_window_size)", "(distance <= self.config.sliding_window_size)"),
        build="build_window",
        also="CausalSelfAttention.scaled_dot_product_attention",
    ),
    _mutant(
        "lit/window-sees-both-sides",
        "M02",
        "CausalSelfAttention.sliding_window_mask",
        "causality",
        "future|later|causal",
        ("return (distance >= 0) & (distance <", "return (distance.abs() >= 0) & (distance <"),
        build="build_window",
        also="CausalSelfAttention.scaled_dot_product_attention",
    ),
    _mutant(
        "lit/dropout-by-a-positive-rate",
        "A09",
        "CausalSelfAttention.scaled_dot_product_attention",
        "determinism",
        "dropout",
        ("dropout_p = self.config.dropout if self.training else 0.0", "dropout_p = self.config.dropout"),
        build="build_dropout",
    ),
    _mutant(
        "lit/cache-written-one-late",
        "K03",
        "KVCache.forward",
        "cache",
        "cache|input_pos|position|slot",
        ("        self.k[:n, :, input_pos] = k\n", "        self.k[:n, :, (input_pos + 1) % self.k.size(2)] = k\n"),
        also="CausalSelfAttention.forward CausalSelfAttention.scaled_dot_product_attention",
    ),
    _mutant(
        "lit/cache-mask-from-zero",
        "M09",
        "GPT.forward",
        "cache",
        "top-left|align|mask|cache|input_pos",
        ("mask = self.mask_cache[input_pos]", "mask = self.mask_cache[:T]"),
        also="CausalSelfAttention.scaled_dot_product_attention",
    ),
    _mutant(
        "lit/decode-rotation-from-zero",
        "R16",
        "GPT.forward",
        "cache",
        "position|offset|rotat|input_pos|restart|cache",
        ("freqs_cis = self.freqs_cis[input_pos]", "freqs_cis = self.freqs_cis[:T]"),
        also="apply_rotary_emb CausalSelfAttention.forward",
    ),
    _mutant(
        "lit/targets-shifted-again",
        "L01",
        "GPT.forward",
        "loss",
        "shift|twice|aligned",
        (
            _LIT_LOSS,
            (
                "F.cross_entropy(\n"
                "                logits[:, :-1].reshape(-1, logits.size(-1)), targets[:, 1:].reshape(-1), ignore_index=-1\n"
                "            )"
            ),
        ),
    ),
    _mutant(
        "lit/residual-init-on-the-wrong-name",
        "I01",
        "GPT.__init__",
        "init",
        "residual|std|proj|depth",
        ('if pn.endswith("proj.weight"):', 'if pn.endswith("c_proj.weight"):'),
        severity="warning",
        also="GPT._init_weights CausalSelfAttention.__init__ LLaMAMLP.__init__",
    ),
    _mutant(
        "lit/gate-without-gradient",
        "",
        "LLaMAMLP.forward",
        "gradients",
        "gradient|detach|no_grad",
        ("        x_fc_1 = self.fc_1(x)\n", "        with torch.no_grad():\n            x_fc_1 = self.fc_1(x)\n"),
        also="LLaMAMLP.__init__",
    ),
    _mutant(
        "lit/second-matrix-unused",
        "P01",
        "LLaMAMLP.forward",
        "gradients structure",
        "fc_2|gradient|unused|never|twice",
        ("        x_fc_2 = self.fc_2(x)\n", "        x_fc_2 = self.fc_1(x)\n"),
        also="LLaMAMLP.__init__",
    ),
    _mutant(
        "lit/layers-share-one-block",
        "",
        "GPT.__init__",
        "structure",
        "shared|same|layer|once",
        (
            "nn.ModuleList(Block(config, block_idx) for block_idx in range(config.n_layer))",
            "nn.ModuleList([Block(config, 0)] * config.n_layer)",
        ),
        severity="warning",
    ),
)

MUTANTS: tuple[Mutant, ...] = _HF_MUTANTS + _NANOGPT_MUTANTS + _LLAMA_MUTANTS + _LIT_MUTANTS

# --------------------------------------------------------------------------------------------------------------------------------
# Legal variants: other designs and other ways to write the same thing

NEUTRAL: tuple[Mutant, ...] = (
    # --- Hugging Face style
    _neutral(
        "hf/rope-interleaved",
        (_HF_ROTATE_HALF, _HF_ROTATE_PAIRS),
        ("emb = torch.cat((freqs, freqs), dim=-1)", "emb = freqs.repeat_interleave(2, dim=-1)"),
    ),
    _neutral(
        "hf/positions-one-more",
        ("positions = position_ids.to(torch.float32)", "positions = position_ids.to(torch.float32) + 1"),
    ),
    _neutral(
        "hf/positions-counted-from-the-first-real-token",
        (
            _HF_POSITIONS,
            (
                "        if position_ids is None:\n"
                "            seq_len = input_ids.shape[1]\n"
                "            if attention_mask is not None:\n"
                "                position_ids = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -seq_len:]\n"
                "            else:\n"
                "                position_ids = torch.arange(past_length, past_length + seq_len, device=input_ids.device)[None, :]\n"
            ),
        ),
    ),
    _neutral(
        "hf/query-scaled",
        ("torch.matmul(query, key.transpose(2, 3)) * scaling", "torch.matmul(query * scaling, key.transpose(2, 3))"),
    ),
    _neutral(
        "hf/boolean-mask",
        (_HF_MASK, "    causal_mask = allowed\n"),
        (
            "    attn_weights = attn_weights + attention_mask\n",
            "    attn_weights = attn_weights.masked_fill(~attention_mask, torch.finfo(attn_weights.dtype).min)\n",
        ),
    ),
    _neutral(
        "hf/boolean-mask-sdpa",
        (_HF_MASK, "    causal_mask = allowed\n"),
        (
            "    attn_weights = attn_weights + attention_mask\n",
            '    attn_weights = attn_weights.masked_fill(~attention_mask, float("-inf"))\n',
        ),
        build="build_window_sdpa",
    ),
    _neutral("hf/minus-infinity-mask", ("min_value = torch.finfo(dtype).min", 'min_value = float("-inf")')),
    _neutral(
        "hf/padding-query-sees-everything",
        (
            "    allowed = allowed | ((key_index == query_index) & ~allowed.any(dim=-1, keepdim=True))\n",
            "    allowed = allowed | ~allowed.any(dim=-1, keepdim=True)\n",
        ),
    ),
    _neutral(
        "hf/mask-before-scaling",
        ("torch.matmul(query, key.transpose(2, 3)) * scaling", "torch.matmul(query, key.transpose(2, 3))"),
        ("attn_weights = attn_weights + attention_mask", "attn_weights = (attn_weights + attention_mask) * scaling"),
    ),
    _neutral(
        "hf/softmax-in-model-dtype",
        ("F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)", "F.softmax(attn_weights, dim=-1)"),
    ),
    _neutral(
        "hf/softmax-by-hand",
        (
            "    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)\n",
            (
                "    attn_weights = torch.exp(attn_weights - attn_weights.amax(dim=-1, keepdim=True))\n"
                "    attn_weights = attn_weights / attn_weights.sum(dim=-1, keepdim=True)\n"
            ),
        ),
    ),
    _neutral(
        "hf/attention-sink",
        _HF_ALWAYS_EAGER,
        (
            "    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)\n",
            (
                "    attn_weights = F.pad(attn_weights, (0, 1))  # one more logit, 0: a query may look at nothing\n"
                "    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)[..., :-1]\n"
            ),
        ),
    ),
    _neutral(
        "hf/alibi",
        _HF_ALWAYS_EAGER,
        (
            "    attn_weights = attn_weights + attention_mask\n",
            (
                "    slopes = 2.0 ** -torch.arange(1, query.shape[1] + 1, device=query.device)\n"
                "    distance = torch.arange(key.shape[2], device=query.device) - key.shape[2] + 1\n"
                "    attn_weights = attn_weights + slopes[:, None, None] * distance\n"
                "    attn_weights = attn_weights + attention_mask\n"
            ),
        ),
    ),
    _neutral(
        "hf/einsum",
        ("torch.matmul(query, key.transpose(2, 3)) * scaling", 'torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling'),
        (
            "    attn_output = torch.matmul(attn_weights, value)\n    attn_output = attn_output.transpose(1, 2).contiguous()\n",
            '    attn_output = torch.einsum("bhqk,bhkd->bqhd", attn_weights, value)\n',
        ),
    ),
    _neutral(
        "hf/queries-in-chunks",
        ("def sdpa_attention(", "CHUNK = 4\n\n\ndef sdpa_attention("),
        (
            (
                "            attn_output = eager_attention(query, key, value, attention_mask, self.scaling, dropout, softcap, "
                "training=self.training)\n"
            ),
            (
                "            pieces = []\n"
                "            for start in range(0, query_length, CHUNK):\n"
                "                rows = slice(start, start + CHUNK)\n"
                "                mask = attention_mask[:, :, rows]\n"
                "                pieces.append(eager_attention(query[:, :, rows], key, value, mask, self.scaling, softcap=softcap))\n"
                "            attn_output = torch.cat(pieces, dim=1)\n"
            ),
        ),
    ),
    _neutral(
        "hf/grouped-heads-tiled",
        (
            (
                "    hidden_states = hidden_states[:, :, None, :, :].expand(batch, num_key_value_heads, n_rep, seq_len, head_dim)\n"
                "    return hidden_states.reshape(batch, num_key_value_heads * n_rep, seq_len, head_dim)\n"
            ),
            "    return hidden_states.repeat(1, n_rep, 1, 1)\n",
        ),
    ),
    _neutral(
        "hf/parallel-block",
        (
            _HF_FFN,
            "        hidden_states = hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(residual)))\n",
        ),
    ),
    _neutral(
        "hf/sandwich-norms",
        (
            "        self.dropout = nn.Dropout(config.hidden_dropout)\n",
            (
                "        self.dropout = nn.Dropout(config.hidden_dropout)\n"
                "        self.after_attention = MyRMSNorm(config.hidden_size, eps=config.rms_norm_eps)\n"
                "        self.after_mlp = MyRMSNorm(config.hidden_size, eps=config.rms_norm_eps)\n"
            ),
        ),
        (
            "        hidden_states = residual + self.dropout(hidden_states)\n\n",
            "        hidden_states = residual + self.dropout(self.after_attention(hidden_states))\n\n",
        ),
        (
            "        hidden_states = self.mlp(hidden_states)\n",
            "        hidden_states = self.after_mlp(self.mlp(hidden_states))\n",
        ),
    ),
    _neutral(
        "hf/norm-after-branch",
        ("        hidden_states = self.input_layernorm(hidden_states)\n", ""),
        (
            "        hidden_states = residual + self.dropout(hidden_states)\n\n",
            "        hidden_states = residual + self.dropout(self.input_layernorm(hidden_states))\n\n",
        ),
        (
            "        hidden_states = self.post_attention_layernorm(hidden_states)\n        hidden_states = self.mlp(hidden_states)\n",
            "        hidden_states = self.post_attention_layernorm(self.mlp(hidden_states))\n",
        ),
    ),
    _neutral(
        "hf/gate-and-up-swapped",
        ("self.act_fn(self.gate_proj(x)) * self.up_proj(x)", "self.act_fn(self.up_proj(x)) * self.gate_proj(x)"),
    ),
    _neutral(
        "hf/head-with-bias",
        (
            "self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)",
            "self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)",
        ),
    ),
    _neutral(
        "hf/embedding-scaled",
        (
            "hidden_states = self.embed_tokens(input_ids)",
            "hidden_states = self.embed_tokens(input_ids) * self.config.hidden_size**0.5",
        ),
    ),
    _neutral(
        "hf/norm-weight-before-the-cast",
        ("return self.weight * hidden_states.to(input_dtype)", "return (self.weight * hidden_states).to(input_dtype)"),
    ),
    _neutral("hf/persistent-inv-freq", ("self.compute_inv_freq(), persistent=False)", "self.compute_inv_freq())")),
    _neutral(
        "hf/cross-entropy-by-hand",
        (
            '    total = F.cross_entropy(shift_logits, shift_labels, ignore_index=ignore_index, reduction="sum")\n',
            (
                "    keep = shift_labels != ignore_index\n"
                "    picked = shift_logits.gather(-1, shift_labels.clamp(min=0)[:, None])[:, 0]\n"
                "    total = ((torch.logsumexp(shift_logits, dim=-1) - picked) * keep).sum()\n"
            ),
        ),
    ),
    _neutral(
        "hf/labels-shifted-by-padding",
        (_HF_LOSS_LOGITS, "shift_logits = logits.reshape(-1, vocab_size).float()"),
        (_HF_LOSS_LABELS, "shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:].reshape(-1)"),
    ),
    _neutral(
        "hf/qk-norm-over-the-whole-projection",
        ("self.q_norm = MyRMSNorm(self.head_dim, eps", "self.q_norm = MyRMSNorm(q_size, eps"),
        ("self.k_norm = MyRMSNorm(self.head_dim, eps", "self.k_norm = MyRMSNorm(kv_size, eps"),
        (
            "            query = self.q_norm(query)\n",
            "            query = self.q_norm(query.flatten(2)).view_as(query)\n",
        ),
        ("            key = self.k_norm(key)\n", "            key = self.k_norm(key.flatten(2)).view_as(key)\n"),
        build="build_qk_norm",
    ),
    _neutral(
        "hf/sdpa-with-grouped-heads",
        (
            "sdpa_attention(query, key, value, attention_mask, self.scaling, dropout=dropout, training=self.training)\n",
            "sdpa_attention(query, key.contiguous(), value.contiguous(), attention_mask, self.scaling, dropout, self.training)\n",
        ),
        build="build_sdpa",
    ),
    # --- nanoGPT style
    _neutral(
        "nanogpt/softmax-in-float32",
        ("att = F.softmax(att, dim=-1)", "att = F.softmax(att.float(), dim=-1).type_as(q)"),
    ),
    _neutral(
        "nanogpt/mask-before-scaling",
        (
            _GPT_ATT,
            (
                '            att = (q @ k.transpose(-2, -1)).masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))\n'
                "            att = att * (1.0 / math.sqrt(k.size(-1)))\n"
                "            att = F.softmax(att, dim=-1)\n"
            ),
        ),
    ),
    _neutral("nanogpt/finite-minimum-mask", ('== 0, float("-inf"))', "== 0, torch.finfo(att.dtype).min)")),
    _neutral(
        "nanogpt/causal-mask-made-anew",
        ("self.bias[:, :, :T, :T] == 0", "~torch.ones(T, T, dtype=torch.bool, device=x.device).tril()"),
    ),
    _neutral(
        "nanogpt/global-maximum-subtracted",
        (
            "            att = F.softmax(att, dim=-1)\n",
            "            att = F.softmax(att - att.detach().amax(dim=-1, keepdim=True), dim=-1)\n",
        ),
    ),
    _neutral(
        "nanogpt/sequence-first",
        ("            x = block(x)\n", "            x = block(x.transpose(0, 1).contiguous()).transpose(0, 1)\n"),
        ("        B, T, C = x.size()  #", "        x = x.transpose(0, 1)\n        B, T, C = x.size()  #"),
        ("        return y\n\n\nclass MLP", "        return y.transpose(0, 1)\n\n\nclass MLP"),
    ),
    _neutral(
        "nanogpt/tokens-merged-in-the-mlp",
        ("        x = self.c_fc(x)\n", "        shape = x.shape\n        x = self.c_fc(x.view(-1, shape[-1]))\n"),
        (
            "        x = self.dropout(x)\n        return x\n",
            "        x = self.dropout(x)\n        return x.view(shape)\n",
        ),
    ),
    _neutral(
        "nanogpt/parallel-block",
        (_GPT_ATTN + _GPT_MLP, "        x = x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))\n"),
    ),
    _neutral(
        "nanogpt/post-norm",
        (_GPT_ATTN + _GPT_MLP, "        x = self.ln_1(x + self.attn(x))\n        x = self.ln_2(x + self.mlp(x))\n"),
    ),
    _neutral(
        "nanogpt/embedding-scaled",
        ("x = self.transformer.wte(idx)  #", "x = self.transformer.wte(idx) * math.sqrt(self.config.n_embd)  #"),
    ),
    _neutral(
        "nanogpt/untied",
        ("self.transformer.wte.weight = self.lm_head.weight  # https://paperswithcode.com/method/weight-tying", "pass"),
    ),
    _neutral(
        "nanogpt/token-shift",
        (
            _GPT_ATTN,
            "        previous = F.pad(x, (0, 0, 1, 0))[:, :-1]\n        x = x + self.attn(self.ln_1(x + 0.5 * previous))\n",
        ),
    ),
    _neutral(
        "nanogpt/convolution-padded-on-the-left",
        (
            "        self.gelu = nn.GELU()\n",
            (
                "        self.gelu = nn.GELU()\n"
                "        self.conv = nn.Conv1d(4 * config.n_embd, 4 * config.n_embd, 3, groups=4 * config.n_embd)\n"
            ),
        ),
        (
            "        x = self.gelu(x)\n",
            "        x = self.gelu(self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2))\n",
        ),
    ),
    _neutral(
        "nanogpt/layer-norm-by-hand",
        (
            _GPT_LN,
            (
                "x = input.float()\n"
                "        var, mean = torch.var_mean(x, dim=-1, keepdim=True, unbiased=False)\n"
                "        x = ((x - mean) / torch.sqrt(var + 1e-5)).type_as(input) * self.weight\n"
                "        return x if self.bias is None else x + self.bias"
            ),
        ),
    ),
    _neutral(
        "nanogpt/dropout-gated-by-hand",
        ("x = self.dropout(x)", "x = F.dropout(x, self.dropout.p, training=self.training)"),
        build="build_dropout",
    ),
    _neutral(
        "nanogpt/rope-half-split",
        (
            (
                "    x1 = x[..., ::2]\n"
                "    x2 = x[..., 1::2]\n"
                "    x = torch.stack((-x2, x1), dim=-1)\n"
                "    return x.flatten(-2)  # (..., x1 x2 x1 x2) -> the pairs lie side by side\n"
            ),
            "    x1, x2 = x.chunk(2, dim=-1)\n    return torch.cat((-x2, x1), dim=-1)\n",
        ),
        ("cos = angle.cos().repeat_interleave(2, dim=-1)", "cos = angle.cos().repeat(1, 2)"),
        ("sin = angle.sin().repeat_interleave(2, dim=-1)", "sin = angle.sin().repeat(1, 2)"),
        build="build_rope",
    ),
    _neutral(
        "nanogpt/logits-softcapped",
        ("            logits = self.lm_head(x)\n", "            logits = 15.0 * torch.tanh(self.lm_head(x) / 15.0)\n"),
    ),
    # --- Llama style
    _neutral("llama/gate-and-up-swapped", ("F.silu(self.w1(x)) * self.w3(x)", "F.silu(self.w3(x)) * self.w1(x)")),
    _neutral(
        "llama/grouped-heads-tiled",
        (
            (
                "    x = x[:, :, :, None, :].expand(bs, slen, n_kv_heads, n_rep, head_dim)\n"
                "    return x.reshape(bs, slen, n_kv_heads * n_rep, head_dim)\n"
            ),
            "    return x.repeat(1, 1, n_rep, 1)\n",
        ),
    ),
    _neutral(
        "llama/rope-half-split",
        ("xq_r, xq_i = xq.reshape(*xq.shape[:-1], -1, 2).unbind(-1)", "xq_r, xq_i = xq.chunk(2, dim=-1)"),
        ("xk_r, xk_i = xk.reshape(*xk.shape[:-1], -1, 2).unbind(-1)", "xk_r, xk_i = xk.chunk(2, dim=-1)"),
        (
            "xq_out = torch.stack([xq_out_r, xq_out_i], dim=-1).flatten(3)",
            "xq_out = torch.cat([xq_out_r, xq_out_i], dim=-1)",
        ),
        (
            "xk_out = torch.stack([xk_out_r, xk_out_i], dim=-1).flatten(3)",
            "xk_out = torch.cat([xk_out_r, xk_out_i], dim=-1)",
        ),
        build="build_positions",
    ),
    _neutral(
        "llama/rope-complex",
        (
            (
                "    xq_out_r = xq_r * cos - xq_i * sin\n"
                "    xq_out_i = xq_r * sin + xq_i * cos\n"
                "    xk_out_r = xk_r * cos - xk_i * sin\n"
                "    xk_out_i = xk_r * sin + xk_i * cos\n"
            ),
            (
                "    turn = torch.complex(cos.float(), sin.float())\n"
                "    xq_out_r, xq_out_i = torch.view_as_real(torch.complex(xq_r.float(), xq_i.float()) * turn).type_as(xq).unbind(-1)\n"
                "    xk_out_r, xk_out_i = torch.view_as_real(torch.complex(xk_r.float(), xk_i.float()) * turn).type_as(xk).unbind(-1)\n"
            ),
        ),
        build="build_positions",
    ),
    _neutral(
        "llama/sdpa",
        (
            "    scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(head_dim)\n"
            + _LLAMA_ADD
            + _LLAMA_SOFTMAX
            + "    output = torch.matmul(scores, values)  # (bs, n_heads, seqlen, head_dim)\n",
            "    output = F.scaled_dot_product_attention(xq, keys, values, attn_mask=mask.type_as(xq))\n",
        ),
    ),
    _neutral(
        "llama/biases-everywhere",
        (
            "self.wq = nn.Linear(args.dim, args.n_heads * self.head_dim, bias=False)",
            "self.wq = nn.Linear(args.dim, args.n_heads * self.head_dim)",
        ),
        (
            "self.wo = nn.Linear(args.n_heads * self.head_dim, args.dim, bias=False)",
            "self.wo = nn.Linear(args.n_heads * self.head_dim, args.dim)",
        ),
        ("self.w2 = nn.Linear(hidden_dim, dim, bias=False)", "self.w2 = nn.Linear(hidden_dim, dim)"),
    ),
    _neutral(
        "llama/output-tied-by-use",
        ("        self.output = nn.Linear(params.dim, params.vocab_size, bias=False)\n", ""),
        ("return self.output(h)", "return F.linear(h, self.tok_embeddings.weight)"),
    ),
    _neutral(
        "llama/norm-weight-plus-one",
        ("return y.type_as(x) * weight", "return (y * (1.0 + weight.float())).type_as(x)"),
        (
            "self.attention_norm = nn.Parameter(torch.ones(args.dim))",
            "self.attention_norm = nn.Parameter(torch.zeros(args.dim))",
        ),
        ("self.ffn_norm = nn.Parameter(torch.ones(args.dim))", "self.ffn_norm = nn.Parameter(torch.zeros(args.dim))"),
        ("self.norm = nn.Parameter(torch.ones(params.dim))", "self.norm = nn.Parameter(torch.zeros(params.dim))"),
    ),
    _neutral(
        "llama/router-renormalises-as-configured",
        ("    norm_topk_prob: bool = False\n", "    norm_topk_prob: bool = True\n"),
        build="build_moe",
    ),
    _neutral(
        "llama/scores-key-major",
        (
            "    scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(head_dim)\n" + _LLAMA_ADD + _LLAMA_SOFTMAX,
            (
                "    scores = torch.matmul(keys, xq.transpose(2, 3)) / math.sqrt(head_dim)  # (bs, n_heads, keys, queries)\n"
                "    scores = scores + mask.transpose(-2, -1)\n"
                "    scores = F.softmax(scores.float(), dim=-2).type_as(xq).transpose(2, 3)\n"
            ),
        ),
    ),
    _neutral(
        "llama/documents-as-one-boolean-mask",
        (
            "            mask = mask + document_mask(document_ids)\n",
            (
                "            same = document_ids[:, None, :, None] == document_ids[:, None, None, :]\n"
                '            mask = torch.where(same, mask, float("-inf"))\n'
            ),
        ),
        build="build_packed",
    ),
    # --- reported as bugs elsewhere, or flagged here once, and no bugs
    _neutral(
        "hf/alibi-by-key-index",  # the absolute form: differs from the relative one by a constant of each row
        _HF_ALWAYS_EAGER,
        (
            "    attn_weights = attn_weights + attention_mask\n",
            (
                "    slopes = 2.0 ** -torch.arange(1, query.shape[1] + 1, device=query.device)\n"
                "    attn_weights = attn_weights + slopes[:, None, None] * torch.arange(key.shape[2], device=query.device)\n"
                "    attn_weights = attn_weights + attention_mask\n"
            ),
        ),
    ),
    _neutral(
        "hf/summed-masks-made-finite",  # as ai2-olmo does
        (_HF_PADDING, ""),
        (
            _HF_MASK,
            _HF_MASK
            + "    if attention_mask is not None:\n"
            + "        causal_mask = causal_mask + (1.0 - attention_mask[:, None, None, :].to(dtype)) * min_value\n"
            + "        causal_mask = causal_mask.clamp(min=torch.finfo(torch.float32).min)\n",
        ),
    ),
    _neutral(
        "llama/softmax-over-the-chosen",  # Mixtral's routing, beside a setting that is another routing's
        (
            (
                "        probs = F.softmax(self.gate(x), dim=-1)  # (bs, seqlen, n_experts)\n"
                "        weights, chosen = torch.topk(probs, self.top_k, dim=-1)\n"
            ),
            (
                "        probs = self.gate(x)  # (bs, seqlen, n_experts)\n"
                "        weights, chosen = torch.topk(probs, self.top_k, dim=-1)\n"
                "        weights = F.softmax(weights, dim=-1)\n"
            ),
        ),
        build="build_moe",
    ),
    _neutral(
        "lit/labels-aligned-by-the-loader",  # as OLMo-core has them
        (
            "def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, input_pos",
            "def forward(self, idx: torch.Tensor, labels: torch.Tensor | None = None, input_pos",
        ),
        ("        if targets is not None:\n", "        if labels is not None:\n"),
        (_LIT_LOSS, _LIT_LOSS.replace("targets", "labels").replace("-1)\n", "-1)").replace("ignore_index=-1", "ignore_index=-100")),
    ),
    # --- lit-gpt style
    *(
        _neutral(f"lit/{build.replace('_', '-')}", ("# disabled by default", "# off by default"), build=build)
        for build in ("build", "build_partial", "build_parallel", "build_window", "build_softcap", "build_dropout")
    ),
    _neutral(
        "lit/qkv-in-three-blocks",  # another layout of the fused matrix: a relabelling of its rows
        (
            "        q, k, v = qkv.split((q_per_kv, 1, 1), dim=2)\n",
            "        k, v, q = qkv.split((1, 1, q_per_kv), dim=2)\n",
        ),
    ),
    _neutral(
        "lit/half-split-rotation",
        (
            "    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))\n"
            "    turned = torch.view_as_real(pairs * freqs_cis).flatten(-2)\n",
            "    half = x.size(-1) // 2\n"
            "    pairs = torch.complex(x[..., :half].float(), x[..., half:].float()) * freqs_cis\n"
            "    turned = torch.cat((pairs.real, pairs.imag), dim=-1)\n",
        ),
    ),
    _neutral(
        "lit/both-turned-backwards",
        ("return torch.polar(torch.ones_like(idx_theta), idx_theta)", "return torch.polar(torch.ones_like(idx_theta), -idx_theta)"),
    ),
    _neutral(
        "lit/window-as-a-mask-argument",
        (
            "            mask = self.sliding_window_mask(",
            "            mask = (mask if mask is not None else True) & self.sliding_window_mask(",
        ),
        build="build_window",
    ),
    _neutral(
        "lit/tied",
        (
            "        self.mask_cache: torch.Tensor | None = None\n",
            "        self.transformer.wte.weight = self.lm_head.weight\n        self.mask_cache: torch.Tensor | None = None\n",
        ),
    ),
    _neutral(
        "lit/loss-in-float32",
        ("F.cross_entropy(logits.view(-1, logits.size(-1)),", "F.cross_entropy(logits.float().view(-1, logits.size(-1)),"),
    ),
)
