"""A small OLMo-2: norm after the sublayer, norm on queries and keys, grouped heads."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class TinyOlmoConfig:
    vocab_size: int = 131
    hidden_size: int = 48
    intermediate_size: int = 112
    num_hidden_layers: int = 3
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    max_position_embeddings: int = 96
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    pad_token_id: int = 0
    eos_token_id: int = 1
    attn_implementation: str = "eager"

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads


@dataclass
class CausalOutput:
    logits: torch.Tensor
    loss: torch.Tensor | None = None
    past_key_values: list[tuple[torch.Tensor, torch.Tensor]] | None = None


class OlmoNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        dtype = x.dtype
        x = x.float() if x.dtype != torch.float64 else x
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        return (self.weight * x).to(dtype)


class Rotary(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config.head_dim
        inv_freq = 1.0 / (config.rope_theta ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @torch.no_grad()
    def forward(self, position_ids):
        angles = position_ids[:, :, None].float() * self.inv_freq[None, None, :].float()
        emb = torch.cat([angles, angles], dim=-1)
        return emb.cos(), emb.sin()


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


def apply_rotary(q, k, cos, sin):
    cos = cos.unsqueeze(1).to(q.dtype)
    sin = sin.unsqueeze(1).to(q.dtype)
    q = q * cos + rotate_half(q) * sin
    k = k * cos + rotate_half(k) * sin
    return q, k


def repeat_kv(x, n):
    if n == 1:
        return x
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, n, t, d).reshape(b, h * n, t, d)


def eager_attention(q, k, v, bias, scale, dropout):
    scores = torch.matmul(q, k.transpose(-2, -1)) * scale
    scores = scores + bias
    probs = F.softmax(scores, dim=-1, dtype=torch.float32 if scores.dtype != torch.float64 else None).to(q.dtype)
    probs = F.dropout(probs, p=dropout)
    return torch.matmul(probs, v)


def sdpa_attention(q, k, v, bias, scale, dropout):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)


ATTENTION = {"eager": eager_attention, "sdpa": sdpa_attention}


class OlmoAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.n_heads = config.num_attention_heads
        self.n_kv = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = 1 / math.sqrt(self.head_dim)
        self.q_proj = nn.Linear(config.hidden_size, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.n_kv * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.n_kv * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = OlmoNorm(self.n_heads * self.head_dim, config.rms_norm_eps)
        self.k_norm = OlmoNorm(self.n_kv * self.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, bias, past):
        b, t, _ = x.shape
        q = self.q_norm(self.q_proj(x)).view(b, t, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.k_norm(self.k_proj(x)).view(b, t, self.n_kv, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.n_kv, self.head_dim).transpose(1, 2)
        q, k = apply_rotary(q, k, cos, sin)
        if past is not None:
            k = torch.cat([past[0], k], dim=2)
            v = torch.cat([past[1], v], dim=2)
        present = (k, v)
        k = repeat_kv(k, self.n_heads // self.n_kv)
        v = repeat_kv(v, self.n_heads // self.n_kv)
        dropout = self.config.attention_dropout if self.training else 0.0
        out = ATTENTION[self.config.attn_implementation](q, k, v, bias, self.scale, dropout)
        out = out.transpose(1, 2).contiguous().view(b, t, -1)
        return self.o_proj(out), present


class OlmoMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OlmoBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = OlmoAttention(config, layer_idx)
        self.mlp = OlmoMLP(config)
        self.post_attention_layernorm = OlmoNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = OlmoNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, bias, past):
        h, present = self.self_attn(x, cos, sin, bias, past)
        x = x + self.post_attention_layernorm(h)
        h = self.mlp(x)
        x = x + self.post_feedforward_layernorm(h)
        return x, present


class TinyOlmoForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=None)
        self.rotary = Rotary(config)
        self.layers = nn.ModuleList([OlmoBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = OlmoNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(p, mean=0.0, std=config.initializer_range / math.sqrt(2 * config.num_hidden_layers))
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)

    def build_bias(self, attention_mask, b, t, past_length, x):
        total = past_length + t
        rows = torch.arange(past_length, total, device=x.device)[:, None]
        cols = torch.arange(total, device=x.device)[None, :]
        allowed = (cols <= rows)[None, None].expand(b, 1, t, total)
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None, :].bool()
        bias = torch.zeros(b, 1, t, total, dtype=x.dtype, device=x.device)
        return bias.masked_fill(~allowed, torch.finfo(x.dtype).min)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False, labels=None):
        b, t = input_ids.shape
        x = self.embed_tokens(input_ids)
        past_length = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        if position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -t:]
            else:
                position_ids = torch.arange(past_length, past_length + t, device=x.device)[None].expand(b, t)
        cos, sin = self.rotary(position_ids)
        bias = self.build_bias(attention_mask, b, t, past_length, x)
        presents = []
        for i, layer in enumerate(self.layers):
            past = past_key_values[i] if past_key_values is not None else None
            x, present = layer(x, cos, sin, bias, past)
            presents.append(present)
        logits = self.lm_head(self.norm(x))
        loss = None
        if labels is not None:
            shift_logits = logits[:, :-1].contiguous().float()
            shift_labels = labels[:, 1:].contiguous()
            loss = F.cross_entropy(shift_logits.view(-1, shift_logits.size(-1)), shift_labels.view(-1), ignore_index=-100)
        return CausalOutput(logits=logits, loss=loss, past_key_values=presents if use_cache else None)


def build():
    config = TinyOlmoConfig()
    return TinyOlmoForCausalLM(config), config
