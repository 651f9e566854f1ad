"""llama in one file: params, plain functions, complex rotations, sliding window, a cache the model keeps."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ModelArgs:
    dim: int = 64
    n_layers: int = 3
    n_heads: int = 4
    n_kv_heads: int = 2
    vocab_size: int = 151
    ffn_hidden: int = 144
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 128
    max_batch_size: int = 4
    sliding_window: int = 7
    dropout: float = 0.0


def precompute_freqs_cis(dim: int, end: int, theta: float) -> Tensor:
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim))
    t = torch.arange(end, dtype=torch.float32)
    freqs = torch.outer(t, freqs)
    return torch.polar(torch.ones_like(freqs), freqs)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    pairs = torch.view_as_complex(wide.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis[None, :, None, :]).flatten(3).type_as(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).type_as(x) * weight


def window_mask(start: int, t: int, window: int, device) -> Tensor:
    q = torch.arange(start, start + t, device=device).unsqueeze(1)
    k = torch.arange(start + t, device=device).unsqueeze(0)
    return (k <= q) & (k > q - window)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float = 0.0) -> Tensor:
    n_rep = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(n_rep, dim=2)
    v = v.repeat_interleave(n_rep, dim=2)
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p).transpose(1, 2)


def swiglu(x: Tensor, w1: nn.Linear, w2: nn.Linear, w3: nn.Linear) -> Tensor:
    return w2(F.silu(w1(x)) * w3(x))


class Layer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.head_dim = args.dim // args.n_heads
        self.wq = nn.Linear(args.dim, args.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * self.head_dim, args.dim, bias=False)
        self.w1 = nn.Linear(args.dim, args.ffn_hidden, bias=False)
        self.w2 = nn.Linear(args.ffn_hidden, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_hidden, bias=False)
        self.attn_norm = nn.Parameter(torch.ones(args.dim))
        self.ffn_norm = nn.Parameter(torch.ones(args.dim))
        self.cache: tuple | None = None

    def attention(self, x: Tensor, freqs_cis: Tensor, mask: Tensor, start_pos: int, use_cache: bool) -> Tensor:
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.args.n_heads, self.head_dim)
        k = self.wk(x).view(b, t, self.args.n_kv_heads, self.head_dim)
        v = self.wv(x).view(b, t, self.args.n_kv_heads, self.head_dim)
        q = apply_rotary_emb(q, freqs_cis)
        k = apply_rotary_emb(k, freqs_cis)
        if use_cache:
            keys, values = self.cache
            keys[:b, start_pos : start_pos + t] = k
            values[:b, start_pos : start_pos + t] = v
            k = keys[:b, : start_pos + t]
            v = values[:b, : start_pos + t]
        p = self.args.dropout if self.training else 0.0
        out = attend(q, k, v, mask, p)
        return self.wo(out.reshape(b, t, -1))

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor, start_pos: int, use_cache: bool) -> Tensor:
        eps = self.args.norm_eps
        x = x + self.attention(rms_norm(x, self.attn_norm, eps), freqs_cis, mask, start_pos, use_cache)
        return x + swiglu(rms_norm(x, self.ffn_norm, eps), self.w1, self.w2, self.w3)


class Llama(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Layer(args) for _ in range(args.n_layers))
        self.norm = nn.Parameter(torch.ones(args.dim))
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        freqs_cis = precompute_freqs_cis(args.dim // args.n_heads, args.max_seq_len, args.rope_theta)
        self.register_buffer("freqs_cis", freqs_cis, persistent=False)
        for name, w in self.named_parameters():
            if w.dim() == 2:
                scale = (2 * args.n_layers) ** -0.5 if name.endswith(("wo.weight", "w2.weight")) else 1.0
                nn.init.normal_(w, std=0.02 * scale)

    def setup_caches(self, max_batch_size: int, max_seq_len: int) -> None:
        like = self.output.weight
        for layer in self.layers:
            shape = (max_batch_size, max_seq_len, self.args.n_kv_heads, layer.head_dim)
            layer.cache = (like.new_zeros(shape), like.new_zeros(shape))

    def forward(self, tokens: Tensor, start_pos: int | None = None, targets: Tensor | None = None):
        b, t = tokens.shape
        use_cache = start_pos is not None
        start = start_pos or 0
        assert start + t <= self.args.max_seq_len, f"{start + t} positions asked of {self.args.max_seq_len}"
        h = self.tok_embeddings(tokens)
        freqs_cis = self.freqs_cis[start : start + t]
        mask = window_mask(start, t, self.args.sliding_window, tokens.device)
        for layer in self.layers:
            h = layer(h, freqs_cis, mask, start, use_cache)
        h = rms_norm(h, self.norm, self.args.norm_eps)
        logits = self.output(h)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits, loss

    @torch.no_grad()
    def generate(self, tokens: Tensor, n: int) -> Tensor:
        self.setup_caches(tokens.shape[0], tokens.shape[1] + n)
        logits = self(tokens, start_pos=0)
        for _ in range(n):
            nxt = logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, nxt], dim=1)
            logits = self(nxt, start_pos=tokens.shape[1] - 1)
        return tokens


def build():
    return Llama(ModelArgs())
