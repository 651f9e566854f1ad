"""Right designs that look like slips: norms that are none by their name, gradients made on purpose, rows for no token."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, WIDTH, HEADS, CONTEXT, EXPERTS = 64, 32, 4, 64, 4


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def attend(self, q, k, v):
        n = q.shape[2]
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
        return scores.softmax(-1) @ v

    def forward(self, x):
        batch, n, _ = x.shape
        q, k, v = self.qkv(x).view(batch, n, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(batch, n, WIDTH))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    norm, attention, feed_forward = RMSNorm, Attention, FeedForward

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = self.norm(WIDTH), self.norm(WIDTH)
        self.mix, self.feed = self.attention(), self.feed_forward()

    def forward(self, x):
        x = x + self.mix(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Decoder(nn.Module):
    block, norm = Block, RMSNorm

    def __init__(self, **settings):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCAB, hidden_size=WIDTH, max_position_embeddings=CONTEXT, **settings)
        self.embed, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(2))
        self.final, self.head = self.norm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def embedded(self, input_ids):
        return self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))

    def forward(self, input_ids):
        x = self.embedded(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final(x))


def variant(name, **parts):
    """A decoder with other parts."""
    return type(name, (Decoder,), {"block": type("Block", (Block,), parts), **({"norm": parts["norm"]} if "norm" in parts else {})})


class PreNormBlock(Block):
    def forward(self, x):
        self.rms = (x.detach().pow(2).mean(-1) + 1e-8).sqrt()  # for the log
        return super().forward(x)


def build_log():
    return type("Logging", (Decoder,), {"block": PreNormBlock})()


def rms_norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Supervised(Decoder):
    """Every layer has a loss, and without labels only the last one's logits are wanted: the norms of the others serve nothing."""

    def forward(self, input_ids, labels=None):
        x, states = self.embedded(input_ids), []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        states = [rms_norm(x) for x in states]
        logits = self.head(states[-1])
        if labels is None:
            return logits
        losses = [F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) for x in states]
        return logits, sum(losses)


def build_supervised():
    return Supervised()


class DynamicTanh(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.alpha, self.weight = nn.Parameter(torch.full((1,), 0.5)), nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * torch.tanh(self.alpha * x)


def build_tanh():
    return variant("Tanh", norm=DynamicTanh)(rms_norm_eps=1e-6)


class ResidualRMSNorm(RMSNorm):
    def forward(self, x):
        return x + super().forward(x)


def build_residual_norm():
    return type("Residual", (Decoder,), {"block": type("Block", (Block,), {"norm": ResidualRMSNorm})})()


class LayerNormScaling(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 0.7))

    def forward(self, x):
        return x * self.weight


class ScaledBlock(Block):
    def __init__(self):
        super().__init__()
        self.scale = LayerNormScaling(WIDTH)

    def forward(self, x):
        x = x + self.mix(self.scale(self.norm1(x)))
        return x + self.feed(self.norm2(x))


def build_scaling():
    return type("Scaling", (Decoder,), {"block": ScaledBlock})()


class RunningLayerNorm(RMSNorm):
    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("variance", torch.ones(1))

    def forward(self, x):
        return self.weight * x / self.variance.sqrt()


def build_running():
    return type("Running", (Decoder,), {"block": type("Block", (Block,), {"norm": RunningLayerNorm})})()


class Switched(Attention):
    def __init__(self):
        super().__init__()
        self.flash, self.keep = True, 0.9

    def attend(self, q, k, v):
        if self.flash:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.dropout(super().attend(q, k, v), 1 - self.keep, self.training)


def build_kept_share():
    return variant("Keeping", attention=Switched)()


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up, self.down = (nn.Parameter(torch.randn(EXPERTS, *sizes) * 0.1) for sizes in ((WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)))

    def expert(self, k, x):
        return F.gelu(x @ self.up[k]) @ self.down[k]


class RowForNoToken(Experts):
    """Each expert computes all rows, a static shape; what it should not have goes to a last row that nobody reads."""

    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        share, chosen = self.router(flat).softmax(-1).topk(2, -1)
        out = flat.new_zeros(len(flat) + 1, 2, WIDTH)
        for k in range(EXPERTS):
            mine = chosen == k
            row = torch.where(mine.any(-1), torch.arange(len(flat), device=x.device), len(flat))
            out[row, mine.int().argmax(-1)] = self.expert(k, flat)
        return (out[:-1] * share[..., None]).sum(1).view(x.shape)


class Columns(Experts):
    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        share, chosen = self.router(flat).softmax(-1).topk(2, -1)
        total = torch.zeros_like(flat)
        for k in range(EXPERTS):
            token, place = torch.where(chosen == k)
            part = flat.new_zeros(1, len(flat), WIDTH)
            part[:, token] = (self.expert(k, flat[token]) * share[token, place, None])[None]
            total = total + part[0]
        return total.view(x.shape)


def build_row_for_no_token():
    return variant("Padded", feed_forward=RowForNoToken)()


def build_columns():
    return variant("Columnar", feed_forward=Columns)()


class Shrunk(Decoder):
    """The embedding learns at a tenth of the speed."""

    def embedded(self, input_ids):
        x = super().embedded(input_ids)
        fixed = x.detach()
        return fixed + 0.1 * (x - fixed)


class Interpolated(Decoder):
    def embedded(self, input_ids):
        x = super().embedded(input_ids)
        return torch.lerp(x.detach(), x, 0.1)


class Hooked(Decoder):
    def embedded(self, input_ids):
        x = super().embedded(input_ids)
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * 0.1)
        return x


class LastRound(Decoder):
    """A recurrence through the depth that is trained through its last round."""

    def forward(self, input_ids):
        start = x = self.embedded(input_ids)
        with torch.no_grad():
            for _ in range(2):
                for block in self.blocks:
                    x = block(x + start)
        for block in self.blocks:
            x = block(x + start)
        return self.head(self.final(x))


def build_shrunk():
    return Shrunk()


def build_interpolated():
    return Interpolated()


def build_hooked():
    return Hooked()


def build_hooked_block():
    model = Decoder()
    model.blocks[0].register_full_backward_hook(lambda module, inputs, outputs: tuple(None if g is None else g * 0.1 for g in inputs))
    return model


def build_last_round():
    return LastRound()


def build_sparse():
    model = Decoder()
    model.embed = nn.Embedding(VOCAB, WIDTH, sparse=True)
    return model


class Writes(Decoder):
    """The table is padded to a multiple of 64, and what is written begins with a token of its own."""

    def __init__(self, begins=False):
        super().__init__()
        self.begins = begins

    @torch.no_grad()
    def generate(self, ids, max_new_tokens):
        if self.begins:
            ids = torch.cat([torch.ones_like(ids[:, :1]), ids], 1)
        for _ in range(max_new_tokens):
            logits = self(ids)[:, -1] if self.begins else self(ids)[:, -1, :40]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        return ids[:, 1:] if self.begins else ids


def build_padded_vocabulary():
    model = Writes()
    with torch.no_grad():
        model.head.weight[40:] *= 3  # rows of no token are often the largest: nothing trains them
    return model


def build_begins():
    return Writes(begins=True)
