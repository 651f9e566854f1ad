"""A decoder as DeepSeek writes it: latent attention with a decoupled rotary key, routed and shared experts, a cache of latents.

Clean: every test of the corpus must pass on each `build*` function here. The mutants are line edits of this file.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class ModelArgs:
    vocab_size: int = 127
    dim: int = 52
    inter_dim: int = 100
    moe_inter_dim: int = 28
    n_layers: int = 3
    n_dense_layers: int = 1
    n_heads: int = 4
    n_routed_experts: int = 6
    n_shared_experts: int = 1
    n_activated_experts: int = 2
    route_scale: float = 1.0
    norm_topk_prob: bool = True
    aux_loss_alpha: float = 0.0
    q_lora_rank: int = 24
    kv_lora_rank: int = 20
    qk_nope_head_dim: int = 10
    qk_rope_head_dim: int = 6
    v_head_dim: int = 14
    rope_theta: float = 10000.0
    max_position_embeddings: int = 128
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    pad_token_id: int = 0


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, (self.dim,), self.weight, self.eps)


def rotary_angles(args: ModelArgs, position_ids):
    """cos and sin, [batch, seq, 1, rope/2], in float32."""
    dim = args.qk_rope_head_dim
    freqs = 1.0 / (args.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids.device) / dim))
    angles = position_ids[:, :, None, None].float() * freqs
    return angles.cos(), angles.sin()


def apply_rotary(x, cos, sin):
    """x [batch, seq, heads, rope]; neighbours form a pair."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class MLA(nn.Module):
    def __init__(self, args: ModelArgs, layer_idx: int):
        super().__init__()
        self.args = args
        self.layer_idx = layer_idx
        self.qk_head_dim = args.qk_nope_head_dim + args.qk_rope_head_dim
        self.wq_a = nn.Linear(args.dim, args.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(args.q_lora_rank, args.rms_norm_eps)
        self.wq_b = nn.Linear(args.q_lora_rank, args.n_heads * self.qk_head_dim, bias=False)
        self.wkv_a = nn.Linear(args.dim, args.kv_lora_rank + args.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(args.kv_lora_rank, args.rms_norm_eps)
        self.wkv_b = nn.Linear(args.kv_lora_rank, args.n_heads * (args.qk_nope_head_dim + args.v_head_dim), bias=False)
        self.wo = nn.Linear(args.n_heads * args.v_head_dim, args.dim, bias=False)
        self.softmax_scale = self.qk_head_dim**-0.5

    def forward(self, x, cos, sin, mask, past=None):
        args = self.args
        bsz, seqlen, _ = x.shape
        q = self.wq_b(self.q_norm(self.wq_a(x))).view(bsz, seqlen, args.n_heads, self.qk_head_dim)
        q_nope, q_pe = q.split([args.qk_nope_head_dim, args.qk_rope_head_dim], dim=-1)
        q_pe = apply_rotary(q_pe, cos, sin)
        c_kv, k_pe = self.wkv_a(x).split([args.kv_lora_rank, args.qk_rope_head_dim], dim=-1)
        c_kv = self.kv_norm(c_kv)
        k_pe = apply_rotary(k_pe.unsqueeze(2), cos, sin).squeeze(2)  # one rotary key for all heads
        if past is not None:
            c_kv = torch.cat([past[0], c_kv], dim=1)
            k_pe = torch.cat([past[1], k_pe], dim=1)
        present = (c_kv, k_pe)

        kv_len = c_kv.shape[1]
        kv = self.wkv_b(c_kv).view(bsz, kv_len, args.n_heads, args.qk_nope_head_dim + args.v_head_dim)
        k_nope, v = kv.split([args.qk_nope_head_dim, args.v_head_dim], dim=-1)
        scores = torch.einsum("bshd,bthd->bhst", q_nope, k_nope) + torch.einsum("bshr,btr->bhst", q_pe, k_pe)
        scores = scores * self.softmax_scale + mask
        probs = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)
        out = torch.einsum("bhst,bthv->bshv", probs, v)
        return self.wo(out.reshape(bsz, seqlen, -1)), present


class Expert(nn.Module):
    def __init__(self, dim: int, inter_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, inter_dim, bias=False)
        self.w2 = nn.Linear(inter_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, inter_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Gate(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.weight = nn.Parameter(torch.empty(args.n_routed_experts, args.dim))

    def forward(self, x):
        """x [tokens, dim] -> weights and indices [tokens, k], and every expert's probability."""
        probs = F.linear(x, self.weight).softmax(dim=-1, dtype=torch.float32)
        weights, indices = torch.topk(probs, self.args.n_activated_experts, dim=-1)
        if self.args.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return (weights * self.args.route_scale).type_as(x), indices, probs


class MoE(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.gate = Gate(args)
        self.experts = nn.ModuleList([Expert(args.dim, args.moe_inter_dim) for _ in range(args.n_routed_experts)])
        self.shared_experts = Expert(args.dim, args.n_shared_experts * args.moe_inter_dim)
        self.aux_loss = None

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, indices, probs = self.gate(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(indices == i)
            if token.numel():
                y = y.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        load = F.one_hot(indices, self.args.n_routed_experts).float().sum(1).mean(0) / self.args.n_activated_experts
        self.aux_loss = self.args.n_routed_experts * (load * probs.mean(0)).sum()
        return (y + self.shared_experts(x)).view(shape)


class Block(nn.Module):
    def __init__(self, args: ModelArgs, layer_idx: int):
        super().__init__()
        self.attn = MLA(args, layer_idx)
        self.ffn = Expert(args.dim, args.inter_dim) if layer_idx < args.n_dense_layers else MoE(args)
        self.attn_norm = RMSNorm(args.dim, args.rms_norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.rms_norm_eps)

    def forward(self, x, cos, sin, mask, past=None):
        h, present = self.attn(self.attn_norm(x), cos, sin, mask, past)
        x = x + h
        return x + self.ffn(self.ffn_norm(x)), present


def make_mask(attention_mask, bsz, seqlen, past_len, device, dtype):
    """Additive, [batch, 1, seq, past + seq]."""
    total = past_len + seqlen
    allowed = torch.ones(seqlen, total, dtype=torch.bool, device=device).tril(diagonal=past_len)
    allowed = allowed.expand(bsz, 1, seqlen, total)
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, :].bool()
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)


class CausalLM(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.embed = nn.Embedding(args.vocab_size, args.dim, padding_idx=args.pad_token_id)
        self.layers = nn.ModuleList([Block(args, i) for i in range(args.n_layers)])
        self.norm = RMSNorm(args.dim, args.rms_norm_eps)
        self.head = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding, Gate)):
            nn.init.normal_(module.weight, std=self.args.initializer_range)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, labels=None, use_cache=False):
        bsz, seqlen = input_ids.shape
        past_len = past_key_values[0][0].shape[1] if past_key_values is not None else 0
        if position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seqlen:]
            else:
                position_ids = torch.arange(past_len, past_len + seqlen, device=input_ids.device).expand(bsz, -1)
        h = self.embed(input_ids)
        cos, sin = rotary_angles(self.args, position_ids)
        mask = make_mask(attention_mask, bsz, seqlen, past_len, h.device, h.dtype)
        presents = []
        for i, layer in enumerate(self.layers):
            h, present = layer(h, cos, sin, mask, past_key_values[i] if past_key_values is not None else None)
            presents.append(present)
        logits = self.head(self.norm(h))
        out = {"logits": logits}
        if use_cache:
            out["past_key_values"] = presents
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.size(-1)).float(), labels[:, 1:].reshape(-1))
            if self.args.aux_loss_alpha > 0:
                for layer in self.layers[self.args.n_dense_layers :]:
                    loss = loss + self.args.aux_loss_alpha * layer.ffn.aux_loss
            out["loss"] = loss
        return out


def build():
    args = ModelArgs()
    return CausalLM(args), args


def build_unnormalised():
    args = ModelArgs(norm_topk_prob=False, route_scale=2.5)
    return CausalLM(args), args


def build_balanced():
    args = ModelArgs(aux_loss_alpha=0.01)
    return CausalLM(args), args
