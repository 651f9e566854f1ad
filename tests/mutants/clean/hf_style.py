"""A decoder as the Hugging Face modeling files write it: config, attention, layer, model, language-model head.

Clean: every test of the corpus must pass on each `build*` function here. The mutants are line edits of this file.
"""
# ruff: noqa: RET504

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

ACT2FN = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


@dataclass
class MyConfig:
    vocab_size: int = 97
    hidden_size: int = 48
    intermediate_size: int = 112
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 12
    max_position_embeddings: int = 64
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 50000.0
    rope_scaling: dict | None = None
    partial_rotary_factor: float = 1.0
    initializer_range: float = 0.05
    attention_bias: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    use_qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ("full_attention", "full_attention", "full_attention")
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    tie_word_embeddings: bool = False
    gradient_checkpointing: bool = False
    attn_implementation: str = "eager"
    pad_token_id: int = 0


@dataclass
class MyCausalLMOutput:
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: tuple | None = None


class MyRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class MyRotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rotary_dim = int(config.head_dim * config.partial_rotary_factor)
        self.attention_factor = 1.0
        if config.rope_scaling is not None:
            self.attention_factor = config.rope_scaling.get("attention_factor", 1.0)
        self.register_buffer("inv_freq", self.compute_inv_freq(), persistent=False)

    def compute_inv_freq(self, device=None):
        steps = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device)
        inv_freq = 1.0 / (self.config.rope_theta ** (steps / self.rotary_dim))
        scaling = self.config.rope_scaling
        if scaling is not None and scaling["rope_type"] == "linear":
            inv_freq = inv_freq / scaling["factor"]
        return inv_freq

    def reset_parameters(self):
        self.inv_freq = self.compute_inv_freq(self.inv_freq.device)

    def _apply(self, fn, recurse=True):
        # A cast to bfloat16 would round the frequencies, and to_empty() would lose them: make them anew.
        super()._apply(fn, recurse)
        self.reset_parameters()
        return self

    @torch.no_grad()
    def forward(self, hidden_states, position_ids):
        positions = position_ids.to(torch.float32)
        freqs = positions[:, :, None] * self.inv_freq[None, None, :]
        emb = torch.cat((freqs, freqs), dim=-1)
        cos = emb.cos() * self.attention_factor
        sin = emb.sin() * self.attention_factor
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(query, key, cos, sin):
    """query [batch, heads, seq_len, head_dim], cos and sin [batch, seq_len, rotary_dim]."""
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    rotary_dim = cos.shape[-1]
    query_rot, query_pass = query[..., :rotary_dim], query[..., rotary_dim:]
    key_rot, key_pass = key[..., :rotary_dim], key[..., rotary_dim:]
    query_rot = (query_rot * cos) + (rotate_half(query_rot) * sin)
    key_rot = (key_rot * cos) + (rotate_half(key_rot) * sin)
    return torch.cat((query_rot, query_pass), dim=-1), torch.cat((key_rot, key_pass), dim=-1)


def repeat_kv(hidden_states, n_rep):
    """[batch, num_key_value_heads, seq_len, head_dim] -> [batch, num_attention_heads, seq_len, head_dim]"""
    batch, num_key_value_heads, seq_len, head_dim = hidden_states.shape
    if n_rep == 1:
        return hidden_states
    hidden_states = hidden_states[:, :, None, :, :].expand(batch, num_key_value_heads, n_rep, seq_len, head_dim)
    return hidden_states.reshape(batch, num_key_value_heads * n_rep, seq_len, head_dim)


def uses_sdpa(config):
    """SDPA has no softcap of the scores: such a model takes the eager path."""
    return config.attn_implementation == "sdpa" and config.attn_logit_softcapping is None


def make_causal_mask(config, attention_mask, hidden_states, past_length, sliding_window=None):
    """The additive mask [batch or 1, 1, query_length, key_length]; None where SDPA's is_causal is enough.

    attention_mask is [batch, key_length], 1 for a real token and 0 for padding.
    """
    query_length = hidden_states.shape[1]
    key_length = past_length + query_length
    dtype, device = hidden_states.dtype, hidden_states.device
    if attention_mask is not None and attention_mask.shape[-1] != key_length:
        raise ValueError(f"attention_mask has {attention_mask.shape[-1]} columns, expected {key_length}")

    plain = attention_mask is None and sliding_window is None
    if uses_sdpa(config) and plain and (past_length == 0 or query_length == 1):
        return None

    query_index = torch.arange(past_length, key_length, device=device)[:, None]
    key_index = torch.arange(key_length, device=device)[None, :]
    allowed = key_index <= query_index
    if sliding_window is not None:
        allowed = allowed & (key_index > query_index - sliding_window)
    allowed = allowed[None, None, :, :]
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, :].bool()
    # A padding query may have no key at all; let it see itself, so that its softmax is no 0/0.
    allowed = allowed | ((key_index == query_index) & ~allowed.any(dim=-1, keepdim=True))

    min_value = torch.finfo(dtype).min
    causal_mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    causal_mask = causal_mask.masked_fill(~allowed, min_value)
    return causal_mask


def eager_attention(query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, training=False):
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        attn_weights = softcap * torch.tanh(attn_weights / softcap)
    attn_weights = attn_weights + attention_mask
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = F.dropout(attn_weights, p=dropout, training=training)
    attn_output = torch.matmul(attn_weights, value)
    attn_output = attn_output.transpose(1, 2).contiguous()
    return attn_output


def sdpa_attention(query, key, value, attention_mask, scaling, dropout=0.0, training=False):
    is_causal = attention_mask is None and query.shape[2] > 1
    attn_output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout if training else 0.0,
        is_causal=is_causal,
        scale=scaling,
    )
    return attn_output.transpose(1, 2).contiguous()


class MyAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout

        q_size = self.num_heads * self.head_dim
        kv_size = self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = MyRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = MyRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.use_qk_norm else None

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_value=None, use_cache=False):
        batch_size, query_length, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(batch_size, query_length, self.num_heads, self.head_dim)
        key = self.k_proj(hidden_states).view(batch_size, query_length, self.num_key_value_heads, self.head_dim)
        value = self.v_proj(hidden_states).view(batch_size, query_length, self.num_key_value_heads, self.head_dim)
        if self.q_norm is not None:
            query = self.q_norm(query)
            key = self.k_norm(key)
        query = query.transpose(1, 2)
        key = key.transpose(1, 2)
        value = value.transpose(1, 2)

        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(query, key, cos, sin)

        if past_key_value is not None:
            key = torch.cat((past_key_value[0], key), dim=2)
            value = torch.cat((past_key_value[1], value), dim=2)
        present = (key, value) if use_cache else None

        key = repeat_kv(key, self.num_key_value_groups)
        value = repeat_kv(value, self.num_key_value_groups)

        softcap = self.config.attn_logit_softcapping
        dropout = self.attention_dropout
        if uses_sdpa(self.config):
            attn_output = sdpa_attention(query, key, value, attention_mask, self.scaling, dropout=dropout, training=self.training)
        else:
            attn_output = eager_attention(query, key, value, attention_mask, self.scaling, dropout, softcap, training=self.training)
        attn_output = attn_output.reshape(batch_size, query_length, self.num_heads * self.head_dim)
        return self.o_proj(attn_output), present


class MyMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MyDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attention_type = config.layer_types[layer_idx]
        self.self_attn = MyAttention(config, layer_idx)
        self.mlp = MyMLP(config)
        self.input_layernorm = MyRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MyRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_value=None, use_cache=False):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, present = self.self_attn(hidden_states, position_embeddings, attention_mask, past_key_value, use_cache)
        hidden_states = residual + self.dropout(hidden_states)

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + self.dropout(hidden_states)
        return hidden_states, present


class MyModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MyDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MyRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MyRotaryEmbedding(config)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False):
        past_length = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        hidden_states = self.embed_tokens(input_ids)
        if position_ids is None:
            seq_len = input_ids.shape[1]
            position_ids = torch.arange(past_length, past_length + seq_len, device=input_ids.device)[None, :]
        position_embeddings = self.rotary_emb(hidden_states, position_ids)

        masks = {"full_attention": make_causal_mask(self.config, attention_mask, hidden_states, past_length)}
        if "sliding_attention" in self.config.layer_types:
            masks["sliding_attention"] = make_causal_mask(
                self.config, attention_mask, hidden_states, past_length, sliding_window=self.config.sliding_window
            )

        presents = []
        for i, layer in enumerate(self.layers):
            layer_mask = masks[layer.attention_type]
            if self.config.gradient_checkpointing and self.training and not use_cache:
                hidden_states, present = checkpoint(layer, hidden_states, position_embeddings, layer_mask, use_reentrant=False)
            else:
                past_key_value = None if past_key_values is None else past_key_values[i]
                hidden_states, present = layer(hidden_states, position_embeddings, layer_mask, past_key_value, use_cache)
            presents.append(present)

        hidden_states = self.norm(hidden_states)
        return hidden_states, tuple(presents) if use_cache else None


def causal_lm_loss(logits, labels, vocab_size, ignore_index=-100):
    """The mean cross-entropy of token t+1 given the logits at t, over the labels that count."""
    shift_logits = logits[:, :-1, :].reshape(-1, vocab_size).float()
    shift_labels = labels[:, 1:].reshape(-1)
    total = F.cross_entropy(shift_logits, shift_labels, ignore_index=ignore_index, reduction="sum")
    count = (shift_labels != ignore_index).sum()
    return total / count.clamp(min=1)


class MyForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = MyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()
        self.tie_weights()

    def init_weights(self):
        self.apply(self._init_weights)
        residual_std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
        for name, param in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(param, mean=0.0, std=residual_std)

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, MyRMSNorm):
            nn.init.ones_(module.weight)

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn, recurse=True):
        # to_empty() gives each module its own memory: tie again.
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=False,
        labels=None,
    ):
        hidden_states, past_key_values = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        logits = self.lm_head(hidden_states)
        softcap = self.config.final_logit_softcapping
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)

        loss = None
        if labels is not None:
            loss = causal_lm_loss(logits, labels, self.config.vocab_size)
        return MyCausalLMOutput(loss=loss, logits=logits, past_key_values=past_key_values)


def build():
    return MyForCausalLM(MyConfig())


def build_sdpa():
    return MyForCausalLM(MyConfig(attn_implementation="sdpa"))


def build_qk_norm():
    return MyForCausalLM(MyConfig(use_qk_norm=True, attention_bias=True))


def build_window():
    layer_types = ("sliding_attention", "full_attention", "sliding_attention")
    return MyForCausalLM(MyConfig(sliding_window=5, layer_types=layer_types))


def build_window_sdpa():
    layer_types = ("sliding_attention", "full_attention", "sliding_attention")
    return MyForCausalLM(MyConfig(sliding_window=5, layer_types=layer_types, attn_implementation="sdpa"))


def build_dropout():
    return MyForCausalLM(MyConfig(attention_dropout=0.2, hidden_dropout=0.1))


def build_dropout_sdpa():
    return MyForCausalLM(MyConfig(attention_dropout=0.2, hidden_dropout=0.1, attn_implementation="sdpa"))


def build_tied():
    return MyForCausalLM(MyConfig(tie_word_embeddings=True))


def build_checkpointing():
    return MyForCausalLM(MyConfig(gradient_checkpointing=True))


def build_partial_rotary():
    return MyForCausalLM(MyConfig(partial_rotary_factor=0.5))


def build_linear_scaling():
    return MyForCausalLM(MyConfig(rope_scaling={"rope_type": "linear", "factor": 4.0}))


def build_attention_factor():
    scaling = {"rope_type": "linear", "factor": 4.0, "attention_factor": 1.3}
    return MyForCausalLM(MyConfig(rope_scaling=scaling))


def build_softcap():
    return MyForCausalLM(MyConfig(attn_logit_softcapping=5.0, final_logit_softcapping=3.0))


def build_softcap_sdpa():
    config = MyConfig(attn_logit_softcapping=5.0, final_logit_softcapping=3.0, attn_implementation="sdpa")
    return MyForCausalLM(config)
