"""A decoder as Meta's llama repository writes it: plain functions, a rotation table, bare logits.

Clean: every test of the corpus must pass on each `build*` function here. The mutants are line edits of this file.
"""
# ruff: noqa: RET504

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class ModelArgs:
    dim: int = 56
    n_layers: int = 3
    n_heads: int = 4
    n_kv_heads: int = 2
    hidden_dim: int = 136
    vocab_size: int = 113
    max_seq_len: int = 72
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    n_experts: int = 0  # 0: one dense feed-forward
    n_experts_per_token: int = 2
    norm_topk_prob: bool = False


def rms_norm(x, weight, eps):
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return y.type_as(x) * weight


def precompute_freqs_cis(head_dim, end, theta=10000.0, device=None):
    """cos and sin of position * theta**(-2i/head_dim), both [end, head_dim/2]."""
    freqs = 1.0 / (theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim))
    t = torch.arange(end, device=device).float()
    freqs = torch.outer(t, freqs)
    return torch.cos(freqs), torch.sin(freqs)


def reshape_for_broadcast(freqs, x):
    """[T, D/2] or [B, T, D/2] -> a shape that broadcasts with x [B, T, H, D/2]"""
    if freqs.ndim == 2:
        freqs = freqs[None]
    assert freqs.shape[1] == x.shape[1]
    return freqs[:, :, None, :].type_as(x)


def apply_rotary_emb(xq, xk, freqs_cos, freqs_sin):
    """xq [B, T, H, D], xk [B, T, KV, D]; the pairs are (0,1), (2,3), ..."""
    xq_r, xq_i = xq.reshape(*xq.shape[:-1], -1, 2).unbind(-1)
    xk_r, xk_i = xk.reshape(*xk.shape[:-1], -1, 2).unbind(-1)
    cos = reshape_for_broadcast(freqs_cos, xq_r)
    sin = reshape_for_broadcast(freqs_sin, xq_r)

    xq_out_r = xq_r * cos - xq_i * sin
    xq_out_i = xq_r * sin + xq_i * cos
    xk_out_r = xk_r * cos - xk_i * sin
    xk_out_i = xk_r * sin + xk_i * cos

    xq_out = torch.stack([xq_out_r, xq_out_i], dim=-1).flatten(3)
    xk_out = torch.stack([xk_out_r, xk_out_i], dim=-1).flatten(3)
    return xq_out, xk_out


def repeat_kv(x, n_rep):
    """torch.repeat_interleave(x, dim=2, repeats=n_rep)"""
    bs, slen, n_kv_heads, head_dim = x.shape
    if n_rep == 1:
        return x
    x = x[:, :, :, None, :].expand(bs, slen, n_kv_heads, n_rep, head_dim)
    return x.reshape(bs, slen, n_kv_heads * n_rep, head_dim)


def causal_mask(seqlen, device):
    """[T, T]: 0 where a position may look, -inf in the future"""
    mask = torch.full((seqlen, seqlen), float("-inf"), device=device)
    return torch.triu(mask, diagonal=1)


def attention(xq, xk, xv, mask, n_rep):
    """xq [B, T, H, D], xk and xv [B, T, KV, D] -> [B, T, H*D]"""
    bsz, seqlen, _, head_dim = xq.shape
    keys = repeat_kv(xk, n_rep)
    values = repeat_kv(xv, n_rep)

    xq = xq.transpose(1, 2)  # (bs, n_heads, seqlen, head_dim)
    keys = keys.transpose(1, 2)
    values = values.transpose(1, 2)
    scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(head_dim)
    scores = scores + mask  # (bs, n_heads, seqlen, seqlen)
    scores = F.softmax(scores.float(), dim=-1).type_as(xq)
    output = torch.matmul(scores, values)  # (bs, n_heads, seqlen, head_dim)
    return output.transpose(1, 2).contiguous().view(bsz, seqlen, -1)


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.n_heads = args.n_heads
        self.n_kv_heads = args.n_kv_heads
        self.n_rep = self.n_heads // self.n_kv_heads
        self.head_dim = args.dim // args.n_heads
        self.wq = nn.Linear(args.dim, args.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * self.head_dim, args.dim, bias=False)

    def forward(self, x, freqs_cos, freqs_sin, mask):
        bsz, seqlen, _ = x.shape
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = xq.view(bsz, seqlen, self.n_heads, self.head_dim)
        xk = xk.view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        xv = xv.view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cos, freqs_sin)
        output = attention(xq, xk, xv, mask, self.n_rep)
        return self.wo(output)


class FeedForward(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.top_k = args.n_experts_per_token
        self.norm_topk_prob = args.norm_topk_prob
        self.gate = nn.Linear(args.dim, args.n_experts, bias=False)
        self.experts = nn.ModuleList([FeedForward(args.dim, args.hidden_dim) for _ in range(args.n_experts)])

    def forward(self, x):
        probs = F.softmax(self.gate(x), dim=-1)  # (bs, seqlen, n_experts)
        weights, chosen = torch.topk(probs, self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        gates = torch.zeros_like(probs).scatter(-1, chosen, weights)
        output = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            output = output + gates[..., i : i + 1] * expert(x)
        return output


class TransformerBlock(nn.Module):
    def __init__(self, layer_id, args):
        super().__init__()
        self.layer_id = layer_id
        self.norm_eps = args.norm_eps
        self.attention = Attention(args)
        self.feed_forward = MoE(args) if args.n_experts > 0 else FeedForward(args.dim, args.hidden_dim)
        self.attention_norm = nn.Parameter(torch.ones(args.dim))
        self.ffn_norm = nn.Parameter(torch.ones(args.dim))

    def forward(self, x, freqs_cos, freqs_sin, mask):
        normed = rms_norm(x, self.attention_norm, self.norm_eps)
        h = x + self.attention(normed, freqs_cos, freqs_sin, mask)
        normed = rms_norm(h, self.ffn_norm, self.norm_eps)
        out = h + self.feed_forward(normed)
        return out


class Transformer(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = params
        self.config = params
        self.tok_embeddings = nn.Embedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList()
        for layer_id in range(params.n_layers):
            self.layers.append(TransformerBlock(layer_id, params))
        self.norm = nn.Parameter(torch.ones(params.dim))
        self.output = nn.Linear(params.dim, params.vocab_size, bias=False)

        freqs_cos, freqs_sin = self.make_freqs()
        self.register_buffer("freqs_cos", freqs_cos, persistent=False)
        self.register_buffer("freqs_sin", freqs_sin, persistent=False)
        self.init_weights()

    def make_freqs(self, device=None):
        head_dim = self.params.dim // self.params.n_heads
        return precompute_freqs_cis(head_dim, self.params.max_seq_len, self.params.rope_theta, device)

    def reset_parameters(self):
        self.freqs_cos, self.freqs_sin = self.make_freqs(self.freqs_cos.device)

    def _apply(self, fn, recurse=True):
        # the table stays float32 whatever the weights are cast to, and to_empty() leaves no garbage in it
        super()._apply(fn, recurse)
        self.reset_parameters()
        return self

    def init_weights(self):
        residual_std = 0.02 / math.sqrt(2 * self.params.n_layers)
        for name, p in self.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                nn.init.normal_(p, mean=0.0, std=residual_std)
            elif p.ndim == 2:
                nn.init.normal_(p, mean=0.0, std=0.02)

    def run_layers(self, tokens, freqs_cos, freqs_sin, mask):
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, freqs_cos, freqs_sin, mask)
        h = rms_norm(h, self.norm, self.params.norm_eps)
        return self.output(h)

    def check_length(self, seqlen):
        if seqlen > self.params.max_seq_len:
            raise ValueError(f"sequence of {seqlen} tokens, max_seq_len is {self.params.max_seq_len}")

    def forward(self, tokens):
        seqlen = tokens.shape[1]
        self.check_length(seqlen)
        freqs_cos = self.freqs_cos[:seqlen]
        freqs_sin = self.freqs_sin[:seqlen]
        mask = causal_mask(seqlen, tokens.device)
        return self.run_layers(tokens, freqs_cos, freqs_sin, mask)


class PositionedTransformer(Transformer):
    """The same with the positions given: position_ids [B, T]"""

    def forward(self, tokens, position_ids=None):
        bsz, seqlen = tokens.shape
        self.check_length(seqlen)
        if position_ids is None:
            position_ids = torch.arange(seqlen, device=tokens.device).expand(bsz, seqlen)
        cos = self.freqs_cos[position_ids]  # (bs, seqlen, head_dim / 2)
        sin = self.freqs_sin[position_ids]
        mask = causal_mask(seqlen, tokens.device)
        return self.run_layers(tokens, cos, sin, mask)


def document_mask(document_ids):
    """[B, T] -> [B, 1, T, T]: 0 within a document, -inf between two"""
    same = document_ids[:, :, None] == document_ids[:, None, :]
    mask = torch.zeros(same.shape, device=document_ids.device)
    return mask.masked_fill(~same, float("-inf"))[:, None]


class PackedTransformer(Transformer):
    """The same with several documents in a row: document_ids [B, T]"""

    def forward(self, tokens, document_ids=None):
        seqlen = tokens.shape[1]
        self.check_length(seqlen)
        cos = self.freqs_cos[:seqlen]
        sin = self.freqs_sin[:seqlen]
        mask = causal_mask(seqlen, tokens.device)
        if document_ids is not None:
            mask = mask + document_mask(document_ids)
        return self.run_layers(tokens, cos, sin, mask)


def build():
    return Transformer(ModelArgs())


def build_positions():
    return PositionedTransformer(ModelArgs())


def build_packed():
    return PackedTransformer(ModelArgs())


def build_moe():
    return Transformer(ModelArgs(n_experts=5))


def build_moe_top1():
    return Transformer(ModelArgs(n_experts=5, n_experts_per_token=1))
