"""Decoders as courses teach them: settings in a dict, scores by hand, a cache behind a switch (`build`) or in an object that
the caller makes (`build_grouped`); a selective scan without attention (`build_scan`); one position's logits without targets
(`build_sampler`)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

SMALL = {"vocab_size": 211, "context_length": 64, "emb_dim": 48, "n_heads": 4, "n_layers": 3, "drop_rate": 0.1}
GROUPED = {"vocab_size": 211, "context_length": 128, "emb_dim": 48, "n_heads": 6, "n_kv_groups": 2, "head_dim": 16, "hidden_dim": 80,
           "n_layers": 3, "rope_base": 50_000.0}  # fmt: skip


class ScaledNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        variance = x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(variance + self.eps) * self.scale + self.shift


class SelfAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg["n_heads"]
        self.W_query = nn.Linear(cfg["emb_dim"], cfg["emb_dim"], bias=False)
        self.W_key = nn.Linear(cfg["emb_dim"], cfg["emb_dim"], bias=False)
        self.W_value = nn.Linear(cfg["emb_dim"], cfg["emb_dim"], bias=False)
        self.out_proj = nn.Linear(cfg["emb_dim"], cfg["emb_dim"])
        self.dropout = nn.Dropout(cfg["drop_rate"])
        size = cfg["context_length"]
        self.register_buffer("mask", torch.triu(torch.ones(size, size), diagonal=1), persistent=False)
        self.register_buffer("cache_k", None, persistent=False)
        self.register_buffer("cache_v", None, persistent=False)
        self.seen = 0

    def split(self, x):
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x, use_cache=False):
        queries, keys, values = self.split(self.W_query(x)), self.split(self.W_key(x)), self.split(self.W_value(x))
        start = 0
        if use_cache:
            if self.cache_k is None:
                self.cache_k, self.cache_v = keys, values
            else:
                self.cache_k = torch.cat([self.cache_k, keys], dim=2)
                self.cache_v = torch.cat([self.cache_v, values], dim=2)
            keys, values = self.cache_k, self.cache_v
            start = self.seen
            self.seen += x.shape[1]
        scores = queries @ keys.transpose(2, 3)
        hidden = self.mask.bool()[start : start + x.shape[1], : keys.shape[2]]
        scores.masked_fill_(hidden, -torch.inf)
        weights = self.dropout(torch.softmax(scores / keys.shape[-1] ** 0.5, dim=-1))
        return self.out_proj((weights @ values).transpose(1, 2).reshape(x.shape))

    def reset_cache(self):
        self.cache_k, self.cache_v, self.seen = None, None, 0


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.att = SelfAttention(cfg)
        self.ff = nn.Sequential(nn.Linear(cfg["emb_dim"], 4 * cfg["emb_dim"]), nn.GELU(), nn.Linear(4 * cfg["emb_dim"], cfg["emb_dim"]))
        self.norm1 = ScaledNorm(cfg["emb_dim"])
        self.norm2 = ScaledNorm(cfg["emb_dim"])
        self.drop = nn.Dropout(cfg["drop_rate"])

    def forward(self, x, use_cache=False):
        shortcut = x
        x = self.drop(self.att(self.norm1(x), use_cache=use_cache))
        x = x + shortcut
        shortcut = x
        x = self.drop(self.ff(self.norm2(x)))
        return x + shortcut


class CourseGPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.ModuleList([Layer(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = ScaledNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)
        self.current_pos = 0

    def forward(self, in_idx, use_cache=False):
        seq_len = in_idx.shape[1]
        start = self.current_pos if use_cache else 0
        positions = torch.arange(start, start + seq_len, device=in_idx.device)
        if use_cache:
            self.current_pos += seq_len
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(positions))
        for block in self.trf_blocks:
            x = block(x, use_cache=use_cache)
        return self.out_head(self.final_norm(x))

    def reset_kv_cache(self):
        for block in self.trf_blocks:
            block.att.reset_cache()
        self.current_pos = 0


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.float()
        mean_square = wide.pow(2).mean(-1, keepdim=True)
        return (wide * torch.rsqrt(mean_square + self.eps) * self.scale).to(x.dtype)


def rope_tables(head_dim, base, length):
    inverse = 1.0 / base ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), inverse)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin, offset=0):
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    rows = slice(offset, offset + x.shape[2])
    return (x * cos[rows] + turned * sin[rows]).to(x.dtype)


class KVCache:
    """Keys and values of every layer, made by the caller."""

    def __init__(self, n_layers):
        self.layers = [None] * n_layers

    def extend(self, layer, keys, values):
        if self.layers[layer] is not None:
            keys = torch.cat([self.layers[layer][0], keys], dim=2)
            values = torch.cat([self.layers[layer][1], values], dim=2)
        self.layers[layer] = keys, values
        return keys, values


class GroupedAttention(nn.Module):
    def __init__(self, cfg, index):
        super().__init__()
        self.index = index
        self.heads, self.groups, self.size = cfg["n_heads"], cfg["n_kv_groups"], cfg["head_dim"]
        self.W_query = nn.Linear(cfg["emb_dim"], self.heads * self.size, bias=False)
        self.W_key = nn.Linear(cfg["emb_dim"], self.groups * self.size, bias=False)
        self.W_value = nn.Linear(cfg["emb_dim"], self.groups * self.size, bias=False)
        self.out_proj = nn.Linear(self.heads * self.size, cfg["emb_dim"], bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.size), RMSNorm(self.size)

    def forward(self, x, hidden, cos, sin, start, cache):
        batch, seq_len, _ = x.shape
        queries = self.q_norm(self.W_query(x).view(batch, seq_len, self.heads, self.size).transpose(1, 2))
        keys = self.k_norm(self.W_key(x).view(batch, seq_len, self.groups, self.size).transpose(1, 2))
        values = self.W_value(x).view(batch, seq_len, self.groups, self.size).transpose(1, 2)
        queries = rotate(queries, cos, sin, offset=start)
        keys = rotate(keys, cos, sin, offset=start)
        if cache is not None:
            keys, values = cache.extend(self.index, keys, values)
        keys = keys.repeat_interleave(self.heads // self.groups, dim=1)
        values = values.repeat_interleave(self.heads // self.groups, dim=1)
        scores = (queries @ keys.transpose(2, 3)).masked_fill(hidden, -torch.inf)
        weights = torch.softmax(scores / self.size**0.5, dim=-1)
        return self.out_proj((weights @ values).transpose(1, 2).reshape(batch, seq_len, -1))


class GatedFeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.up = nn.Linear(cfg["emb_dim"], 2 * cfg["hidden_dim"], bias=False)
        self.down = nn.Linear(cfg["hidden_dim"], cfg["emb_dim"], bias=False)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class GroupedLayer(nn.Module):
    def __init__(self, cfg, index):
        super().__init__()
        self.att = GroupedAttention(cfg, index)
        self.ff = GatedFeedForward(cfg)
        self.norm1, self.norm2 = RMSNorm(cfg["emb_dim"]), RMSNorm(cfg["emb_dim"])

    def forward(self, x, *rest):
        x = x + self.att(self.norm1(x), *rest)
        return x + self.ff(self.norm2(x))


class GroupedDecoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.trf_blocks = nn.ModuleList([GroupedLayer(cfg, i) for i in range(cfg["n_layers"])])
        self.final_norm = RMSNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)
        cos, sin = rope_tables(cfg["head_dim"], cfg["rope_base"], cfg["context_length"])
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.current_pos = 0

    def forward(self, in_idx, cache=None):
        seq_len = in_idx.shape[1]
        start = 0
        if cache is not None:
            start = self.current_pos
            self.current_pos = start + seq_len
        stop = start + seq_len
        hidden = torch.ones(stop, stop, dtype=torch.bool, device=in_idx.device).triu(1)[start:stop]
        x = self.tok_emb(in_idx)
        for block in self.trf_blocks:
            x = block(x, hidden, self.cos, self.sin, start, cache)
        return self.out_head(self.final_norm(x))

    def reset_kv_cache(self):
        self.current_pos = 0


class Scan(nn.Module):
    """A selective state-space mixer: convolution, gate, and a state that decays."""

    def __init__(self, width, state=8, kernel=4):
        super().__init__()
        inner = 2 * width
        self.state = state
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
        self.parameters_of = nn.Linear(inner, inner + 2 * state, bias=False)
        self.log_decay = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        value, gate = self.in_proj(x).chunk(2, dim=-1)
        value = self.conv(value.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        value = F.silu(value)
        step, write, read = self.parameters_of(value).split([value.shape[-1], self.state, self.state], dim=-1)
        step = F.softplus(step)
        decay = torch.exp(step[..., None] * -self.log_decay.exp())
        written = (step * value)[..., None] * write[..., None, :]
        state, outputs = torch.zeros_like(written[:, 0]), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + written[:, t]
            outputs.append((state * read[:, t, None]).sum(-1))
        y = torch.stack(outputs, dim=1) + value * self.skip
        return self.out_proj(y * F.silu(gate))


class ScanBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = RMSNorm(width)
        self.mixer = Scan(width)

    def forward(self, x):
        return self.mixer(self.norm(x)) + x


class ScanModel(nn.Module):
    def __init__(self, vocab_size=208, width=32, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList([ScanBlock(width) for _ in range(layers)])
        self.norm_f = RMSNorm(width)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm_f(x))


class Sampler(CourseGPT):
    """It keeps its loss, and gives the logits of one position only where there are no targets."""

    last_loss = None

    def forward(self, tokens, targets=None):
        x = self.tok_emb(tokens) + self.pos_emb.weight[: tokens.shape[1]]
        for block in self.trf_blocks:
            x = block(x)
        x = self.final_norm(x)
        if targets is None:
            self.last_loss = None
            return self.out_head(x[:, [-1], :])
        logits = self.out_head(x)
        self.last_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits


def build():
    torch.manual_seed(0)
    return CourseGPT(SMALL)


def build_grouped():
    torch.manual_seed(0)
    return GroupedDecoder(GROUPED)


def build_scan():
    torch.manual_seed(0)
    return ScanModel()


def build_sampler():
    torch.manual_seed(0)
    return Sampler(SMALL)
