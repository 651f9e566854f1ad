"""A GPT as lit-gpt, gpt-fast and llama2.c write it: one fused qkv, complex rotation, a key-value cache kept in the module.

Clean: every test of the corpus must pass on each `build*` function here. The mutants are line edits of this file.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    block_size: int = 80
    padded_vocab_size: int = 127
    n_layer: int = 3
    n_head: int = 6
    n_query_groups: int = 3
    head_size: int = 10
    n_embd: int = 48
    intermediate_size: int = 88
    rotary_percentage: float = 1.0
    rope_base: int = 10000
    norm_eps: float = 1e-5
    parallel_residual: bool = False
    sliding_window_size: int | None = None
    attention_logit_softcapping: float | None = None
    dropout: float = 0.0

    @property
    def rope_n_elem(self) -> int:
        return int(self.rotary_percentage * self.head_size)


def precompute_freqs_cis(seq_len: int, n_elem: int, base: int, device=None) -> torch.Tensor:
    """exp(i * position * base**(-2j/n_elem)), complex64 [seq_len, n_elem/2]."""
    theta = 1.0 / (base ** (torch.arange(0, n_elem, 2, device=device).float() / n_elem))
    seq_idx = torch.arange(seq_len, device=device).float()
    idx_theta = torch.outer(seq_idx, theta)
    return torch.polar(torch.ones_like(idx_theta), idx_theta)


def apply_rotary_emb(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """x (B, nh, T, n_elem); each pair (2j, 2j+1) is a complex number that is turned."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = torch.view_as_real(pairs * freqs_cis).flatten(-2)
    return turned.type_as(x)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        x = x.float()
        norm_x = torch.mean(x * x, dim=-1, keepdim=True)
        x_normed = x * torch.rsqrt(norm_x + self.eps)
        return x_normed.to(dtype=dtype) * self.weight


class KVCache(nn.Module):
    def __init__(self, k_shape, v_shape):
        super().__init__()
        self.register_buffer("k", torch.zeros(k_shape), persistent=False)
        self.register_buffer("v", torch.zeros(v_shape), persistent=False)

    def forward(self, input_pos: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        # move the buffer to the activation dtype for when AMP is used
        self.k = self.k.to(k.dtype)
        self.v = self.v.to(v.dtype)
        # update the cache
        n = k.size(0)
        self.k[:n, :, input_pos] = k
        self.v[:n, :, input_pos] = v
        return self.k[:n], self.v[:n]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: Config, block_idx: int):
        super().__init__()
        self.config = config
        # key, query and value projections for all heads, but in a batch
        shape = (config.n_head + 2 * config.n_query_groups) * config.head_size
        self.attn = nn.Linear(config.n_embd, shape, bias=False)
        # output projection
        self.proj = nn.Linear(config.head_size * config.n_head, config.n_embd, bias=False)
        # disabled by default
        self.kv_cache: KVCache | None = None
        self.apply_sliding_window_attention = config.sliding_window_size is not None and block_idx % 2 == 0

    def forward(self, x, freqs_cis, mask: torch.Tensor | None = None, input_pos: torch.Tensor | None = None):
        B, T, _ = x.size()

        # assemble into a number of query groups to support MHA, MQA and GQA together
        q_per_kv = self.config.n_head // self.config.n_query_groups
        total_qkv = q_per_kv + 2  # each group has 1+ queries, 1 key, and 1 value
        qkv = self.attn(x).view(B, T, self.config.n_query_groups, total_qkv, self.config.head_size)
        qkv = qkv.permute(0, 2, 3, 1, 4)  # (B, n_query_groups, total_qkv, T, hs)
        q, k, v = qkv.split((q_per_kv, 1, 1), dim=2)
        q = q.reshape(B, -1, T, self.config.head_size)  # (B, nh_q, T, hs)
        k = k.reshape(B, -1, T, self.config.head_size)  # (B, nh_k, T, hs)
        v = v.reshape(B, -1, T, self.config.head_size)  # (B, nh_v, T, hs)

        n_elem = self.config.rope_n_elem
        q_roped = apply_rotary_emb(q[..., :n_elem], freqs_cis)
        k_roped = apply_rotary_emb(k[..., :n_elem], freqs_cis)
        q = torch.cat((q_roped, q[..., n_elem:]), dim=-1)
        k = torch.cat((k_roped, k[..., n_elem:]), dim=-1)

        if input_pos is not None:
            k, v = self.kv_cache(input_pos, k, v)

        if self.apply_sliding_window_attention:
            mask = self.sliding_window_mask(T, k.size(2), input_pos, x.device)

        k = k.repeat_interleave(q_per_kv, dim=1)
        v = v.repeat_interleave(q_per_kv, dim=1)
        y = self.scaled_dot_product_attention(q, k, v, mask)
        y = y.reshape(B, T, self.config.head_size * self.config.n_head)  # re-assemble all head outputs side by side
        return self.proj(y)

    def sliding_window_mask(self, T, kv_len, input_pos, device):
        query_pos = torch.arange(T, device=device) if input_pos is None else input_pos
        distance = query_pos[:, None] - torch.arange(kv_len, device=device)[None, :]
        return (distance >= 0) & (distance < self.config.sliding_window_size)

    def scaled_dot_product_attention(self, q, k, v, mask: torch.Tensor | None = None):
        scale = 1.0 / math.sqrt(self.config.head_size)
        dropout_p = self.config.dropout if self.training else 0.0
        if self.config.attention_logit_softcapping is not None:
            cap = self.config.attention_logit_softcapping
            scores = q @ k.mT * scale
            scores = torch.tanh(scores / cap) * cap
            if mask is None:
                mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~mask, float("-inf"))
            scores = F.softmax(scores, dim=-1, dtype=torch.float).to(dtype=q.dtype)
            y = F.dropout(scores, dropout_p) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale, is_causal=mask is None)
        return y.transpose(1, 2)


class LLaMAMLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.fc_1 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.fc_2 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x):
        x_fc_1 = self.fc_1(x)
        x_fc_2 = self.fc_2(x)
        x = F.silu(x_fc_1) * x_fc_2
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, config: Config, block_idx: int):
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = CausalSelfAttention(config, block_idx)
        self.norm_2 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = LLaMAMLP(config)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.config = config

    def forward(self, x, freqs_cis, mask=None, input_pos=None):
        x_normed = self.norm_1(x)
        attention_output = self.resid_dropout(self.attn(x_normed, freqs_cis, mask, input_pos))
        if self.config.parallel_residual:
            return x + attention_output + self.resid_dropout(self.mlp(self.norm_2(x)))
        x = attention_output + x
        x_normed = self.norm_2(x)
        return self.resid_dropout(self.mlp(x_normed)) + x


class GPT(nn.Module):
    last_loss: torch.Tensor | None

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "h": nn.ModuleList(Block(config, block_idx) for block_idx in range(config.n_layer)),
                "ln_f": RMSNorm(config.n_embd, eps=config.norm_eps),
            }
        )
        self.mask_cache: torch.Tensor | None = None
        self.register_buffer("freqs_cis", self.rope_cache(), persistent=False)
        # the loss of the last forward call; set if it is called with targets
        self.last_loss = None

        self.apply(self._init_weights)
        # scaled init to the residual projections, per the GPT-2 paper
        for pn, p in self.named_parameters():
            if pn.endswith("proj.weight"):
                torch.nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def rope_cache(self, device=None):
        return precompute_freqs_cis(self.config.block_size, self.config.rope_n_elem, self.config.rope_base, device)

    def _apply(self, fn, recurse=True):
        # a cast must not touch the rotation (torch drops the imaginary part), and to_empty() must not lose it
        del self.freqs_cis
        super()._apply(fn, recurse)
        self.register_buffer("freqs_cis", self.rope_cache(self.lm_head.weight.device), persistent=False)
        return self

    def set_kv_cache(self, batch_size: int, max_seq_length: int | None = None, device=None, dtype=None):
        length = max_seq_length or self.config.block_size
        shape = (batch_size, self.config.n_query_groups, length, self.config.head_size)
        for block in self.transformer.h:
            block.attn.kv_cache = KVCache(shape, shape).to(device=device, dtype=dtype)
        self.mask_cache = torch.ones(length, length, dtype=torch.bool, device=device).tril()

    def clear_kv_cache(self):
        self.mask_cache = None
        for block in self.transformer.h:
            block.attn.kv_cache = None

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, input_pos: torch.Tensor | None = None):
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"Cannot forward sequence of length {T}, block size is only {self.config.block_size}.")

        if input_pos is not None:  # use the kv cache
            if self.mask_cache is None:
                raise TypeError("You need to call `gpt.set_kv_cache()`")
            freqs_cis = self.freqs_cis[input_pos]
            mask = self.mask_cache[input_pos]
        else:
            freqs_cis = self.freqs_cis[:T]
            mask = None  # defaults to causal mask

        x = self.transformer.wte(idx)  # token embeddings of shape (B, T, n_embd)
        for block in self.transformer.h:
            x = block(x, freqs_cis, mask, input_pos)
        x = self.transformer.ln_f(x)
        logits = self.lm_head(x)  # (B, T, padded_vocab_size)
        if targets is not None:
            self.last_loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits


def build():
    return GPT(Config())


def build_partial():
    return GPT(Config(rotary_percentage=0.4, head_size=20))


def build_parallel():
    return GPT(Config(parallel_residual=True))


def build_window():
    return GPT(Config(sliding_window_size=5))


def build_softcap():
    return GPT(Config(attention_logit_softcapping=3.0))


def build_dropout():
    return GPT(Config(dropout=0.1))
