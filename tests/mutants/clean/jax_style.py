"""A decoder as a JAX programmer writes it in torch: a dict of parameters stacked over the layers, plain functions, einsum throughout.

Clean: every test of the corpus must pass on each `build*` function here. The mutants are line edits of this file.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Config(NamedTuple):
    vocab: int = 113
    layers: int = 3
    embed: int = 40
    kv_heads: int = 2
    groups: int = 3  # query heads of one key head
    head_dim: int = 8
    mlp: int = 92
    theta: float = 10_000.0
    eps: float = 1e-6
    init_std: float = 0.02
    local_window: int = 0  # 0: every layer is global; else the even layers look back this far
    attn_softcap: float = 0.0
    z_loss: float = 0.0


MASKED = -(2.0**127)


def init_params(c: Config) -> dict[str, Tensor]:
    L, D, K, G, H = c.layers, c.embed, c.kv_heads, c.groups, c.head_dim
    out_std = c.init_std / (2 * L) ** 0.5

    def normal(*shape: int, std: float = c.init_std) -> Tensor:
        return torch.randn(shape) * std

    return {
        "embedding": normal(c.vocab, D),
        "attn_scale": torch.ones(L, D),
        "wq": normal(L, D, K, G, H),
        "wkv": normal(L, 2, D, K, H),
        "wo": normal(L, K, G, H, D, std=out_std),
        "mlp_scale": torch.ones(L, D),
        "w_in": normal(L, 2, D, c.mlp),
        "w_out": normal(L, c.mlp, D, std=out_std),
        "final_scale": torch.ones(D),
        "unembedding": normal(D, c.vocab),
    }


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    x32 = x.float() if x.dtype != torch.float64 else x
    var = torch.mean(torch.square(x32), dim=-1, keepdim=True)
    return (x32 * torch.rsqrt(var + eps)).type_as(x) * scale


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x [B, T, ..., H], positions [B, T]; the first half of H pairs with the second."""
    half = x.shape[-1] // 2
    fraction = torch.arange(half, device=x.device, dtype=torch.float32) / half
    timescale = theta**fraction
    radians = positions[..., None].float() / timescale
    radians = radians.reshape(*radians.shape[:2], *[1] * (x.ndim - 3), half)
    sin, cos = torch.sin(radians), torch.cos(radians)
    first, second = torch.split(x.float() if x.dtype != torch.float64 else x, half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)


def attention_mask(q_pos: Tensor, k_pos: Tensor, q_seg: Tensor, k_seg: Tensor, window: int) -> Tensor:
    """True where query t may look at key s: [B, T, S]. Segment 0 is padding."""
    distance = q_pos[:, :, None] - k_pos[:, None, :]
    mask = distance >= 0
    mask &= q_seg[:, :, None] == k_seg[:, None, :]
    if window:
        mask &= distance < window
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, c: Config) -> Tensor:
    """q [B, T, K, G, H], k and v [B, S, K, H] -> [B, T, K, G, H]."""
    logits = torch.einsum("btkgh,bskh->bkgts", q * c.head_dim**-0.5, k)
    if c.attn_softcap:
        logits = c.attn_softcap * torch.tanh(logits / c.attn_softcap)
    logits = torch.where(mask[:, None, None], logits.float(), MASKED)
    probs = torch.softmax(logits, dim=-1).type_as(v)
    return torch.einsum("bkgts,bskh->btkgh", probs, v)


def block(p: dict[str, Tensor], x: Tensor, positions: Tensor, segments: Tensor, layer: int, c: Config, cache: dict | None) -> Tensor:
    h = rms_norm(x, p["attn_scale"], c.eps)
    q = torch.einsum("btd,dkgh->btkgh", h, p["wq"])
    k, v = torch.einsum("btd,cdkh->cbtkh", h, p["wkv"]).unbind(0)
    q = rope(q, positions, c.theta)
    k = rope(k, positions, c.theta)
    k_pos, k_seg = positions, segments
    if cache is not None:
        if layer in cache:
            old_k, old_v, old_pos, old_seg = cache[layer]
            k, v = torch.cat([old_k, k], dim=1), torch.cat([old_v, v], dim=1)
            k_pos, k_seg = torch.cat([old_pos, positions], dim=1), torch.cat([old_seg, segments], dim=1)
        cache[layer] = (k, v, k_pos, k_seg)
    window = c.local_window if layer % 2 == 0 else 0
    mask = attention_mask(positions, k_pos, segments, k_seg, window)
    x = x + torch.einsum("btkgh,kghd->btd", attend(q, k, v, mask, c), p["wo"])
    h = rms_norm(x, p["mlp_scale"], c.eps)
    gate, up = torch.einsum("btd,cdf->cbtf", h, p["w_in"]).unbind(0)
    return x + torch.einsum("btf,fd->btd", F.silu(gate) * up, p["w_out"])


STACKED = ("attn_scale", "wq", "wkv", "wo", "mlp_scale", "w_in", "w_out")


def decoder(params: nn.ParameterDict, tokens: Tensor, positions: Tensor, segments: Tensor, c: Config, cache: dict | None = None) -> Tensor:
    x = params["embedding"][tokens] * c.embed**0.5
    for layer in range(c.layers):  # jax.lax.scan over the leading axis
        x = block({name: params[name][layer] for name in STACKED}, x, positions, segments, layer, c, cache)
    x = rms_norm(x, params["final_scale"], c.eps)
    return torch.einsum("btd,dv->btv", x, params["unembedding"])


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float) -> Tensor:
    """Mean over the weighted tokens; position t predicts targets[t]."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    log_z = torch.logsumexp(logits, dim=-1)
    picked = torch.take_along_dim(logits, targets[..., None], dim=-1)[..., 0]
    loss = (log_z - picked + z_loss * log_z.square()) * weights
    return loss.sum() / weights.sum().clamp(min=1)


class Transformer(nn.Module):
    """Holds the parameters; everything else is a function of them."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.params = nn.ParameterDict({name: nn.Parameter(value) for name, value in init_params(config).items()})

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: dict | None = None,
    ):
        if positions is None:
            start = cache[0][0].shape[1] if cache else 0
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand(tokens.shape)
        if segment_ids is None:
            segment_ids = torch.ones_like(tokens)
        logits = decoder(self.params, tokens, positions, segment_ids, self.config, cache)
        if labels is None:
            return logits
        targets, weights = labels[:, 1:], (labels[:, 1:] != -100).float()
        loss = cross_entropy(logits[:, :-1], targets.clamp(min=0), weights, self.config.z_loss)
        return loss, logits


def build():
    config = Config()
    return Transformer(config), config


def build_local():
    config = Config(local_window=4)
    return Transformer(config), config


def build_softcap():
    config = Config(attn_softcap=20.0)
    return Transformer(config), config


def build_multi_query():
    config = Config(kv_heads=1, groups=5)
    return Transformer(config), config
