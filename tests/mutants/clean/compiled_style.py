"""modded-nanogpt-like: compiled helpers, value residuals, norm without weights."""

import torch
import torch.nn as nn
import torch.nn.functional as F


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


@torch.compile
def relu_squared(x):
    return torch.relu(x).square()


@torch.jit.script
def bias_gelu(y, bias):
    x = bias + y
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


class Rotary(nn.Module):
    def __init__(self, dim, max_seq_len=256):
        super().__init__()
        angular_freq = (1 / 1024) ** torch.linspace(0, 1, steps=dim // 4, dtype=torch.float32)
        angular_freq = torch.cat([angular_freq, angular_freq.new_zeros(dim // 4)])
        theta = torch.einsum("i,j -> ij", torch.arange(max_seq_len, dtype=torch.float32), angular_freq)
        self.cos = nn.Buffer(theta.cos(), persistent=False)
        self.sin = nn.Buffer(theta.sin(), persistent=False)

    def forward(self, x):
        cos, sin = self.cos[None, : x.size(-3), None, :], self.sin[None, : x.size(-3), None, :]
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), 3).type_as(x)


class Attn(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.hd = heads, dim // heads
        self.qkv_w = nn.Parameter(torch.empty(3, dim, dim).uniform_(-0.1, 0.1))
        self.lambdas = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.rotary = Rotary(self.hd)
        self.c_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x, ve):
        B, T = x.shape[:2]
        q, k, v = F.linear(x, self.qkv_w.flatten(end_dim=1)).view(B, T, 3 * self.heads, self.hd).chunk(3, dim=-2)
        q, k = self.rotary(norm(q)), self.rotary(norm(k))
        v = self.lambdas[0] * v + self.lambdas[1] * ve.view_as(v)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=0.12)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, -1))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attn = Attn(dim, heads)
        self.fc, self.fc_bias = nn.Linear(dim, 4 * dim, bias=False), nn.Parameter(torch.zeros(4 * dim))
        self.proj = nn.Linear(4 * dim, dim, bias=False)
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.1]))

    def forward(self, x, ve, x0):
        x = self.lambdas[0] * x + self.lambdas[1] * x0
        x = x + self.attn(norm(x), ve)
        return x + self.proj(bias_gelu(self.fc(norm(x)), self.fc_bias) + relu_squared(self.fc(norm(x))))


class GPT(nn.Module):
    def __init__(self, vocab_size=107, num_layers=3, num_heads=5, model_dim=60):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, model_dim)
        self.value_embed = nn.Embedding(vocab_size, model_dim)
        self.blocks = nn.ModuleList([Block(model_dim, num_heads) for _ in range(num_layers)])
        self.lm_head = nn.Linear(model_dim, vocab_size, bias=False)

    def forward(self, input_seq, target_seq=None):
        ve = self.value_embed(input_seq)
        x = x0 = norm(self.embed(input_seq))
        for block in self.blocks:
            x = block(x, ve, x0)
        logits = self.lm_head(norm(x)).float()
        logits = 15 * torch.tanh(logits / 15)
        if target_seq is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), target_seq.view(-1))


def build():
    return GPT()
